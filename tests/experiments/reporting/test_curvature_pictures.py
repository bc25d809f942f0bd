"""Pictures of what was measured along a run; they show what is finite."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.reporting import curvature_pictures, figures

STEPS = [0, 10, 20, 30]


def test_sharpness_against_its_threshold() -> None:
    values = np.array([[1.0, 0.5], [2.0, 0.6], [np.inf, 0.7], [4.0, np.nan]])
    figure = curvature_pictures.draw_sharpness(STEPS, values, 4.0, loss=[3.0, 2.0, 1.0, 0.5])
    upper, lower = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in upper.lines}
    assert [*lines] == ["following eigenvalues", "largest eigenvalue", "stability threshold"]
    np.testing.assert_array_equal(lines["largest eigenvalue"], [1, 2, np.nan, 4])
    np.testing.assert_array_equal(lines["stability threshold"], 4)
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), [3, 2, 1, 0.5])
    assert upper.get_yscale() == lower.get_yscale() == "log"
    # The same figure can be drawn into again, and a negative eigenvalue keeps the axis linear.
    again = curvature_pictures.draw_sharpness(STEPS, [-1.0, 1, 2, 3], figure=figure)
    assert again is figure
    assert len(figure.axes) == 1
    assert figure.axes[0].get_yscale() == "linear"
    assert {*figures.encode("a", figure)} == {"a.png", "a.svg"}


def test_thresholds_of_a_schedule() -> None:
    figure = curvature_pictures.draw_sharpness(STEPS, [1.0] * 4, [2.0, 4.0, 8.0, 16.0])
    np.testing.assert_array_equal(figure.axes[0].lines[-1].get_ydata(), [2, 4, 8, 16])


def test_spectrum_as_a_heat_map() -> None:
    grid = np.linspace(-1, 3, 5)
    density = np.exp(-np.abs(grid))[None] * np.array([[1.0], [2.0], [0.5], [1.0]])
    density[1, 2] = np.nan
    figure = curvature_pictures.draw_spectrum(STEPS, grid, density)
    columns = figure.axes[0].collections
    assert len(columns) == 4
    shown = np.stack([np.ma.filled(column.get_array(), np.nan).ravel() for column in columns])
    expected = np.log10(density / 2)  # the highest one is at the eigenvalue 0
    np.testing.assert_allclose(shown, np.maximum(expected, -6))
    # Columns meet in the middle between two measurements.
    assert figure.axes[0].get_xlim() == pytest.approx((-5, 35))
    # Each step may have eigenvalues of its own.
    own = np.stack([grid * (1 + i) for i in range(4)])
    assert len(curvature_pictures.draw_spectrum(STEPS, own, density).axes[0].collections) == 4
    assert curvature_pictures.draw_spectrum([7], grid, density[:1]).axes[0].get_xlim() == (6.5, 7.5)


def test_alignments() -> None:
    figure = curvature_pictures.draw_alignment(
        STEPS, {"gradient": [0.1, 0.9, 0.9, 0.8], "update": [0.1, 0.2, np.nan, 0.1]}, random=0.05
    )
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["gradient", "update", "random vector"]
    assert figure.axes[0].get_ylim() == (0, 1.02)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="`sharpness` must have one entry for each of the 4"):
        curvature_pictures.draw_sharpness(STEPS, [1.0, 2.0])
    with pytest.raises(ValueError, match="`threshold` must have one entry"):
        curvature_pictures.draw_sharpness(STEPS, [1.0] * 4, [1.0] * 3)
    with pytest.raises(ValueError, match="`steps` must be a sequence of numbers"):
        curvature_pictures.draw_sharpness([], [])
    with pytest.raises(ValueError, match=r"`density` must be \(steps, points\)"):
        curvature_pictures.draw_spectrum(STEPS, np.ones(3), np.ones((4, 2)))
    with pytest.raises(ValueError, match="positive somewhere"):
        curvature_pictures.draw_spectrum(STEPS, np.arange(2.0), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at least one vector"):
        curvature_pictures.draw_alignment(STEPS, {})


def test_pictures_of_a_run_hold_its_records():
    rows = [
        {"step": i, "loss": 1.0 / i, "monitor/sharpness": None if i % 2 else float(i)}
        for i in range(1, 5)
    ]
    found = curvature_pictures.of_run(rows)
    assert list(found) == ["sharpness", "alignment"]
    line = found["sharpness"].axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xydata(), [[2, 2], [4, 4]])
    limited = [row | {"monitor/stability_threshold": 40.0} for row in rows]
    assert list(curvature_pictures.of_run(limited)) == [
        "sharpness",
        "effective_sharpness",
        "alignment",
    ]
    assert curvature_pictures.of_run(rows[:1]) == {}
