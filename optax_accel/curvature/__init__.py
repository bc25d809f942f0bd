"""Matrix-free linear algebra on pytrees: blocks of vectors, eigensolvers, subspace tracking.

A module that would have the name of the function in it starts with an underscore, so that
``curvature.lanczos`` is always the function.
"""

from optax_accel.curvature._block_iteration import block_iteration, subspace_sweep
from optax_accel.curvature._lanczos import lanczos
from optax_accel.curvature._lobpcg import lobpcg
from optax_accel.curvature.block_diagonals import BlockDiagonal, DiagonalBlock, block_diagonal
from optax_accel.curvature.block_tracker import BlockTracker
from optax_accel.curvature.density import SpectralDensity, spectral_density
from optax_accel.curvature.diagonals import DiagonalEstimate, diagonal
from optax_accel.curvature.eigensolvers import Eigenpairs
from optax_accel.curvature.estimates import Estimate
from optax_accel.curvature.exact_tracker import ExactTracker
from optax_accel.curvature.fishers import empirical_fisher, fisher, gradient_covariance
from optax_accel.curvature.gradient_tracker import GradientTracker
from optax_accel.curvature.hessians import functional_hessian, gauss_newton, hessian
from optax_accel.curvature.inverses import InverseProduct, inverse_product
from optax_accel.curvature.low_rank import NystromApproximation, nystrom
from optax_accel.curvature.operators import CurvatureOperator
from optax_accel.curvature.preconditioners import (
    Preconditioner,
    adagrad_preconditioner,
    adam_preconditioner,
    preconditioned,
    rmsprop_preconditioner,
    sgd_preconditioner,
)
from optax_accel.curvature.round_robin_tracker import RoundRobinTracker
from optax_accel.curvature.traces import EnergyShares, energy_shares, frobenius_norm, trace
from optax_accel.curvature.tracking import Eigenspace, Tracker

__all__ = [
    "BlockDiagonal",
    "BlockTracker",
    "CurvatureOperator",
    "DiagonalBlock",
    "DiagonalEstimate",
    "Eigenpairs",
    "Eigenspace",
    "EnergyShares",
    "Estimate",
    "ExactTracker",
    "GradientTracker",
    "InverseProduct",
    "NystromApproximation",
    "Preconditioner",
    "RoundRobinTracker",
    "SpectralDensity",
    "Tracker",
    "adagrad_preconditioner",
    "adam_preconditioner",
    "block_diagonal",
    "block_iteration",
    "diagonal",
    "empirical_fisher",
    "energy_shares",
    "fisher",
    "frobenius_norm",
    "functional_hessian",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "inverse_product",
    "lanczos",
    "lobpcg",
    "nystrom",
    "preconditioned",
    "rmsprop_preconditioner",
    "sgd_preconditioner",
    "spectral_density",
    "subspace_sweep",
    "trace",
]
