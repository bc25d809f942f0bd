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
    png, svg = figures.encode("line", figure).values()
    assert imread(io.BytesIO(png)).shape[:2] == (130, 260)
    assert svg.startswith(b"<?xml")
    # The same results give the same files.
    assert figures.encode("line", draw()) == {"line.png": png, "line.svg": svg}
    assert mpl.rcParams == before


def test_an_axis_that_is_not_linear_says_so() -> None:
    figure = Figure()
    axes, plain = figure.subplots(1, 2)
    axes.set(xscale="log", yscale="symlog", xlabel="rate (circle: chosen)", ylabel="ratio")
    plain.set(xlabel="step", yscale="log", ylabel="")
    for _ in range(2):  # once is enough
        figures.encode("axes", figure)
        assert axes.get_xlabel() == "rate (circle: chosen; log scale)"
        assert axes.get_ylabel() == "ratio (symmetric log scale)"
        assert plain.get_xlabel() == "step"
        assert not plain.get_ylabel()
