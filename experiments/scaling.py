"""What the methods send between devices: read from compiled steps, on paper, and timed.

    python -m experiments.scaling --task digits

1. Every method's training step is compiled for virtual devices, and its collectives are counted:
   in a step and, for methods that follow the Hessian's dominant subspace, in a refresh of it.
2. From those counts: how much a worker sends in a step among 1 to 1024 workers, and in how many
   messages one after the other, by the usual models of cost.
3. Steps are timed on 1, 2, 4, ... of the devices, the global batch being the same. Virtual devices
   share the cores of the machine, so this measures what the devices cost, not what they gain.

The metrics of a run (loss and finiteness, a few bytes) are not among the counts: the steps here
return none, so that what only they need falls away.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import models
import optax_accel as oa
from experiments import cli, data, hlo, timing
from experiments.methods import METHODS, Context, Method, get_methods
from experiments.reporting import tables
from experiments.runs.records import plain_options
from experiments.training import cluster, losses, networks, parallel
from experiments.training.parallel import Parallel
from experiments.training.step import Batch, StepOptions, TrainState, init_state, train_step

PROG = "python -m experiments.scaling"
# Of `parallel.MODES`; pmap is shard_map underneath.
MODES = ("jit", "fsdp", "shard_map")
WORKERS = tuple(2**k for k in range(11))
# Steps between averagings after the switch: the public code's command for ResNet-20 on CIFAR-10.
LOCAL_STEPS = 32
TOTAL_STEPS = 1000
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Count what the methods send between devices, and time it."""

    limits: ClassVar = {"rounds": cli.Range(0, 10**6)}

    task: str = "digits"
    """Data set: digits, mnist5k, cifar10_5k, ..."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own. An unknown name lists all."""
    methods: str | None = None
    """Methods to count, separated by commas; default: all."""
    modes: str = "jit,fsdp,shard_map"
    """Parallel modes, separated by commas."""
    batch_size: int = 64
    """Examples per step, over all devices."""
    devices: int = 8
    """Devices, a power of two; on a CPU, so many virtual ones are made."""
    timed: str = "sgd,bulk_sgd_gradient,decentlam"
    """Methods to time, separated by commas."""
    rounds: int = 20
    """Rounds of the timing; 0: no timing."""
    json: Path | None = None
    """Also write the numbers to this file."""


# Collectives --------------------------------------------------------------------------------------


# Costs --------------------------------------------------------------------------------------------


# Programs -----------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Steps of a run whose programs are alike.

    Attributes:
      share: of the steps of a long run.
      refresh: what the method does about its estimate of curvature.
    """

    share: float
    refresh: bool | str | None = None


def phases(method: Method) -> list[Phase]:
    """The steps of a method, the cold start of its curvature left out."""
    period = method.period
    kinds = collections.Counter(method.refresh(period + i) for i in range(period))
    steps_before_refreshes = sorted(kinds.items(), key=lambda item: bool(item[0]))
    return [Phase(number / period, kind) for kind, number in steps_before_refreshes]


class Programs:
    """Training steps of one model on one task.

    Args:
      task: the task; its first examples are the batch.
      model: name of the model.
      batch_size: examples in all.
      devices: the devices.
    """

    def __init__(self, task: data.Task, model: str, batch_size: int, devices: Sequence[jax.Device]):
        built = models.create(
            model,
            input_shape=task.input_shape,
            num_classes=task.num_classes,
            vocabulary_size=task.vocabulary_size,
        )
        self.graphdef, self.params, self.rest = networks.split(built)
        self.copy = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.num_classes = task.num_classes
        self.batch = {"x": task.train.x[:batch_size], "y": task.train.y[:batch_size]}
        self.objective = networks.objective(self.graphdef)
        self.devices = devices
        self._found: dict[Any, list[hlo.Collective]] = {}

    def runner(
        self, method: Method, mode: str, num_devices: int
    ) -> tuple[Parallel, Callable[[], TrainState]]:
        """A training step without metrics, and what makes its first state.

        Args:
          method: the method; one worker per device if its workers have a state of their own.
          mode: one of `MODES`.
          num_devices: the first of the devices.
        """
        workers = num_devices if method.per_worker else None
        tx = method.build(
            LEARNING_RATE,
            total_steps=TOTAL_STEPS,
            num_classes=self.num_classes,
            axis_name=parallel.AXIS if method.per_worker else None,
            num_workers=workers or 1,
            objective=self.objective.bind(rest=self.rest, **jax.tree.map(jnp.asarray, self.batch)),
            likelihood=losses.LIKELIHOODS["cross_entropy"],
        )

        options = StepOptions(per_worker=method.per_worker)

        def step(
            state: TrainState,
            batch: Batch,
            curvature: Batch | None,
            *,
            refresh: bool | str | None,
            axis_name: str | None,
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            state, _ = train_step(
                tx,
                self.objective,
                state,
                batch,
                curvature,
                refresh=refresh,
                axis_name=axis_name,
                options=options,
            )
            return state, {}

        runner = Parallel(mode, self.devices[:num_devices], step, workers=workers)
        return runner, lambda: init_state(tx, self.params, self.rest)

    def collectives(
        self, method: Method, mode: str, phase: Phase, num_devices: int | None = None
    ) -> list[hlo.Collective]:
        """What a step of a phase sends.

        Args:
          method: the method; one worker per device if its workers have a state of their own.
          mode: one of `MODES`.
          phase: the kind of step.
          num_devices: default: all.
        """
        num_devices = num_devices or len(self.devices)
        key = (method, mode, phase.refresh, num_devices)
        if key not in self._found:
            runner, make_state = self.runner(method, mode, num_devices)
            batch = runner.put_batch(self.batch)
            curvature = batch if phase.refresh else None
            state = runner.abstract_state(make_state)
            lowered = runner.lower(state, batch, curvature, phase.refresh)
            self._found[key] = hlo.collectives(lowered.compile())
        return self._found[key]


# 1. Counts ----------------------------------------------------------------------------------------


def counts(programs: Programs, method: Method, mode: str) -> list[dict[str, Any]]:
    """Collectives and bytes of a method's steps in a mode.

    Returns:
      A row per kind of step, what happens in each such step first, then what each conditional adds
      at times. ``calls``: number of collectives by kind; ``bytes``: of the arrays; ``sent``: bytes
      that each worker sends; ``mean``: the same on average over the steps, in the first row,
      without what happens at times.
    """
    rows, mean = [], 0.0
    for phase in phases(method):
        name = "each" if not phase.refresh else f"refresh, 1 in {round(1 / phase.share)}"
        name = "each, a refresh" if phase.refresh and phase.share > 0.5 else name
        always, sometimes = hlo.split(programs.collectives(method, mode, phase))
        mean += phase.share * hlo.sent(always)
        for found in (always, *sometimes):
            calls: collections.Counter[str] = collections.Counter()
            for collective in found:
                calls[collective.kind] += collective.times or 1
            rows.append(
                {
                    "method": method.name,
                    "mode": mode,
                    "step": name if found is always else f"{name}, at times",
                    "calls": dict(calls),
                    "bytes": sum(c.bytes * (c.times or 1) for c in found),
                    "sent": hlo.sent(found),
                    "at_least": any(c.times is None for c in found),
                }
            )
    rows[0]["mean"] = mean
    return rows


def counts_table(rows: Sequence[dict[str, Any]], programs: Programs) -> tuple[Table, list[str]]:
    """The counts, methods with the same ones in all modes together, and notes on those."""
    columns = ["method", "mode", "step", *(kind.replace("-", "-\n") for kind in hlo.KINDS)]
    columns += ["copies", "sent", "sent\non average"]
    view = tables.table(columns, f"collectives on {len(programs.devices)} devices", left=3)

    def copies(size: float) -> str:
        return f"{size / programs.copy:.2f}"

    lines: dict[str, list[list[str]]] = {}
    for row in rows:
        least = "≥ " if row["at_least"] else ""
        calls = (row["calls"].get(kind) for kind in hlo.KINDS)
        line = [row["mode"], row["step"], *(f"{least}{n}" if n else "" for n in calls)]
        line += [least + copies(row["bytes"]), least + copies(row["sent"])]
        line.append(copies(row["mean"]) if "mean" in row else "")
        lines.setdefault(row["method"], []).append(line)
    groups: dict[str, list[str]] = {}
    for method, own in lines.items():
        same = next((name for name in groups if lines[name] == own), None)
        if same is not None:
            groups[same].append(method)
            continue
        groups[method] = []
        before = None
        for i, (mode, *cells) in enumerate(own):
            view.add_row("" if i else method, "" if mode == before else mode, *cells)
            before = mode
    notes = [f"Like {name}: {', '.join(others)}." for name, others in groups.items() if others]
    return view, notes


# 2. On paper --------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A row of the table on paper.

    Attributes:
      name: what is shown.
      method: what is compiled.
      every: steps between those in which the last conditional of the program sends something; the
        others never do. None: no conditional ever does.
      topology: of the workers from their number, where they talk to some others only.
    """

    name: str
    method: Method
    every: int | None = None
    topology: Callable[[int], oa.topologies.Topology] | None = None


def _mesh_2d(workers: int) -> oa.topologies.Topology:
    rows = 2 ** (int(math.log2(workers)) // 2)
    return oa.topologies.mesh_2d(rows, workers // rows)


TOPOLOGIES: dict[str, Callable[[int], oa.topologies.Topology]] = {
    "ring": oa.topologies.ring,
    "exponential": oa.topologies.exponential,
    "symmetric exponential": functools.partial(oa.topologies.exponential, symmetric=True),
    "one-peer exponential": oa.topologies.one_peer_exponential,
    "2-D mesh": _mesh_2d,
    "complete": oa.topologies.complete,
}


def entries(names: Sequence[str]) -> list[Entry]:
    """The rows of the table on paper that are variants of the given methods."""
    result = [Entry(name, METHODS[name]) for name in ("sgd", "extrap_sgd_local", "bulk_sgd")]

    post_local_sgd = dataclasses.replace(
        METHODS["post_local_sgd"],
        from_context=lambda context: {
            "local_steps": LOCAL_STEPS,
            "switch_step": 0,
            "axis_name": context.axis_name,
        },
    )
    result.append(Entry(f"post_local_sgd, H = {LOCAL_STEPS}", post_local_sgd, LOCAL_STEPS))
    for name, topology in TOPOLOGIES.items():
        # DecentLaM sends the same, but diverges with momentum on the directed topologies.
        dmsgd = dataclasses.replace(
            METHODS["dmsgd"], from_context=functools.partial(_on_topology, topology=topology)
        )
        result.append(Entry(f"dmsgd, {name}", dmsgd, None, topology))
    return [entry for entry in result if entry.method.name in names]


def _on_topology(
    context: Context, topology: Callable[[int], oa.topologies.Topology]
) -> dict[str, Any]:
    return {
        "topology": topology(context.num_workers),
        "axis_name": context.axis_name,
        "consensus_every": 0,
    }


def on_paper(programs: Programs, entry: Entry, numbers: Sequence[int] = WORKERS) -> list[hlo.Cost]:
    """The cost of a step on average, for each number of workers.

    The program of all devices gives number and bytes of the collectives; the number of permutes
    grows with the workers as the topology says. So few workers that a topology makes them all
    neighbors have a program of their own, with an all-reduce.
    """
    return [_mean_cost(programs, entry, workers) for workers in numbers]


def _mean_cost(programs: Programs, entry: Entry, workers: int) -> hlo.Cost:
    if workers == 1:
        return hlo.Cost(0.0, 0)
    devices, sends = len(programs.devices), 1.0
    if entry.topology is not None:
        topology = entry.topology(workers)
        devices = workers if topology.is_all_reduce and workers < devices else devices
        sends = topology.sends_per_step / entry.topology(devices).sends_per_step
    mean = hlo.Cost(0.0, 0)
    for phase in phases(entry.method):
        always, sometimes = hlo.split(
            programs.collectives(entry.method, "shard_map", phase, devices)
        )
        if entry.every is not None:
            mean += hlo.total_cost(sometimes[-1], workers) * (phase.share / entry.every)
        for collective in always:
            factor = sends if collective.kind == "collective-permute" else 1.0
            mean += hlo.total_cost([collective], workers) * (phase.share * factor)
    return mean


def paper_table(title: str, rows: dict[str, list[float]], form: Callable[[float], str]) -> Table:
    """One line per entry, one column per number of workers."""
    view = tables.table(["workers", *map(str, WORKERS)], title)
    for name, values in rows.items():
        view.add_row(name, *map(form, values))
    return view


# 3. Timing ----------------------------------------------------------------------------------------


def time_steps(programs: Programs, method: Method, mode: str, rounds: int) -> list[dict[str, Any]]:
    """Times steps of the same global batch on 1, 2, 4, ... devices, in interleaved rounds.

    Returns:
      As `timing.measure`; the base is one device.
    """
    period = method.period
    cases = []
    num_devices = 1
    while num_devices <= len(programs.devices):
        runner, make_state = programs.runner(method, mode, num_devices)
        call = functools.partial(_blocked_step, runner, runner.put_batch(programs.batch), method)
        base = None if num_devices == 1 else "1"
        carry = runner.init(make_state)
        cases.append(
            timing.Case(str(num_devices), base, call, carry, period * math.ceil(10 / period))
        )
        num_devices *= 2
    return timing.measure(cases, rounds)


def _blocked_step(runner: Parallel, batch: Any, method: Method, i: int, state: Any) -> Any:
    refresh = method.refresh(i, cold_start=False)
    state, _ = runner.step(state, batch, batch if refresh else None, refresh)
    # Steps in a queue can hang on virtual devices.
    return jax.block_until_ready(state)


def timing_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios to one device, medians with quartiles in brackets."""
    numbers = [case["name"] for case in rows[0]["devices"]][1:]
    columns = ["method", "mode", "1 device", *(f"{number} devices" for number in numbers)]
    view = tables.table(columns, "time per step, relative to one device", left=2)
    for row in rows:
        one, *others = row["devices"]
        ratios = [case["ratio"] for case in others]
        view.add_row(
            row["method"],
            row["mode"],
            f"{one['milliseconds'][1]:.2f} ms",
            *(f"{median:.2f} ({low:.2f}–{high:.2f})" for low, median, high in ratios),
        )
    return view


# The command --------------------------------------------------------------------------------------


def _check(options: Options) -> tuple[Programs, list[Method], list[str], list[Method]]:
    """The programs, and the methods, modes and timed methods that the options name.

    Raises:
      UsageError, DataError: an option is wrong.
    """
    options.check()
    cli.check_file("--json", options.json)
    cluster.check_virtual_devices(options.devices)
    data.check_classification(options.task)
    cli.check_known("model", options.model, models.list())
    modes = [mode.strip() for mode in options.modes.split(",")]
    for mode in modes:
        cli.check_known("parallel mode", mode, MODES)
    if options.devices < 2 or options.devices & (options.devices - 1):
        raise cli.UsageError(f"--devices must be a power of two from 2 on, got {options.devices}")
    try:
        names = METHODS if options.methods is None else options.methods.split(",")
        methods = get_methods([name.strip() for name in names])
        timed = get_methods([name.strip() for name in options.timed.split(",")])
        parallel.check_divisible(options.batch_size, options.devices, "--batch-size")
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    task = data.load_task(options.task, data_dir=options.data_dir)
    if not 1 <= options.batch_size <= len(task.train):
        raise cli.UsageError(
            f"--batch-size must be between 1 and the {len(task.train)} training examples, got "
            f"{options.batch_size}"
        )
    # Only possible before JAX starts its backends; afterwards what is there has to do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", options.devices)
    devices = jax.devices()[: options.devices]
    if len(devices) < options.devices:
        raise cli.UsageError(
            f"--devices {options.devices}: there are only {len(devices)} of kind "
            f"{devices[0].platform}; set JAX_PLATFORMS=cpu to use virtual ones"
        )
    try:
        programs = Programs(task, options.model or task.default_model, options.batch_size, devices)
    except ValueError as error:  # the model does not take such examples
        raise cli.UsageError(str(error)) from None
    return programs, methods, modes, timed


def run(options: Options, console: Console) -> dict[str, Any]:
    """Counts, costs and times; prints the tables.

    Raises:
      UsageError, DataError: an option is wrong.
    """
    programs, methods, modes, timed = _check(options)
    machine = timing.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    console.print(
        f"{options.task}, batch {options.batch_size}; a copy of the parameters has "
        f"{programs.copy:,} bytes, and all amounts are in such copies"
    )
    counted = [
        row
        for method in methods
        for mode in modes
        if not (method.per_worker and mode == "fsdp")
        for row in counts(programs, method, mode)
    ]
    view, notes = counts_table(counted, programs)
    console.print()
    console.print(view)
    for note in notes:
        console.print(note)
    console.print(
        "Copies: size of the arrays reduced, gathered or passed on, in copies of the parameters. "
        "Sent: by each worker, collectives around a ring; on average over the steps of a run, "
        "without what happens at times, in a conditional. Metrics are left out. Workers with a "
        "state of their own are simulated in the mode jit, where each step pays for what is rare "
        "and permutes gather; the mode fsdp has none."
    )

    chosen = entries([method.name for method in methods])
    paper = {entry.name: on_paper(programs, entry) for entry in chosen}
    if paper:
        sent = {name: [c.sent / programs.copy for c in costs] for name, costs in paper.items()}
        hops = {name: [float(c.hops) for c in costs] for name, costs in paper.items()}
        for title, rows in (("copies sent per worker and step", sent), ("hops per step", hops)):
            console.print()
            console.print(paper_table(f"on paper: {title}", rows, lambda v: f"{v:.4g}"))
        console.print(
            "From the counts of the mode shard_map by the models of Thakur et al. (2005): around a "
            "ring of n workers an all-reduce of b bytes sends 2 (n - 1) / n b in 2 (n - 1) hops "
            "(recursive halving and doubling: as much in 2 log2 n hops); a permute, of which there "
            "is one for each array and neighbor, sends b in one. post_local_sgd: after its switch; "
            "before, it is as sgd."
        )

    times = []
    if options.rounds:
        times = [
            {
                "method": m.name,
                "mode": mode,
                "devices": time_steps(programs, m, mode, options.rounds),
            }
            for m in timed
            for mode in modes
            if not (m.per_worker and mode == "fsdp")
        ]
        console.print()
        console.print(timing_table(times))
        console.print(
            f"Medians (quartiles) of {options.rounds} interleaved rounds, the global batch the "
            "same, each step waited for. The virtual devices share the cores of one machine: this "
            "is the overhead of the devices, not a speed-up."
        )
    return {
        "machine": machine,
        "options": plain_options(options),
        "copy_bytes": programs.copy,
        "counts": counted,
        "workers": WORKERS,
        "paper": {name: [c._asdict() for c in costs] for name, costs in paper.items()},
        "times": times,
    }


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        results = run(options, cli.console(150))
    except (cli.UsageError, data.DataError) as error:
        return cli.fail(error)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(options.json, cli.to_json(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
