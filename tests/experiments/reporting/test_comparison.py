"""The table, its footnotes, the pictures and the page."""

from __future__ import annotations

import copy
import csv
import html.parser
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments import methods
from experiments.reporting import comparison, comparison_figures


def make_row(name: str, **changes: Any) -> dict[str, Any]:
    method = methods.METHODS[name]
    steps = list(range(0, 101, 10))
    cost = method.gradients_per_step
    return {
        "method": name,
        "family": method.family,
        "summary": method.summary,
        "paper": method.paper.authors,
        "link": method.paper.link,
        "fidelity": method.fidelity,
        "base": method.base,
        "learning_rate": 0.1,
        "grid_edge": None,
        "test_accuracy": 0.95,
        "test_accuracy_error": 0.004,
        "validation_accuracy": 0.96,
        "validation_loss": 0.1,
        "diverged_at_rate": 0,
        "diverged": 0,
        "seeds_at_target": 3,
        "steps_to_target": 40.0,
        "gradient_evaluations_to_target": 40.0 * cost,
        "gradient_evaluations": 100.0 * cost,
        "rates": [
            {
                "learning_rate": rate,
                "validation_accuracy": 0.9,
                "validation_accuracy_error": 0.01,
                "validation_loss": 0.2,
                "diverged": 0,
            }
            for rate in method.learning_rates
        ],
        "curve": {
            "step": steps,
            "gradient_evaluations": [float(cost * step) for step in steps],
            "train_loss": [None, *(2.0 / step for step in steps[1:])],
            "train_loss_error": [None, *(0.1 / step for step in steps[1:])],
            "validation_accuracy": [1 - 0.9 / (1 + step) for step in steps],
            "validation_accuracy_error": [0.01] * len(steps),
        },
        "parameters": 4810,
        "state_relative_to_parameters": 1.0,
        "seconds_per_step": 0.002,
        "time_relative_to_base": None if method.base is None else 1.25,
        **changes,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    names = ["sgd", "adam", "demon_sgd", "extrap_sgd"]
    return {
        "config": {
            "task": "digits",
            "train_examples": 1000,
            "validation_examples": 300,
            "model": "mlp",
            "seeds": 3,
            "steps": 100,
            "batch_size": 64,
            "curvature_batch_size": 128,
            "eval_every": 10,
            "target": 0.95,
            "methods": {name: list(methods.METHODS[name].learning_rates) for name in names},
        },
        "environment": {"jax": "0.10.2", "cores": 2},
        "timing": {"runs_together": 15, "rounds": 9},
        "rows": [make_row(name) for name in names],
    }


def text(results: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(comparison.table(results))
    for note in comparison.footnotes(results):
        console.print(note)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table(results: dict[str, Any]) -> None:
    shown = text(results)
    assert "95.00 ± 0.40" in shown
    assert "2.00 ms" in shown
    assert "1.25 ×" in shown
    assert "times the base: sgd (demon_sgd); nesterov_sgd (extrap_sgd)" in shown
    assert "to 95%" in shown
    assert "128 / 64" in shown
    assert "edge" not in shown
    assert "Diverged" not in shown


def test_table_fits_a_terminal_of_80_columns(results: dict[str, Any]) -> None:
    results["rows"][1]["method"] = "interpolated_sgd"
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison.table(results))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for row in results["rows"]:
        (line,) = (line for line in shown.splitlines() if line.startswith(row["method"] + " "))
        for cell in comparison.cells(row, results["config"]):
            assert cell in line


def test_warnings(results: dict[str, Any]) -> None:
    results["rows"][0] |= {"grid_edge": "highest", "diverged": 2, "diverged_at_rate": 1}
    results["rows"][1] |= {"diverged": 15, "diverged_at_rate": 3, "test_accuracy": 0.0}
    results["rows"][2] |= {
        "steps_to_target": None,
        "gradient_evaluations_to_target": None,
        "seeds_at_target": 1,
    }
    shown = text(results)
    assert "0.1*" in shown
    assert "sgd (highest)" in shown
    assert "(1 diverged)" in shown
    assert "of 15 runs at all rates: sgd 2, adam 15" in shown
    assert "1 of 3" in shown


def test_one_seed_has_no_error(results: dict[str, Any]) -> None:
    results["config"]["seeds"] = 1
    for row in results["rows"]:
        row["test_accuracy_error"] = None
    shown = text(results)
    assert "95.00 ±" not in shown
    assert "one seed, so without an error" in shown


class _Page(html.parser.HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.keys: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data") or (tag == "link" and name == "href"):
                self.loads.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "data-key":
                self.keys.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_files(results: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(results)
    comparison.write_all(tmp_path, results)
    assert results == before
    for name in ("curves.png", "rates.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.loads) == 2
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    columns = len(comparison.headers(results["config"]))
    assert page.keys[2::columns] == [str(row["test_accuracy"]) for row in results["rows"]]
    assert "Bold: the highest test accuracy." in page.text
    assert "https://arxiv.org/abs/1910.04952" in page.links
    assert not any(link.startswith("optax.") for link in page.links)
    for part in ("demon_sgd", "1.25 ×", "gradients to 95%", "faithful", "4,810", "standard error"):
        assert part in page.text
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(results["config"]["methods"])
    assert float(rows[0]["test_accuracy"]) == 0.95


def test_a_page_of_failures(results: dict[str, Any], tmp_path: Path) -> None:
    for row in results["rows"]:
        points = len(row["curve"]["step"])
        row |= {"diverged": 15, "diverged_at_rate": 3, "validation_loss": None}
        row |= {"test_accuracy": 0.0, "test_accuracy_error": 0.0, "validation_accuracy": 0.0}
        row |= {"steps_to_target": None, "gradient_evaluations_to_target": None}
        row["curve"]["train_loss"] = row["curve"]["train_loss_error"] = [None] * points
        for rate in row["rates"]:
            rate |= {"diverged": 3, "validation_accuracy": 0.0, "validation_loss": None}
    comparison.write_all(tmp_path, results)
    assert "diverged" in _Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"validation_accuracy": [1.0] * 11}, id="perfect"),
        pytest.param({"validation_accuracy": [0.0] * 11}, id="hopeless"),
        pytest.param({"train_loss": [None] + [0.0] * 10}, id="no loss left"),
        pytest.param({"train_loss_error": [None] * 11}, id="no error"),
    ],
)
def test_extreme_curves(results: dict[str, Any], change: dict[str, Any]) -> None:
    for row in results["rows"]:
        row["curve"] |= change
    figure = comparison_figures.curves(results)
    figure.savefig(io.BytesIO(), dpi=20)  # whatever the size, all of it is drawn
    panels = figure.axes
    assert len(panels) == 4
    for axes in panels:
        low, high = axes.get_ylim()
        for row, line in zip(results["rows"], axes.lines, strict=False):  # the target comes last
            assert len(line.get_ydata()) == len(row["curve"]["step"]) - 1
            assert np.all((low <= line.get_ydata()) & (line.get_ydata() <= high))
