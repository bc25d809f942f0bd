"""What the comparison of natural-gradient methods concludes."""

from __future__ import annotations

from typing import Any

from experiments.reporting import natural_gradient as report


def row(name: str, losses: list[float], seconds: float) -> dict[str, Any]:
    count = len(losses)
    curve = {
        "step": [float(i) for i in range(count)],
        "seconds": [seconds * i for i in range(count)],
        "train": losses,
        "test": losses,
    }
    return {"method": name, "curve": curve, "reached": report.reached(curve, 0.5)}


def test_conclusion_says_what_the_numbers_say() -> None:
    rows = [
        row("sgd", [2.0, 1.5, 1.0, 0.7, 0.5], 1.0),
        row("adam", [2.0, 1.0, 0.4, 0.6, 0.3], 1.5),
        row("kfac", [2.0, 0.5, 0.2], 8.0),
        row("ekfac", [2.0, 1.0, 0.9, 0.8, 0.4], 1.01),
        row("hessian_free", [2.0, 0.9], 9.0),
    ]
    assert report.conclusion(rows) == [
        "sgd gets to a training loss of 0.5 in 4 steps, 4 s",
        "adam gets there in 2 steps, 2 times fewer, and 3 s, 1.3 times less",
        "kfac gets there in 1 steps, 4 times fewer, and 8 s, 2 times more",
        "ekfac gets there in 4 steps, about as many, and 4.04 s, about as much",
        "hessian_free does not get there in 9 s (lowest: 0.9)",
        "fewest steps: kfac; least time: adam; lowest training loss at the end: kfac",
    ]
