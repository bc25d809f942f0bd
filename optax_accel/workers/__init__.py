"""Methods whose workers keep parameters of their own and communicate with few others, or rarely."""

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
