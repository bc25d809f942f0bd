"""Where a landscape is looked at: at the end of a training, or at a finished run of `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
import optax_accel as oa
from experiments import cli, data, progress
from experiments.cli import UsageError
from experiments.runs import folders
from experiments.runs.checkpoints import CheckpointError, Checkpoints
from experiments.runs.records import CONFIG, first_difference, read_config
from experiments.training import losses, networks
from experiments.training.options import Options, from_record
from experiments.training.plan import prepare
from experiments.training.program import Program, build
from experiments.training.replicas import FETCH_EVERY, Plan, Trainer, tree_bytes
from experiments.training.step import TrainState, averaged
from experiments.training.studies.landscape import Point

PyTree = Any

# Points along the training whose parameters are kept.
SNAPSHOTS = 30
# Points that are evaluated at a time; see `landscape.Landscape`.
CHUNK = 32
# Training examples whose loss is looked at, where nobody says how many.
MOST_EXAMPLES = 2000


def chunk_of(model: str) -> int:
    """Points that a model can be evaluated at, at a time, without being slow."""
    return 1 if models.is_convolutional(model) and jax.default_backend() == "cpu" else CHUNK


def check_examples(number: int | None, split: data.Split) -> None:
    """Raises `UsageError` if a split has not so many examples."""
    if number is not None and number > len(split):
        raise UsageError(
            f"--examples {number} is more than the {len(split)} training examples; give fewer"
        )


def examples_of(split: data.Split, number: int | None) -> dict[str, jax.Array]:
    """The examples whose loss is looked at, as arguments of the objective.

    Args:
      split: the training split.
      number: how many, drawn once for all; None for all, but at most `MOST_EXAMPLES`.

    Raises:
      UsageError: there are not so many.
    """
    check_examples(number, split)
    order = np.random.default_rng(0).permutation(len(split))
    rows = np.sort(order[: number or MOST_EXAMPLES])
    return {"x": jnp.asarray(split.x[rows]), "y": jnp.asarray(split.y[rows])}


# Trained now ------------------------------------------------------------------------------------


def train(plan: Plan, learning_rate: float, examples: int | None) -> Point:
    """Trains a model, and keeps some of the parameters that it has on the way.

    Args:
      plan: the training: of one method, with one seed.
      learning_rate: the learning rate.
      examples: number of training examples whose loss is looked at; None for all.

    Returns:
      The point at the end.

    Raises:
      UsageError: there are fewer examples, or the kept parameters do not fit into the memory.
      ValueError: the training ended at parameters that are not finite.
    """
    batch = examples_of(plan.task.train, examples)
    trainer, (method,) = Trainer(plan), plan.methods
    need = SNAPSHOTS * tree_bytes(trainer.weights[0][0])
    cli.check_memory(3 * need, f"parameters at {SNAPSHOTS} points of the training")
    runs = trainer.start(method, [(learning_rate, plan.first_seed)])
    number = min(SNAPSHOTS, plan.steps + 1)
    kept = {*np.linspace(0, plan.steps, number).round().astype(int).tolist()}
    steps, iterates = [], []
    progress.expect(plan.steps)
    for done in range(plan.steps + 1):
        if done in kept:
            # A copy: the next step takes the buffers.
            iterates.append(jax.tree.map(jnp.copy, averaged(runs.state).params))
            steps.append(done)
        if done < plan.steps:
            loss = runs.advance(done)
            if done % FETCH_EVERY == 0:
                jax.block_until_ready(loss)
            progress.advance()
    rest = averaged(runs.state).rest
    title = (
        f"{plan.task.name}, {plan.model}, {method.name} at learning rate {learning_rate:g}, "
        f"{cli.plural(plan.steps, 'step')} of {cli.plural(plan.batch_size, 'example')}"
    )
    return _point(
        title,
        trainer.loss.bind(rest=rest, **batch),
        steps,
        iterates,
        plan.task.num_directions,
        chunk_of(plan.model),
    )


# A finished run ---------------------------------------------------------------------------------


def load(folder: Path, data_dir: Path | None, examples: int | None) -> Point:
    """The point at which a run of `train` ended, with all checkpoints that its folder has.

    Args:
      folder: the run's folder.
      data_dir: where its data are now; None for where they were.
      examples: number of training examples whose loss is looked at; None for all.

    Returns:
      The point at the latest checkpoint.

    Raises:
      UsageError: the folder holds no such run, or its data are others now.
      CheckpointError: it has no checkpoint that is whole.
      ValueError: the parameters there are not finite.
    """
    if not (folder / CONFIG).exists():
        raise UsageError(
            f"--run {folder} holds no run: there is no {CONFIG}; name a folder that "
            "python -m experiments.train has made"
        )
    record = read_config(folder)
    options: Options = from_record(record["options"], folder)
    if data_dir is not None:
        options = Options(**{**vars(options), "data_dir": data_dir})
    plan = prepare(options)
    if difference := first_difference({"data": record["run"].get("data")}, _data(plan.task)):
        raise UsageError(f"--run {folder} was made with {difference}; give its data by --data-dir")
    batch = examples_of(plan.task.train, examples)
    program = build(plan)
    held = folders.lock(folder)  # says so if the run is under way
    try:
        states = _checkpoints(folder, program)
    finally:
        held.release()
    last = [*states.values()][-1]
    loss = losses.find_loss(plan.loss, label_smoothing=plan.options.label_smoothing)
    title = (
        f"{plan.task.name}, {plan.model}, {plan.method.name} at learning rate "
        f"{plan.learning_rate:g}, step {[*states][-1]} of the run in {folder}"
    )
    return _point(
        title,
        networks.objective(program.graphdef, loss).bind(rest=last.rest, **batch),
        [*states],
        [state.params for state in states.values()],
        plan.task.num_directions,
        chunk_of(plan.model),
    )


def _data(task: data.Task) -> dict[str, Any]:
    return {"data": task.checksums}


def _checkpoints(folder: Path, program: Program) -> dict[int, TrainState]:
    """What is evaluated of every checkpoint that is whole, by its step."""
    target = program.runner.abstract_state(program.make_state)
    show: Callable[[str], None] = progress.tell
    states: dict[int, TrainState] = {}
    # Nothing is saved, so that nothing is removed, however many there are.
    with Checkpoints(folder / "checkpoints", keep=2**31 - 1, warn=show) as saved:
        first = None  # of those that have been read
        while first is None or (saved.steps() and saved.steps()[0] < first):
            try:
                at = None if first is None else first - 1
                first, state, _ = saved.restore(target, at=at)
            except CheckpointError:
                if states:  # all before are damaged
                    break
                raise
            shown = averaged(program.runner.consensus(program.runner.put_state(state)))
            params, rest = jax.tree.map(_on_one_device, (shown.params, shown.rest))
            states[first] = shown._replace(params=params, rest=rest, opt_state=())
    return dict(sorted(states.items()))


def _on_one_device(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, jax.devices()[0])


def _point(
    title: str,
    objective: oa.Objective,
    steps: list[int],
    iterates: list[PyTree],
    directions: int,
    chunk: int,
) -> Point:
    """A point, if it is one.

    Raises:
      ValueError: its parameters are not finite.
    """
    params = iterates[-1]
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "the parameters at the end of the training are not finite; lower the learning rate"
        )
    return Point(title, objective, params, steps, iterates, directions, chunk)
