"""Problems and comparisons that the tests share."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import optax_accel as oa

PyTree = Any
_REFERENCES = Path(__file__).parents[1] / "experiments" / "methods" / "references.json"


def worked_example(method: str) -> np.ndarray:
    """The parameters after each step of the short example of `references.json`, to ten digits."""
    runs = json.loads(_REFERENCES.read_text(encoding="utf-8"))
    (run,) = (r for r in runs if r["method"] == method and r["source"].endswith("ten digits"))
    return np.squeeze(list(run["iterates"].values()))


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """A convex problem whose optimum and Hessian are known: a linear network with two outputs.

    The Hessian is diagonal, without double eigenvalues (the outputs weigh differently). The
    examples can be sharded over eight devices.

    Attributes:
      x: inputs, (16, 4).
      y: targets, (16, 2).
      params: the start, {"dense": {"w": (4, 2)}, "b": (2,)}; no entry is at the optimum.
      optimum: where the loss is 0.
      dominant: which entries are the ``num_directions`` leading eigenvectors.
    """

    x: np.ndarray
    y: np.ndarray
    params: PyTree
    optimum: PyTree
    dominant: PyTree
    num_directions: int = 2

    def objective(self, x: Any = None, y: Any = None, axis_name: str | None = None) -> oa.Objective:
        return linear_objective(
            self.x if x is None else x, self.y if y is None else y, axis_name=axis_name
        )


OUTPUT_WEIGHTS = np.array([[1.0, 0.55]], np.float32)


def linear_objective(x: Any, y: Any, axis_name: str | None = None) -> oa.Objective:
    return oa.Objective(
        predict=lambda params: x @ params["dense"]["w"] + params["b"][None],
        loss=lambda out: 0.5 * jnp.mean(jnp.sum(OUTPUT_WEIGHTS * (out - y) ** 2, axis=-1)),
        axis_name=axis_name,
    )


@functools.cache
def least_squares() -> LeastSquares:
    rng = np.random.default_rng(0)
    # Orthogonal columns with eigenvalues 2, 1.3, 0.8, 0.5 and, from the bias, 1.
    columns = np.linalg.qr(np.concatenate([np.ones((16, 1)), rng.normal(size=(16, 4))], 1))[0]
    features = np.sqrt(16 * np.array([1.0, 2.0, 1.3, 0.8, 0.5])) * columns
    x = np.float32(features[:, 1:])
    optimum = {
        "dense": {"w": np.float32(rng.normal(size=(4, 2)))},
        "b": np.float32(rng.normal(size=2)),
    }
    y = np.float32(x @ optimum["dense"]["w"] + optimum["b"])
    error = {
        "dense": {"w": 0.5 * np.sign(rng.normal(size=(4, 2)))},
        "b": 0.5 * np.sign(rng.normal(size=2)),
    }
    params = jax.tree.map(lambda p, e: jnp.asarray(p + e, jnp.float32), optimum, error)
    # The eigenvalue of (input, output) is the product of theirs: 2 and 1.3 lead, 2 * 0.55 follows.
    dominant = {"dense": {"w": np.zeros((4, 2), bool)}, "b": np.zeros(2, bool)}
    dominant["dense"]["w"][:2, 0] = True
    return LeastSquares(x, y, params, optimum, dominant)


@functools.cache
def classification() -> tuple[np.ndarray, np.ndarray]:
    """Three noisy classes in the plane: inputs (48, 2) and integer labels (48,)."""
    rng = np.random.default_rng(0)
    y = np.arange(48, dtype=np.int32) % 3
    angle = 2 * np.pi * y / 3
    x = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.normal(size=(48, 2))
    return np.float32(x), y


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_init(sizes: tuple[int, ...] = (2, 8, 3), seed: int = 0) -> PyTree:
    """Parameters of a tanh network: {"layer0": {"w": ..., "b": ...}, ...}."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"layer{i}": {
            "w": jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in),
            "b": jnp.zeros(n_out),
        }
        for i, (key, n_in, n_out) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def mlp_apply(params: PyTree, x: Any) -> jax.Array:
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = (x if i == 0 else jnp.tanh(x)) @ layer["w"] + layer["b"][None]
    return x


def mlp_objective(x: Any, y: Any, axis_name: str | None = None) -> oa.Objective:
    return oa.Objective(
        predict=lambda params: mlp_apply(params, x),
        loss=lambda logits: cross_entropy(logits, y),
        axis_name=axis_name,
    )


def with_eigenspace(state: PyTree) -> PyTree:
    """A state of a method for `LeastSquares` whose basis, if it has one, is the exact one."""
    stored = optax.tree.get(state, "basis")
    if stored is None:
        return state
    problem = least_squares()
    rows = np.flatnonzero(
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(problem.dominant)])
    )
    size = optax.tree.size(problem.params)
    _, unravel = jax.flatten_util.ravel_pytree(problem.params)
    basis = optax.tree.cast_like(jax.vmap(unravel)(jnp.eye(size)[rows]), stored)
    return optax.tree.set(
        state, basis=basis, eigenvalues=jnp.array([2.0, 1.3]), ready=jnp.array(True)
    )


def to_numpy(tree: PyTree) -> PyTree:
    """Leaves as NumPy arrays; random keys as their data, bfloat16 as float32."""

    def leaf(x: Any) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else None)

    return jax.tree.map(leaf, tree)


def tree_allclose(
    actual: PyTree, desired: PyTree, *, rtol: float = 1e-5, atol: float = 0.0
) -> None:
    """Asserts that two trees have the same structure and values.

    ``rtol`` is relative to the largest entry of each leaf: rounding errors of matrix products have
    that scale, and a single small entry says nothing about them.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(to_numpy(actual)),
        jax.tree.leaves(to_numpy(desired)),
        strict=True,
    )
    for (path, a), d in pairs:
        scale = np.max(np.abs(d), initial=0) if d.dtype.kind == "f" else 0
        np.testing.assert_allclose(
            a, d, rtol=0, atol=rtol * scale + atol, err_msg=jax.tree_util.keystr(path)
        )


def tree_equal(actual: PyTree, desired: PyTree) -> None:
    """Asserts that two trees are bit for bit the same."""
    tree_allclose(actual, desired, rtol=0)


def signature(tree: PyTree) -> PyTree:
    """Shape, dtype and weakness of each leaf: what decides whether ``jit`` compiles anew."""
    return jax.tree.map(
        lambda x: (x.shape, str(x.dtype), bool(getattr(x, "weak_type", False))), tree
    )


WORKER_MODES = ("vmap", "shard_map", "pmap")


def over_workers(mode: str, function: Any, num_workers: int) -> Any:
    """A function of one worker's values as one of arrays with a leading axis of workers.

    Inside, the axis is called "workers"; on devices each has one worker.
    """
    if mode == "vmap":
        return jax.jit(jax.vmap(function, axis_name="workers"))
    devices = jax.devices()[:num_workers]
    if mode == "pmap":
        return jax.pmap(function, "workers", devices=devices)
    mesh = jax.make_mesh(
        (num_workers,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )

    def one(*args: Any) -> Any:
        result = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], result)

    spec = jax.P("workers")
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))
