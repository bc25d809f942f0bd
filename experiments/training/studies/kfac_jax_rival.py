"""kfac-jax as a rival in a comparison, where it is installed: its optimizer on our problems.

The library does without it. The settings are those of K-FAC here: factors at every step, inverses
every ten, a KL clip, momentum of 0.9; what else there is keeps its default.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.training.studies.problems import Problem
from experiments.training.studies.tuning import Candidate, Setting

PyTree = Any
_REGISTER = {
    "categorical": "register_softmax_cross_entropy_loss",
    "bernoulli": "register_sigmoid_cross_entropy_loss",
}


def installed() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec("kfac_jax") is not None


def _library() -> Any:
    return importlib.import_module("kfac_jax")


class _State(NamedTuple):
    params: PyTree
    optimizer: PyTree
    key: jax.Array


class KFACJaxTrainer:
    """Runs of kfac-jax with the interface of :class:`~experiments.training.studies.tuning.Trainer`.

    Args:
      candidate: rate and settings, ``kl_clip`` and ``damping``.
      problem: the problem; its loss must be one that kfac-jax knows.

    Attributes:
      compile_seconds: how long a first step took with its compilation, less another one. Each KL
        clip has an optimizer of its own; all are compiled before the first run.
    """

    def __init__(self, candidate: Candidate, problem: Problem):
        self.candidate, self.problem = candidate, problem
        self.batch_size = problem.batch_size
        self._optimizers: dict[float, Any] = {}
        self.compile_seconds = 0.0
        for setting in candidate.settings:
            self._compile({name: jnp.float32(value) for name, value in setting.items()})

    def _compile(self, setting: Setting) -> None:
        if float(setting["kl_clip"]) in self._optimizers:
            return
        state, rows = self.start(setting), jnp.zeros(self.batch_size, jnp.int32)
        durations = []
        for number in range(3):
            begin = time.perf_counter()
            state = jax.block_until_ready(self.step(number, state, setting, rows))
            durations.append(time.perf_counter() - begin)
        self.compile_seconds = durations[0] - durations[2]

    def start(self, setting: Setting, params: PyTree = None) -> _State:
        """The state before the first step, from the problem's parameters or given ones."""
        params = self.problem.params if params is None else params
        params, key = jax.tree.map(jnp.copy, params), jax.random.key(0)
        batch = self._batch(jnp.arange(self.batch_size))
        return _State(params, self._optimizer(setting).init(params, key, batch), key)

    def step(self, number: int, state: _State, setting: Setting, rows: jax.Array) -> _State:
        """One step, whose state is donated."""
        key, now = jax.random.split(state.key)
        params, optimizer, _ = self._optimizer(setting).step(
            state.params,
            state.optimizer,
            now,
            batch=self._batch(rows),
            learning_rate=jnp.float32(self.candidate.fixed["rate"]),
            momentum=jnp.float32(0.9),
            damping=jnp.float32(setting["damping"]),
            global_step_int=number,
        )
        return _State(params, optimizer, key)

    def evaluated(self, state: _State) -> PyTree:
        """The parameters to evaluate."""
        return state.params

    def work(self, state: _State) -> float:
        """The gradients of one batch that a step is worth, as K-FAC's here."""
        return self.candidate.method.gradients_per_step

    def _batch(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, y = self.problem.train
        return x[rows], y[rows]

    def _optimizer(self, setting: Setting) -> Any:
        """The optimizer of a KL clip, which it is built with."""
        clip = float(setting["kl_clip"])
        if clip not in self._optimizers:
            self._optimizers[clip] = _library().Optimizer(
                jax.value_and_grad(functools.partial(_loss, self.problem)),
                l2_reg=0.0,
                norm_constraint=clip,
                num_burnin_steps=0,
                inverse_update_period=10,
                estimation_mode="fisher_gradients",
            )
        return self._optimizers[clip]


def _loss(problem: Problem, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    outputs = problem.evaluated.outputs(params, x=x)
    getattr(_library(), _REGISTER[problem.likelihood])(outputs, y)
    return problem.evaluated.loss_of_outputs(outputs, y=y)
