"""What training steps send between devices: counted in their programs, on paper, and timed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import models
import optax_accel as oa
from experiments import data, hlo, timing
from experiments.methods import METHODS, Context, Method, Phase
from experiments.training import losses, networks, parallel
from experiments.training.parallel import Parallel
from experiments.training.step import Batch, StepOptions, TrainState, init_state, train_step

# Of `parallel.MODES`; pmap is shard_map underneath.
MODES = ("jit", "fsdp", "shard_map")
# Steps between averagings after the switch: the public code's command for ResNet-20 on CIFAR-10.
LOCAL_STEPS = 32
TOTAL_STEPS = 1000
LEARNING_RATE = 1e-3


class Programs:
    """Training steps of one model on one task.

    Args:
      task: the task; its first examples are the batch.
      model: name of the model.
      batch_size: number of examples over all devices.
      devices: the devices.

    Raises:
      ValueError: the model does not take the task's examples.
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
        self._collectives: dict[Any, list[hlo.Collective]] = {}

    def runner(
        self, method: Method, mode: str, num_devices: int
    ) -> tuple[Parallel, Callable[[], TrainState]]:
        """A training step without metrics, and a function that makes its first state.

        Args:
          method: the method; it has one worker per device if its workers have separate states.
          mode: one of `MODES`.
          num_devices: number of devices, the first ones.
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
          method: the method; it has one worker per device if its workers have separate states.
          mode: one of `MODES`.
          phase: the kind of step.
          num_devices: number of devices, the first ones; None for all.
        """
        num_devices = num_devices or len(self.devices)
        key = (method, mode, phase.refresh, num_devices)
        if key not in self._collectives:
            runner, make_state = self.runner(method, mode, num_devices)
            batch = runner.put_batch(self.batch)
            curvature = batch if phase.refresh else None
            state = runner.abstract_state(make_state)
            lowered = runner.lower(state, batch, curvature, phase.refresh)
            self._collectives[key] = hlo.collectives(lowered.compile())
        return self._collectives[key]


# Counts -----------------------------------------------------------------------------------------


def counts(programs: Programs, method: Method, mode: str) -> list[dict[str, Any]]:
    """Collectives and bytes of a method's steps in a mode.

    Args:
      programs: the training steps.
      method: the method.
      mode: one of `MODES`.

    Returns:
      For each kind of step a row with what happens in every such step, then one for what each
      conditional adds at times. ``calls`` is the number of collectives by kind, ``bytes`` the size
      of their arrays, ``sent`` the bytes that each worker sends, ``at_least`` whether a loop runs
      an unknown number of times. The first row has the ``mean`` bytes sent over all steps, without
      what happens at times.
    """
    rows, mean = [], 0.0
    for phase in method.phases:
        name = "each" if not phase.refresh else f"refresh, 1 in {round(1 / phase.share)}"
        name = "each, a refresh" if phase.refresh and phase.share > 0.5 else name
        always, sometimes = hlo.split(programs.collectives(method, mode, phase))
        mean += phase.share * hlo.sent(always)
        for group in (always, *sometimes):
            calls: collections.Counter[str] = collections.Counter()
            for collective in group:
                calls[collective.kind] += collective.times or 1
            rows.append(
                {
                    "method": method.name,
                    "mode": mode,
                    "step": name if group is always else f"{name}, at times",
                    "calls": dict(calls),
                    "bytes": sum(c.bytes * (c.times or 1) for c in group),
                    "sent": hlo.sent(group),
                    "at_least": any(c.times is None for c in group),
                }
            )
    rows[0]["mean"] = mean
    return rows


# On paper ---------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A row of the table on paper.

    Attributes:
      name: what the table shows.
      method: the method that is compiled.
      every: number of steps after which the last conditional of the program sends something; the
        other conditionals never do. None if no conditional ever does.
      topology: makes the topology from the number of workers; None if all talk to all.
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
    """The rows of the table on paper that are variants of some methods.

    Args:
      names: the methods.
    """
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


def on_paper(programs: Programs, entry: Entry, workers: int) -> hlo.Cost:
    """The mean cost of a step among a number of workers.

    The program of all devices gives number and bytes of the collectives; the number of permutes
    grows with the workers as the topology says. Where a topology makes a small number of workers
    all neighbors, the program of that number is read instead, which has an all-reduce.

    Args:
      programs: the training steps.
      entry: what is computed.
      workers: number of workers.
    """
    if workers == 1:
        return hlo.Cost(0.0, 0)
    devices, sends = len(programs.devices), 1.0
    if entry.topology is not None:
        topology = entry.topology(workers)
        devices = workers if topology.is_all_reduce and workers < devices else devices
        sends = topology.sends_per_step / entry.topology(devices).sends_per_step
    mean = hlo.Cost(0.0, 0)
    for phase in entry.method.phases:
        always, sometimes = hlo.split(
            programs.collectives(entry.method, "shard_map", phase, devices)
        )
        if entry.every is not None:
            mean += hlo.total_cost(sometimes[-1], workers) * (phase.share / entry.every)
        for collective in always:
            factor = sends if collective.kind == "collective-permute" else 1.0
            mean += hlo.total_cost([collective], workers) * (phase.share * factor)
    return mean


# Timing -----------------------------------------------------------------------------------------


def time_steps(programs: Programs, method: Method, mode: str, rounds: int) -> list[dict[str, Any]]:
    """Times steps of the same global batch on 1, 2, 4, ... devices, in interleaved rounds.

    Args:
      programs: the training steps.
      method: the method.
      mode: one of `MODES`.
      rounds: number of rounds.

    Returns:
      The rows of `timing.measure`, with one device as the base.
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
