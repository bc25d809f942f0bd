"""What the accelerator report shows: one table per question, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from experiments.reporting import tables

Record = dict[str, Any]


class Section(NamedTuple):
    """One table.

    Attributes:
      title: what was measured.
      columns: their names; the first `left` ones hold words.
      rows: the cells.
      left: number of columns that hold words.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    left: int


def sections(records: dict[str, list[Record]], machine: Record) -> list[Section]:
    """The tables of what has been measured, and one that names what has not.

    Args:
      records: by section, those of the finished rows, each with its identity and ``status``.
      machine: ``parameters`` of the updated tree and ``base``, the method of the ratios.
    """
    base = machine["base"]
    update = Section(
        f"update + apply, {machine['parameters']:,} float32 parameters",
        ["method", "ms", f"x {base}", "GB moved", "copy GB/s", "x time of its bytes", "state GiB"],
        [
            [
                record["method"],
                _quartiles(record["milliseconds"]),
                _quartiles(record["ratio"]),
                f"{record['moved_bytes'] / 1e9:.2f}",
                tables.short(record["bandwidth"][1] / 1e9),
                _quartiles(record["of_limit"]),
                _gib(record["state_bytes"]),
            ]
            for record in _measured(records, "update")
        ],
        1,
    )
    step = Section(
        "training step",
        ["network", "in", "method", "ms", f"x {base}", "examples / s"],
        [
            [
                *_place(record),
                record["method"],
                _quartiles(record["milliseconds"]),
                _quartiles(record["ratio"]),
                tables.short(1e3 * record["examples"] / record["milliseconds"][1]),
            ]
            for record in _measured(records, "step")
        ],
        3,
    )
    first = Section(
        "time to the first step, in seconds, compilation included",
        ["network", "in", "method", "init", "compilation", "run", "all", f"x {base}"],
        [
            [
                *_place(record),
                record["method"],
                *(tables.short(record[f"{part}_seconds"]) for part in _FIRST),
                _ratio(record["first_ratio"]),
            ]
            for record in _measured(records, "step")
        ],
        3,
    )
    memory = Section(
        "memory in GiB",
        ["network", "in", "method", "params + state", "step, planned", f"x {base}", "device peak"],
        [
            [
                *_place(record),
                record["method"],
                _gib(record["state_bytes"]),
                _gib(record["step_bytes"]),
                _ratio(record["bytes_ratio"]),
                _gib(record["peak_bytes"]),
            ]
            for record in _measured(records, "step")
        ],
        3,
    )
    micro = Section(
        f"micro-batches, {base}: over one whole batch",
        ["network", "in", "micro-batches", "x time", "x memory"],
        [
            [
                *_place(record),
                str(record["micro_batches"]),
                _quartiles(record["ratio"]),
                _ratio(record["bytes_ratio"]),
            ]
            for record in _measured(records, "micro-batches")
        ],
        2,
    )
    slow = Section(
        f"an input that takes as long as a step, {base}: milliseconds a step",
        ["network", "in", "no delay", "in turn", "queued", "prefetched", "hidden"],
        [
            [
                *_place(record),
                *(tables.short(record[f"{name}_milliseconds"]) for name in _INPUT),
                f"{record['hidden']:.0%}",
            ]
            for record in _measured(records, "input")
        ],
        2,
    )
    return [one for one in (update, step, first, memory, micro, slow) if one.rows]


_FIRST = ("init", "compile", "run", "first")
_INPUT = ("no_delay", "in_turn", "queued", "prefetched")


def gaps(
    records: dict[str, list[Record]], left_out: dict[str, list[Record]], reason: str
) -> Section:
    """The rows that have no numbers, with their reasons; those left out are joined.

    Args:
      records: by section, those of the finished rows.
      left_out: by section, what identifies the rows that were left out.
      reason: why they were.
    """
    rows = [
        [f"{section} {_name(record)}", record["status"], record["reason"]]
        for section, group in records.items()
        for record in group
        if record["status"] != "measured"
    ]
    joined: dict[str, list[str]] = {}
    for section, group in left_out.items():
        for identity in group:
            method = identity.get("method")
            place = _name({**identity, "method": None})
            joined.setdefault(f"{section} {place}".strip(), []).extend([method] if method else [])
    for place, methods in joined.items():
        name = f"{place}: {', '.join(methods)}" if methods else place
        rows.append([name, "left out", f"{reason}; the same command continues"])
    return Section("not measured", ["row", "what", "why"], rows, 3)


def notes(records: dict[str, list[Record]]) -> list[str]:
    """What the methods warned of, each line once, behind the rows concerned.

    Args:
      records: by section, those of the finished rows.
    """
    rows: dict[str, list[str]] = {}
    for group in records.values():
        for record in group:
            for note in record.get("notes", ()):
                rows.setdefault(note, []).append(_name(record))
    return [f"{', '.join(names)}: {note}" for note, names in rows.items()]


def heading(machine: Record) -> list[str]:
    """Whose figures these are, in a few sentences.

    Args:
      machine: what `studies.accelerator.machine` says, with ``matmul_precision``.
    """
    lines = []
    if machine["platform"] == "cpu":
        lines.append(
            "These are figures of a CPU: they show that the report works, and say nothing about "
            "a GPU or a TPU. On a machine that has one, install JAX for it, such as jax[cuda13] or "
            "jax[tpu]."
        )
    memory = "" if machine["memory"] is None else f", {machine['memory'] / 2**30:.1f} GiB"
    one_of = "" if machine["devices"] == 1 else f", one of {machine['devices']}"
    packages = ("jax", "jaxlib", "optax", "flax", "python")
    lines.append(
        f"{machine['device']} ({machine['platform']}{memory}{one_of}), {machine['cores']} cores; "
        + ", ".join(f"{name} {machine[name]}" for name in packages)
    )
    lines.append(
        "Times are medians (quartiles) of interleaved rounds, ratios those to the base timed "
        "beside it, with donated buffers, waiting for every round. In f32 rows, matrices are "
        f"multiplied with jax.default_matmul_precision({machine['matmul_precision']!r}); in bf16 "
        "rows the network computes in bfloat16 on float32 parameters, also where a method "
        "evaluates it. The examples are noise, but for the embedded digits."
    )
    return lines


def legend(machine: Record) -> str:
    """How to read the columns.

    Args:
      machine: ``base``, the method of the ratios.
    """
    return (
        "GB moved: what an update has to read and write once; beside it the bandwidth of a copy "
        "in the same rounds, and the time over what those bytes take at that bandwidth. Updates "
        f"of {machine['base']} are timed beside themselves, which shows how far ratios spread; "
        "those of subspace methods project without refreshing; methods that evaluate the network "
        "have no update of their own. Steps refresh at their usual rhythm, behind the first one; "
        f"subspace methods take their products on {machine['curvature_share']:.3g} of the batch. "
        f"First steps follow that of {machine['base']}, whose tuned kernels a compiler may reuse. "
        "Device peak: where the row raised it above all rows before, the state of "
        f"{machine['base']} included."
    )


def view(section: Section) -> Table:
    """A section on the terminal.

    Args:
      section: the section.
    """
    table = tables.table(section.columns, section.title, left=section.left, wrap=True)
    for row in section.rows:
        table.add_row(*row)
    return table


def markdown(shown: Sequence[Section], gaps: Section, notes: Sequence[str], machine: Record) -> str:
    """The whole report as Markdown, with the device's name as its heading.

    Args:
      shown: the tables.
      gaps: what was not measured.
      notes: further lines.
      machine: the device and the versions.
    """
    parts = [f"## {_escaped(machine['device'])}", *map(_escaped, heading(machine))]
    for section in (*shown, *([gaps] if gaps.rows else [])):
        lines = [
            _line(section.columns),
            _line(["---"] * section.left + ["---:"] * (len(section.columns) - section.left)),
            *map(_line, section.rows),
        ]
        parts += [f"**{section.title[0].upper()}{section.title[1:]}**", "\n".join(lines)]
    parts += [legend(machine), "\n".join(f"- {_escaped(note)}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    for mark in "\\|`*_<[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _measured(records: dict[str, list[Record]], section: str) -> list[Record]:
    return [record for record in records.get(section, ()) if record["status"] == "measured"]


def _place(record: Record) -> list[str]:
    return [record["network"], record["precision"]]


def _name(record: Record) -> str:
    identity = (record.get(key) for key in ("network", "precision", "method"))
    return " ".join(part for part in identity if part)


def _quartiles(values: Sequence[float] | None) -> str:
    return "" if values is None else tables.quartiles(values, tables.short)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.3g}"
