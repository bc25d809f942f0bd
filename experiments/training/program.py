"""What a plan compiles to: the model, the optimizer and the step, made once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
import optax_accel as oa
from experiments import cli, data
from experiments.cli import UsageError
from experiments.runs.metric_files import TIMES
from experiments.training import losses, monitoring, networks, parallel
from experiments.training.average_precision import precisions
from experiments.training.optimizers import find_in_state, wrap
from experiments.training.plan import Plan
from experiments.training.precision import PRECISIONS
from experiments.training.step import (
    Batch,
    StepOptions,
    TrainState,
    averaged,
    init_state,
    norm_names,
    train_step,
)

PyTree = Any
# Examples per forward pass of an evaluation: keeps its activations small.
EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Program:
    """What a plan compiles to.

    Attributes:
      plan: the plan.
      tx: the optimizer.
      runner: runs the step on the plan's devices.
      make_state: makes the state before the first step; pure.
      shapes: what `make_state` makes, as shapes and dtypes.
      graphdef: the static part of the model.
      compiled_scores: scores of ``(params, rest, batch)``, see `networks.evaluate`.
      scores: names of the scores of a split, see `evaluate`.
    """

    plan: Plan
    tx: optax.GradientTransformationExtraArgs
    runner: parallel.Parallel
    make_state: Callable[[], TrainState]
    shapes: TrainState
    graphdef: nnx.GraphDef[Any]
    compiled_scores: Callable[..., dict[str, jax.Array]]
    scores: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Names of all numbers that a row of the metrics can hold."""
        return [
            *("step", "epoch", "loss", "learning_rate", *norm_names(self.shapes.opt_state)),
            *(["share"] if self.plan.follows else []),
            *jax.eval_shape(statistics, self.shapes.opt_state),
            *(f"validation_{name}" for name in self.scores),
            *TIMES,
        ]

    def step(
        self, state: TrainState, batch: PyTree, curvature: PyTree, refresh: bool | str | None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step of a placed state on a placed batch; see `parallel.Parallel.step`."""
        needed = monitoring.without_records(state, refresh)
        new, metrics = self.runner.step(needed, batch, curvature if refresh else None, refresh)
        return monitoring.with_records(new, state), metrics

    def cold_start(self, refresh: bool | str | None) -> str | None:
        """What a compiled step is busy with where it solves for a subspace; None where not."""
        if refresh != "cold":
            return None
        plan = self.plan
        products = plan.method.products(refresh, self.shapes.params, plan.task.num_directions)
        return f"finding the subspace ({products} products)"

    def evaluate(self, state: TrainState, split: data.Split) -> dict[str, float]:
        """Scores of a split, read batch by batch; of several workers, of their mean parameters.

        Args:
          state: a placed state.
          split: the examples.

        Returns:
          ``loss``, where there are classes to predict ``accuracy``, both over the labels that
          count, for one number to predict ``rmse``, the root of the mean squared error in the units
          of the file, of language ``perplexity``, e to the loss, of optical flow
          ``end_point_error``, in pixels, and of boxes ``average_precision``, that of all and of
          small ones.
        """
        runner = self.runner
        state = averaged(runner.consensus(state))
        totals: dict[str, float] = {}
        found: list[Any] = []  # boxes, of a detector
        # Whole multiples of the devices.
        size = max(evaluation_batch(self.plan.task) // runner.mesh.size, 1) * runner.mesh.size
        for batch in data.in_order(split, size, self.plan.options.data_workers):
            number, placed = len(batch["y"]), runner.put_whole(batch)
            scores = jax.device_get(self.compiled_scores(state.params, state.rest, placed))
            found.append(scores.pop("detections", None))
            for name, value in scores.items():
                totals[name] = totals.get(name, 0.0) + float(value) * number
        counted = totals.pop("counted", float(len(split)))
        means: dict[str, float] = {
            name: totals[name] / counted if counted else math.nan
            for name in ("loss", "accuracy", "end_point_error")
            if name in totals
        }
        if self.plan.task.label_scale:  # the root mean square, in the units of the labels
            (scale,) = self.plan.task.label_scale[:1]
            means["rmse"] = scale * math.sqrt(2 * means["loss"])
        if _predicts_tokens(self.plan.task):
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        if self.plan.loss == "detection":
            means |= precisions(np.concatenate(found), split.y)
        return means


def build(plan: Plan) -> Program:
    """Model, optimizer and step of a plan.

    Args:
      plan: the plan.

    Returns:
      The program; nothing is compiled yet.

    Raises:
      ValueError: the model does not take the task's examples, or the method not the model.
    """
    model = Model(plan)
    tx = make_optimizer(plan, model)
    step = make_step(plan, model, tx)

    def make_state() -> TrainState:
        params, rest = model.make_arrays()
        return init_state(tx, params, rest, average=plan.options.ema is not None)

    shapes = jax.eval_shape(make_state)  # says what is wrong with model and method
    _check_memory(plan, shapes, f"model and state of method {plan.method.name}")
    scores = ["loss"]
    if np.issubdtype(plan.task.train.y.dtype, np.integer):
        scores.append("accuracy")
    if plan.task.label_scale:
        scores.append("rmse")
    if _predicts_tokens(plan.task):
        scores.append("perplexity")
    if plan.task.defaults.kind == "flow":
        scores.append("end_point_error")
    if plan.loss == "detection":
        scores += ["average_precision", "average_precision_small"]
    runner = parallel.Parallel(plan.options.parallel, plan.devices, step, workers=plan.workers)
    return Program(
        plan,
        tx,
        runner,
        make_state,
        shapes,
        model.graphdef,
        jax.jit(model.evaluate, out_shardings=runner.replicated),
        tuple(scores),
    )


class Model:
    """The model of a plan, once in the precision of the step and once in that of `value_fn`.

    Args:
      plan: the plan.

    Attributes:
      graphdef: the static part, in the precision of the step.
      objective: the training loss, see `networks.objective`.
      value_fn: the same in the precision of what the method evaluates itself.

    Raises:
      ValueError: the model has no such options, or does not take the task's examples.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        with _explained(plan):
            self.graphdef, arrays = self._describe(plan.options.precision)
            value_fn_graphdef, _ = self._describe(plan.options.value_fn_precision)
        loss = losses.find_loss(plan.loss, label_smoothing=plan.options.label_smoothing)
        group = losses.GROUPS.get(plan.options.follow)
        self.objective = networks.objective(self.graphdef, loss, group=group)
        self.value_fn = networks.objective(value_fn_graphdef, loss)
        named = f"model {plan.model} with the options {json.dumps(plan.model_options)}"
        _check_memory(plan, arrays, named)
        if plan.model_options != plan.task.defaults.model_options:
            with _explained(plan):  # an option such as a dtype is looked at by the first call
                jax.eval_shape(self.evaluate, *arrays, self._examples(1))
        elif plan.model != plan.task.default_model:
            self._check_outputs(arrays)

    def _check_outputs(self, arrays: PyTree) -> None:
        """Raises `UsageError` if the loss does not take what the model makes of an example."""
        plan = self._plan
        try:
            jax.eval_shape(self.evaluate, *arrays, self._examples(2))
        except Exception as error:
            raise UsageError(
                f"model {plan.model} does not fit the task {plan.task.name} "
                f"({plan.task.defaults.kind}); its own is {plan.task.default_model}: "
                f"{textwrap.shorten(str(error), 200)}"
            ) from error

    def make_arrays(self) -> tuple[PyTree, PyTree]:
        """Initial parameters and other variables; pure."""
        return self._make(self._plan.options.precision)[1:]

    def evaluate(self, params: PyTree, rest: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Scores of a batch, see `networks.evaluate`."""
        return networks.evaluate(self.graphdef, params, rest, batch, loss=self._plan.loss)

    def example_objective(self) -> oa.Objective:
        """The loss of a batch like those of the run, in which K-FAC finds the layers."""
        plan = self._plan
        _, _, rest = self._make(plan.options.value_fn_precision)
        return self.value_fn.bind(rest=rest, **self._examples(plan.batch_size))

    def _examples(self, number: int) -> Batch:
        train = self._plan.task.train
        return {"x": jnp.asarray(train.x[:number]), "y": jnp.asarray(train.y[:number])}

    def _make(self, precision: str) -> tuple[nnx.GraphDef[Any], PyTree, PyTree]:
        plan = self._plan
        return networks.split(
            models.create(
                plan.model,
                input_shape=plan.task.input_shape,
                num_classes=plan.task.num_classes or None,
                vocabulary_size=plan.task.vocabulary_size,
                rngs=plan.options.seed,
                **plan.model_options,
                **PRECISIONS[precision].options,
            )
        )

    def _describe(self, precision: str) -> tuple[nnx.GraphDef[Any], PyTree]:
        """The static part, and the shapes of parameters and other variables."""
        static: list[nnx.GraphDef[Any]] = []

        def arrays() -> PyTree:
            graphdef, *made = self._make(precision)
            static.append(graphdef)
            return made

        shapes = jax.eval_shape(arrays)
        return static[0], shapes


def make_optimizer(plan: Plan, model: Model) -> optax.GradientTransformationExtraArgs:
    """The plan's method with what surrounds it: clipping, weight decay, a loss scale.

    Args:
      plan: the plan.
      model: its model.

    Returns:
      The optimizer.
    """
    # With an `axis_name` an extrapolation is local; without, all parallel modes compute the same.
    tx = plan.method.build(
        plan.learning_rate,
        total_steps=plan.steps,
        num_classes=plan.task.num_directions,
        steps_per_epoch=plan.steps_per_epoch,
        seed=plan.options.seed,
        axis_name=None if plan.workers is None else parallel.AXIS,
        num_workers=plan.workers or 1,
        objective=model.example_objective() if plan.method.needs_objective else None,
        likelihood=losses.LIKELIHOODS.get(plan.loss),
    )
    whole = wrap(
        tx,
        plan.learning_rate,
        clip=plan.options.clip,
        weight_decay=plan.options.weight_decay,
        precision=PRECISIONS[plan.options.precision],
    )
    if plan.monitor_every is None:
        return whole
    return monitoring.watch(
        whole,
        plan.method.name,
        plan.learning_rate,
        every=plan.monitor_every,
        # A curvature batch, on which it is then recorded, may be of one part.
        parts=plan.parts if plan.curvature_batch_size is None else 1,
        batch_size=plan.batch_size,
    )


def make_step(plan: Plan, model: Model, tx: optax.GradientTransformationExtraArgs) -> parallel.Step:
    """The training step of a plan: `train_step` with learning rate, norms and statistics.

    Args:
      plan: the plan.
      model: its model.
      tx: its optimizer.

    Returns:
      A pure function, as `parallel.Parallel` takes it.
    """
    options = StepOptions(
        accumulate=plan.options.accumulate,
        unroll=plan.loops_convolutions_slowly,
        per_worker=plan.workers is not None,
        skip_non_finite=plan.options.non_finite == "skip",
        ema=plan.options.ema,
        value_fn=model.value_fn,
        shares=plan.follows,
        norms_every=plan.options.norms_every,
    )

    def step(
        state: TrainState,
        batch: Batch,
        curvature: Batch | None,
        *,
        refresh: bool | str | None,
        axis_name: str | None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = train_step(
            tx,
            model.objective,
            state,
            batch,
            curvature,
            refresh=refresh,
            axis_name=axis_name,
            options=options,
        )
        rate = find_in_state(state.opt_state, "learning_rate")
        rate = jnp.asarray(plan.learning_rate if rate is None else rate, jnp.float32)
        return state, metrics | {"learning_rate": rate} | statistics(state.opt_state)

    return step


def statistics(opt_state: PyTree) -> dict[str, jax.Array]:
    """What the state of an optimizer tells about the run, as scalars.

    Args:
      opt_state: the state.

    Returns:
      By name what there is of momentum, alignment, consensus distance, loss scale and the top
      eigenvalue; then every other scalar field of the states and every injected or scheduled
      hyperparameter but the learning rate, by its path, such as ``state/0/count``; and what a
      monitor of the curvature recorded in this step.
    """
    monitored = monitoring.metrics(opt_state)
    if isinstance(opt_state, oa.MonitorCurvatureState):
        opt_state = opt_state.inner_state
    fields = {
        name: find_in_state(opt_state, name)
        for name in ("momentum", "alignment", "consensus_distance", "loss_scale", "eigenvalues")
    }
    # Some methods call an array of the parameters' shapes their momentum.
    scalars = {name: value for name, value in fields.items() if getattr(value, "shape", None) == ()}
    if fields["eigenvalues"] is not None:
        scalars["top_eigenvalue"] = jnp.max(fields["eigenvalues"])
    told = {id(value) for value in scalars.values()}
    told.add(id(find_in_state(opt_state, "learning_rate")))
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        is_number = leaf.shape == () and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        if is_number and id(leaf) not in told and _is_field(path):
            scalars[f"state/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = leaf
    return scalars | monitored


def _is_field(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is a field of a state or a hyperparameter, not of one parameter or layer."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        return True
    holder = getattr(path[-2], "name", None) if len(path) > 1 else None
    return holder in ("hyperparams", "scheduled")


def evaluation_batch(task: data.Task) -> int:
    """Examples per forward pass of an evaluation: keeps activations and outputs small."""
    outputs = task.train.y[0].size * (task.vocabulary_size or task.num_classes or 1)
    most = min(2**22 // math.prod(task.train.x.shape[1:]), 2**25 // outputs)
    return min(max(most, 1), EVALUATION_BATCH)


def _predicts_tokens(task: data.Task) -> bool:
    return task.defaults.kind in ("language", "translation")


@contextlib.contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Says of an error while a model is made, whatever it is, which options it comes from."""
    try:
        yield
    except Exception as error:
        if plan.model_options == plan.task.defaults.model_options and isinstance(error, ValueError):
            raise
        raise UsageError(
            f"--model-options {cli.shortened(json.dumps(plan.model_options))} do not fit the model "
            f"{plan.model}: {textwrap.shorten(str(error), 300)}"
        ) from error


def _check_memory(plan: Plan, arrays: PyTree, what: str) -> None:
    """Raises `UsageError` if arrays of these shapes do not fit into the plan's devices."""
    copies = 1 if plan.options.parallel == "fsdp" else len(plan.devices)
    need = copies * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    parallel.check_memory(need, what, plan.devices)
