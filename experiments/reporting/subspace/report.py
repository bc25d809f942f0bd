"""Writes the report of the subspace study: tables, pictures, claims, and a page in two formats.

Everything is made from the rows that `experiments.subspace_study` stores, so a report can be made
again without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.cli import plural
from experiments.reporting import figures, pages
from experiments.reporting.subspace.claims import judge_all, number
from experiments.reporting.subspace.figures import DRAW, LARGEST_ERROR
from experiments.reporting.subspace.rows import final_accuracy, final_loss, line, pick, seeds
from experiments.reporting.tables import mean_and_deviation, percent
from experiments.runs.records import to_csv
from experiments.runs.units import Rows

PANELS = {
    "alignment": "Alignment of the gradient with the dominant subspace",
    "switch": "Training inside, outside and between the subspaces",
    "effective_learning_rates": "Effective learning rates",
    "stability": "Stability of Bulk-SGD",
    "energy": "Curvature energy in the dominant subspace",
    "noise": "Where the alignment comes from",
}


def methods_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Final training loss and test accuracy of the branches.

    Args:
      rows: the rows of the panel `switch`.

    Returns:
      The column names, and the cells of each line as text.
    """
    lines = []
    for name, label in (("sgd", "SGD"), ("dom", "Dom-SGD"), ("bulk", "Bulk-SGD")):
        lines.append((label, pick(rows, method=name)))
    for name, label in (("sgd_to_bulk", "SGD to Bulk-SGD"), ("dom_to_bulk", "Dom- to Bulk-SGD")):
        for alpha, run in list(line(rows, name))[1:-1]:
            lines.append((f"{label}, alpha {alpha:g}", run))
    cells = []
    for label, runs in lines:
        single = [pick(runs, seed=seed) for seed in seeds(runs)]
        losses = [final_loss(run) for run in single]
        accuracies = [final_accuracy(run) for run in single]
        cells.append(
            [
                label,
                f"{runs[0]['a']:g}, {runs[0]['b']:g}",
                mean_and_deviation(losses, "{:.4g}".format),
                mean_and_deviation(accuracies, percent),
            ]
        )
    return ["method", "a, b", "training loss", "test accuracy %"], cells


def captions(config: dict[str, Any]) -> dict[str, str]:
    """What a reader has to know about each picture, by panel.

    Args:
      config: the settings of the study.
    """
    lines = "One line per seed." if config["seeds"] > 1 else "One seed."
    tracked = (
        f"The projected runs track the subspace on {config['curvature_examples']} fixed training "
        f"examples, refreshed every {config['refresh_every']} steps."
    )
    return {
        "alignment": (
            f"chi_k and eigenvalues from eigenvectors of the Hessian on "
            f"{config['measured_examples']} training examples, solved to a tolerance; the average "
            f"(every {config['check_every']} steps, decay 0.9) from the tracked basis. {lines}"
        ),
        "switch": f"All branches start from the same weights and see the same batches. {tracked}",
        "effective_learning_rates": (
            "From the untrained network on, each estimate pooled over 10 updates. Adam runs at a "
            f"tenth of SGD's learning rate. Dotted: the nominal rate. {lines}"
        ),
        "stability": (
            "From the switch point. The learning rate is varied first; every other ablation "
            f"changes one setting at {5 * config['learning_rate']:g}. Unstable: not finite, or "
            f"higher at the end than at the start. {lines}"
        ),
        "energy": (
            "In the span of the k leading eigenvectors of the Hessian. Frobenius: the sum of "
            "|A u|² over the basis / |A|²; trace: tr(UᵀAU) / tr(A), which for the functional "
            "Hessian can be negative or above 1. Bars: standard error of the estimate; where it is "
            f"above {LARGEST_ERROR:g}, the point is left out."
        ),
        "noise": (
            "From the switch point: SGD goes on, or full-batch gradient descent takes over, at the "
            f"same learning rate. {lines}"
        ),
    }


def content(results: Mapping[str, Any], verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The values that the templates show.

    Args:
      results: the ``config``, the ``environment`` and the ``rows`` by panel.
      verdicts: what `judge_all` returned.
    """
    config, rows = results["config"], results["rows"]
    panels = []
    for name in PANELS:
        if rows.get(name):
            headers, cells = methods_table(rows[name]) if name == "switch" else ([], [])
            panels.append(
                {
                    "name": name,
                    "title": PANELS[name],
                    "caption": captions(config)[name],
                    "headers": headers,
                    "cells": cells,
                    "pictures": figures.encode(name, DRAW[name](rows[name], config)),
                }
            )
    held = sum(verdict["verdict"] == "holds" for verdict in verdicts)
    settings = [(key.replace("_", " "), value) for key, value in config.items() if key != "study"]
    return {
        "title": f"Sharp and flat directions: {config['task']}, {config['loss']}",
        "lead": (
            f"{config['model']}, {config['train_examples']} training examples, k = {config['k']}, "
            f"batches of {config['batch_size']}, learning rate {config['learning_rate']:g}, "
            f"{plural(config['seeds'], 'seed')}. {held} of {len(verdicts)} claims hold."
        ),
        "note": (
            "Number: mean ± standard deviation over the seeds. A claim holds if every seed meets "
            "the criterion, and does not if none does. The criteria are ours: the papers show "
            "curves. Papers: Song, Ahn, Yun, arXiv 2405.16002; Zakarin, Singh, arXiv 2505.11972."
        ),
        "verdicts": [{**verdict, "number": number(verdict)} for verdict in verdicts],
        "panels": panels,
        "settings": [*settings, *results["environment"].items()],
    }


def write_all(folder: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Writes tables, pictures, claims and reports into the run's folder.

    Args:
      folder: the run's folder.
      results: the ``config``, the ``environment`` and the ``rows`` by panel.

    Returns:
      The claims with their verdicts.
    """
    verdicts = judge_all(results)
    shown = content(results, verdicts)
    for panel in shown["panels"]:
        name = panel["name"]
        cli.write_atomic(folder / f"{name}.csv", to_csv(results["rows"][name]))
        for file, picture in panel["pictures"].items():
            cli.write_atomic(folder / file, picture)
    cli.write_atomic(folder / "claims.json", cli.to_json(verdicts))
    for name in ("report.md", "report.html"):
        template = name.replace("report", "subspace")
        cli.write_atomic(folder / name, pages.render(template, **shown))
    return verdicts
