"""Time every method of the catalogue against its Optax base, in one run.

    python -m experiments.bench

What does a method's `update` cost on a tree of 10 million parameters, where there is nothing but
the optimizer, and which multiple is that of the time that its bytes, read and written once, need at
the bandwidth of a copy; what does it cost in a whole training step of a dense model; how long does
that step take to compile; for K-FAC, at twice the batch, what do its whole cycle and a step between
refreshes cost (beside the package `kfac_jax`, where that is installed); for low-rank and sparse
methods, on a GPT, what do a step between refreshes and one with a refresh by a range finder cost,
and how long do these take to compile; what does the gradient of a fixed point cost beside a
hand-written loop, in CPU time, and beside one block, in memory; and how long does a person wait for
the first step, compilation included, of a GPT, of the dense model and of a small convolutional
network? Method and base run side by side (A B, B A, A B, ...), compiled, with donated buffers,
waiting for every result, so that a busy moment of the machine hits both. A ratio is the median of
the ratios of such pairs; the quartiles beside it say how far to trust it. First steps start from
empty caches, in rounds that each begin with Adam.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from experiments import cli, progress, timing
from experiments.methods import METHODS, Method, get_methods
from experiments.reporting import pages, tables
from experiments.training.studies import equilibrium_cost, first_step, method_cost

COMPILE_REPEATS = 5  # at most: a compilation takes a second
MONITOR_REPEATS = 15  # at most: a record takes as long as ten steps
EQUILIBRIUM_REPEATS = 9  # at most: a gradient evaluates a network more than a hundred times

PROG = "python -m experiments.bench"
QUESTIONS = (
    "update",
    "step",
    "natural",
    "low_memory",
    "low_memory_compile",
    "compile",
    "monitor",
    "equilibrium",
)


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Time every method of the catalogue against its Optax base."""

    limits: ClassVar = {"first_steps": cli.Range(0, 100)}

    methods: str | None = None
    """Methods to time beside their bases, separated by commas; default: all."""
    tables: str | None = None
    """Tables to make, separated by commas: update, step, natural, low_memory, low_memory_compile,
    compile, monitor, equilibrium; default: all."""
    repeats: int = 40
    """Number of rounds, each of which times every method once beside its base."""
    parameters: int = 10_000_000
    """Parameters of the tree that is updated, in ten square float32 matrices."""
    first_steps: int = 1
    """Rounds of the tables "time to the first step", each from empty caches; 0 for none."""
    json: Path | None = None
    """Also write the numbers to this file."""
    html: Path | None = None
    """Also write the tables to this file, as a page for the browser."""


def verdict(row: dict[str, Any]) -> str:
    """What to show beside a target.

    Args:
      row: one row of `timing.measure`.
    """
    if row["target"] is None:
        return ""
    return f"<= {row['target']:.2f} {'pass' if row['ratio'][1] <= row['target'] else 'FAIL'}"


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Medians, with quartiles in brackets; each base is followed by its methods.

    Args:
      title: what was timed.
      rows: the rows of `timing.measure`, those of updates with what `update_rows` adds.
    """
    columns = ["method", "milliseconds", "ratio to base", "target"]
    limited = "of_limit" in rows[0]
    view = tables.table(columns + ["of the limit"] * limited, title)
    for row in rows:
        time = tables.quartiles(row["milliseconds"], tables.short)
        limit = [f"{row['of_limit']:.2f}"] if limited else []
        if row["base"] is None:
            view.add_row(row["name"], time, "", "", *limit, style="bold")
        else:
            ratio = tables.quartiles(row["ratio"], "{:.2f}".format, "{:.3f}".format)
            view.add_row(f"  {row['name']}", time, ratio, verdict(row), *limit)
    return view


def update_rows(
    cases: Sequence[timing.Case], parameters: int, repeats: int
) -> list[dict[str, Any]]:
    """Times updates beside a copy, whose bandwidth is the limit of what they can reach.

    Args:
      cases: the base, then its methods, with their bytes.
      parameters: size of the array that is copied.
      repeats: number of rounds.

    Returns:
      The rows of `timing.measure`, with the `bytes` of each; the `bandwidth` of the copy in bytes a
      second; and `of_limit`, the median time over that of the bytes at that bandwidth.
    """
    copy = dataclasses.replace(method_cost.copy_case(parameters), base=cases[0].name)
    *rows, copied = timing.measure([*cases, copy], repeats)
    assert copy.bytes is not None
    bandwidth = 1e3 * copy.bytes / copied["milliseconds"][1]
    for row, case in zip(rows, cases, strict=True):
        assert case.bytes is not None
        seconds = row["milliseconds"][1] / 1e3
        row |= {"bytes": case.bytes, "bandwidth": bandwidth}
        row["of_limit"] = seconds * bandwidth / case.bytes
    return rows


def first_step_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Seconds before training goes on, and the ratio to Adam's first step.

    Args:
      title: what was timed.
      rows: the rows of `first_step.rows`.
    """
    columns = ["method", "init", "first step", "its run", "products", "ratio to Adam", "target"]
    limits = f"<= {first_step.STEP_TARGET:g} times Adam, init <= {first_step.INIT_TARGET:g} s"
    view = tables.table(columns, f"{title} (target: {limits})")
    for row in rows:
        seconds = [f"{row[key]:.2f} s" for key in ("init", "step", "run")]
        ratio = tables.quartiles(row["ratio"], "{:.2f}".format, "{:.3f}".format)
        passes = "pass" if row["passes"] else "FAIL"
        view.add_row(row["name"], *seconds, str(row["products"] or ""), ratio, passes)
    return view


def grouped(names: str | None) -> dict[str, list[Method]]:
    """The methods to time by their base, which comes first in each group.

    Args:
      names: names in the catalogue, separated by commas; None for all of them.

    Raises:
      UsageError: a name is unknown, cannot be timed here, or all are bases.
    """
    everything = [name for name, method in METHODS.items() if not method.per_worker]
    chosen = everything if names is None else [name.strip() for name in names.split(",")]
    with cli.usage():
        methods = get_methods(chosen, per_worker=False)
    groups: dict[str, list[Method]] = {}
    for method in methods:
        if method.base is not None:
            groups.setdefault(method.base, [METHODS[method.base]]).append(method)
    if not groups:
        raise cli.UsageError("--methods names only base methods; add one to compare")
    return groups


def chosen_tables(names: str | None) -> tuple[str, ...]:
    """The names of the tables to make.

    Args:
      names: some of `QUESTIONS`, separated by commas; None for all of them.

    Raises:
      UsageError: a name is unknown.
    """
    chosen = QUESTIONS if names is None else tuple(name.strip() for name in names.split(","))
    for name in chosen:
        cli.check_known("table", name, QUESTIONS)
    return chosen


def monitor_tables(repeats: int, console: Console) -> dict[str, Any]:
    """What watching the curvature costs Adam, printed for each network.

    Args:
      repeats: number of rounds.
      console: where the tables are printed.

    Returns:
      The rows and the summary of each network.
    """
    results: dict[str, Any] = {}
    for name in progress.each([*first_step.NETWORKS], "monitor, {}".format, expected=True):
        cases = method_cost.monitor_cases(first_step.NETWORKS[name]())
        rows = timing.measure(cases, repeats)
        summary = method_cost.monitor_summary(cases, rows)
        results[name] = {"rows": rows, **summary}
        target = method_cost.MONITOR_TARGET
        console.print()
        console.print(table(f"training step of Adam, its curvature watched, {name}", rows))
        console.print(
            f"at the default period the monitor adds {summary['time']:.1%} of the training time "
            f"(<= {target:.0%} {'pass' if summary['time'] <= target else 'FAIL'}), "
            f"{summary['cpu']:.1%} of the CPU time, and {summary['memory']:.2f} copies of the "
            "parameters"
        )
        between, record = (
            tables.quartiles(row["cpu_ratio"], "{:.2f}".format, "{:.3f}".format) for row in rows[1:]
        )
        console.print(f"CPU time, ratio to Adam: {between} between records, {record} with a record")
    return results


def memory_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Planned memory of gradients, beside one block and with many steps beside few.

    Args:
      title: whose memory it is.
      rows: the rows of `equilibrium_cost.memory_rows`.
    """
    columns = ["gradient", "megabytes", "over one block", "target", "over few steps", "target"]
    view = tables.table(columns, title)
    for row in rows:
        cells = []
        for key in ("over_block", "growth"):
            ratio, target = row[key], row[f"{key}_target"]
            passes = "" if target is None else "pass" if ratio <= target else "FAIL"
            cells += [f"{ratio:.2f}", f"<= {target:.2f} {passes}" if passes else ""]
        view.add_row(row["name"], tables.short(row["bytes"][-1] / 1e6), *cells)
    return view


def equilibrium_tables(repeats: int, console: Console) -> dict[str, Any]:
    """What the gradient of a fixed point costs, printed for each network.

    Args:
      repeats: number of rounds.
      console: where the tables are printed.

    Returns:
      The rows of each network.
    """
    few, steps = equilibrium_cost.FEW_STEPS, equilibrium_cost.STEPS
    results: dict[str, Any] = {}
    names = [*equilibrium_cost.NETWORKS]
    for name in progress.each(names, "equilibrium, {}".format, expected=True):
        block = equilibrium_cost.NETWORKS[name]()
        memory = equilibrium_cost.memory_rows(block, steps, few)
        console.print()
        console.print(memory_table(f"planned memory, {few} and {steps} steps, {name}", memory))
        hand, phantom = (
            timing.measure(cases, repeats, 1)
            for cases in equilibrium_cost.time_cases(block, steps, equilibrium_cost.BACKWARD_STEPS)
        )
        console.print()
        console.print(table(f"CPU time of the gradient of a fixed point, {name}", hand + phantom))
        results[name] = {"memory": memory, "by_hand": hand, "phantom": phantom}
    return results


def run(options: Options, groups: dict[str, list[Method]], console: Console) -> dict[str, Any]:
    """Times everything and prints one table per question.

    Args:
      options: the command's options.
      groups: the methods by their base.
      console: where the tables are printed.

    Returns:
      The results as plain JSON.
    """
    machine = timing.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if machine["load"] > 0.5 * machine["cores"]:
        console.print(
            "other programs keep the machine busy: mind the quartiles, or come back later"
        )
    side = max(1, math.isqrt(options.parameters // 10))
    batch, gpt = method_cost.BATCH_SIZE, first_step.NETWORKS["gpt"]
    gpt_words = "GPT of 0.8 million parameters"
    questions: dict[str, tuple[str, Callable[..., list[timing.Case]]]] = {
        "update": (
            f"update + apply, {10 * side * side:,} parameters",
            functools.partial(method_cost.update_cases, parameters=options.parameters),
        ),
        "step": (f"training step, MLP on 28 x 28 images, batch {batch}", method_cost.step_cases),
        "natural": (
            f"K-FAC's cycle and its steps between, batch {2 * batch}",
            method_cost.natural_cases,
        ),
        "low_memory": (
            f"training step, {gpt_words}",
            functools.partial(method_cost.low_memory_cases, network=gpt),
        ),
        "low_memory_compile": (
            f"compilation of the step, {gpt_words}",
            functools.partial(method_cost.low_memory_compile_cases, network=gpt),
        ),
        "compile": ("compilation of the step", method_cost.compile_cases),
    }
    wanted = chosen_tables(options.tables)
    questions = {name: question for name, question in questions.items() if name in wanted}
    compilations = min(options.repeats, COMPILE_REPEATS)
    results: dict[str, Any] = {"machine": machine, "repeats": options.repeats}
    networks = [*first_step.NETWORKS] if options.first_steps else []
    watched = len(first_step.NETWORKS) if "monitor" in wanted else 0
    blocks = len(equilibrium_cost.NETWORKS) if "equilibrium" in wanted else 0
    progress.expect(len(questions) * len(groups) + watched + blocks + len(networks))
    for key, (title, make) in questions.items():
        repeats, warm_ups = (compilations, 1) if "compile" in key else (options.repeats, 2)
        results[key] = [
            row
            for base in progress.each(
                [*groups], f"{key}: {{}} and its methods".format, expected=True
            )
            if (cases := make(base, groups[base]))
            for row in (
                update_rows(cases, options.parameters, repeats)
                if key == "update"
                else timing.measure(cases, repeats, warm_ups)
            )
        ]
        if results[key]:
            console.print()
            console.print(table(title, results[key]))
        if key == "update" and results[key]:
            bandwidths = ", ".join(
                dict.fromkeys(f"{row['bandwidth'] / 1e9:.1f}" for row in results[key])
            )
            console.print(
                f"bandwidth of a copy, beside each base: {bandwidths} GB/s; of the limit: the time "
                "over that of the bytes that an update has to read and write once"
            )
    if "monitor" in wanted:
        results["monitor"] = monitor_tables(min(options.repeats, MONITOR_REPEATS), console)
    if "equilibrium" in wanted:
        repeats = min(options.repeats, EQUILIBRIUM_REPEATS)
        results["equilibrium"] = equilibrium_tables(repeats, console)
    if options.first_steps:
        timed = dict.fromkeys(method for group in groups.values() for method in group)
        results["first_step"] = {}
        for name in progress.each(networks, "time to the first step, {}".format, expected=True):
            network = first_step.NETWORKS[name]
            rows = first_step.rows(network(), list(timed), options.first_steps)
            results["first_step"][name] = rows
            console.print()
            console.print(first_step_table(f"time to the first step, {name}", rows))
    console.print(
        f"\nMedians (quartiles) of {options.repeats} rounds, of compilations {compilations}. Bold: "
        "the bases. "
        "Updates of subspace methods project without refreshing; their steps refresh at the usual "
        "rhythm, the cold start left out; it is part of their first step."
    )
    return results


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    cli.check_files({"--json": options.json, "--html": options.html})
    # The tree, its gradient, its update and a state of two trees for the method and its base each.
    cli.check_memory(4 * 8 * options.parameters, f"a tree of {options.parameters:,} parameters")
    groups, console = grouped(options.methods), cli.console(100)
    chosen_tables(options.tables)
    if options.dry_run:
        methods = sum(map(len, groups.values())) - len(groups)
        lines = {
            "plan": f"{cli.plural(methods, 'method')} beside {cli.plural(len(groups), 'base')}: "
            "updates, steps, compilation, first steps",
            "runs": f"{cli.plural(options.repeats, 'round')} of each, "
            f"{cli.plural(options.first_steps, 'round')} of first steps",
            "parameters": f"{options.parameters:,} of the tree that is updated",
            "memory": f"up to {8 * 4 * options.parameters / 1e9:.3g} GB, from shapes: eight trees "
            "of float32",
            "time": cli.TIME_NOT_KNOWN,
        }
        return cli.print_forecast(console, lines)
    with progress.show(console, "bench"):
        results = run(options, groups, console)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(options.json, cli.to_json(results))
    if options.html is not None:
        title = "Methods of the catalogue beside their bases"
        pages.write_study(options.html, title, PROG, options, printed=console.printed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
