"""Matrix-free linear algebra on pytrees: blocks of vectors, eigensolvers, subspace tracking."""

from optax_accel.curvature.eigensolvers import Eigenpairs as Eigenpairs
from optax_accel.curvature.eigensolvers import lanczos as lanczos
from optax_accel.curvature.eigensolvers import subspace_sweep as subspace_sweep
from optax_accel.curvature.tracking import BlockTracker as BlockTracker
from optax_accel.curvature.tracking import Eigenspace as Eigenspace
