"""Training of a small network on curves by ensembles and by Adam, at equal evaluations."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_accel as oa
from experiments import cli
from experiments.training.replicas import Replica

PyTree = Any
ITERATIONS = 4  # of ESMDA, whose evaluations are the budget
# The functions, and the ranges of their arguments.
CURVES: dict[str, tuple[Callable[[jax.Array], jax.Array], float]] = {
    "sine": (jnp.sin, float(np.pi)),
    "mexican hat": (lambda x: (1 - x**2) * jnp.exp(-(x**2) / 2), 5.0),
}


def predict(params: PyTree, x: jax.Array) -> jax.Array:
    """The outputs of a network of one hidden layer of tanh units.

    Args:
      params: its weights, ``{"hidden": {"w", "b"}, "out": {"w", "b"}}``.
      x: inputs, (examples, 1).

    Returns:
      Outputs, (examples, 1).
    """
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["out"]["w"] + params["out"]["b"][None]


class Runner:
    """Trains on one curve, with the evaluations that an ensemble of one size takes.

    Args:
      setting: the options of the setting, see `experiments.reporting.referee.data_assimilation`.
      data_dir: not used: the data are drawn.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        self.setting = dict(setting)
        self._programs: dict[str, Callable[..., Any]] = {}

    def config(self) -> dict[str, Any]:
        """Nothing: the options decide all numbers."""
        return {}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of gradients of all points that cost what a run costs."""
        share = 1 if options["kind"] == "enkf" else ITERATIONS
        return self.setting["members"] * share / 2

    def seconds(self) -> float:
        """Seconds that one gradient takes, measured on a run of Adam."""
        options = {"kind": "adam", "restarts": 1}
        self.run(options, [(0.01, 0)])
        begin = time.perf_counter()
        self.run(options, [(0.01, 1)])
        return (time.perf_counter() - begin) / self.gradients(options)

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> list[dict[str, Any]]:
        """Trains the runs of a contestant together; returns the scores of each."""
        rates, seeds = (np.array(column) for column in zip(*runs, strict=True))
        name = cli.to_json(dict(options))
        if name not in self._programs:
            one = functools.partial(self._run, dict(options))
            self._programs[name] = jax.jit(jax.vmap(one))
        train = self._programs[name]
        scores = jax.device_get(train(jnp.asarray(rates, jnp.float32), jnp.asarray(seeds)))
        return [
            {name: values[i].tolist() for name, values in scores.items()} for i in range(len(runs))
        ]

    # -- one run, which is traced ----------------------------------------------------------------

    def _run(self, options: dict[str, Any], rate: Any, seed: Any) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        curve, limit = CURVES[self.setting["curve"]]

        def points(number: int, offset: int) -> tuple[jax.Array, jax.Array]:
            of_x, of_noise = jax.random.split(jax.random.fold_in(key, offset))
            x = jax.random.uniform(of_x, (number, 1), minval=-limit, maxval=limit)
            noise = self.setting["noise"] * jax.random.normal(of_noise, x.shape)
            return x, curve(x) + noise

        train = points(self.setting["examples"], 1)
        validation = points(self.setting["examples"], 2)
        x, _ = points(self.setting["test_examples"], 3)
        start = jax.random.fold_in(key, 4)
        if options["kind"] == "adam":
            params = self._adam(rate, options["restarts"], train, start)
            members = jax.tree.map(lambda p: p[None], params)
            further: dict[str, jax.Array] = {}
        else:
            params, members, further = self._ensemble(options, rate, train, start)
        outputs, truth = predict(params, x), curve(x)
        mean = jax.vmap(predict, (0, None))(members, x).mean(0)
        squares = jnp.mean((outputs - truth) ** 2)
        return {
            "validation": jnp.sqrt(jnp.mean((predict(params, validation[0]) - validation[1]) ** 2)),
            "rmse": jnp.sqrt(squares),
            "mean_rmse": jnp.sqrt(jnp.mean((mean - truth) ** 2)),
            "unexplained": squares / jnp.var(truth),
            **further,
        }

    def _zeros(self) -> PyTree:
        units = self.setting["hidden"]
        return {
            "hidden": {"w": jnp.zeros((1, units)), "b": jnp.zeros(units)},
            "out": {"w": jnp.zeros((units, 1)), "b": jnp.zeros(1)},
        }

    def _prior(self, key: jax.Array, number: int) -> PyTree:
        """Networks drawn as the first members of an ensemble with a prior of scale 1."""
        return oa.esmda(num_members=number, noise=1.0, key=key).init(self._zeros()).ensemble

    def _adam(
        self, rate: Any, restarts: int, train: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> PyTree:
        """The weights with the lowest training loss of several runs that share the budget."""
        x, y = train
        steps = max(1, self.setting["members"] * ITERATIONS // 2 // restarts)
        tx = optax.adam(rate)

        def loss(params: PyTree) -> jax.Array:
            return jnp.mean((predict(params, x) - y) ** 2)

        def one(params: PyTree) -> tuple[PyTree, jax.Array]:
            def step(carry: Any, _: None) -> tuple[Any, None]:
                params, state = carry
                updates, state = tx.update(jax.grad(loss)(params), state)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = lax.scan(step, (params, tx.init(params)), length=steps)
            return params, loss(params)

        starts = jax.tree.map(lambda p: p[:restarts], self._prior(key, max(2, restarts)))
        params, losses = jax.vmap(one)(starts)
        best = jnp.nanargmin(losses)
        return jax.tree.map(lambda p: p[best], params)

    def _ensemble(
        self,
        options: dict[str, Any],
        scale: Any,
        train: tuple[jax.Array, jax.Array],
        key: jax.Array,
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        """The mean weights, the members, and how far they are apart after each iteration."""
        settings = {
            "num_members": self.setting["members"],
            "noise": self.setting["noise"],
            "prior_scale": scale,
            "key": key,
        }
        objective = oa.Objective(
            lambda params, x: predict(params, x), lambda out, y: jnp.mean((out - y) ** 2)
        )
        if options["kind"] == "enkf":
            tx, batches = oa.enkf(**settings), jax.tree.map(lambda a: a[:, None], train)
        else:
            tx = oa.esmda(**settings, alphas=tuple(options["alphas"]))
            batches = jax.tree.map(lambda a: jnp.stack([a] * len(options["alphas"])), train)

        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            x, y = batch
            updates, state = tx.update(params, state, params, value_fn=objective, x=x, y=y)
            return (optax.apply_updates(params, updates), state), state.spread

        params = self._zeros()
        first = tx.init(params)
        (params, last), spread = lax.scan(step, (params, first), batches)
        spread = jnp.concatenate([first.spread[None], spread])
        singular, before = (self._singular_values(s.ensemble) for s in (last, first))
        further = {
            "spread": spread[:: max(1, (len(spread) - 1) // ITERATIONS)],
            "rise": jnp.max(jnp.diff(spread)),
            "rank": jnp.sum(singular > 1e-4 * before[0]).astype(jnp.float32),
        }
        return params, last.ensemble, further

    def _singular_values(self, ensemble: PyTree) -> jax.Array:
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(ensemble)]
        flat = jnp.concatenate(rows, axis=1)
        return jnp.linalg.svd(flat - flat.mean(0, keepdims=True), compute_uv=False)
