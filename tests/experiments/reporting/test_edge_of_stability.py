"""The pictures of the edge of stability show what the runs hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.reporting import edge_of_stability as pictures


def run(*, flows: bool, lost: bool = False) -> dict[str, Any]:
    ratios = [9.0, 0.5, 1.0, None if lost else 1.2]
    scores: dict[str, Any] = {
        "steps of curves": [0.0, 5.0, 10.0, 15.0],
        "ratio along the run": ratios,
        "raw ratio along the run": ratios if flows else [0.1, 0.2, 0.3, 0.4],
    }
    if flows:
        keys = ("loss, averaged", "loss, predicted", "loss of the stable flow")
        keys += ("distance from the central flow", "distance from the stable flow")
        keys += ("variance, measured", "variance, predicted")
        scores |= {key: [1.0 + i, 2.0 + i] for i, key in enumerate(keys)}
        scores |= {"steps of flows": [20.0, 30.0]}
    return {"learning_rate": 0.1, "seed": 1, "scores": scores}


def test_sharpness_has_a_panel_for_each_contestant_and_its_threshold() -> None:
    one, other = [run(flows=True)] * 2, [run(flows=False, lost=True)]
    figure = pictures.sharpness({"Gradient descent": one, "Adam": other})
    first, second = figure.axes
    assert [len(axes.lines) for axes in (first, second)] == [3, 3]  # the threshold and two lines
    np.testing.assert_array_equal(second.lines[1].get_ydata(), [9, 0.5, 1, np.nan])
    np.testing.assert_array_equal(second.lines[2].get_ydata(), [0.1, 0.2, 0.3, 0.4])
    assert second.get_title(loc="left") == "Adam, rate 0.1"
    assert 1.2 < first.get_ylim()[1] < 9  # the first readings may leave the panel


def test_flows_are_drawn_where_there_are_some() -> None:
    runs = {"Gradient descent": [run(flows=True)], "Adam": [run(flows=False)]}
    found = dict(pictures.pictures({"mlp": runs, "gpt": {"Adam": [run(flows=False)]}}))
    assert list(found) == ["sharpness_mlp", "flows_mlp", "sharpness_gpt"]
    assert set(found) <= set(pictures.names(["mlp", "gpt"]))
    losses, distances, variances = found["flows_mlp"].axes  # one row: Adam's run has none
    assert [len(axes.lines) for axes in (losses, distances, variances)] == [3, 2, 2]
    np.testing.assert_array_equal(distances.lines[0].get_ydata(), [4, 5])
    np.testing.assert_array_equal(variances.lines[0].get_xdata(), [20, 30])
