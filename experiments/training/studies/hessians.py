"""The Hessian of a trained network as a matrix for eigensolvers, and its exact eigenpairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import models
from experiments import data, timing
from experiments.training import networks
from optax_accel import curvature

PyTree = Any

LEARNING_RATE = 0.1
BATCH_SIZE = 50
# Steps of SGD between the parameters whose eigenvectors start the block iteration, and the last.
WARM_STEPS = 5
# Examples on which a product inside a compiled loop is timed, to predict slow solvers.
PROBE_EXAMPLES = 50
MAX_PRODUCTS = 200


@dataclasses.dataclass(frozen=True)
class Reference:
    """Exact leading eigenpairs.

    Attributes:
      eigenvalues: ``(k,)``, the leading one first.
      vectors: ``(dimension, k)``.
      products: number of products that it took.
      seconds: time that it took.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    products: int
    seconds: float


# ARPACK's words for the ends of the spectrum.
_WHICH = {"algebraic": "LA", "smallest": "SA", "both": "BE"}


def arpack(
    product: Callable[[jax.Array], Any],
    size: int,
    k: int,
    *,
    order: str = "algebraic",
    **options: Any,
) -> Reference:
    """Leading eigenpairs of a symmetric matrix, by SciPy's ARPACK.

    >>> arpack(lambda vector: jnp.arange(9.0) * vector, 9, 2, tol=1e-6).eigenvalues.round(3)
    array([8., 7.], dtype=float32)
    >>> both = arpack(lambda vector: jnp.arange(9.0) * vector, 9, 3, order="both", tol=1e-6)
    >>> abs(both.eigenvalues).round(3)
    array([8., 0., 7.], dtype=float32)

    Args:
      product: the product of the matrix with a flat vector.
      size: number of rows of the matrix.
      k: number of eigenpairs.
      order: ``"algebraic"``, the largest eigenvalues, ``"smallest"``, the smallest, or ``"both"``,
        the largest and the smallest in turn.
      **options: further arguments of `scipy.sparse.linalg.eigsh`, such as ``tol`` and ``ncv``.

    Returns:
      The eigenpairs, the leading one first, and what they cost.
    """
    count = 0

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return np.asarray(product(jnp.asarray(vector.ravel())))

    operator = scipy.sparse.linalg.LinearOperator((size, size), counted, dtype=np.float32)
    (values, vectors), seconds = timing.timed(
        lambda: scipy.sparse.linalg.eigsh(operator, k, which=_WHICH[order], **options)
    )
    index = np.argsort(values if order == "smallest" else -values)
    if order == "both":  # of an odd number, ARPACK takes one more at the upper end
        half = (k + 1) // 2
        index = np.insert(index[:half], np.arange(1, k // 2 + 1), index[half:][::-1])
    return Reference(values[index], vectors[:, index], count, seconds)


@dataclasses.dataclass(frozen=True)
class ChunkedHessian:
    """The Hessian of the mean loss over all examples, as a mean over chunks of examples.

    Attributes:
      params: the parameters, which give the shapes.
      linears: the linear function of each chunk, as a pytree that compiled functions can take.
      gradient: gradient of the same loss.
      earlier: block of leading eigenvectors a few steps before.
      probe: linear function of a few examples.
      num_examples: number of examples in all chunks.
    """

    params: PyTree
    linears: list[Any]
    gradient: PyTree
    earlier: PyTree
    probe: Any
    num_examples: int

    def product(self, vector: PyTree) -> PyTree:
        """One product, driven from the host."""
        return mean_product(self.linears, vector, apply_linear)

    def products(self, block: PyTree) -> PyTree:
        """The products of a block, row by row: on a CPU faster than vectorized."""
        num = jax.tree.leaves(block)[0].shape[0]
        return _stack([self.product(_row(block, i)) for i in range(num)])


def mean_product(linears: Sequence[Any], vector: PyTree, apply: Callable[..., PyTree]) -> PyTree:
    """The mean of ``apply(linear, vector)`` over the linear functions.

    Args:
      linears: the linear functions, or whatever else `apply` takes first.
      vector: the vector to multiply.
      apply: makes one product.
    """
    return _mean([apply(linear, vector) for linear in linears])


@jax.jit
def _mean(images: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves) / len(leaves), *images)


@jax.jit
def apply_linear(linear: Any, vector: PyTree) -> PyTree:
    """The compiled product of a linear function and a vector."""
    return linear(vector)


@functools.partial(jax.jit, static_argnums=1)
def _row(block: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], block)


@jax.jit
def _stack(rows: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@jax.jit
def ravel(tree: PyTree) -> jax.Array:
    """A pytree as a flat vector."""
    return ravel_pytree(tree)[0]


def trained_hessian(
    task: data.Task,
    *,
    k: int,
    steps: int,
    examples: int | None = None,
    chunk: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> ChunkedHessian:
    """Trains the task's default model by SGD on the squared error and linearizes its gradient.

    Args:
      task: the data.
      k: number of eigenvectors, two fewer than the block from a few steps before has.
      steps: number of SGD steps before, at least `WARM_STEPS`.
      examples: number of training examples to use; None for all.
      chunk: number of examples that are multiplied at a time.
      tolerance: relative accuracy of the eigenvectors from a few steps before.
      seed: seed of the model and the batches.

    Returns:
      The Hessian at the parameters after the last step.
    """
    model = models.create(
        task.default_model, input_shape=task.input_shape, num_classes=task.num_classes, rngs=seed
    )
    graphdef, params, rest = networks.split(model)
    objective = networks.objective(graphdef, "mse").given(rest=rest)
    num = examples or len(task.train)
    chunk = min(chunk, num)
    num -= num % chunk  # chunks of one size, so that their mean is that of the examples
    x, y = jnp.asarray(task.train.x[:num]), jnp.asarray(task.train.y[:num])
    pieces = [(x[i : i + chunk], y[i : i + chunk]) for i in range(0, num, chunk)]
    gradient = jax.jit(lambda params, x, y: jax.grad(objective)(params, x=x, y=y))
    linearize = jax.jit(lambda params, x, y: objective.hessian(params, x=x, y=y))

    @jax.jit
    def step(params: PyTree, x: jax.Array, y: jax.Array) -> PyTree:
        slope = jax.grad(objective)(params, x=x, y=y)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, slope)

    random = np.random.default_rng(seed)
    earlier = params
    for i in range(steps):
        if i == steps - WARM_STEPS:
            earlier = params
        index = random.integers(0, num, BATCH_SIZE)
        params = step(params, x[index], y[index])

    def linears(params: PyTree) -> list[Any]:
        return [linearize(params, *piece) for piece in pieces]

    mean = mean_product(pieces, params, lambda piece, params: gradient(params, *piece))
    probe = linearize(params, x[:PROBE_EXAMPLES], y[:PROBE_EXAMPLES])
    before = ChunkedHessian(params, linears(earlier), mean, None, probe, num)
    warm = curvature.lanczos(
        before.product,
        params,
        k + 2,
        key=jax.random.key(1),
        num_products=MAX_PRODUCTS,
        tolerance=tolerance,
        loop="host",
    )
    return dataclasses.replace(before, linears=linears(params), earlier=warm.basis)
