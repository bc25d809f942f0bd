"""Equilibrium: deep equilibrium layers with their solvers, and acceleration of training itself."""

from optax_accel.equilibrium.acceleration import (
    AndersonAccelerationState,
    anderson_acceleration,
)
from optax_accel.equilibrium.layers import (
    Phantom,
    correction_loss,
    deq,
    jacobian_penalty,
    phantom,
)
from optax_accel.equilibrium.solvers import (
    FixedPointReport,
    FixedPointSolver,
    anderson,
    broyden,
    fixed_point,
    solve,
)

__all__ = [
    "AndersonAccelerationState",
    "FixedPointReport",
    "FixedPointSolver",
    "Phantom",
    "anderson",
    "anderson_acceleration",
    "broyden",
    "correction_loss",
    "deq",
    "fixed_point",
    "jacobian_penalty",
    "phantom",
    "solve",
]
