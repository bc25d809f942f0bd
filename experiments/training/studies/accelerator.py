"""What methods cost on one device: updates of a large tree, and steps of networks people train."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
from experiments import cli, data, hlo, timing
from experiments.methods import METHODS, Method
from experiments.runs.records import versions
from experiments.runs.units import Unit
from experiments.training import losses, networks
from experiments.training.precision import PRECISIONS
from experiments.training.step import StepOptions, init_state, train_step
from experiments.training.studies import method_cost, overlap

PyTree = Any
Record = dict[str, Any]

BASE = "adam"
# The methods whose training steps are measured: the base first; those whose steps have several
# forms, all of which are compiled, last.
STEP_METHODS = (BASE, "muon", "stoch_grad_adam", "extrap_sgd", "gnp_sgd", "kfac", "bulk_sgd")
# Of the subspace methods, on any network: as many as they have for ten classes.
DIRECTIONS = 10
# They take their products on this share of a batch: ten directions side by side on a whole batch
# need ten times the memory of a gradient, and `experiments.trackers` finds the subspace followed
# well on a tenth of the examples.
CURVATURE_SHARE = 1 / 8
# A GPU multiplies float32 matrices in TF32 under "high", a TPU in three passes of bfloat16; the
# default of a TPU is a single pass, which is bfloat16 under another name.
F32_MATMUL_PRECISION = "high"


class DoesNotFit(Exception):
    """Something would need more memory than the device has; says how much of both."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and the batches that it trains on.

    Attributes:
      make: makes the network from the options of a precision (`Precision.options`).
      batch_size: examples per step.
      shape: of one example: ``(height, width, channels)``, or ``(length,)`` for token ids.
      num_outputs: number of classes, or of different token ids.
      examples: number of synthetic examples, from which batches are read.
    """

    make: Callable[..., Any]
    batch_size: int
    shape: tuple[int, ...]
    num_outputs: int
    examples: int

    def split(self) -> data.Split:
        """Synthetic examples: noise, which costs what pictures and texts of this shape cost."""
        random = np.random.default_rng(0)
        if len(self.shape) == 1:
            tokens = random.integers(0, self.num_outputs, (self.examples, 1 + self.shape[0]))
            tokens = tokens.astype(np.int32)
            return data.Split(tokens[:, :-1], tokens[:, 1:])
        x = random.random((self.examples, *self.shape), np.float32)
        return data.Split(x, random.integers(0, self.num_outputs, self.examples, np.int32))


def _zoo(
    name: str, shape: tuple[int, ...], num_outputs: int, batch_size: int, **options: Any
) -> Workload:
    """A network of the zoo; four batches of examples."""
    options["vocabulary_size" if len(shape) == 1 else "num_classes"] = num_outputs
    make = functools.partial(models.create, name, input_shape=shape, **options)
    return Workload(make, batch_size, shape, num_outputs, 4 * batch_size)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
      parameters: of the tree that is updated.
      workloads: the networks by name, the most important one first.
      repeats: timings of everything.
      calls: calls that a timing lasts at least.
      micro_batches: number of micro-batches of a batch.
      input_steps: steps of a round when a slow input is timed.
      seconds: of the whole report, at most.
      estimates: seconds that a row takes, by its section; a first guess, which is corrected by
        what rows turn out to take.
    """

    parameters: int
    workloads: Mapping[str, Workload]
    repeats: int
    calls: int
    micro_batches: int
    input_steps: int
    seconds: float
    estimates: Mapping[str, float]


FULL = Scale(
    parameters=100_000_000,
    workloads={
        "gpt2_124m": _zoo("transformer_lm", (1024,), 50_257, 8, dropout_rate=0.0),
        "resnet50": _zoo("resnet50", (224, 224, 3), 1_000, 64),
        "vit_s": _zoo("vit_s", (224, 224, 3), 1_000, 64, patch_size=16),
    },
    repeats=5,
    calls=5,
    micro_batches=4,
    input_steps=10,
    seconds=460,
    estimates={"update": 5, "step": 30, "micro-batches": 25, "input": 20},
)
QUICK = Scale(
    parameters=1_000_000,
    workloads={
        "small_gpt": _zoo(
            "transformer_lm",
            (32,),
            256,
            8,
            embedding_size=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
        ),
        "small_cnn": _zoo("cnn", (16, 16, 3), 10, 16, channels=(8, 8)),
    },
    repeats=3,
    calls=2,
    micro_batches=2,
    input_steps=5,
    seconds=100,
    estimates={"update": 2, "step": 6, "micro-batches": 4, "input": 2},
)


# Steps that exist in several forms, which are compiled one by one.
_WEIGHTS = {"bulk_sgd": 3.0, "kfac": 2.5}


@dataclasses.dataclass(frozen=True)
class Row(Unit):
    """A unit of the report.

    Attributes:
      estimate: seconds that it takes, a first guess.
      place: the network and the precision whose base has to be compiled for it; None for one that
        needs none.
      base_estimate: seconds that this takes, a first guess.
    """

    estimate: float
    place: tuple[str, str] | None = None
    base_estimate: float = 0.0

    @property
    def key(self) -> str:
        """Section and name, which tell it from all other rows."""
        return f"{self.group}/{self.name}"


def rows(scale: Scale, sections: Sequence[str], methods: Sequence[str] | None = None) -> list[Row]:
    """What the report measures, the most important rows first.

    Rows of one network and one precision follow each other, so that the base is compiled once.

    Args:
      scale: how large everything is.
      sections: some of ``scale.estimates``.
      methods: names of methods to which updates and steps are restricted, the base aside.

    Returns:
      The rows; the work of each returns one record.
    """
    measure = Measurements(scale)
    updated = [
        name
        for name, method in METHODS.items()
        if not (method.per_worker or method.evaluates_network)
    ]
    important = [name for name in STEP_METHODS if name in updated]

    def row(section: str, work: Callable[..., Record], **identity: str) -> Row:
        def compute() -> list[Record]:
            return [work(**identity)]

        estimate, method = scale.estimates[section], identity.get("method")
        if section == "update":
            return Row(section, identity, compute, estimate)
        if section == "step":
            estimate *= _WEIGHTS.get(method or "", 1.0)
        base = 0.0 if section == "step" and method == BASE else scale.estimates["step"]
        place = identity["network"], identity["precision"]
        return Row(section, identity, compute, estimate, place, base)

    def updates(names: Sequence[str]) -> list[Row]:
        return [row("update", measure.update, method=name) for name in names]

    def network(name: str, precision: str) -> Iterator[Row]:
        place = {"network": name, "precision": precision}
        base, *others = STEP_METHODS
        yield row("step", measure.step, **place, method=base)
        if precision == "bf16":
            yield row("micro-batches", measure.micro_batches, **place)
            yield row("input", measure.input, **place)
        for method in others:
            yield row("step", measure.step, **place, method=method)

    every = updates(important)
    for precision in ("bf16", "f32"):
        for name in scale.workloads:
            every += network(name, precision)
    every.append(row("input", measure.input, network="digits", precision="f32"))
    every += updates([name for name in updated if name not in important])
    wanted = None if methods is None else {BASE, *methods}
    return [
        row
        for row in every
        if row.group in sections and (wanted is None or row.identity.get("method", BASE) in wanted)
    ]


def machine() -> Record:
    """The device and the versions that the numbers depend on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "memory": _limit() if math.isfinite(_limit()) else None,
        "cores": os.cpu_count(),
        **versions(),
    }


def worker(scale: Scale) -> Callable[[str], Any]:
    """What the isolated process calls: ``"machine"``, or a row by its `Row.key`.

    Args:
      scale: how large everything is.
    """
    by_key = {row.key: row for row in rows(scale, tuple(scale.estimates))}

    def call(name: str) -> Any:
        if name == "machine":
            return machine()
        gc.collect()
        load, began = timing.machine()["load"], time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                (record,) = by_key[name].work()
            except DoesNotFit as reason:
                record = {"status": "does not fit", "reason": str(reason)}
        notes = [str(one.message) for one in caught if one.category is UserWarning]
        return {
            "status": "measured",
            **record,
            "notes": list(dict.fromkeys(note.partition("\n")[0] for note in notes)),
            "load": load,
            "seconds": time.perf_counter() - began,
        }

    return call


# Memory ----------------------------------------------------------------------------------------


def _limit() -> float:
    """Bytes of memory that arrays on the device can take."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else cli.host_memory()


def _held() -> int:
    """Bytes on the device that arrays take now; 0 where it does not tell."""
    return int((jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0))


def _peak() -> int | None:
    """The largest number of bytes on the device so far; None where it does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_fits(what: str, need: float, limit: float | None = None) -> None:
    """Checks that something fits on the device beside what it holds, before it is made.

    Args:
      what: what it is, for the message.
      need: the bytes that it takes.
      limit: bytes that are there; default: of the device, without what it holds.

    Raises:
      DoesNotFit: it does not.
    """
    limit = _limit() - _held() if limit is None else limit
    if need > limit:
        raise DoesNotFit(f"{what} takes {need / 2**30:.2f} GiB, free are {limit / 2**30:.2f}")


# Steps -----------------------------------------------------------------------------------------


class Network:
    """A workload's parameters and batch on the device.

    Args:
      workload: the network and its batches.
      precision: one of `PRECISIONS`.
    """

    def __init__(self, workload: Workload, precision: str):
        self.workload = workload
        make = functools.partial(workload.make, **PRECISIONS[precision].options)
        graphdefs: list[Any] = []

        def arrays() -> tuple[PyTree, PyTree]:
            graphdef, params, rest = networks.split(make())
            graphdefs.append(graphdef)
            return params, rest

        self.params, self.rest = jax.jit(arrays)()  # one program: hundreds of arrays
        self.objective = networks.objective(graphdefs[0])
        self.examples = workload.split()
        first = self.examples[: workload.batch_size]
        self.batch = {"x": jnp.asarray(first.x), "y": jnp.asarray(first.y)}
        number = max(1, round(CURVATURE_SHARE * workload.batch_size))
        self.curvature = {name: array[:number] for name, array in self.batch.items()}

    def build(self, method: Method) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a method for this network.

        Args:
          method: the method.
        """
        return method.build(
            method_cost.LEARNING_RATE,
            total_steps=method_cost.TOTAL_STEPS,
            num_classes=DIRECTIONS,
            objective=self.objective.bind(rest=self.rest, **self.batch),
            likelihood=losses.LIKELIHOODS["cross_entropy"],
        )


class Program:
    """The training step of a method, and what its first step took.

    Args:
      network: what is trained.
      method: the method.
      accumulate: number of micro-batches.

    Attributes:
      first: ``init_seconds``, ``compile_seconds`` (with tracing), ``run_seconds`` of the first
        step, and ``first_seconds``, their sum.
      state_bytes: of parameters, other variables and the optimizer's state.
      step_bytes: of the largest form of the step, as the compiler plans it.

    Raises:
      DoesNotFit: the device has less memory than the state or the step need.
    """

    def __init__(self, network: Network, method: Method, *, accumulate: int = 1):
        self.method = method
        self._batch = network.batch
        self._curvature = None if method.tracker is None else network.curvature
        tx = network.build(method)
        objective, options = network.objective, StepOptions(accumulate=accumulate)

        @jax.jit
        def init(params: PyTree, rest: PyTree) -> Any:
            # Copies: the step donates its state, and other methods start from the same weights.
            return init_state(tx, *jax.tree.map(jnp.copy, (params, rest)))

        @functools.partial(jax.jit, static_argnames="refresh", donate_argnames="state")
        def step(state: Any, batch: Any, curvature: Any, refresh: Any) -> Any:
            return train_step(
                tx, objective, state, batch, curvature, refresh=refresh, options=options
            )

        self._step, self._compiled = step, dict[Any, Any]()
        start = network.params, network.rest
        self.state_bytes, self.step_bytes = _bytes(jax.eval_shape(init, *start)), 0
        check_fits("the state", self.state_bytes)
        self._limit = _limit() - _held()
        jax.clear_caches()  # what another method has traced would make this one's start faster
        self._state, init_seconds = timing.timed(lambda: init(*start))
        begin = time.perf_counter()
        self._form(method.refresh(0))
        compile_seconds = time.perf_counter() - begin
        run_seconds = timing.timed(lambda: self.step(method.refresh(0)))[1]
        self.first = {
            "init_seconds": init_seconds,
            "compile_seconds": compile_seconds,
            "run_seconds": run_seconds,
            "first_seconds": init_seconds + compile_seconds + run_seconds,
        }

    def _form(self, refresh: Any) -> Any:
        """The compiled step with this static argument."""
        if refresh not in self._compiled:
            lowered = self._step.lower(self._state, self._batch, self._curvature, refresh=refresh)
            compiled = lowered.compile()
            planned = hlo.memory(compiled).total
            check_fits("the compiled step", planned, self._limit)
            self.step_bytes = max(self.step_bytes, planned)
            self._compiled[refresh] = compiled
        return self._compiled[refresh]

    def step(self, refresh: Any, batch: Any = None) -> Any:
        """Makes a step.

        Args:
          refresh: the argument ``refresh`` of the update.
          batch: the batch; default: the network's own.

        Returns:
          The metrics.
        """
        form = self._form(refresh)
        batch = self._batch if batch is None else batch
        self._state, metrics = form(self._state, batch, self._curvature)
        return metrics

    def case(self, calls: int) -> timing.Case:
        """Whole periods of steps behind the first ones.

        Args:
          calls: the least number of steps.
        """
        method = self.method

        def call(step: int, metrics: Any) -> Any:
            return self.step(method.refresh(step))

        period = method.period * math.ceil(calls / method.period)
        base = None if method.name == BASE else BASE
        return timing.Case(method.name, base, call, None, period, step=method.period)


class Measurements:
    """The work of all rows.

    The base of the network and precision that were measured last is kept, compiled, so that each
    method is timed right beside it.

    Args:
      scale: how large everything is.
    """

    def __init__(self, scale: Scale):
        self.scale = scale
        self._base: tuple[Any, Network, Program] | None = None

    def update(self, method: str) -> Record:
        """`update` and `apply_updates` on a large tree, against the base and the bandwidth.

        Args:
          method: its name.
        """
        self._base = None
        chosen, params = METHODS[method], _tree(self.scale.parameters)
        group = [METHODS[BASE], chosen]
        optimizers = [_build(one) for one in group]
        states = [jax.eval_shape(tx.init, params) for tx in optimizers]
        # The array that is copied and the gradient; parameters and updates of both methods.
        check_fits(
            f"a tree of {self.scale.parameters:,} parameters with gradient, updates and states",
            (2 + 2 * 2) * _bytes(params) + _bytes(states),
        )
        cases = method_cost.update_cases(BASE, group, self.scale.parameters)
        copy = method_cost.copy_case(sum(x.size for x in jax.tree.leaves(params)))
        timers = [dataclasses.replace(case, period=self.scale.calls) for case in [copy, *cases]]
        for timer in timers * 2:
            timer.time()
        seconds = timing.interleave([timer.time for timer in timers], self.scale.repeats)
        moved = cases[-1].bytes
        assert moved is not None
        copied = 2 * _bytes(params)
        return {
            "milliseconds": timing.quartiles(1e3 * seconds[-1]),
            "ratio": timing.quartiles(seconds[-1] / seconds[1]),
            "moved_bytes": moved,
            "bandwidth": timing.quartiles(copied / seconds[0]),
            "of_limit": timing.quartiles(seconds[-1] / (seconds[0] * moved / copied)),
            "state_bytes": _bytes(states[-1]),
        }

    def step(self, network: str, precision: str, method: str) -> Record:
        """Training steps: the first one, the time of the others, and their memory.

        Args:
          network: its name in the scale.
          precision: one of `PRECISIONS`.
          method: its name.
        """
        with matmul_precision(precision):
            peak = _peak()
            place, base = self.base(network, precision)
            program = base if method == BASE else Program(place, METHODS[method])
            record = self._compared(base, program)
            return {
                **record,
                **program.first,
                "first_ratio": _ratio(program, base, lambda one: one.first["first_seconds"]),
                "state_bytes": program.state_bytes,
                "peak_bytes": _peak() if _peak() != peak else None,
                "examples": place.workload.batch_size,
            }

    def micro_batches(self, network: str, precision: str) -> Record:
        """The base with its gradient over micro-batches, beside whole batches.

        Args:
          network: its name in the scale.
          precision: one of `PRECISIONS`.
        """
        with matmul_precision(precision):
            place, base = self.base(network, precision)
            number = self.scale.micro_batches
            program = Program(place, METHODS[BASE], accumulate=number)
            return {**self._compared(base, program), "micro_batches": number}

    def input(self, network: str, precision: str) -> Record:
        """How much of an input as slow as a step is hidden by prefetching, for the base.

        Args:
          network: its name in the scale, or ``"digits"``.
          precision: one of `PRECISIONS`.
        """
        with matmul_precision(precision):
            place, base = self.base(network, precision)
            result = overlap.measure(
                lambda batch: base.step(METHODS[BASE].refresh(1), batch),
                place.examples,
                batch_size=place.workload.batch_size,
                steps=self.scale.input_steps,
                rounds=self.scale.repeats,
            )
            times = ("delay", "no_delay", "in_turn", "queued", "prefetched")
            return {
                **{f"{name}_milliseconds": 1e3 * getattr(result, name) for name in times},
                "hidden": result.hidden,
                "hidden_by_queue": result.hidden_by_queue,
            }

    def base(self, network: str, precision: str) -> tuple[Network, Program]:
        """The network, and the base's step on it.

        Args:
          network: its name in the scale, or ``"digits"``.
          precision: one of `PRECISIONS`.
        """
        if self._base is None or self._base[0] != (network, precision):
            self._base = None  # frees the memory before the next one takes its own
            workload = _Digits() if network == "digits" else self.scale.workloads[network]
            place = Network(workload, precision)
            self._base = (network, precision), place, Program(place, METHODS[BASE])
        return self._base[1:]

    def _compared(self, base: Program, program: Program) -> Record:
        """Times and memory of two steps, interleaved."""
        case = program.case(self.scale.calls)
        # As many steps of the base between two waits: dispatch overlaps with computing in both.
        cases = [case] if program is base else [base.case(case.period), case]
        timed = timing.measure(cases, self.scale.repeats, warm_ups=1)[-1]
        return {
            "milliseconds": timed["milliseconds"],
            "ratio": timed["ratio"],
            "step_bytes": program.step_bytes,
            "bytes_ratio": _ratio(program, base, lambda one: one.step_bytes),
        }


def _ratio(program: Program, base: Program, of: Callable[[Program], float]) -> float | None:
    return None if program is base else of(program) / of(base)


class _Digits(Workload):
    """The embedded digits and the MLP."""

    def __init__(self) -> None:
        task = data.load_task("digits")
        make = functools.partial(
            models.create, "mlp", input_shape=task.input_shape, num_classes=task.num_classes
        )
        super().__init__(make, 64, task.input_shape, task.num_classes, len(task.train))

    def split(self) -> data.Split:
        return data.load_task("digits").train


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """How float32 matrices are multiplied in the rows of a precision: "high" in those of float32.

    Args:
      precision: one of `PRECISIONS`.
    """
    if precision != "f32":
        yield
        return
    with jax.default_matmul_precision(F32_MATMUL_PRECISION):
        yield


def _build(method: Method) -> optax.GradientTransformationExtraArgs:
    return method.build(
        method_cost.LEARNING_RATE, total_steps=method_cost.TOTAL_STEPS, num_classes=DIRECTIONS
    )


def _tree(parameters: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the tree of `method_cost.update_cases`."""
    side = max(1, math.isqrt(parameters // 10))
    return {
        f"matrix_{i}": jax.ShapeDtypeStruct((side, side), jnp.dtype("float32")) for i in range(10)
    }
