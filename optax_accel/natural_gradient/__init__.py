"""Natural gradient methods: K-FAC and EKFAC on layers found in the program, Hessian-free."""

from optax_accel.natural_gradient.batch_gauss_newton import (
    ScaleByBatchGaussNewtonState,
    batch_gauss_newton,
    scale_by_batch_gauss_newton,
)
from optax_accel.natural_gradient.ekfac import ekfac, scale_by_ekfac
from optax_accel.natural_gradient.finding import describe_layers
from optax_accel.natural_gradient.hessian_free import HessianFreeState, hessian_free
from optax_accel.natural_gradient.kfac import kfac, scale_by_kfac
from optax_accel.natural_gradient.levenberg_marquardt import LevenbergMarquardt, TrustRegion
from optax_accel.natural_gradient.quadratic_model import QuadraticModelState, quadratic_model
from optax_accel.natural_gradient.state import ScaleByKFACState

__all__ = [
    "HessianFreeState",
    "LevenbergMarquardt",
    "QuadraticModelState",
    "ScaleByBatchGaussNewtonState",
    "ScaleByKFACState",
    "TrustRegion",
    "batch_gauss_newton",
    "describe_layers",
    "ekfac",
    "hessian_free",
    "kfac",
    "quadratic_model",
    "scale_by_batch_gauss_newton",
    "scale_by_ekfac",
    "scale_by_kfac",
]
