"""Training by feedback alignment, and the angles between its gradients and the true ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
import optax_accel as oa
from experiments.training.replicas import Replica
from experiments.training.studies.image_runs import ImageRunner, PyTree, seconds_of

_MEASURED = 256  # most training examples that the angles are measured on
_TIMES = 4  # how often they are, besides after one epoch


class Runner(ImageRunner):
    """Trains one network on a part of a task's training data, see `protocol_runs.Runner`.

    The steps are not scanned: XLA runs convolutions in loops slowly on a CPU.

    Args:
      setting: ``network`` and ``share`` as in the study, ``task``, ``hidden_sizes`` or
        ``channels``, ``steps`` and ``batch_size``.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        super().__init__(setting, data_dir, folder)
        self._graphdef, _ = self._network(0)
        self._objective = oa.Objective(
            lambda params, x: nnx.merge(self._graphdef, params)(x),
            lambda logits, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)),
        )

    def seconds(self) -> float:
        """Seconds of a gradient by back-propagation."""
        _, params = self._network(0)
        x, y = self.batch(self._order(0)[0][0])
        call = functools.partial(jax.jit(self._objective.grad), params, x=x, y=y)
        return seconds_of(call)

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other; see `protocol_runs.Runner`."""
        step = self.program("step", self._step, options)
        angles = self.program("angles", self._angles, options)
        outputs = self.program("outputs", self._outputs)
        steps = self.setting["steps"]
        times = {round(steps * i / _TIMES) for i in range(_TIMES + 1)}
        for rate, seed in runs:
            _, params = self._network(seed)
            state, start, key = self._optimizer(rate).init(params), params, jax.random.key(seed)
            order, epoch = self._order(seed)
            sample = self.batch(np.unique(order[:epoch])[:_MEASURED])
            scores: dict[str, Any] = {"angles": []}
            for i in range(steps + 1):
                if i in times or i == min(epoch, steps):
                    found = np.asarray(angles(params, start, key, *sample))
                    if i == min(epoch, steps):
                        scores["angle"] = float(found.max())
                    if i in times:
                        scores["angles"] += found.tolist()
                if i < steps:
                    batch = self.batch(order[i])
                    params, state = step(params, state, start, key, jnp.float32(rate), *batch)
            yield scores | self.errors(functools.partial(outputs, params))

    # -- the network and its data --------------------------------------------------------------

    def _network(self, seed: int) -> tuple[Any, PyTree]:
        common: dict[str, Any] = {
            "input_shape": self.task.input_shape,
            "num_classes": self.task.num_classes,
            "rngs": seed,
        }
        network = self.setting["network"]
        if network == "CNN":
            first, second = self.setting["channels"]
            return nnx.split(models.Cnn(channels=(first, second), **common))
        sizes, activation = self.setting["hidden_sizes"], network.split()[0]
        return nnx.split(models.Mlp(hidden_sizes=sizes, activation=activation, **common))

    def _order(self, seed: int) -> tuple[np.ndarray, int]:
        """The rows of each step, from a part of the data that the seed chooses, and of an epoch."""
        total = len(self.task.train.y)
        size = round(total * self.setting["share"])
        part = np.random.default_rng(seed).permutation(total)[:size]
        return self.order(seed, part), size // self.setting["batch_size"]

    # -- programs ------------------------------------------------------------------------------

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        schedule = optax.linear_schedule(rate, 0.0, self.setting["steps"])
        return optax.sgd(schedule, momentum=0.9)

    def _aligned(
        self, options: Mapping[str, Any], start: PyTree, key: jax.Array, x: jax.Array
    ) -> oa.Objective:
        """The objective that a contestant trains on; its matrices are those of the run's key."""
        if not options:
            return self._objective
        return oa.feedback_alignment(self._objective, start, {"x": x}, key=key, **options)

    def _outputs(self, options: Mapping[str, Any], params: PyTree, x: jax.Array) -> jax.Array:
        del options
        return self._objective.outputs(params, x=x)

    def _step(
        self,
        options: Mapping[str, Any],
        params: PyTree,
        state: PyTree,
        start: PyTree,
        key: jax.Array,
        rate: jax.Array,
        x: jax.Array,
        y: jax.Array,
    ) -> tuple[PyTree, PyTree]:
        gradient = self._aligned(options, start, key, x).grad(params, x=x, y=y)
        updates, state = self._optimizer(rate).update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def _angles(
        self,
        options: Mapping[str, Any],
        params: PyTree,
        start: PyTree,
        key: jax.Array,
        x: jax.Array,
        y: jax.Array,
    ) -> jax.Array:
        """The angle to the true gradient of each matrix, in degrees and the order of the layers."""
        gradients = [
            [g for g in jax.tree.leaves(objective.grad(params, x=x, y=y)) if g.ndim > 1]
            for objective in (self._aligned(options, start, key, x), self._objective)
        ]

        def angle(one: jax.Array, other: jax.Array) -> jax.Array:
            norms = jnp.linalg.norm(one.ravel()) * jnp.linalg.norm(other.ravel())
            cosine = jnp.vdot(one, other) / jnp.where(norms > 0, norms, 1)
            return jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1)))

        return jnp.stack([angle(*pair) for pair in zip(*gradients, strict=True)])
