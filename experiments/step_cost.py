"""What a training step costs, in memory and time, and what gradient accumulation makes of that.

    python -m experiments.step_cost --model cnn --batch-size 128 --accumulate 8
    python -m experiments.step_cost --model resnet20 --only plain,whole --rounds 30

Compares the step of `train` on a whole batch ("whole") with the shortest that a person would write
with Flax and Optax ("plain"), and with the same step over micro-batches: by
`optax_accel.mean_over_micro_batches` in a loop and written out, by `optax.microbatching`, and by
`optax.MultiSteps`, whose update is called once for each. The memory is what XLA plans for
intermediate results ("temp"); times are medians of interleaved rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
from experiments import cli, hlo, progress, timing
from experiments.reporting import pages, tables
from experiments.runs.records import provenance
from experiments.training import networks
from experiments.training.options import read_model_options
from experiments.training.precision import PRECISIONS
from experiments.training.step import StepOptions, TrainState, init_state, train_step
from experiments.training.studies import forecast

PROG = "python -m experiments.step_cost"
HEADERS = ("way", "temp MB", "of whole", "ms", "of whole")
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a compiled program costs.

    Attributes:
      temp_bytes: memory of intermediate results, as the compiler plans it.
      seconds: median over the rounds.
    """

    temp_bytes: int
    seconds: float


def measure(
    programs: Mapping[str, Callable[..., Any]], *args: PyTree, rounds: int = 5
) -> dict[str, Cost]:
    """Memory and time of functions of the same arguments, timed in interleaved rounds.

    >>> costs = measure({"sum": jnp.sum, "sine": lambda x: jnp.sin(x).sum()}, jnp.ones(1000))
    >>> sorted(costs), costs["sum"].seconds > 0
    (['sine', 'sum'], True)

    Args:
      programs: pure functions by name, which are compiled here.
      *args: the arguments of all of them.
      rounds: timed calls of each function, after one that is not timed.

    Returns:
      The cost of each function by its name.
    """
    compiled = {
        name: jax.jit(programs[name]).lower(*args).compile()
        for name in progress.each([*programs], "compiling {}".format)
    }
    progress.tell("timing")

    def timer(program: Callable[..., Any]) -> Callable[[], float]:
        jax.block_until_ready(program(*args))
        return lambda: timing.timed(lambda: program(*args))[1]

    seconds = timing.interleave([timer(program) for program in compiled.values()], rounds)
    medians = np.median(seconds, axis=1).tolist()
    return {
        name: Cost(hlo.memory(program).temp, median)
        for (name, program), median in zip(compiled.items(), medians, strict=True)
    }


def ways(
    graphdef: nnx.GraphDef[Any], tx: optax.GradientTransformation, number: int
) -> dict[str, Callable[..., Any]]:
    """Ways to make one step on a batch: functions ``(state, x, y) -> (state, metrics)``.

    Args:
      graphdef: static part of the model.
      tx: the optimizer.
      number: number of micro-batches.

    Returns:
      ``plain``, written by hand; ``whole``, ``loop`` and ``unrolled``, ours; ``microbatching`` and
      ``MultiSteps``, Optax's.
    """
    full = optax.with_extra_args_support(tx)
    objective = networks.objective(graphdef)

    def ours(**options: Any) -> Callable[..., Any]:
        chosen = StepOptions(**options)
        return lambda state, x, y: train_step(
            full, objective, state, {"x": x, "y": y}, options=chosen
        )

    def gradient(state: TrainState, x: jax.Array, y: jax.Array) -> PyTree:
        return objective.grad(state.params, rest=state.rest, x=x, y=y)

    def microbatching(state: TrainState, x: jax.Array, y: jax.Array) -> Any:
        mean = optax.microbatching.AccumulationType.MEAN
        in_parts = optax.microbatching.microbatch(gradient, (1, 2), len(x) // number, mean)
        return _updated(full, state, in_parts(state, x, y)), None

    return {
        "plain": functools.partial(_plain, graphdef, full),
        "whole": ours(),
        "loop": ours(accumulate=number),
        "unrolled": ours(accumulate=number, unroll=True),
        "microbatching": microbatching,
        "MultiSteps": functools.partial(_multi_steps, full, number, gradient),
    }


def _updated(tx: optax.GradientTransformation, state: TrainState, grads: PyTree) -> TrainState:
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def _plain(
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    state: TrainState,
    x: jax.Array,
    y: jax.Array,
) -> Any:
    """The shortest step that a person would write with Flax and Optax."""

    def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
        model = nnx.merge(graphdef, params, state.rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean(), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return _updated(tx, state, grads)._replace(step=state.step + 1, rest=rest), value


def _multi_steps(
    tx: optax.GradientTransformation,
    number: int,
    gradient: Callable[..., PyTree],
    state: TrainState,
    x: jax.Array,
    y: jax.Array,
) -> Any:
    """Calls the update of `optax.MultiSteps` for every micro-batch."""
    micro = optax.MultiSteps(tx, number).gradient_transformation()
    inner, state = state.opt_state, state._replace(opt_state=micro.init(state.params))
    state = state._replace(opt_state=state.opt_state._replace(inner_opt_state=inner))
    parts = [a.reshape(number, -1, *a.shape[1:]) for a in (x, y)]

    def one(state: TrainState, part: PyTree) -> tuple[TrainState, None]:
        return _updated(micro, state, gradient(state, *part)), None

    state, _ = jax.lax.scan(one, state, parts)
    return state._replace(opt_state=state.opt_state.inner_opt_state), None


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Measure ways to make one training step."""

    model: str = "cnn"
    """Model that classifies images; an unknown name lists all."""
    model_options: str | None = None
    """Options of the model as JSON, e.g. '{"patch_size": 4}'."""
    image_size: int = 32
    """Height and width of the images."""
    batch_size: int = 128
    """Examples of the whole batch, a multiple of --accumulate."""
    accumulate: int = 8
    """Number of micro-batches."""
    precision: str = "f32"
    """f32, bf16 or f16."""
    only: str = ""
    """Ways to time: some of plain,whole,loop,unrolled,microbatching,MultiSteps; default: all."""
    rounds: int = 5
    """Timed steps of each way."""
    json: Path | None = None
    """Also write the numbers to this file, with settings, versions, date and the machine's load."""
    html: Path | None = None
    """Also write the tables to this file, as a page for the browser."""


WAYS = ("plain", "whole", "loop", "unrolled", "microbatching", "MultiSteps")


@dataclasses.dataclass(frozen=True)
class _Study:
    """What is measured.

    Attributes:
      names: the ways.
      make_model: makes the static part, parameters and other variables.
      shape: of an image.
      params: shapes of the parameters.
      need: bytes of the model and a batch.
    """

    names: tuple[str, ...]
    make_model: Callable[[], tuple[nnx.GraphDef[Any], PyTree, PyTree]]
    shape: tuple[int, ...]
    params: PyTree
    need: int


def check(options: Options) -> _Study:
    """Checks the options; computes nothing.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it.
    """
    cli.check_known("model", options.model, models.list())
    cli.check_known("precision", options.precision, tuple(PRECISIONS))
    if options.batch_size % options.accumulate:
        raise cli.UsageError(
            f"--batch-size {options.batch_size} is not a multiple of --accumulate "
            f"{options.accumulate}"
        )
    names = tuple(options.only.split(",")) if options.only else WAYS
    for name in names:
        cli.check_known("way", name, WAYS)
    shape = (options.image_size, options.image_size, 3)
    model_options = read_model_options(options.model_options) or {}

    def make_model() -> Any:
        model = models.create(
            options.model,
            input_shape=shape,
            num_classes=10,
            **model_options,
            **PRECISIONS[options.precision].options,
        )
        return networks.split(model)

    try:
        arrays = jax.eval_shape(lambda: make_model()[1:])
    except (ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise cli.UsageError(
            f"--model-options {options.model_options} do not fit the model {options.model}: {error}"
        ) from error
    images = 4 * options.batch_size * math.prod(shape)
    need = images + sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    cli.check_memory(need, f"model {options.model} with {options.batch_size} images of {shape}")
    return _Study(names, make_model, shape, arrays[0], need)


def run(options: Options, study: _Study) -> dict[str, Cost]:
    """Measures what the options say."""
    graphdef, params, rest = study.make_model()
    shape = (options.batch_size, *study.shape)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    y = jnp.arange(options.batch_size) % 10
    tx = optax.adam(1e-3)
    programs = ways(graphdef, tx, options.accumulate)
    state = init_state(tx, params, rest)
    return measure(
        {name: programs[name] for name in study.names}, state, x, y, rounds=options.rounds
    )


def dry_run(options: Options, study: _Study) -> int:
    """Prints what the measurement would take; returns the exit code."""
    lines = {
        "plan": f"{options.model}, steps of adam on {options.batch_size} images of {study.shape} "
        f"in {options.accumulate}: {', '.join(study.names)}",
        "runs": f"{cli.plural(len(study.names), 'program')} compiled, {options.rounds} timed steps "
        "of each",
        "parameters": f"{forecast.parameters(study.params):,}",
        "memory": f"model and batch {forecast.size(study.need)}, from shapes; the optimizer's "
        "state and intermediate results are not counted",
        "time": cli.TIME_NOT_KNOWN,
    }
    return cli.print_forecast(cli.console(120), lines)


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells under `HEADERS`, one row for each way.

    Args:
      results: what ``--json`` writes.
    """
    costs = results["costs"]
    whole = costs.get("whole")
    return [
        [
            name,
            f"{cost['temp_bytes'] / 1e6:.1f}",
            f"{cost['temp_bytes'] / whole['temp_bytes']:.2f}" if whole else "",
            f"{1e3 * cost['seconds']:.1f}",
            f"{cost['seconds'] / whole['seconds']:.2f}" if whole else "",
        ]
        for name, cost in costs.items()
    ]


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    cli.check_files({"--json": options.json, "--html": options.html})
    console = cli.console(100)
    with cli.usage():
        study = check(options)
    if options.dry_run:
        return dry_run(options, study)
    with progress.show(console, "step_cost"):
        costs = run(options, study)
    results = {
        "config": {**dataclasses.asdict(options), "json": None, "html": None},
        **provenance(PROG, options),
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
    }
    title = f"{options.model}, {options.batch_size} in {options.accumulate}"
    table = tables.table(list(HEADERS), title)
    for cells in rows(results):
        table.add_row(*cells)
    console.print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(options.json, cli.to_json(results))
    if options.html is not None:
        heading = f"What a training step of {options.model} costs"
        pages.write_study(options.html, heading, PROG, options, printed=console.printed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
