"""What a plan compiles to: model, method and step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from experiments import cli, data
from experiments.cli import UsageError
from experiments.training import engine, losses, parallel
from experiments.training.precision import PRECISIONS, Precision
from experiments.training.settings import Plan

PyTree = Any


# Examples per forward pass of an evaluation: keeps its activations small.
EVALUATION_BATCH = 1000
# Of the dominant subspace, where a task has no classes to give their number.
DIRECTIONS = 10


def statistics(opt_state: PyTree) -> dict[str, jax.Array]:
    """What the optimizer's state tells about the run, as scalars: what there is of it."""
    found = {
        name: engine.find_in_state(opt_state, name)
        for name in ("momentum", "alignment", "consensus_distance", "loss_scale", "eigenvalues")
    }
    # Some methods call an array of the parameters' shapes their momentum.
    scalars = {name: value for name, value in found.items() if getattr(value, "shape", None) == ()}
    if found["eigenvalues"] is not None:
        scalars["top_eigenvalue"] = jnp.max(found["eigenvalues"])
    return scalars


def evaluate(
    compiled: Callable[..., dict[str, jax.Array]],
    runner: parallel.Parallel,
    state: engine.TrainState,
    task: data.Task,
    split: data.Split,
    workers: int = 0,
) -> dict[str, float]:
    """Scores of a split, read batch by batch; of several workers, of the mean of their parameters.

    Returns:
      ``loss``, where there are labels to predict ``accuracy``, both over the labels that count, and
      of language ``perplexity``, e to the loss.
    """
    state = engine.averaged(runner.consensus(state))
    totals: dict[str, float] = {}
    # Whole multiples of the devices.
    size = max(evaluation_batch(task) // runner.mesh.size, 1) * runner.mesh.size
    for batch in data.in_order(split, size, workers):
        number = len(batch["y"])
        sharding = runner.replicated if number % runner.mesh.size else runner.sharded
        x, y = (
            jax.make_array_from_callback(part.shape, sharding, part.__getitem__)
            for part in (batch["x"], batch["y"])
        )
        for name, value in compiled(state.params, state.rest, x, y).items():
            totals[name] = totals.get(name, 0.0) + float(value) * number
    counted = totals.pop("counted", float(len(split)))
    names = [name for name in ("loss", "accuracy") if name in totals]
    scores: dict[str, float] = {
        name: totals[name] / counted if counted else math.nan for name in names
    }
    if task.defaults.kind in ("language", "translation"):
        scores["perplexity"] = math.exp(min(scores["loss"], 700.0))
    return scores


def evaluation_batch(task: data.Task) -> int:
    """Examples per forward pass of an evaluation: keeps activations and outputs small."""
    outputs = task.train.y[0].size * (task.vocabulary_size or task.num_classes or 1)
    most = min(2**22 // math.prod(task.train.x.shape[1:]), 2**25 // outputs)
    return min(max(most, 1), EVALUATION_BATCH)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a plan compiles to.

    Attributes:
      runner: runs the step.
      make_state: makes the state before the first step; pure.
      evaluate: scores of ``(params, rest, x, y)``, see `engine.evaluate`.
      scores: names of the scores of a split, see `evaluate`.
    """

    runner: parallel.Parallel
    make_state: Callable[[], engine.TrainState]
    evaluate: Callable[..., dict[str, jax.Array]]
    scores: tuple[str, ...]


def build(plan: Plan) -> Program:
    """Model and step of a plan.

    Raises:
      ValueError: the model does not take the task's examples, or the method not the model.
    """
    precision, of_value_fn = (
        PRECISIONS[name] for name in (plan.precision, plan.value_fn_precision)
    )

    def make_model(precision: Precision) -> tuple[nnx.GraphDef[Any], PyTree, PyTree]:
        return engine.split(
            models.create(
                plan.model,
                input_shape=plan.task.input_shape,
                num_classes=plan.task.num_classes or None,
                vocabulary_size=plan.task.vocabulary_size,
                rngs=plan.seed,
                **plan.model_options,
                **precision.options,
            )
        )

    loss = losses.find_loss(plan.loss, label_smoothing=plan.label_smoothing)
    graphdefs: list[nnx.GraphDef[Any]] = []

    def make_arrays() -> PyTree:
        made = [make_model(chosen) for chosen in (precision, of_value_fn)]
        graphdefs.extend(graphdef for graphdef, _, _ in made)
        return made[0][1:]

    options = json.dumps(plan.model_options)
    with _explained(plan, options):
        arrays = jax.eval_shape(make_arrays)
    graphdef, value_fn_graphdef = graphdefs
    _check_memory(plan, arrays, f"model {plan.model} with the options {options}")
    evaluate = functools.partial(engine.evaluate, graphdef, loss=plan.loss)
    if plan.model_options != plan.task.defaults.model_options:
        with _explained(plan, options):  # an option such as a dtype is looked at by the first call
            train = plan.task.train
            jax.eval_shape(
                evaluate, *arrays, *(jnp.asarray(part[:1]) for part in (train.x, train.y))
            )
    seen = None
    if plan.method.needs_objective:
        static, _, rest = make_model(of_value_fn)
        x, y = (part[: plan.batch_size] for part in (plan.task.train.x, plan.task.train.y))
        seen = engine.objective(static, rest, jnp.asarray(x), jnp.asarray(y), loss=loss)
    # With an `axis_name` an extrapolation is local; without, all parallel modes compute the same.
    tx = plan.method.build(
        plan.learning_rate,
        total_steps=plan.steps,
        num_classes=plan.task.num_classes or DIRECTIONS,
        seed=plan.seed,
        axis_name=None if plan.workers is None else parallel.AXIS,
        num_workers=plan.workers or 1,
        objective=seen,
        likelihood=losses.LIKELIHOODS.get(plan.loss),
    )
    tx = engine.complete(
        tx,
        plan.learning_rate,
        clip=plan.clip,
        weight_decay=plan.weight_decay,
        precision=precision,
    )

    def make_state() -> engine.TrainState:
        _, params, rest = make_model(precision)
        return engine.init_state(tx, params, rest, average=plan.ema is not None)

    state = jax.eval_shape(make_state)  # for what is wrong with model and method
    _check_memory(plan, state, f"model and state of method {plan.method.name}")
    # XLA runs convolutions in a loop many times slower on a CPU (jax#12868).
    unroll = plan.devices[0].platform == "cpu" and models.is_convolutional(plan.model)

    def step(
        state: engine.TrainState,
        batch: dict[str, jax.Array],
        curvature: dict[str, jax.Array] | None,
        *,
        refresh: bool | str | None,
        axis_name: str | None,
    ) -> tuple[engine.TrainState, dict[str, jax.Array]]:
        state, metrics = engine.train_step(
            tx,
            graphdef,
            state,
            batch["x"],
            batch["y"],
            curvature=None if curvature is None else (curvature["x"], curvature["y"]),
            refresh=refresh,
            loss=loss,
            axis_name=axis_name,
            per_worker=plan.workers is not None,
            skip_non_finite=plan.non_finite == "skip",
            accumulate=plan.accumulate,
            unroll=unroll,
            value_fn_graphdef=value_fn_graphdef,
            ema=plan.ema,
        )
        return state, metrics | statistics(state.opt_state)

    scores = ["loss"]
    if np.issubdtype(plan.task.train.y.dtype, np.integer):
        scores.append("accuracy")
    if plan.task.defaults.kind in ("language", "translation"):
        scores.append("perplexity")
    return Program(
        parallel.Parallel(plan.parallel, plan.devices, step, workers=plan.workers),
        make_state,
        jax.jit(evaluate),
        tuple(scores),
    )


@contextlib.contextmanager
def _explained(plan: Plan, options: str) -> Iterator[None]:
    """Says of an error while a model is made, whatever it is, which options it comes from."""
    try:
        yield
    except Exception as error:
        if plan.model_options == plan.task.defaults.model_options and isinstance(error, ValueError):
            raise
        raise UsageError(
            f"--model-options {cli.shortened(options)} do not fit the model {plan.model}: "
            f"{textwrap.shorten(str(error), 300)}"
        ) from error


def _check_memory(plan: Plan, arrays: PyTree, what: str) -> None:
    """Raises `UsageError` if arrays of these shapes do not fit into the plan's devices."""
    copies = 1 if plan.parallel == "fsdp" else len(plan.devices)
    need = copies * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    parallel.check_memory(need, what, plan.devices)
