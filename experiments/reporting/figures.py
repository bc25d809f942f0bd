"""The look that all pictures share."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.methods import METHODS

# Okabe and Ito's palette, distinguishable with every common color vision; its yellow, too pale on
# white, is replaced by Tol's wine.
# The methods of `make demo`; they come first in the palette, so each has a color of its own.
PRINCIPAL = (
    "sgd",
    "adam",
    "demon_sgd",
    "demon_adam",
    "stoch_grad_adam",
    "bulk_sgd",
    "interpolated_sgd",
    "extrap_sgd",
)
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
LINES = (
    *("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))),
    *((0, (9, 2)), (0, (1.2, 3)), (0, (9, 2, 1.2, 2)), (0, (5, 1.5, 1.2, 1.5, 1.2, 1.5))),
)
MARKERS = "osD^vPX*"


def style(name: str) -> dict[str, Any]:
    """Color, line and marker of a method: the same in every picture of every run."""
    place = list(dict.fromkeys([*PRINCIPAL, *METHODS])).index(name)
    return {
        "color": COLORS[place % len(COLORS)],
        "linestyle": LINES[place // len(COLORS) % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def frame(axes: Axes) -> None:
    """The look that all pictures share: a light grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
