"""Trainings some of whose epochs are skipped, and what happens to the parameters instead.

A run has a number of epochs, some of which `optax_accel.skip_epoch` skips. In these the parameters
move once, by a sample of what the epoch before did (`optax_accel.sample_epoch`), by just that
increment again, or by noise of its norm in a random direction. Optimizer, learning rate and
statistics of batch normalization stand still meanwhile: the rate falls along a cosine over the
epochs that are trained. Doing nothing at all in them is to train so many epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import optax_accel as oa
from experiments import cli, data, timing
from experiments.training import networks
from experiments.training.replicas import Replica

PyTree = Any
STATISTICS = ("tensor", "model", "element")
INSTEAD = ("training", "nothing", "increment", "isotropic", *STATISTICS)
OPTIMIZERS = {"sgd": functools.partial(optax.trace, decay=0.9), "adam": optax.scale_by_adam}


def isotropic(key: jax.Array, params: PyTree, previous: PyTree) -> PyTree:
    """Parameters moved in a random direction by as much as the last epoch moved them.

    Args:
      key: PRNG key.
      params: the parameters at the end of the last epoch.
      previous: those at its start.

    Returns:
      Parameters like `params`; the norm is that of all of them together.
    """
    norm = optax.tree.norm(optax.tree.sub(params, previous))
    noise = optax.tree.random_like(key, params, jax.random.normal)
    return optax.tree.add_scale(params, norm / optax.tree.norm(noise), noise)


def move(instead: str, key: jax.Array, params: PyTree, previous: PyTree) -> PyTree:
    """What a contestant does in place of an epoch.

    Args:
      instead: one of `INSTEAD`, but for the first two.
      key: PRNG key.
      params: the parameters at the end of the last epoch.
      previous: those at its start.

    Returns:
      The parameters at the end of the skipped epoch.
    """
    if instead == "isotropic":
        return isotropic(key, params, previous)
    if instead == "increment":  # the mean of each element without its noise
        return oa.sample_epoch(key, params, previous, statistics="element", scale=0.0)
    assert instead in STATISTICS
    return oa.sample_epoch(key, params, previous, statistics=instead)  # type: ignore[arg-type]


class Runner:
    """Trains on one setting, see `protocol_runs.Runner`.

    Args:
      setting: ``task``, ``model`` and its ``model_options``, ``optimizer`` (``"sgd"``, with
        momentum 0.9, or ``"adam"``), ``epochs``, ``batch_size``, and ``period`` and ``start`` of
        `optax_accel.skip_epoch`.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        self.setting = setting
        self.task = data.load_task(setting["task"], data_dir=data_dir)
        self.epochs = setting["epochs"]
        rule = {"period": setting["period"], "start": setting["start"]}
        self.skipped = [epoch for epoch in range(self.epochs) if oa.skip_epoch(epoch, **rule)]
        self.steps = len(self.task.train.y) // setting["batch_size"]
        self.optimizer = OPTIMIZERS[setting["optimizer"]]()
        # XLA does grouped convolutions, which vmapped weights make, slowly on a CPU.
        alone = models.is_convolutional(setting["model"]) and jax.default_backend() == "cpu"
        self.together = 1 if alone else None
        graphdef, _, self.rest = self._model(0)
        self.loss = networks.objective(graphdef, "cross_entropy")
        self._evaluate = jax.jit(
            jax.vmap(functools.partial(networks.evaluate, graphdef), in_axes=(0, 0, None))
        )
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1, 2))
        self._moves = {
            name: jax.jit(jax.vmap(functools.partial(move, name))) for name in INSTEAD[2:]
        }

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def trained_epochs(self, options: Mapping[str, Any]) -> int:
        """Number of epochs that a contestant trains.

        Args:
          options: ``instead``, one of `INSTEAD`: what it does in place of the skipped epochs;
            ``"training"`` skips none.
        """
        cli.check_known("what is done instead", options["instead"], INSTEAD)
        return self.epochs - (0 if options["instead"] == "training" else len(self.skipped))

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps of the epochs that are trained."""
        return float(self.trained_epochs(options) * self.steps)

    def seconds(self) -> float:
        """Seconds of a step of one run."""
        params, state, rest = self._start([(0.1, 0)])
        rows = self._order(0, 1)[0][None]

        def step() -> Any:
            nonlocal params, state, rest
            count = jnp.zeros((), jnp.int32)
            params, state, rest = self._step(
                params, state, rest, jnp.full(1, 0.1), count, self.steps, rows
            )
            return params

        timing.timed(step)
        return min(timing.timed(step)[1] for _ in range(5))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> list[dict[str, Any]]:
        """Trains runs; see `protocol_runs.Runner`."""
        size = self.together or len(runs)
        parts = (runs[first : first + size] for first in range(0, len(runs), size))
        return [scores for part in parts for scores in self._run(options, part)]

    def _run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> list[dict[str, Any]]:
        epochs, instead = self.trained_epochs(options), options["instead"]
        skipped = self.skipped if instead in self._moves else []
        params, state, rest = self._start(runs)
        keys = jax.vmap(jax.random.key)(np.array([seed for _, seed in runs]))
        rates = jnp.asarray([rate for rate, _ in runs], jnp.float32)
        orders = np.stack([self._order(seed, epochs) for _, seed in runs])
        total, count, previous = epochs * self.steps, 0, params
        for epoch in range(epochs + len(skipped)):
            if epoch in skipped:
                fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
                params, previous = self._moves[instead](fold(keys, epoch), params, previous), params
                continue
            previous = jax.tree.map(jnp.copy, params)  # since steps donate theirs
            for _ in range(self.steps):
                params, state, rest = self._step(
                    params, state, rest, rates, count, total, orders[:, count]
                )
                count += 1
            jax.block_until_ready(params)
        return self._scores(options, params, rest)

    def _train_step(
        self,
        params: PyTree,
        state: PyTree,
        rest: PyTree,
        rates: Any,
        count: Any,
        total: Any,
        rows: Any,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """A step of all runs; the rate falls along a cosine."""
        share = 0.5 * (1 + jnp.cos(jnp.pi * count / total))
        x, y = jnp.asarray(self.task.train.x), jnp.asarray(self.task.train.y)

        def one(params: PyTree, state: PyTree, rest: PyTree, rate: Any, rows: Any) -> Any:
            (_, after), gradients = self.loss.value_and_grad(
                params, rest=rest, x=x[rows], y=y[rows]
            )
            updates, state = self.optimizer.update(gradients, state, params)
            updates = optax.tree.scale(-rate * share, updates)
            return optax.apply_updates(params, updates), state, after

        return jax.vmap(one)(params, state, rest, rates, rows)

    def _model(self, seed: int) -> tuple[Any, PyTree, PyTree]:
        task, setting = self.task, self.setting
        return networks.split(
            models.create(
                setting["model"],
                input_shape=task.input_shape,
                num_classes=task.num_classes,
                vocabulary_size=task.vocabulary_size,
                rngs=seed,
                **setting["model_options"],
            )
        )

    def _start(self, runs: Sequence[Replica]) -> tuple[PyTree, PyTree, PyTree]:
        parts = [self._model(seed)[1:] for _, seed in runs]
        params, rest = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        return params, jax.vmap(self.optimizer.init)(params), rest

    def _order(self, seed: int, epochs: int) -> np.ndarray:
        steps, size = epochs * self.steps, self.setting["batch_size"]
        return data.index_steps(len(self.task.train.y), batch_size=size, seed=seed, steps=steps)

    def _scores(
        self, options: Mapping[str, Any], params: PyTree, rest: PyTree
    ) -> list[dict[str, Any]]:
        errors: dict[str, np.ndarray] = {}
        for name, split in (("validation", self.task.validation), ("error", self.task.test)):
            sums: Any = 0.0
            for first in range(0, len(split.y), 1_000):
                part = split[first : first + 1_000]
                batch = {"x": jnp.asarray(part.x), "y": jnp.asarray(part.y)}
                scores = self._evaluate(params, rest, batch)
                # The loss of a run that diverged is not finite, nor is its error then.
                wrong = 1.0 - np.asarray(scores["accuracy"], np.float64)
                sums = sums + len(part.y) * np.where(np.isfinite(scores["loss"]), wrong, np.nan)
            errors[name] = sums / len(split.y)
        gradients = self.trained_epochs(options) / self.epochs
        return [
            {"validation": validation, "error": error, "gradients": gradients}
            for validation, error in zip(errors["validation"], errors["error"], strict=True)
        ]
