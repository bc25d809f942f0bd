"""Matrix-free linear algebra on pytrees: blocks of vectors, eigensolvers, subspace tracking."""

from optax_accel.curvature._lanczos import (
    Eigenpairs,
    block_iteration,
    lanczos,
    lobpcg,
    subspace_sweep,
)
from optax_accel.curvature.operators import (
    CurvatureOperator,
    empirical_fisher,
    fisher,
    functional_hessian,
    gauss_newton,
    gradient_covariance,
    hessian,
)
from optax_accel.curvature.spectrum import (
    EnergyShares,
    Estimate,
    SpectralDensity,
    energy_shares,
    frobenius_norm,
    spectral_density,
    trace,
)
from optax_accel.curvature.tracking import (
    BlockTracker,
    Eigenspace,
    ExactTracker,
    GradientTracker,
    RoundRobinTracker,
    Tracker,
)

__all__ = [
    "BlockTracker",
    "CurvatureOperator",
    "Eigenpairs",
    "Eigenspace",
    "EnergyShares",
    "Estimate",
    "ExactTracker",
    "GradientTracker",
    "RoundRobinTracker",
    "SpectralDensity",
    "Tracker",
    "block_iteration",
    "empirical_fisher",
    "energy_shares",
    "fisher",
    "frobenius_norm",
    "functional_hessian",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "lanczos",
    "lobpcg",
    "spectral_density",
    "subspace_sweep",
    "trace",
]
