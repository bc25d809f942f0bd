"""What methods send between devices, and what the devices cost, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments import hlo
from experiments.reporting import tables

ON_COUNTS = (
    "Copies: size of the arrays reduced, gathered or passed on, in copies of the parameters. "
    "Sent: by each worker, collectives around a ring; on average over the steps of a run, "
    "without what happens at times, in a conditional. Metrics are left out. Workers with a "
    "state of their own are simulated in the mode jit, where each step pays for what is rare "
    "and permutes gather; the mode fsdp has none."
)
ON_PAPER = (
    "From the counts of the mode shard_map by the models of Thakur et al. (2005): around a "
    "ring of n workers an all-reduce of b bytes sends 2 (n - 1) / n b in 2 (n - 1) hops "
    "(recursive halving and doubling: as much in 2 log2 n hops); a permute, of which there "
    "is one for each array and neighbor, sends b in one. post_local_sgd: after its switch; "
    "before, it is as sgd."
)


def counts_table(
    rows: Sequence[dict[str, Any]], num_devices: int, copy_bytes: int
) -> tuple[Table, list[str]]:
    """The counts, and notes on the methods that have the same ones in all modes.

    Args:
      rows: the rows of `experiments.training.studies.communication.counts` of all methods.
      num_devices: number of devices that they are for.
      copy_bytes: size of a copy of the parameters, in which amounts are shown.
    """
    columns = ["method", "mode", "step", *(kind.replace("-", "-\n") for kind in hlo.KINDS)]
    columns += ["copies", "sent", "sent\non average"]
    view = tables.table(columns, f"collectives on {num_devices} devices", left=3)

    def copies(size: float) -> str:
        return f"{size / copy_bytes:.2f}"

    lines: dict[str, list[list[str]]] = {}
    for row in rows:
        least = "≥ " if row["at_least"] else ""
        calls = (row["calls"].get(kind) for kind in hlo.KINDS)
        line = [row["mode"], row["step"], *(f"{least}{n}" if n else "" for n in calls)]
        line += [least + copies(row["bytes"]), least + copies(row["sent"])]
        line.append(copies(row["mean"]) if "mean" in row else "")
        lines.setdefault(row["method"], []).append(line)
    groups: dict[str, list[str]] = {}
    for method, table_lines in lines.items():
        same = next((name for name in groups if lines[name] == table_lines), None)
        if same is not None:
            groups[same].append(method)
            continue
        groups[method] = []
        before = None
        for i, (mode, *cells) in enumerate(table_lines):
            view.add_row("" if i else method, "" if mode == before else mode, *cells)
            before = mode
    notes = [f"Like {name}: {', '.join(others)}." for name, others in groups.items() if others]
    return view, notes


def paper_table(title: str, workers: Sequence[int], rows: Mapping[str, Sequence[float]]) -> Table:
    """One line per entry, one column per number of workers.

    Args:
      title: the line above the table.
      workers: the numbers of workers.
      rows: by entry, one value per number of workers.
    """
    view = tables.table(["workers", *map(str, workers)], title)
    for name, values in rows.items():
        view.add_row(name, *(f"{value:.4g}" for value in values))
    return view


def timing_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios to one device, medians with quartiles in brackets.

    Args:
      rows: method, mode, and under ``"devices"`` the rows of
        `experiments.training.studies.communication.time_steps`.
    """
    numbers = [case["name"] for case in rows[0]["devices"]][1:]
    columns = ["method", "mode", "1 device", *(f"{number} devices" for number in numbers)]
    view = tables.table(columns, "time per step, relative to one device", left=2)
    for row in rows:
        one, *others = row["devices"]
        view.add_row(
            row["method"],
            row["mode"],
            f"{one['milliseconds'][1]:.2f} ms",
            *(tables.quartiles(case["ratio"], "{:.2f}".format) for case in others),
        )
    return view
