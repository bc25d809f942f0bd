"""Training inside, outside or between the dominant and the bulk subspace of the Hessian."""

from optax_accel.subspace.interpolation import InterpolateSubspacesState, interpolate_subspaces
from optax_accel.subspace.optimizers import bulk_sgd, dom_sgd, interpolated_sgd
from optax_accel.subspace.projections import project_to_bulk, project_to_dominant

__all__ = [
    "InterpolateSubspacesState",
    "bulk_sgd",
    "dom_sgd",
    "interpolate_subspaces",
    "interpolated_sgd",
    "project_to_bulk",
    "project_to_dominant",
]
