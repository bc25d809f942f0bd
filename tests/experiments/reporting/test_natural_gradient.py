"""What the comparison of natural-gradient methods concludes."""

from __future__ import annotations

from typing import Any

from experiments.reporting import natural_gradient as report


def row(name: str, losses: list[list[float]], seconds: float, work: int = 1) -> dict[str, Any]:
    curves = [
        {
            "step": [float(i) for i in range(len(seed))],
            "seconds": [seconds * i for i in range(len(seed))],
            "gradients": [work * i for i in range(len(seed))],
            "train": seed,
            "test": seed,
        }
        for seed in losses
    ]
    row = {"method": name, "curves": curves}
    return row | {"reached": [report.reached(curve, 0.5) for curve in curves]}


def rows() -> list[dict[str, Any]]:
    return [
        row("sgd", [[2.0, 1.5, 1.0, 0.7, 0.5], [2.0, 1.5, 1.0, 0.7, 0.4]], 1.0),
        row("adam", [[2.0, 1.0, 0.4, 0.6, 0.3]] * 2, 1.5),
        row("kfac", [[2.0, 0.5, 0.2]] * 2, 8.0, 6),
        row("ekfac", [[2.0, 1.0, 0.9, 0.8, 0.4]] * 2, 1.01),
        row("hessian_free", [[2.0, 0.9]] * 2, 9.0, 30),
        row("muon", [[2.0, 0.9], [2.0, 0.5]], 9.0),
    ]


def test_conclusion_says_what_the_numbers_say() -> None:
    assert report.target(rows()) == 0.5
    assert report.conclusion(rows()) == [
        "sgd gets to a training loss of 0.5 in 4 steps, 4 s, 4 gradients",
        (
            "adam gets there in 2 steps, 2 times fewer, 3 s, 1.3 times less, and 2 gradients, "
            "2 times fewer"
        ),
        (
            "kfac gets there in 1 steps, 4 times fewer, 8 s, 2 times more, and 6 gradients, "
            "1.5 times more"
        ),
        (
            "ekfac gets there in 4 steps, about as many, 4.04 s, about as much, and 4 gradients, "
            "about as many"
        ),
        "hessian_free does not get there in 9 s (lowest: 0.9)",
        "muon gets there in 1 of 2 runs only (lowest: 0.5)",
        (
            "fewest steps: kfac; least time: adam; fewest gradients: adam; lowest training loss at "
            "the end: kfac"
        ),
    ]


def test_the_table_shows_how_far_the_seeds_are_apart() -> None:
    settings = {"chosen": {"rate": 0.1}, "milliseconds_per_step": 1.0, "compile_seconds": 1.0}
    view = report.table([entry | settings for entry in rows()])
    columns = {column.header: list(column.cells) for column in view.columns}
    assert columns["train"][0] == "0.45 (0.4-0.5)"
    assert columns["steps there"] == ["4", "2", "1", "4", "never", "1, 1 of 2"]
    assert columns["gradients there"][2] == "6"
