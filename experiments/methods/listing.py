"""The catalogue as text, for `--list`."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.methods.catalogue import Method


def catalogue(entries: Sequence[Method]) -> str:
    """All methods by family, with what they do, paper, fidelity, extra cost, learning rates."""
    lines = []
    for family in dict.fromkeys(entry.family for entry in entries):
        lines.append(f"{family}:")
        for entry in entries:
            if entry.family != family:
                continue
            grid = " ".join(f"{rate:g}" for rate in entry.learning_rates)
            compared = f", compared with {entry.base}" if entry.base else ""
            lines += [
                f"  {entry.name}: {entry.summary}",
                f"      {entry.fidelity}: {entry.paper}, {entry.link}",
                f"      cost: {entry.extra_cost()}{compared}",
                f"      learning rates {grid}",
            ]
    return "\n".join(lines)
