"""Natural gradient methods: K-FAC and EKFAC on layers found in the program, Hessian-free."""

from optax_accel.natural_gradient.ekfac import ekfac, scale_by_ekfac
from optax_accel.natural_gradient.finding import describe_layers
from optax_accel.natural_gradient.hessian_free import HessianFreeState, hessian_free
from optax_accel.natural_gradient.kfac import kfac, scale_by_kfac
from optax_accel.natural_gradient.state import ScaleByKFACState

__all__ = [
    "HessianFreeState",
    "ScaleByKFACState",
    "describe_layers",
    "ekfac",
    "hessian_free",
    "kfac",
    "scale_by_ekfac",
    "scale_by_kfac",
]
