"""What a comparison shows: the table, its footnotes, the pictures and one HTML page.

Everything is made from the plain dictionary that `experiments.compare` stores as `results.json`, so
a report can be made again without training.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.table import Table

from experiments import cli
from experiments.cli import plural
from experiments.reporting import tables
from experiments.reporting.figures import frame, png, style
from experiments.reporting.html import PAGE_HEAD
from experiments.reporting.tables import percent

Results = dict[str, Any]
Row = dict[str, Any]


# Numbers as text ------------------------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _rate(row: Row) -> str:
    return f"{row['learning_rate']:g}" + ("*" if row["grid_edge"] else "")


def _accuracy(row: Row, config: dict[str, Any]) -> str:
    if row["diverged_at_rate"] == config["seeds"]:
        return "diverged"
    text = percent(row["test_accuracy"], row["test_accuracy_error"])
    return text + (f" ({row['diverged_at_rate']} diverged)" if row["diverged_at_rate"] else "")


def _to_target(row: Row, key: str, config: dict[str, Any]) -> str:
    if row[key] is not None:
        return _count(row[key])
    return f"{row['seeds_at_target']} of {config['seeds']}"


def _time(row: Row) -> str:
    if row["time_relative_to_base"] is None:
        return f"{1000 * row['seconds_per_step']:.2f} ms"
    return f"{row['time_relative_to_base']:.2f} ×"


def cells(row: Row, config: dict[str, Any]) -> list[str]:
    """One line of the table, as text in the order of `headers`."""
    return [
        row["method"],
        _rate(row),
        _accuracy(row, config),
        f"{100 * row['validation_accuracy']:.2f}",
        _to_target(row, "steps_to_target", config),
        _to_target(row, "gradient_evaluations_to_target", config),
        _time(row),
        f"{row['state_relative_to_parameters']:.2f}",
    ]


def headers(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's column names: in full, and short enough for a terminal of 80 columns."""
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
    """The table for a terminal; the highest test accuracy is bold."""
    config, rows = results["config"], results["rows"]
    title = f"{config['task']}, {config['model']}, {config['steps']} steps"
    view = tables.table([name for _, name in headers(config)], title)
    for row in rows:
        bold = "bold" if row["test_accuracy"] == best(rows) else None
        view.add_row(*cells(row, config), style=bold)
    return view


def footnotes(results: Results) -> list[str]:
    """What a reader has to know before believing the table."""
    config, timing, rows = results["config"], results["timing"], results["rows"]
    rates = len(rows[0]["rates"])
    seeds = plural(config["seeds"], "seed")
    together = timing["runs_together"]
    step = "step of one run" if together == 1 else f"step that trains {together} runs at once"
    error = "mean ± standard error over the seeds (below two errors a difference means little)"
    if config["seeds"] == 1:
        error = "one seed, so without an error: take no ranking from it"
    bases: dict[str, list[str]] = {}
    for row in rows:
        if row["base"] is not None:
            bases.setdefault(row["base"], []).append(row["method"])
    pairs = "; ".join(f"{base} ({', '.join(names)})" for base, names in bases.items())
    relative = f"× means times the base: {pairs}." if bases else ""
    notes = [
        (
            f"Budget: {rates} learning rates x {seeds} per method, {config['steps']} steps of "
            f"{config['batch_size']} examples. One seed means the same initial weights and batches "
            "for every method and rate."
        ),
        (
            "Choice: the rate with the highest mean validation accuracy at the last step, ties by "
            "lower validation loss; a diverged run counts as accuracy 0. Test accuracy: at that "
            f"rate only, {error}."
        ),
    ]
    if edges := [f"{row['method']} ({row['grid_edge']})" for row in rows if row["grid_edge"]]:
        where = ", ".join(edges)
        notes.append(f"* Rate on the edge of its grid, a better one may lie outside: {where}.")
    if failed := [f"{row['method']} {row['diverged']}" for row in rows if row["diverged"]]:
        notes.append(
            f"Diverged, of {rates * config['seeds']} runs at all rates: {', '.join(failed)}."
        )
    return [
        *notes,
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
            f"median of {timing['rounds']} rounds, methods in alternation. {relative}"
        ),
        "State: bytes of optimizer state / bytes of parameters.",
    ]


# Pictures ---------------------------------------------------------------------------------------


def _accuracy_axis(axes: Axes, lowest: float, highest: float, examples: int) -> None:
    """Stretches the axis towards 1, so that 98% and 99% are as far apart as 80% and 90%."""
    floor = 0.5 / examples  # an accuracy of 1 stays on the picture

    def forward(accuracy: Any) -> Any:
        return -np.log10(np.maximum(1 - np.asarray(accuracy, float), 0) + floor)

    def inverse(height: Any) -> Any:
        return 1 - (10.0 ** -np.asarray(height, float) - floor)

    axes.set_yscale("function", functions=(forward, inverse))
    ticks = [0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0]
    top = forward(highest)
    bottom = min(forward(lowest), top - 0.3)
    margin = 0.05 * (top - bottom)
    low = max(0.0, float(inverse(bottom - margin)))
    high = min(1.0, float(inverse(top + margin)))
    axes.set_ylim(low, high)
    heights = [(tick, forward(tick)) for tick in ticks if low <= tick <= high]
    kept: list[float] = []
    for tick, height in reversed(heights):  # no two labels on top of each other
        if all(abs(height - forward(other)) > 0.055 * (top - bottom) for other in kept):
            kept.append(tick)
    axes.set_yticks(kept)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([], minor=True)


def _spread(curve: dict[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    mean = np.array(curve[key], float)
    error = np.nan_to_num(np.array(curve[f"{key}_error"], float))
    return mean, error


def curves(results: Results) -> Figure:
    """Training loss and validation accuracy, over steps and over gradient evaluations."""
    config, rows = results["config"], results["rows"]
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row")
    for column, cost in enumerate(("step", "gradient_evaluations")):
        for line, key in enumerate(("train_loss", "validation_accuracy")):
            axes = grid[line, column]
            frame(axes)
            for row in rows:
                # The first point is the untrained model: no training loss, and not on a log axis.
                x = np.array(row["curve"][cost][1:], float)
                mean, error = (values[1:] for values in _spread(row["curve"], key))
                look = style(row["method"])
                axes.plot(
                    x,
                    mean,
                    color=look["color"],
                    linestyle=look["linestyle"],
                    linewidth=1.8,
                    label=row["method"] if (line, column) == (0, 0) else None,
                )
                low = mean - error
                if key == "train_loss":  # a band below zero cannot be drawn on a log axis
                    low = np.maximum(low, 0.2 * mean)
                high = (
                    np.minimum(mean + error, 1.0) if key == "validation_accuracy" else mean + error
                )
                axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
    losses = [loss for row in rows for loss in row["curve"]["train_loss"] if loss]
    accuracies = [
        value
        for row in rows
        for value in row["curve"]["validation_accuracy"][1:]
        if value is not None
    ]
    for column, axes in enumerate(grid[0]):
        if losses and min(losses) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(
            ("Training loss", "Training loss against cost")[column], loc="left", fontsize=12
        )
    for column, axes in enumerate(grid[1]):
        if accuracies:
            _accuracy_axis(
                axes,
                min([*accuracies, config["target"]]),
                max([*accuracies, config["target"]]),
                config["validation_examples"],
            )
        axes.axhline(
            config["target"], color="#666666", linewidth=1, linestyle=(0, (2, 2)), zorder=1
        )
        axes.annotate(
            f"target {100 * config['target']:g}%",
            (0.995, config["target"]),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color="#555555",
        )
        axes.set_title(
            ("Validation accuracy", "Validation accuracy against cost")[column],
            loc="left",
            fontsize=12,
        )
    for axes in grid[:, 0]:
        axes.set_xlabel("step")
        axes.set_xlim(0, config["steps"])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes in grid[:, 1]:
        axes.set_xlabel("gradient evaluations (log scale)")
        costs = [cost for row in rows for cost in row["curve"]["gradient_evaluations"][1:]]
        axes.set_xscale("log")
        axes.set_xlim(min(costs), max(costs) * 1.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_ylabel("mean mini-batch loss")
    grid[1, 0].set_ylabel("accuracy")
    figure.legend(
        loc="outside upper center",
        ncols=math.ceil(len(rows) / math.ceil(len(rows) / 5)),
        frameon=False,
        fontsize=11,
        handlelength=2.6,
    )
    return figure


def rates(results: Results) -> Figure:
    """Validation accuracy of every learning rate of every method: how much the choice matters."""
    config, rows = results["config"], results["rows"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    frame(axes)
    shown = []
    for row in rows:
        look = style(row["method"])
        tried = sorted(row["rates"], key=lambda entry: entry["learning_rate"])
        kept = [entry for entry in tried if entry["diverged"] < config["seeds"]]
        x = [entry["learning_rate"] for entry in kept]
        y = [entry["validation_accuracy"] for entry in kept]
        shown += y
        axes.errorbar(
            x,
            y,
            yerr=[entry["validation_accuracy_error"] or 0.0 for entry in kept],
            label=row["method"],
            linewidth=1.6,
            markersize=5,
            elinewidth=1,
            **look,
        )
        if kept:
            axes.plot(
                row["learning_rate"],
                row["validation_accuracy"],
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=look["color"],
                markeredgewidth=1.5,
            )
    tried_anywhere = [entry["learning_rate"] for row in rows for entry in row["rates"]]
    axes.set_xscale("log")
    axes.set_xlim(min(tried_anywhere) / 1.5, max(tried_anywhere) * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(
        "learning rate (circle: chosen; rates at which all seeds diverged are left out)"
    )
    axes.set_ylabel("validation accuracy")
    if shown:
        _accuracy_axis(axes, min(shown), max(shown), config["validation_examples"])
    axes.set_title("Final validation accuracy over the grid", loc="left", fontsize=12)
    figure.legend(
        loc="outside upper center",
        ncols=math.ceil(len(rows) / math.ceil(len(rows) / 5)),
        frameon=False,
        fontsize=11,
    )
    return figure


# Page -------------------------------------------------------------------------------------------


_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    PAGE_HEAD
    + """  .lead { color: #444; margin: 0 0 1.2rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-size: .92rem; }
  th, td { padding: .4rem .65rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
  th { border-bottom: 2px solid #555; text-align: left; vertical-align: bottom; font-weight: 600; }
  td { font-variant-numeric: tabular-nums; }
  .numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
  .numbers td:not(:last-child), .name { white-space: nowrap; }
  tr.best td { font-weight: 700; background: #f3f7fb; }
  .key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
  img { width: 100%; height: auto; }
  ul.notes { padding-left: 1.2rem; color: #444; font-size: .9rem; }
  a { color: #0b5cad; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<div class="scroll"><table class="numbers">
<thead><tr>{% for name in headers %}<th scope="col">{{ name[0] }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in lines %}<tr{% if row.best %} class="best"{% endif %}>
  <td><span class="key" style="background: {{ row.color }}"></span>{{ row.cells[0] }}</td>
  {% for cell in row.cells[1:] %}<td>{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}</tbody></table></div>
<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<h2>Curves at the chosen learning rates</h2>
<img alt="Training loss and validation accuracy over steps and over gradient evaluations"
     src="data:image/png;base64,{{ curves }}">
<p class="lead">Lines: mean over the seeds; bands: standard error of the mean. Training loss: mean
of the mini-batch losses since the previous point, where the method evaluates them (extragradient:
at the extrapolated point).</p>
<h2>How much the learning rate matters</h2>
<img alt="Final validation accuracy over the learning rates"
     src="data:image/png;base64,{{ rates }}">
<h2>Methods</h2>
<div class="scroll"><table>
<thead><tr><th>method</th><th>family</th><th>what it does</th><th>paper</th><th>fidelity</th></tr>
</thead>
<tbody>
{% for row in rows %}<tr><td class="name">{{ row.method }}</td><td>{{ row.family }}</td>
<td>{{ row.summary }}</td>
<td>{% if row.link.startswith("http") %}<a href="{{ row.link }}">{{ row.paper }}</a>
{% else %}{{ row.paper }}; <code>{{ row.link }}</code>{% endif %}</td>
<td>{{ row.fidelity }}</td></tr>
{% endfor %}</tbody></table></div>
<h2>Settings</h2>
<div class="scroll"><table><tbody>
{% for key, value in settings %}<tr><td class="name">{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
</body>
</html>
"""
)


def page(results: Results, curves_png: bytes, rates_png: bytes) -> str:
    """The HTML report: one file, no outside resources."""
    config, rows = results["config"], results["rows"]
    settings = [(key.replace("_", " "), value) for key, value in config.items() if key != "methods"]
    settings += [
        (f"learning rates of {name}", ", ".join(f"{rate:g}" for rate in grid))
        for name, grid in config["methods"].items()
    ]
    settings += [(key, value) for key, value in results["environment"].items()]
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
            f"{first['method']}, {_count(first['gradient_evaluations_to_target'])}."
        )
    return _PAGE.render(
        title=f"Training methods on {config['task']}",
        lead=lead,
        headers=headers(config),
        lines=[
            {
                "cells": cells(row, config),
                "best": row["test_accuracy"] == best(rows),
                "color": style(row["method"])["color"],
            }
            for row in rows
        ],
        notes=footnotes(results),
        rows=rows,
        settings=settings,
        curves=base64.b64encode(curves_png).decode(),
        rates=base64.b64encode(rates_png).decode(),
    )


def table_csv(results: Results) -> str:
    """The table as CSV, numbers unrounded."""
    rows = results["rows"]
    names = [key for key, value in rows[0].items() if not isinstance(value, (list, dict))]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# What `write_all` writes.
FILES = ("results.csv", "curves.png", "rates.png", "report.html")


def write_all(folder: Path, results: Results) -> None:
    """Writes results.csv, curves.png, rates.png and report.html into the run's folder."""
    curves_png, rates_png = png(curves(results)), png(rates(results))
    html = page(results, curves_png, rates_png)
    contents: tuple[str | bytes, ...] = (table_csv(results), curves_png, rates_png, html)
    for name, content in zip(FILES, contents, strict=True):
        cli.write_atomic(folder / name, content)
