"""Momentum's family: decaying, quasi-hyperbolic, aggregated, and tuned by itself."""

from optax_accel.momentum.aggregated import (
    ScaleByAggMoState,
    aggmo,
    aggmo_betas,
    scale_by_aggmo,
)
from optax_accel.momentum.demon import (
    ScaleByDemonAdamState,
    demon_adam,
    demon_schedule,
    demon_sgd,
    scale_by_demon,
    scale_by_demon_adam,
)
from optax_accel.momentum.quasi_hyperbolic import (
    QHAdamParameters,
    QHMParameters,
    ScaleByQHAdamState,
    ScaleByQHMState,
    qh_adam,
    qh_adam_from_nadam,
    qhm,
    qhm_from_accsgd,
    qhm_from_pid,
    qhm_from_synthesized_nesterov,
    scale_by_qh_adam,
    scale_by_qhm,
)
from optax_accel.momentum.yellowfin import ScaleByYellowFinState, scale_by_yellowfin, yellowfin

__all__ = [
    "QHAdamParameters",
    "QHMParameters",
    "ScaleByAggMoState",
    "ScaleByDemonAdamState",
    "ScaleByQHAdamState",
    "ScaleByQHMState",
    "ScaleByYellowFinState",
    "aggmo",
    "aggmo_betas",
    "demon_adam",
    "demon_schedule",
    "demon_sgd",
    "qh_adam",
    "qh_adam_from_nadam",
    "qhm",
    "qhm_from_accsgd",
    "qhm_from_pid",
    "qhm_from_synthesized_nesterov",
    "scale_by_aggmo",
    "scale_by_demon",
    "scale_by_demon_adam",
    "scale_by_qh_adam",
    "scale_by_qhm",
    "scale_by_yellowfin",
    "yellowfin",
]
