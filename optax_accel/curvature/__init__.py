"""Matrix-free linear algebra on pytrees: blocks of vectors, eigensolvers, subspace tracking."""

from optax_accel.curvature.eigensolvers import Eigenpairs as Eigenpairs
from optax_accel.curvature.eigensolvers import block_iteration as block_iteration
from optax_accel.curvature.eigensolvers import lanczos as lanczos
from optax_accel.curvature.eigensolvers import lobpcg as lobpcg
from optax_accel.curvature.eigensolvers import subspace_sweep as subspace_sweep
from optax_accel.curvature.operators import CurvatureOperator as CurvatureOperator
from optax_accel.curvature.operators import empirical_fisher as empirical_fisher
from optax_accel.curvature.operators import fisher as fisher
from optax_accel.curvature.operators import functional_hessian as functional_hessian
from optax_accel.curvature.operators import gauss_newton as gauss_newton
from optax_accel.curvature.operators import gradient_covariance as gradient_covariance
from optax_accel.curvature.operators import hessian as hessian
from optax_accel.curvature.spectrum import EnergyShares as EnergyShares
from optax_accel.curvature.spectrum import Estimate as Estimate
from optax_accel.curvature.spectrum import SpectralDensity as SpectralDensity
from optax_accel.curvature.spectrum import energy_shares as energy_shares
from optax_accel.curvature.spectrum import frobenius_norm as frobenius_norm
from optax_accel.curvature.spectrum import spectral_density as spectral_density
from optax_accel.curvature.spectrum import trace as trace
from optax_accel.curvature.tracking import BlockTracker as BlockTracker
from optax_accel.curvature.tracking import Eigenspace as Eigenspace
from optax_accel.curvature.tracking import ExactTracker as ExactTracker
from optax_accel.curvature.tracking import GradientTracker as GradientTracker
from optax_accel.curvature.tracking import RoundRobinTracker as RoundRobinTracker
from optax_accel.curvature.tracking import Tracker as Tracker
