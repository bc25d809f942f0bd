"""Methods whose workers keep parameters of their own and talk to a few others, or now and then."""

from optax_accel.workers import topologies
from optax_accel.workers.decentralized import DecentralizedState, decentlam, dmsgd
from optax_accel.workers.post_local import PostLocalSGDState, post_local_sgd

__all__ = [
    "DecentralizedState",
    "PostLocalSGDState",
    "decentlam",
    "dmsgd",
    "post_local_sgd",
    "topologies",
]
