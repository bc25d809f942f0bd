"""What the report of the subspace study says about made-up series."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments import subspace_study
from experiments.reporting.subspace.claims import CLAIMS, judge, number
from experiments.reporting.subspace.report import PANELS, methods_table, write_all
from experiments.reporting.subspace.rows import highest_stable, pick
from experiments.runs.units import Rows
from experiments.training.studies.subspace_panels import ALPHAS, LINES, METHODS

STEPS = range(10)


def series(start: float, end: float, wiggle: float = 0.0) -> list[float]:
    """A geometric decay with every other value moved."""
    decay = (end / start) ** (1 / (len(STEPS) - 1))
    return [start * decay**i * (1 + wiggle * (i % 2)) for i in STEPS]


def branch(losses: list[float | None], **identity: object) -> Rows:
    return [
        {**identity, "step": step, "train_loss": loss, "test_accuracy": loss and 1 - loss / 10}
        for step, loss in enumerate(losses)
    ]


def switch_rows(*, dom: float, bulk: float, wiggle: float = 0.0, seed: int = 0) -> Rows:
    """SGD goes from 1 to 0.1; the others to given losses; the lines between are geometric."""
    rows = []
    ends = {"sgd": 0.1, "dom": dom, "bulk": bulk}
    for method, end in ends.items():
        a, b = METHODS[method]
        losses = series(1.0, end, 0.05 if method == "sgd" else wiggle)
        rows += branch(losses, method=method, alpha=None, a=a, b=b, seed=seed)
    for name, weights in LINES.items():
        first, last = (ends[end] for end in name.split("_to_"))
        for alpha in ALPHAS:
            a, b = weights(alpha)
            losses = series(1.0, first ** (1 - alpha) * last**alpha)
            rows += branch(losses, method=name, alpha=alpha, a=a, b=b, seed=seed)
    return rows


def stability_rows(bulk_ends: list[float | None], seed: int = 0) -> Rows:
    """SGD ends at 0.5 for every rate of 1, 2, 4, ... but the last, where it diverges."""
    rows = []
    for i, end in enumerate(bulk_ends):
        sgd_end = None if i == len(bulk_ends) - 1 else 0.5
        for method, value in (("sgd", sgd_end), ("bulk", end)):
            identity = {"ablation": "learning_rate", "value": 2.0**i, "method": method}
            rows += branch([1.0, None] if value is None else [1.0, value], **identity, seed=seed)
    return rows


def judged(name: str, rows: Rows) -> dict[str, object]:
    (claim,) = (claim for claim in CLAIMS if claim.name == name)
    return judge(claim, rows)


def alignment_rows(average: float, chi: float) -> Rows:
    rows = [{"seed": 0, "step": 0, "chi": 0.2, "switch_step": 20}]
    rows += [{"seed": 0, "step": 10, "tracked_average": average, "switch_step": 20}]
    return [*rows, {"seed": 0, "step": 20, "chi": chi, "switch_step": 20}]


def effective_rows(dominant: float, bulk: float) -> Rows:
    row = {"optimizer": "momentum", "seed": 0, "learning_rate": 0.1}
    first = {**row, "step": 0, "dominant": 100.0, "bulk": 0.0}  # does not count
    return [first, {**row, "step": 5, "dominant": dominant, "bulk": bulk}]


def noise_rows(sgd: float, gd: float) -> Rows:
    ends = {"sgd": sgd, "gd": gd}
    return [
        {"method": method, "seed": 0, "step": step, "train_loss": 0.1, "chi": chi}
        for method, end in ends.items()
        for step, chi in enumerate([0.97, end])
    ]


def energy_rows(**shares: float) -> Rows:
    return [
        {
            "seed": 0,
            "step": step,
            "operator": operator,
            "frobenius_share": share if step else 0.5,  # the untrained network does not count
            "frobenius_error": 0.01,
            "trace_share": share,
            "trace_error": 0.01,
        }
        for operator, share in shares.items()
        for step in (0, 5)
    ]


@pytest.mark.parametrize(
    ("name", "good", "good_number", "bad", "bad_number"),
    [
        ("gradient aligns early", alignment_rows(0.96, 0.9), 0.96, alignment_rows(0.5, 0.9), 0.5),
        ("alignment stays", alignment_rows(0.9, 0.95), 0.95, alignment_rows(0.9, 0.6), 0.6),
        (
            "Dom-SGD stalls",
            switch_rows(dom=1.0, bulk=0.1),
            0.0,
            switch_rows(dom=0.1, bulk=0.1, wiggle=0.05),
            1.0,
        ),
        (
            "Bulk-SGD tracks SGD",
            switch_rows(dom=1.0, bulk=0.1, wiggle=0.05),
            1.0,
            switch_rows(dom=1.0, bulk=1.0),
            0.0,
        ),
        (
            "Bulk-SGD is less noisy",
            switch_rows(dom=1.0, bulk=0.1, wiggle=0.01),
            math.log(1.01) / math.log(1.05),
            switch_rows(dom=1.0, bulk=0.1, wiggle=0.1),
            math.log(1.1) / math.log(1.05),
        ),
        (
            "Dom-SGD's loss rises",
            switch_rows(dom=1.5, bulk=0.1),
            1.5,
            switch_rows(dom=0.9, bulk=0.1),
            0.9,
        ),
        ("momentum favors the bulk", effective_rows(0.1, 1.0), 10, effective_rows(1.0, 0.1), 0.1),
        ("noise makes the alignment", noise_rows(0.9, 0.09), 0.1, noise_rows(0.9, 0.9), 1.0),
        ("bulk is faster", stability_rows([0.25, 0.25, None]), 0.5, stability_rows([1.0, 0.5]), 2),
        (
            "bulk is less stable",
            stability_rows([0.5, None, None, None]),
            0.25,
            stability_rows([0.5, 0.5, 0.5, 0.5]),
            2.0,
        ),
        (
            "more bulk, lower loss",
            switch_rows(dom=1.0, bulk=0.1),
            -1.0,
            switch_rows(dom=0.1, bulk=1.0),
            1.0,
        ),
        (
            "Hessian's energy is dominant",
            energy_rows(hessian=0.9),
            0.9,
            energy_rows(hessian=0.1),
            0.1,
        ),
        (
            "functional Hessian's is not",
            energy_rows(functional_hessian=0.1),
            0.1,
            energy_rows(functional_hessian=0.9),
            0.9,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_claims_follow_the_data(
    name: str,
    good: Rows,
    good_number: float,
    bad: Rows,
    bad_number: float,
) -> None:
    for rows, verdict, value in (
        (good, "holds", good_number),
        (bad, "does not hold", bad_number),
    ):
        result = judged(name, rows)
        assert result["verdict"] == verdict
        assert result["mean"] == pytest.approx(value, abs=1e-6)
        assert result["values"] == pytest.approx([value], abs=1e-6)


def test_seeds_that_disagree_are_counted() -> None:
    rows = [
        row
        for seed, dom in enumerate([1.0, 1.0, 0.1])
        for row in switch_rows(dom=dom, bulk=0.1, seed=seed)
    ]
    result = judged("Dom-SGD stalls", rows)
    assert result["verdict"] == "in 2 of 3 seeds"
    assert result["mean"] == pytest.approx(1 / 3, abs=0.02)
    assert result["deviation"] == pytest.approx(math.sqrt(1 / 3), abs=0.02)


def test_diverged_branch_is_no_success() -> None:
    rows = switch_rows(dom=1.0, bulk=0.1)
    for row in pick(rows, method="bulk")[5:]:
        row["train_loss"] = row["test_accuracy"] = None
    result = judged("Bulk-SGD tracks SGD", rows)
    assert (result["verdict"], result["values"], result["diverged"]) == ("does not hold", [None], 1)
    assert number(result) == "1 without bound"
    assert judged("Bulk-SGD is less noisy", rows)["verdict"] == "not measurable"
    assert "diverged" in [cell for line in methods_table(rows)[1] for cell in line]


def test_stability_ends_at_the_first_unstable_rate() -> None:
    rows = stability_rows([0.5, 3.0, 0.5, 0.5])  # 3: finite, but higher than at the start
    assert highest_stable(rows, "learning_rate", "bulk") == 1.0
    assert highest_stable(rows, "learning_rate", "sgd") == 4.0


@pytest.fixture
def results() -> dict[str, Any]:
    rows = {
        "alignment": [
            {**row, **{f"eigenvalue_{i}": 10.0 / i for i in range(1, 15)}, "train_loss": 1.0}
            if "chi" in row
            else row
            for row in alignment_rows(0.96, 0.97)
        ],
        "switch": switch_rows(dom=1.0, bulk=0.123456),
        "effective_learning_rates": effective_rows(0.1, 1.0),
        "stability": stability_rows([0.25, 0.25, None]),
        "energy": energy_rows(hessian=0.9, gauss_newton=0.8, functional_hessian=0.2),
        "noise": noise_rows(0.9, 0.2),
    }
    plan, _ = subspace_study.resolve(subspace_study.Options(scale="tiny"))
    return {"config": plan.config(), "environment": {"device": "cpu"}, "rows": rows}


def test_report_says_what_the_rows_say(results: dict[str, Any], tmp_path: Path) -> None:
    verdicts = write_all(tmp_path, results)
    assert json.loads((tmp_path / "claims.json").read_text()) == verdicts
    # Cross entropy's own claim is left out, and Adam has no rows.
    assert len(verdicts) == len(CLAIMS) - 1
    by_name = {verdict["claim"]: verdict for verdict in verdicts}
    assert by_name["Adam favors the bulk"]["verdict"] == "not measurable"
    held = sum(verdict["verdict"] == "holds" for verdict in verdicts)
    markdown = (tmp_path / "report.md").read_text()
    html = (tmp_path / "report.html").read_text()
    for text in (markdown, html):
        assert f"{held} of {len(verdicts)} claims hold" in text
        assert "0.1235" in text  # the final loss of Bulk-SGD
        assert "learning rate 0.05" in text
    for verdict in verdicts:
        line = next(line for line in markdown.splitlines() if verdict["statement"] in line)
        assert f"**{verdict['verdict']}**" in line
        assert f" {number(verdict)} |" in line
    assert html.count("data:image/svg+xml;base64,") == len(PANELS)
    for panel in PANELS:
        table = csv.DictReader((tmp_path / f"{panel}.csv").read_text().splitlines())
        assert len(list(table)) == len(results["rows"][panel])
        assert (tmp_path / f"{panel}.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_some_panels(results: dict[str, Any], tmp_path: Path) -> None:
    results["rows"] = {"noise": results["rows"]["noise"]}
    verdicts = write_all(tmp_path, results)
    assert [verdict["claim"] for verdict in verdicts] == ["noise makes the alignment"]
    assert {path.suffix for path in tmp_path.iterdir()} == {
        *(".csv", ".png", ".svg", ".json", ".md", ".html")
    }
    assert "1 of 1 claims hold" in (tmp_path / "report.md").read_text()
