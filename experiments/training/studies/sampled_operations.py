"""Training with sampled products, their multiplications, and the bias and variance of gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import models
import optax_accel as oa
from experiments import cli, data, timing
from experiments.training.replicas import Replica

PyTree = Any


class Runner:
    """Trains a perceptron by Adam, see `protocol_runs.Runner`.

    Args:
      setting: ``task``, ``hidden_sizes``, ``steps``, ``batch_size`` and ``draws`` of the gradient.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        self.task = data.load_classification(setting["task"], data_dir=data_dir)
        self._mean, self._deviation = (f(self.task.train.x) for f in (np.mean, np.std))
        self._graphdef, _ = self._network(0)
        self._objective = oa.Objective(
            lambda params, x: nnx.merge(self._graphdef, params)(x),
            lambda logits, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)),
        )
        self._programs: dict[str, Callable[..., Any]] = {}

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps; every contestant computes one gradient in each."""
        del options
        return float(self.setting["steps"])

    def seconds(self) -> float:
        """Seconds of an exact gradient."""
        call = functools.partial(jax.jit(self._objective.grad), self._network(0)[1])
        x, y = self._batch(self._order(0)[0])
        timing.timed(functools.partial(call, x=x, y=y))
        return min(timing.timed(functools.partial(call, x=x, y=y))[1] for _ in range(5))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other; see `protocol_runs.Runner`."""
        train = self._program("train", self._train, options)
        spread = self._program("spread", self._spread, options)
        flops = self._flops(options) / self._flops({})
        for rate, seed in runs:
            _, start = self._network(seed)
            order, key = self._order(seed), jax.random.key(seed)
            x, y = self._batch(order)
            params = train(start, x, y, key, jnp.float32(rate))
            bias, variance = spread(start, x[0], y[0], key)
            yield {
                "flops": flops,
                "bias": float(bias),
                "variance": float(variance),
                **self._errors(params),
            }

    def _flops(self, options: Mapping[str, Any]) -> float:
        x, y = self._batch(self._order(0)[0])
        gradient = jax.jit(lambda params: self._sampled(options, jax.random.key(0)).grad(
            params, x=x, y=y
        ))  # fmt: skip
        analysis = gradient.lower(self._network(0)[1]).compile().cost_analysis()
        assert analysis is not None
        return float(analysis["flops"])

    def _errors(self, params: PyTree) -> dict[str, float]:
        """Shares of wrong answers on the validation and the test split, by exact products."""
        outputs = self._program("outputs", self._outputs, {})
        wrong = {}
        for name, split in (("validation", self.task.validation), ("error", self.task.test)):
            logits = np.asarray(outputs(params, self._standardized(split.x)))
            share = float(np.mean(logits.argmax(axis=-1) != split.y))
            wrong[name] = share if np.isfinite(logits).all() else float("nan")
        return wrong

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

    def _standardized(self, x: Any) -> jax.Array:
        return (jnp.asarray(x) - self._mean) / self._deviation

    def _batch(self, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self._standardized(self.task.train.x[rows]), jnp.asarray(self.task.train.y[rows])

    def _order(self, seed: int) -> np.ndarray:
        """The rows of each step, (steps, batch size)."""
        size = self.setting["batch_size"]
        batches = iter(data.index_batches(len(self.task.train.y), batch_size=size, seed=seed))
        return np.stack([np.asarray(next(batches)) for _ in range(self.setting["steps"])])

    # -- programs ------------------------------------------------------------------------------

    def _program(
        self, what: str, function: Callable[..., Any], options: Mapping[str, Any]
    ) -> Callable[..., Any]:
        name = f"{what}: {cli.to_json(dict(options))}"
        if name not in self._programs:
            self._programs[name] = jax.jit(functools.partial(function, dict(options)))
        return self._programs[name]

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
