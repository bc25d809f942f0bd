"""Statistics over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; no error for a single value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def grid_edge(rate: float, rates: Sequence[float]) -> str | None:
    """Whether a rate is the ``"lowest"`` or ``"highest"`` of several that were tried, or neither.

    >>> grid_edge(0.1, [0.1, 0.3, 1.0]), grid_edge(0.3, [0.1, 0.3, 1.0]), grid_edge(0.1, [0.1])
    ('lowest', None, None)
    """
    if len(rates) < 2:
        return None
    return {min(rates): "lowest", max(rates): "highest"}.get(rate)
