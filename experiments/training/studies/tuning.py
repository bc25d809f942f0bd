"""Tunes methods on a problem: one run per setting, its losses over steps and over seconds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_accel as oa
from experiments.methods import Method
from experiments.training.step import TrainState, averaged, init_state, train_step
from experiments.training.studies.problems import Problem

PyTree = Any
Setting = dict[str, float]
Curve = dict[str, list[float]]
# Points of a curve, and examples on which they are evaluated.
POINTS, EVALUATED = 50, 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method and the settings that it is tuned on.

    Attributes:
      method: its entry in the catalogue.
      summary: what is tuned and what is not, in one line.
      settings: values by name: ``rate`` is the learning rate, any other name one of the method's
        hyperparameters.
      fixed: values that are the same in all settings.
      relative_rate: whether rates are for losses of about 1, and so divided by `Problem.unit`.
      gradient_batches: number of batches whose mean gradient makes a step; curvature is taken on
        the first one.
      gradients: what a step takes, in gradients of one batch, from the optimizer's state behind it;
        None for the number in the catalogue.
    """

    method: Method
    summary: str
    settings: tuple[Setting, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    relative_rate: bool = False
    gradient_batches: int = 1
    gradients: Callable[[PyTree], float] | None = None

    def work(self, opt_state: PyTree) -> float:
        """The gradients of one batch that the step before this state was worth."""
        if self.gradients is None:
            return self.method.gradients_per_step
        return self.gradients(opt_state)

    def build(
        self, problem: Problem, setting: Mapping[str, Any]
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer.

        Args:
          problem: what it is to train.
          setting: one of `settings`; its values may be traced.

        Returns:
          The transformation.
        """
        values = {**self.fixed, **setting}
        rate = values.pop("rate")
        x, y = (array[: problem.batch_size] for array in problem.train)
        return self.method.build(
            rate / problem.unit if self.relative_rate else rate,
            total_steps=problem.steps,
            num_classes=1,  # none of the methods follows a dominant subspace
            objective=problem.objective.bind(rest=problem.rest, x=x, y=y),
            likelihood=problem.likelihood,
            **values,
        )

    def middle(self, number: int | None) -> tuple[Setting, ...]:
        """A number of settings from the middle of the table, in its order; all for ``None``."""
        count = len(self.settings)
        nearest = sorted(range(count), key=lambda i: abs(2 * i - count + 1))
        return tuple(self.settings[i] for i in sorted(nearest[:number]))


def grid(**values: Sequence[float]) -> tuple[Setting, ...]:
    """All combinations of values.

    >>> grid(rate=(0.1, 0.3), damping=(1.0,))
    ({'rate': 0.1, 'damping': 1.0}, {'rate': 0.3, 'damping': 1.0})

    Args:
      **values: the values of each name.

    Returns:
      One setting per combination.
    """
    return tuple(
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    )


class Runs(Protocol):
    """What :func:`train` needs of a method on a problem; :class:`Trainer` is one."""

    problem: Problem
    batch_size: int

    def start(self, setting: PyTree, params: PyTree = None) -> Any:
        """The state before the first step, from the problem's parameters or given ones."""

    def step(self, number: int, state: Any, setting: PyTree, rows: jax.Array) -> Any:
        """One step, whose state is donated."""

    def evaluated(self, state: Any) -> PyTree:
        """The parameters to evaluate."""

    def work(self, state: Any) -> float:
        """The gradients of one batch that the step before this state was worth."""
        ...


class Trainer:
    """The compiled steps of one method on one problem, for any of its settings.

    Args:
      candidate: the method.
      problem: the problem.

    Attributes:
      compile_seconds: how long compiling the steps took.
    """

    def __init__(self, candidate: Candidate, problem: Problem):
        self.candidate, self.problem = candidate, problem
        self.batch_size = problem.batch_size * candidate.gradient_batches
        setting = jax.tree.map(jnp.float32, candidate.settings[0])
        rows = jnp.zeros(self.batch_size, jnp.int32)
        self._built = candidate.build(problem, candidate.settings[0])
        refreshes = dict.fromkeys(oa.refresh_at(step, self._built) for step in range(20))
        state = self.start(setting)
        begin = time.perf_counter()
        self._steps = {
            refresh: jax.jit(functools.partial(self._step, refresh=refresh), donate_argnums=0)
            .lower(state, setting, rows)
            .compile()
            for refresh in refreshes
        }
        self.compile_seconds = time.perf_counter() - begin
        for step in self._steps.values():  # the first call sets up what later ones find
            state = jax.block_until_ready(step(state, setting, rows))

    def start(self, setting: PyTree, params: PyTree = None) -> TrainState:
        """The state before the first step, from the problem's parameters or given ones."""
        params = self.problem.params if params is None else params
        return self._start(setting, jax.tree.map(jnp.copy, params))

    def evaluated(self, state: TrainState) -> PyTree:
        """The parameters to evaluate."""
        return averaged(state).params

    def work(self, state: TrainState) -> float:
        """The gradients of one batch that the step before this state was worth."""
        return self.candidate.work(state.opt_state)

    @functools.cached_property
    def _start(self) -> Any:
        def start(setting: PyTree, params: PyTree) -> TrainState:
            tx = self.candidate.build(self.problem, setting)
            return init_state(tx, params, self.problem.rest)

        return jax.jit(start)

    def step(self, number: int, state: TrainState, setting: PyTree, rows: jax.Array) -> TrainState:
        """One step, whose state is donated.

        Args:
          number: zero-based number of the step.
          state: the state before it.
          setting: the values of the setting, float32.
          rows: the numbers of the batch's examples.

        Returns:
          The state after it.
        """
        return self._steps[oa.refresh_at(number, self._built)](state, setting, rows)

    def _step(self, state: TrainState, setting: PyTree, rows: jax.Array, *, refresh: Any) -> Any:
        problem, several = self.problem, self.candidate.gradient_batches > 1

        def batch(rows: jax.Array) -> dict[str, jax.Array]:
            x, y = problem.train
            return {"x": x[rows], "y": y[rows]}

        return train_step(
            self.candidate.build(problem, setting),
            problem.objective,
            state,
            batch(rows),
            batch(rows[: problem.batch_size]) if several else None,
            refresh=refresh,
        )[0]


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(objective: oa.Objective, params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    return objective(params, x=x, y=y)


def batches(examples: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of batches, without end: the data shuffled anew in each epoch, the remainder dropped."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(examples).astype(np.int32)
        for start in range(0, examples - size + 1, size):
            yield order[start : start + size]


def train(
    trainer: Runs,
    setting: Setting,
    steps: int,
    seconds: float,
    seed: int,
    params: PyTree = None,
) -> Curve:
    """Makes one run, which ends early where the loss is not finite or the time is up.

    Args:
      trainer: the method and the problem.
      setting: one of the method's settings.
      steps: number of steps.
      seconds: time that the steps may take, evaluations not counted.
      seed: seed of the batches.
      params: where to start; None for the problem's own parameters.

    Returns:
      The curve: steps made, seconds they took, what they were worth in gradients of one batch,
      training and test loss then.
    """
    problem = trainer.problem
    values = jax.tree.map(jnp.float32, setting)
    state = trainer.start(values, params)
    parts = [tuple(a[:EVALUATED] for a in split) for split in (problem.train, problem.test)]
    curve: Curve = {key: [] for key in ("step", "seconds", "gradients", "train", "test")}
    elapsed, shown, gradients = 0.0, -math.inf, 0.0
    rows = batches(len(problem.train[1]), trainer.batch_size, seed)
    for step in range(steps + 1):
        last = step == steps or elapsed >= seconds
        if last or step % max(1, steps // POINTS) == 0 or elapsed - shown > seconds / POINTS:
            at = trainer.evaluated(state)
            losses = [float(_evaluate(problem.evaluated, at, *part)) for part in parts]
            if not all(map(math.isfinite, losses)):
                break
            shown = elapsed
            for key, value in zip(curve, (step, elapsed, gradients, *losses), strict=True):
                curve[key].append(value)
        if last:
            break
        batch = jnp.asarray(next(rows))
        begin = time.perf_counter()
        state = jax.block_until_ready(trainer.step(step, state, values, batch))
        elapsed += time.perf_counter() - begin
        gradients += trainer.work(state)
    return curve


def final_loss(curve: Curve, steps: int, seconds: float) -> float:
    """The last training loss of a run; infinity if it diverged.

    Args:
      curve: the run, from `train`.
      steps: number of steps that it was to make.
      seconds: time that it could take.

    Returns:
      The loss.
    """
    ended = curve["step"][-1] >= steps or curve["seconds"][-1] >= seconds
    return curve["train"][-1] if ended else math.inf
