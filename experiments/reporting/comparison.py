"""The report of a comparison: the table with its footnotes, and the files.

Everything is made from the plain dictionary that `experiments.compare` stores as `results.json`, so
a report can be made again without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments import cli
from experiments.cli import plural
from experiments.reporting import comparison_figures, figures, pages, tables
from experiments.reporting.figures import style
from experiments.reporting.tables import count, percent
from experiments.runs.records import to_csv

Results = dict[str, Any]
Row = dict[str, Any]


# Table ------------------------------------------------------------------------------------------


def _rate(row: Row) -> str:
    return f"{row['learning_rate']:g}" + ("*" if row["grid_edge"] else "")


def _accuracy(row: Row, config: dict[str, Any]) -> str:
    if row["diverged_at_rate"] == config["seeds"]:
        return "diverged"
    text = percent(row["test_accuracy"], row["test_accuracy_error"])
    return text + (f" ({row['diverged_at_rate']} diverged)" if row["diverged_at_rate"] else "")


def _to_target(row: Row, key: str, config: dict[str, Any]) -> str:
    if row[key] is not None:
        return count(row[key])
    return f"{row['seeds_at_target']} of {config['seeds']}"


def _time(row: Row) -> str:
    if row["time_relative_to_base"] is None:
        return f"{1000 * row['seconds_per_step']:.2f} ms"
    return f"{row['time_relative_to_base']:.2f} ×"


def cells(row: Row, config: dict[str, Any]) -> list[str]:
    """One line of the table, as text in the order of `headers`.

    Args:
      row: the results of one method.
      config: the settings of the comparison.
    """
    return [
        row["method"],
        _rate(row),
        _accuracy(row, config),
        percent(row["validation_accuracy"]),
        _to_target(row, "steps_to_target", config),
        _to_target(row, "gradient_evaluations_to_target", config),
        _time(row),
        f"{row['state_relative_to_parameters']:.2f}",
    ]


def sort_keys(row: Row) -> list[str | float | None]:
    """What each of the `cells` is sorted by on the page; None comes last.

    Args:
      row: the results of one method.
    """
    keys = ("steps_to_target", "gradient_evaluations_to_target", "seconds_per_step")
    return [
        *(row[key] for key in ("method", "learning_rate", "test_accuracy", "validation_accuracy")),
        *(row[key] for key in keys),
        row["state_relative_to_parameters"],
    ]


def headers(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The column names: in full, and short enough for a terminal of 80 columns.

    Args:
      config: the settings of the comparison.
    """
    target = f"{100 * config['target']:g}%"
    return [
        ("method", "method"),
        ("learning rate", "rate"),
        ("test accuracy %", "test %"),
        ("validation accuracy %", "val. %"),
        (f"steps to {target}", f"steps\nto {target}"),
        (f"gradients to {target}", f"grads\nto {target}"),
        ("time per step", "time\nper step"),
        ("state / parameters", "state\n/ par."),
    ]


def best(rows: Sequence[Row]) -> float:
    """The highest test accuracy of the table."""
    return max(row["test_accuracy"] for row in rows)


def table(results: Results) -> Table:
    """The table for a terminal; the highest test accuracy is bold.

    Args:
      results: the results, as `results.json` holds them.
    """
    config, rows = results["config"], results["rows"]
    title = f"{config['task']}, {config['model']}, {config['steps']} steps"
    view = tables.table([name for _, name in headers(config)], title)
    for row in rows:
        bold = "bold" if row["test_accuracy"] == best(rows) else None
        view.add_row(*cells(row, config), style=bold)
    return view


def footnotes(results: Results) -> list[str]:
    """What a reader has to know before believing the table.

    Args:
      results: the results, as `results.json` holds them.
    """
    config, timing, rows = results["config"], results["timing"], results["rows"]
    together = timing["runs_together"]
    step = "step of one run" if together == 1 else f"step that trains {together} runs at once"
    return [
        "Bold: the highest test accuracy.",
        *_budget_notes(config, len(rows[0]["rates"])),
        *_warnings(config, rows),
        (
            "To the target: mean over the seeds of the first validation (every "
            f"{config['eval_every']} steps) at or above it; if not all seeds get there, how many "
            "do."
        ),
        (
            "Gradients: mini-batch gradient evaluations; a Hessian-vector product counts as two, "
            f"times curvature batch / batch = {config['curvature_batch_size']} / "
            f"{config['batch_size']}."
        ),
        (
            f"Time: of the compiled {step}, with its curvature refreshes, without compilation, "
            "first (cold) refresh and evaluation; "
            f"median of {timing['rounds']} rounds, methods in alternation. {_bases(rows)}"
        ),
        "State: bytes of optimizer state / bytes of parameters.",
    ]


def _budget_notes(config: dict[str, Any], rates: int) -> list[str]:
    """What every method gets, and how its learning rate is chosen."""
    error = "mean ± standard error over the seeds (below two errors a difference means little)"
    if config["seeds"] == 1:
        error = "one seed, so without an error: take no ranking from it"
    return [
        (
            f"Budget: {rates} learning rates x {plural(config['seeds'], 'seed')} per method, "
            f"{config['steps']} steps of {config['batch_size']} examples. One seed means the same "
            "initial weights and batches for every method and rate."
        ),
        (
            "Choice: the rate with the highest mean validation accuracy at the last step, ties by "
            "lower validation loss; a diverged run counts as accuracy 0. Test accuracy: at that "
            f"rate only, {error}."
        ),
    ]


def _warnings(config: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """The methods whose best rate may lie outside the grid, and those with diverged runs."""
    notes = []
    if edges := [f"{row['method']} ({row['grid_edge']})" for row in rows if row["grid_edge"]]:
        where = ", ".join(edges)
        notes.append(f"* Rate on the edge of its grid, a better one may lie outside: {where}.")
    if failed := [f"{row['method']} {row['diverged']}" for row in rows if row["diverged"]]:
        runs = len(rows[0]["rates"]) * config["seeds"]
        notes.append(f"Diverged, of {runs} runs at all rates: {', '.join(failed)}.")
    return notes


def _bases(rows: Sequence[Row]) -> str:
    """The method that each relative time is compared with."""
    bases: dict[str, list[str]] = {}
    for row in rows:
        if row["base"] is not None:
            bases.setdefault(row["base"], []).append(row["method"])
    pairs = "; ".join(f"{base} ({', '.join(names)})" for base, names in bases.items())
    return f"× means times the base: {pairs}." if bases else ""


# Files ------------------------------------------------------------------------------------------


def page(results: Results, curves: bytes, rates: bytes) -> str:
    """The HTML report: one file without outside resources.

    Args:
      results: the results, as `results.json` holds them.
      curves: the picture of the curves, as SVG.
      rates: the picture of the learning rates, as SVG.
    """
    config, rows = results["config"], results["rows"]
    settings = [(key.replace("_", " "), value) for key, value in config.items() if key != "methods"]
    settings += [
        (f"learning rates of {name}", ", ".join(f"{rate:g}" for rate in grid))
        for name, grid in config["methods"].items()
    ]
    settings += [(key, value) for key, value in results["environment"].items()]
    return pages.render(
        "comparison.html",
        title=f"Training methods on {config['task']}",
        lead=_lead(config, rows),
        headers=[name for name, _ in headers(config)],
        lines=[
            {
                "cells": list(zip(cells(row, config), sort_keys(row), strict=True)),
                "best": row["test_accuracy"] == best(rows),
                "color": style(row["method"])["color"],
            }
            for row in rows
        ],
        notes=footnotes(results),
        rows=rows,
        settings=settings,
        curves=curves,
        rates=rates,
    )


def _lead(config: dict[str, Any], rows: Sequence[Row]) -> str:
    """The sentences at the top of the page: the setting, and the methods that come out first."""
    winner = max(rows, key=lambda row: row["test_accuracy"])
    lead = (
        f"{config['model']} with {winner['parameters']:,} parameters, {config['train_examples']:,} "
        f"training examples, {config['steps']} steps. Highest test accuracy: {winner['method']}, "
        f"{percent(winner['test_accuracy'], winner['test_accuracy_error'])}%."
    )
    quick = [row for row in rows if row["gradient_evaluations_to_target"] is not None]
    if quick:
        first = min(quick, key=lambda row: row["gradient_evaluations_to_target"])
        lead += (
            f" Fewest gradient evaluations to {100 * config['target']:g}% validation accuracy: "
            f"{first['method']}, {count(first['gradient_evaluations_to_target'])}."
        )
    return lead


FILES = ("results.csv", *figures.files("curves", "rates"), "report.html")
"""The files that `write_all` writes."""


def write_all(folder: Path, results: Results) -> None:
    """Writes results.csv, the pictures and report.html into the run's folder.

    Args:
      folder: the run's folder.
      results: the results, as `results.json` holds them.
    """
    columns = [
        {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
        for row in results["rows"]
    ]
    pictures = figures.encode("curves", comparison_figures.curves(results))
    pictures |= figures.encode("rates", comparison_figures.rates(results))
    contents: tuple[str | bytes, ...] = (
        to_csv(columns),
        *pictures.values(),
        page(results, pictures["curves.svg"], pictures["rates.svg"]),
    )
    for name, content in zip(FILES, contents, strict=True):
        cli.write_atomic(folder / name, content)
