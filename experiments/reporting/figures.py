"""The look that all pictures share, and how they are written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.style import context

from experiments import cli
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
    *((0, (9, 2, 5, 2)), (0, (9, 2, 1.2, 2, 1.2, 2)), (0, (3, 3)), (0, (14, 3))),
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


FORMATS = ("png", "svg")
"""The formats of every picture: one for a screen, one that can be enlarged and printed."""


def files(*names: str) -> tuple[str, ...]:
    """The file names of pictures, in every format.

    Args:
      *names: the names of the pictures, without a suffix.

    Example:
      >>> files("curves")
      ('curves.png', 'curves.svg')
    """
    return tuple(f"{name}.{kind}" for name in names for kind in FORMATS)


@styled
def encode(name: str, figure: Figure) -> dict[str, bytes]:
    """A figure as files of every format; the label of an axis that is not linear says so.

    Args:
      name: the name of the picture, without a suffix.
      figure: the figure, made by a function that is decorated with `styled`.

    Returns:
      The contents, by the names of `files`.
    """
    for axes in figure.axes:
        _name_scale(axes.xaxis)
        _name_scale(axes.yaxis)
    contents = {}
    for file, kind in zip(files(name), FORMATS, strict=True):
        buffer = io.BytesIO()
        # Without a date, and with the style sheet's fixed salt, equal results give equal files.
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        contents[file] = buffer.getvalue()
        # The layout of the first format is that of all: to find it takes as long as to draw.
        figure.set_layout_engine("none")
    return contents


def write(folder: Path, name: str, figure: Figure) -> dict[str, bytes]:
    """Writes a picture in every format; returns the contents by the names of the files.

    Args:
      folder: the folder, which exists.
      name: the name of the picture, without a suffix.
      figure: the figure, made by a function that is decorated with `styled`.
    """
    contents = encode(name, figure)
    for file, content in contents.items():
        cli.write_atomic(folder / file, content)
    return contents


def _name_scale(axis: Axis) -> None:
    """Adds the scale of an axis to its label, once."""
    label, scale = axis.get_label_text(), axis.get_scale()
    names = {"log": "log scale", "symlog": "symmetric log scale"}
    if label and scale in names and "scale" not in label:
        if label.endswith(")"):
            axis.set_label_text(f"{label[:-1]}; {names[scale]})")
        else:
            axis.set_label_text(f"{label} ({names[scale]})")
