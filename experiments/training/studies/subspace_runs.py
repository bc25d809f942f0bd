"""Training with projected updates, and what is measured along the way.

A `Study` holds the data, the model and the compiled functions of one `Plan`. Its `walk` trains one
`Run`; projections use a basis that the library tracks on a fixed part of the training set. What is
*measured* uses eigenvectors solved to a tolerance.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import optax_accel as oa
from experiments import data
from experiments.runs.records import number
from experiments.training import networks
from experiments.training.step import TrainState, init_state, train_step
from optax_accel import curvature
from optax_accel.curvature import blocks

PyTree = Any

# Numbers are stored with the digits that float32 carries.
rounded = functools.partial(number, digits=7)
# The relative accuracy of all measured eigenvalues.
TOLERANCE = 1e-4
# A queue of unfinished steps costs memory: wait for one this often.
WAIT_EVERY = 16


@dataclasses.dataclass(frozen=True)
class Scale:
    """Lengths and sizes, which separate a quick look from the papers' full runs.

    Attributes:
      seeds: number of seeds.
      latest_switch: last step at which the branches may leave SGD.
      check_every: steps between checks of the alignment before the branches leave.
      steps: steps of each branch.
      short_steps: steps of each run of the panels stability and noise.
      evaluations: number of evaluations of training loss and test accuracy along each run.
      points: number of eigenvalue problems solved along each run.
      snapshots: number of parameter sets kept along SGD after the switch, for the panel energy.
      curvature_examples: training examples, fixed per seed, whose Hessian the projections track.
      measured_examples: training examples whose Hessian the measurements use.
      refresh_every: steps between refreshes of the tracked subspace.
      probes: number of random vectors that estimate the energy outside the subspace.
    """

    seeds: int
    latest_switch: int
    check_every: int
    steps: int
    short_steps: int
    evaluations: int
    points: int
    snapshots: int
    curvature_examples: int
    measured_examples: int
    refresh_every: int
    probes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers, after validation.

    Attributes:
      task: data and model.
      loss: name of the training loss, ``"mse"`` or ``"cross_entropy"``.
      scale: lengths and sizes.
      learning_rate: learning rate of SGD.
      switch_step: step at which the branches leave SGD; ``None`` for the first check at which the
        gradient is aligned.
      batch_size: examples per step, 50 in the papers.
    """

    task: data.Task
    loss: str
    scale: Scale
    learning_rate: float
    switch_step: int | None = None
    batch_size: int = 50

    @property
    def directions(self) -> int:
        """k, the dimension of the dominant subspace: the number of classes, as in the papers."""
        return self.task.num_classes

    def config(self) -> dict[str, Any]:
        """The settings as plain JSON: two runs with equal settings may share a folder."""
        return {
            "study": "subspaces",
            "task": self.task.name,
            "model": self.task.default_model,
            "train_examples": len(self.task.train),
            "test_examples": len(self.task.test),
            "data": self.task.checksums,
            "loss": self.loss,
            "k": self.directions,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "switch_step": self.switch_step,
            **dataclasses.asdict(self.scale),
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one training run.

    Attributes:
      seed: seed of the initial weights and the batch order.
      learning_rate: learning rate of the optimizer.
      batch_size: examples per step.
      optimizer: ``"sgd"`` or ``"adam"``.
      momentum: momentum of SGD, 0 for plain SGD.
      weights: the factors (a, b) of the dominant and the bulk part of the update; ``None`` for an
        update without projection.
      directions: dimension of the tracked subspace.
      refresh_every: steps between refreshes of the tracked subspace.
    """

    seed: int
    learning_rate: float
    batch_size: int
    optimizer: str = "sgd"
    momentum: float = 0.0
    weights: tuple[float, float] | None = None
    directions: int = 0
    refresh_every: int = 1

    def build(self, hyper: dict[str, Any] | None = None) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the run.

        Args:
          hyper: values, possibly traced, to use instead of those of `hyper`.
        """
        hyper = self.hyper() if hyper is None else hyper
        if self.optimizer == "adam":
            tx = optax.adam(hyper["learning_rate"])
        else:
            # Plain SGD keeps no buffer, so it is a different program.
            tx = optax.sgd(hyper["learning_rate"], hyper["momentum"] if self.momentum else None)
        if self.weights is not None:
            tx = optax.chain(
                tx,
                oa.interpolate_subspaces(
                    self.directions, hyper["a"], hyper["b"], tracker=oa.BlockTracker()
                ),
            )
        return optax.with_extra_args_support(tx)

    def hyper(self) -> dict[str, float]:
        """The numbers that the compiled step takes as arguments."""
        a, b = self.weights or (1.0, 1.0)
        return {"learning_rate": self.learning_rate, "momentum": self.momentum, "a": a, "b": b}

    def program(self) -> tuple[Any, ...]:
        """The settings that need a compiled step of their own."""
        return (
            self.optimizer,
            self.momentum > 0,
            None if self.weights is None else self.directions,
        )


def _norm_squared(vector: PyTree) -> jax.Array:
    block = blocks.as_block(vector)
    return blocks.inner(block, block)[0, 0]


@jax.jit
def alignment(basis: PyTree, vector: PyTree) -> jax.Array:
    """chi_k of a vector: the norm of its part in the span of the basis over its own norm."""
    coefficients = blocks.inner(basis, blocks.as_block(vector))
    squared = _norm_squared(vector)
    ratio = jnp.sum(coefficients**2) / jnp.where(squared > 0, squared, 1)
    return jnp.sqrt(jnp.minimum(ratio, 1))


@jax.jit
def update_products(basis: PyTree, gradient: PyTree, before: PyTree, after: PyTree) -> jax.Array:
    """``-<d, g_dom>, |g_dom|^2, -<d, g_bulk>, |g_bulk|^2`` of the update ``d = after - before``."""
    update = jax.tree.map(jnp.subtract, after, before)
    of_gradient = blocks.inner(basis, blocks.as_block(gradient))[:, 0]
    of_update = blocks.inner(basis, blocks.as_block(update))[:, 0]
    whole = blocks.inner(blocks.as_block(update), blocks.as_block(gradient))[0, 0]
    dominant, size = of_update @ of_gradient, of_gradient @ of_gradient
    return jnp.stack([-dominant, size, dominant - whole, _norm_squared(gradient) - size])


class Study:
    """Data, model and compiled functions of one plan.

    Args:
      plan: the settings of the study.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        task = plan.task
        self.x, self.y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
        self.batches = {name: self._cut(getattr(task, name)) for name in ("train", "test")}
        rows = np.random.default_rng(0).permutation(len(task.train))
        rows = np.sort(rows[: plan.scale.measured_examples])
        self.measured = self._cut(data.Split(task.train.x[rows], task.train.y[rows]))
        # Loops around convolutions are slow on a CPU (jax#12868), and the cold start is one.
        self.cold_start = not (
            models.is_convolutional(task.default_model) and jax.default_backend() == "cpu"
        )
        self.graphdef, _, rest = networks.split(self._model(0))

        self.loss = networks.objective(self.graphdef, plan.loss)
        # All measurements share one objective, because compiled programs are cached by objective.
        self.objective = self.loss.given(rest=rest)
        self._gradient = jax.jit(self.objective.grad)
        self._evaluate = jax.jit(
            functools.partial(networks.evaluate, self.graphdef, loss=plan.loss)
        )
        self._steps: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def _cut(self, split: data.Split) -> list[dict[str, jax.Array]]:
        """Cuts a split into batches that fit into one pass, as arguments of the objective."""
        size = 5000 if self.plan.task.default_model == "mlp" else 1000
        return [
            {"x": jnp.asarray(split.x[i : i + size]), "y": jnp.asarray(split.y[i : i + size])}
            for i in range(0, len(split), size)
        ]

    def _model(self, seed: int) -> Any:
        task = self.plan.task
        return models.create(
            task.default_model,
            input_shape=task.input_shape,
            num_classes=task.num_classes,
            vocabulary_size=task.vocabulary_size,
            rngs=seed,
        )

    def start(self, seed: int) -> tuple[PyTree, PyTree]:
        """The initial parameters, and the variables that are not trained.

        Args:
          seed: seed of the initial weights.
        """
        return networks.split(self._model(seed))[1:]

    def walk(
        self, run: Run, params: PyTree, first: int, stop: int
    ) -> Iterator[tuple[int, TrainState]]:
        """Trains from step `first` to `stop`.

        Args:
          run: the settings of the run.
          params: parameters after `first` steps; the optimizer state starts fresh.
          first: number of steps taken before; the batches continue after theirs.
          stop: number of steps taken after the last one.

        Yields:
          The number of steps taken and the state, also before the first step. The next step
          donates the state's buffers: copy what you want to keep.
        """
        _, rest = self.start(run.seed)
        examples = len(self.y)
        order = data.index_batches(examples, batch_size=run.batch_size, seed=run.seed)
        for _ in range(first):
            next(order)
        subset = np.random.default_rng(run.seed).permutation(examples)
        subset = np.sort(subset[: self.plan.scale.curvature_examples])
        tracked = None
        if run.weights is not None:
            tracked = {"x": self.x[subset], "y": self.y[subset]}
        step, hyper = self._step(run), run.hyper()
        state = jax.tree.map(jnp.copy, init_state(run.build(), params, rest))
        yield first, state
        for done in range(first, stop):
            refresh = (
                oa.refresh_at(done - first, run.refresh_every, cold_start=self.cold_start)
                if tracked
                else None
            )
            state, loss = step(state, next(order), self.x, self.y, tracked, hyper, refresh=refresh)
            if done % WAIT_EVERY == 0:
                jax.block_until_ready(loss)
            yield done + 1, state

    def _step(self, run: Run) -> Callable[..., Any]:
        if run.program() not in self._steps:

            def step(
                state: Any, index: Any, x: Any, y: Any, tracked: Any, hyper: Any, refresh: Any
            ) -> tuple[Any, jax.Array]:
                state, metrics = train_step(
                    run.build(hyper),
                    self.loss,
                    state,
                    {"x": x[index], "y": y[index]},
                    tracked,
                    refresh=refresh,
                )
                return state, metrics["loss"]

            self._steps[run.program()] = jax.jit(
                step, static_argnames="refresh", donate_argnames="state"
            )
        return self._steps[run.program()]

    def evaluate(self, state: TrainState) -> dict[str, float | None]:
        """Training loss and test accuracy on all examples.

        Args:
          state: the training state.

        Returns:
          ``train_loss`` and ``test_accuracy``; both ``None`` if the loss is not finite.
        """
        scores = {}
        for split, name in (("train", "loss"), ("test", "accuracy")):
            total = 0.0
            for batch in self.batches[split]:
                result = self._evaluate(state.params, state.rest, batch)
                total += len(batch["y"]) * float(result[name])
            scores[f"{split}_{name}"] = total / len(getattr(self.plan.task, split))
        finite = math.isfinite(scores["train_loss"])
        return {name: rounded(value) if finite else None for name, value in scores.items()}

    def full_gradient(self, params: PyTree) -> PyTree:
        """The gradient of the training loss over all training examples."""
        total = None
        for batch in self.batches["train"]:
            share = len(batch["y"]) / len(self.y)
            part = jax.tree.map(lambda g, share=share: share * g, self._gradient(params, **batch))
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total

    def operator(self, build: Callable[..., Any], params: PyTree) -> curvature.CurvatureOperator:
        """A curvature matrix on the measured examples.

        Args:
          build: a constructor of `optax_accel.curvature`, such as `hessian`.
          params: the parameters at which it is taken.
        """
        if len(self.measured) == 1:
            return build(self.objective, params, **self.measured[0])
        return build(self.objective, params, batches=self.measured)

    def eigenpairs(self, params: PyTree, extra: int = 0) -> curvature.Eigenpairs:
        """The leading eigenpairs of the Hessian, with eigenvalues accurate to `TOLERANCE`.

        Args:
          params: the parameters at which the Hessian is taken.
          extra: number of eigenpairs beyond the k-th.
        """
        operator = self.operator(curvature.hessian, params)
        count = self.plan.directions + extra
        return curvature.lanczos(
            operator,
            operator.like,
            count,
            key=jax.random.key(0),
            num_products=30 * count,
            tolerance=TOLERANCE,
            start=self.full_gradient(params),
            loop="host",
        )

    def batch_alignments(self, params: PyTree, basis: PyTree, seed: int) -> list[float]:
        """chi_k of ten mini-batch gradients.

        Args:
          params: the parameters at which the gradients are taken.
          basis: an orthonormal basis of the dominant subspace.
          seed: seed of the run; the batches differ from those it trains on.
        """
        batch_size = self.plan.batch_size
        order = data.index_batches(len(self.y), batch_size=batch_size, seed=seed + 1000)
        batches = [{"x": self.x[i], "y": self.y[i]} for i in itertools.islice(order, 10)]
        return [float(alignment(basis, self._gradient(params, **batch))) for batch in batches]
