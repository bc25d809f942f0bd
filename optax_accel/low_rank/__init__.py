"""Low-rank training: optimizers whose state lives in a subspace of each weight's gradient."""

from optax_accel.low_rank.adarankgrad import (
    LowRankBytes,
    ScaleByAdaRankGradState,
    adarankgrad,
    low_rank_bytes,
    scale_by_adarankgrad,
)
from optax_accel.low_rank.galore import ScaleByGaLoreState, galore, scale_by_galore

__all__ = [
    "LowRankBytes",
    "ScaleByAdaRankGradState",
    "ScaleByGaLoreState",
    "adarankgrad",
    "galore",
    "low_rank_bytes",
    "scale_by_adarankgrad",
    "scale_by_galore",
]
