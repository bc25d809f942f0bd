"""The look that all pictures share."""

from __future__ import annotations

import io

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.image import imread

from experiments import methods
from experiments.reporting import figures


def test_each_principal_method_has_its_own_color() -> None:
    assert set(figures.PRINCIPAL) <= set(methods.METHODS)
    looks = [figures.style(name) for name in figures.PRINCIPAL]
    assert len({look["color"] for look in looks}) == len(looks)
    everything = [figures.style(name) for name in methods.METHODS]
    assert len({(look["color"], look["linestyle"]) for look in everything}) == len(everything)


def test_the_style_sheet_applies_while_a_function_draws() -> None:
    @figures.styled
    def draw() -> Figure:
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1], [0, 1])
        return figure

    before = mpl.rcParams.copy()
    figure = draw()
    (axes,) = figure.axes
    assert axes.lines[0].get_color() == figures.COLORS[0] == "#000000"
    assert not axes.spines["top"].get_visible()
    assert imread(io.BytesIO(figures.png(figure))).shape[:2] == (130, 260)
    assert mpl.rcParams == before
