"""The look that all pictures share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.style import context

from experiments.methods import METHODS

STYLE_SHEET = Path(__file__).with_name("pictures.mplstyle")
styled = context(STYLE_SHEET)
"""Decorator of every function that draws: applies the style sheet while the function runs."""

COLORS: tuple[str, ...] = tuple(
    mpl.rc_params_from_file(STYLE_SHEET, use_default_template=False)["axes.prop_cycle"].by_key()[
        "color"
    ]
)
LINES = (
    *("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))),
    *((0, (9, 2)), (0, (1.2, 3)), (0, (9, 2, 1.2, 2)), (0, (5, 1.5, 1.2, 1.5, 1.2, 1.5))),
)
MARKERS = "osD^vPX*"
# The methods of `make demo` come first, so that each has a color to itself.
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


def style(name: str) -> dict[str, Any]:
    """Color, line and marker of a method: the same in every picture of every run.

    Args:
      name: the name of the method in the catalogue.
    """
    place = list(dict.fromkeys([*PRINCIPAL, *METHODS])).index(name)
    return {
        "color": COLORS[place % len(COLORS)],
        "linestyle": LINES[place // len(COLORS) % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


@styled
def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file.

    Args:
      figure: the figure, made by a function that is decorated with `styled`.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
