"""Training with sampled products, their multiplications, and the bias and variance of gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import models
import optax_accel as oa
from experiments.training.replicas import Replica
from experiments.training.studies.image_runs import ImageRunner, PyTree, seconds_of


class Runner(ImageRunner):
    """Trains a perceptron by Adam, see `protocol_runs.Runner`.

    Args:
      setting: ``task``, ``hidden_sizes``, ``steps``, ``batch_size`` and ``draws`` of the gradient.
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
        """Seconds of an exact gradient."""
        call = functools.partial(jax.jit(self._objective.grad), self._network(0)[1])
        x, y = self.batch(self.order(0)[0])
        return seconds_of(functools.partial(call, x=x, y=y))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other; see `protocol_runs.Runner`."""
        train = self.program("train", self._train, options)
        spread = self.program("spread", self._spread, options)
        outputs = self.program("outputs", self._outputs)
        flops = self._flops(options) / self._flops({})
        for rate, seed in runs:
            _, start = self._network(seed)
            order, key = self.order(seed), jax.random.key(seed)
            x, y = self.batch(order)
            params = train(start, x, y, key, jnp.float32(rate))
            bias, variance = spread(start, x[0], y[0], key)
            yield {
                "flops": flops,
                "bias": float(bias),
                "variance": float(variance),
                **self.errors(functools.partial(outputs, params)),
            }

    def _flops(self, options: Mapping[str, Any]) -> float:
        x, y = self.batch(self.order(0)[0])
        gradient = jax.jit(lambda params: self._sampled(options, jax.random.key(0)).grad(
            params, x=x, y=y
        ))  # fmt: skip
        analysis = gradient.lower(self._network(0)[1]).compile().cost_analysis()
        assert analysis is not None
        return float(analysis["flops"])

    # -- the network and its data --------------------------------------------------------------

    def _network(self, seed: int) -> tuple[Any, PyTree]:
        return nnx.split(
            models.Mlp(
                hidden_sizes=self.setting["hidden_sizes"],
                activation="relu",
                input_shape=self.task.input_shape,
                num_classes=self.task.num_classes,
                rngs=seed,
            )
        )

    # -- programs ------------------------------------------------------------------------------

    def _sampled(self, options: Mapping[str, Any], key: jax.Array) -> oa.Objective:
        return (
            oa.sample_products(self._objective, key=key, **options) if options else self._objective
        )

    def _outputs(self, options: Mapping[str, Any], params: PyTree, x: jax.Array) -> jax.Array:
        del options
        return self._objective.outputs(params, x=x)

    def _train(
        self,
        options: Mapping[str, Any],
        params: PyTree,
        x: jax.Array,
        y: jax.Array,
        key: jax.Array,
        rate: jax.Array,
    ) -> PyTree:
        """The parameters after a step with each batch."""
        tx = optax.adam(rate)

        def step(carry: tuple[PyTree, PyTree], batch: tuple[jax.Array, ...]) -> tuple[Any, None]:
            (params, state), (i, x, y) = carry, batch
            objective = self._sampled(options, jax.random.fold_in(key, i))
            updates, state = tx.update(objective.grad(params, x=x, y=y), state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = jnp.arange(self.setting["steps"])
        (params, _), _ = lax.scan(step, (params, tx.init(params)), (steps, x, y))
        return params

    def _spread(
        self, options: Mapping[str, Any], params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Bias and variance of the gradient of one batch over draws, relative to the exact one."""
        exact = self._objective.grad(params, x=x, y=y)
        number = self.setting["draws"]

        def draw(i: jax.Array, sums: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
            objective = self._sampled(options, jax.random.fold_in(key, i))
            error = optax.tree.sub(objective.grad(params, x=x, y=y), exact)
            return optax.tree.add(sums[0], error), sums[1] + optax.tree.norm(error, squared=True)

        total, squares = lax.fori_loop(
            0, number, draw, (optax.tree.zeros_like(exact), jnp.zeros(()))
        )
        mean = optax.tree.norm(total, squared=True) / number**2
        size = optax.tree.norm(exact, squared=True)
        return jnp.sqrt(mean / size), jnp.maximum(squares / number - mean, 0) / size
