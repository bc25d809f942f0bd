"""Do to training runs what machines and people do to them, and see what is lost.

    python -m experiments.fault_drill --quick
    python -m experiments.fault_drill

Each fault is real: processes of `experiments.train` on the digits task, in a temporary folder, are
killed, interrupted, left without disk space or fed with broken numbers, and their checkpoints are
damaged. A fault is survived if the run, continued, ends with the metrics and the result of a run
that nothing happened to, and bit by bit with its state; or, where a run has to be refused, if it
ends with the right exit code and one clear line, and nothing in its folder has changed.

Lost steps are those after the latest checkpoint that the metrics already had and that had to be
done again.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import cli, progress
from experiments.reporting import tables
from experiments.training.studies.drill import Ground
from experiments.training.studies.faults import FAULTS

PROG = "python -m experiments.fault_drill"


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Do to training runs what machines and people do to them, and see what is lost."""

    quick: bool = False
    """Each fault once, and three kills instead of twenty."""
    seed: int = 0
    """Decides when the faults happen."""


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 1 if a fault was not survived."""
    options = cli.parse(Options(), argv, PROG)
    console = cli.console(120)
    columns = ["fault", "what happened", "times", "survived", "lost: mean", "max", "seconds"]
    table = tables.table(columns, "Faults injected into training runs", left=2)
    problems = []
    plan = {name: seldom if options.quick else often for name, (_, often, seldom) in FAULTS.items()}
    plan = {name: times for name, times in plan.items() if times}
    if options.dry_run:
        lines = {
            "plan": f"{cli.plural(len(plan), 'fault')} in processes of their own, in a temporary "
            "folder",
            "runs": f"{sum(plan.values())} and one that nothing happens to",
            "parameters": "those of the digits' network",
            "memory": "one or two processes of `train` on the digits at a time",
            "time": cli.TIME_NOT_KNOWN,
        }
        return cli.print_forecast(console, lines)
    with (
        tempfile.TemporaryDirectory(prefix="fault-drill-") as folder,
        progress.show(console, "fault_drill", sum(plan.values()) + 1),
    ):
        ground = Ground(Path(folder), options.seed)
        console.print(f"a run of {ground.steps} steps that nothing happens to")
        progress.tell("the run that nothing happens to")
        ground.reference  # noqa: B018  (made here, so that no fault is charged with its time)
        progress.advance()
        for name, times in plan.items():
            fault = FAULTS[name][0]
            outcomes, began = [], time.monotonic()
            for i in range(times):
                progress.tell(f"{name}, {i + 1} of {times}")
                try:
                    outcomes.append(fault(ground))
                except Exception as failure:
                    problems.append(f"{name}: {type(failure).__name__}: {failure}")
                progress.advance()
            console.print(f"{name}: survived {len(outcomes)} of {times}")
            lost = [steps for outcome in outcomes for steps in outcome.lost]
            failed = times - len(outcomes)
            table.add_row(
                name,
                outcomes[-1].detail if outcomes else "",
                str(len(lost) + failed),
                str(len(lost)),
                f"{np.mean(lost):.1f}" if lost else "",
                str(max(lost)) if lost else "",
                f"{time.monotonic() - began:.0f}",
            )
    console.print(table)
    for problem in problems:
        console.print(f"not survived: {problem}", style="red", soft_wrap=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
