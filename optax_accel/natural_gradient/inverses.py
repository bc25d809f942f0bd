"""What is made of Kronecker factors: inverses, eigendecompositions, preconditioned gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accel._numerics import stack
from optax_accel.natural_gradient.factors import Kronecker, Vary

# Nothing here tolerates the three digits of TF32 or bfloat16 products.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Eigen(NamedTuple):
    """An eigendecomposition.

    Attributes:
      eigenvalues: ascending, at least 0.
      eigenvectors: in columns; None for a diagonal matrix.
    """

    eigenvalues: jax.Array
    eigenvectors: jax.Array | None


# -- inverses -------------------------------------------------------------------------------------


def split_damping(factors: Sequence[jax.Array], damping: Any) -> list[jax.Array]:
    r"""Damping of each factor, :math:`\pi \sqrt\lambda` for A and :math:`\sqrt\lambda / \pi` for B.

    :math:`\pi^2` is the ratio of the mean eigenvalues of A and B (Martens, Grosse, section 6.3).

    Args:
      factors: A and B of one layer, A and B of the next, ...; only their ratio matters.
      damping: :math:`\lambda`.
    """
    if not factors:
        return []
    means = traces(factors) / np.array([len(f) for f in factors], np.float32)
    usable = jnp.all(means.reshape(-1, 2) > 0, axis=1)
    a, b = (jnp.where(usable, side, 1) for side in (means[::2], means[1::2]))
    root = jnp.sqrt(jnp.asarray(damping, means.dtype))
    return list(root * jnp.sqrt(jnp.stack([a / b, b / a], axis=1)).ravel())


def damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """The inverse of ``factor + damping I``; NaN everywhere if that is not positive definite."""
    damping = damping.astype(factor.dtype)
    if factor.ndim == 1:
        return 1 / (factor + damping)
    identity = jnp.eye(len(factor), dtype=factor.dtype)
    damped = factor + damping * identity
    # LAPACK's matrices lie column by column: transposed, which for these changes nothing, none is
    # copied. Two solves: the product of half with itself would be less accurate.
    root = lax.linalg.cholesky(damped.T, symmetrize_input=False)
    half = lax.linalg.triangular_solve(root, identity, left_side=True, lower=True)
    whole = lax.linalg.triangular_solve(root, half, left_side=True, lower=True, transpose_a=True)
    return whole.T


def eigendecomposition(factor: jax.Array) -> Eigen:
    """Eigenvalues, those that rounding made negative set to 0, and eigenvectors."""
    if factor.ndim == 1:
        return Eigen(factor, None)
    # Transposed as in `damped_inverse`.
    values, vectors = jnp.linalg.eigh(factor.T, symmetrize_input=False)
    return Eigen(jnp.maximum(values, 0), vectors)


def share(
    function: Callable[..., chex.ArrayTree],
    arguments: Sequence[tuple[jax.Array, ...]],
    axis_name: str | None,
    vary: Vary,
    stacked: Sequence[bool],
) -> list[chex.ArrayTree]:
    """Results of a function of factors, each computed by one replica of an axis and sent to all.

    Matrices are assigned so that the sums of their cubed sizes are about the same on all replicas;
    a stack is cut into equal parts.  (Stacking those of one size instead takes longer on a CPU, to
    compile and to run.)

    Args:
      function: of a factor and scalars.
      arguments: what it is called with; for a stack these have a leading axis of slices.
      axis_name: of the replicas; None: there is one.
      vary: marks what differs between replicas.
      stacked: which of the factors are stacks.
    """
    functions = [functools.partial(_each_slice, function) if s else function for s in stacked]
    if axis_name is None:
        return [f(*args) for f, args in zip(functions, arguments, strict=True)]
    load = [0] * lax.axis_size(axis_name)
    results: list[chex.ArrayTree] = [None] * len(arguments)
    sent: dict[int, chex.ArrayTree] = {}
    for i in sorted(range(len(arguments)), key=lambda i: -arguments[i][0].shape[-1]):
        factor = arguments[i][0]
        if factor.ndim - stacked[i] == 1:
            results[i] = functions[i](*arguments[i])
            continue
        # Each of these replicas computes so many slices.
        slices = len(factor) if stacked[i] else 1
        per_owner = -(-slices // len(load))
        owners = sorted(range(len(load)), key=lambda r: load[r])[: -(-slices // per_owner)]
        first = np.full(len(load), -1)
        for part, owner in enumerate(owners):
            first[owner] = part * per_owner
            load[owner] += per_owner * factor.shape[-1] ** 3
        start = jnp.asarray(first)[lax.axis_index(axis_name)]
        count = per_owner if stacked[i] else None
        sent[i] = _part(functions[i], count, vary, start, *vary(arguments[i]))
    for i, result in lax.psum(sent, axis_name).items():
        results[i] = result
    return results


def _part(
    function: Callable[..., chex.ArrayTree],
    count: int | None,
    vary: Vary,
    start: jax.Array,
    *arguments: jax.Array,
) -> chex.ArrayTree:
    """The results of this replica, among zeros.

    Args:
      function: of a factor and scalars, or of slices of such.
      count: of slices that are computed; None: there is a single matrix.
      vary: marks what differs between replicas.
      start: of these slices; negative: there are none.
      *arguments: of the function.
    """

    def zeros(*args: jax.Array) -> chex.ArrayTree:
        shapes = jax.eval_shape(function, *args)
        return vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    def compute(*args: jax.Array) -> chex.ArrayTree:
        if count is None:
            return vary(function(*args))
        slices = len(args[0])
        # The last part may be smaller: what it has in common with another is counted once.
        first = jnp.minimum(start, slices - count)
        part = function(*(lax.dynamic_slice_in_dim(arg, first, count) for arg in args))
        fresh = first + jnp.arange(count) >= start

        def put(leaf: jax.Array, empty: jax.Array) -> jax.Array:
            mine = jnp.where(fresh.reshape(-1, *(1 for _ in leaf.shape[1:])), leaf, 0)
            return lax.dynamic_update_slice_in_dim(empty, mine, first, 0)

        return vary(jax.tree.map(put, part, zeros(*args)))

    return lax.cond(start >= 0, compute, zeros, *arguments)


def _each_slice(function: Callable[..., chex.ArrayTree], *arguments: jax.Array) -> chex.ArrayTree:
    """A function of matrices on every slice of stacks of them.

    On a CPU one after the other: jaxlib's batched decompositions can hang there.
    """

    def in_turn(*arguments: jax.Array) -> chex.ArrayTree:
        return lax.map(lambda slices: function(*slices), arguments)

    return lax.platform_dependent(*arguments, cpu=in_turn, default=jax.vmap(function))


# -- preconditioning ------------------------------------------------------------------------------


def apply_inverses(inverses: Kronecker, gradient: jax.Array) -> jax.Array:
    """A^-1 G B^-1."""
    left, right = inverses
    half = gradient * right[None] if right.ndim == 1 else _matmul(gradient, right)
    return left[:, None] * half if left.ndim == 1 else _matmul(left, half)


def apply_in_basis(
    basis: Kronecker, moments: jax.Array, damping: Any, gradient: jax.Array
) -> jax.Array:
    """U_A [(U_A^T G U_B) / (moments + damping)] U_B^T."""
    left, right = basis.inputs.eigenvectors, basis.outputs.eigenvectors
    inner = gradient if left is None else _matmul(left.T, gradient)
    inner = (inner if right is None else _matmul(inner, right)) / (moments + damping)
    inner = inner if right is None else _matmul(inner, right.T)
    return inner if left is None else _matmul(left, inner)


def kronecker_eigenvalues(basis: Kronecker) -> jax.Array:
    """The eigenvalues of A kron B, ``(inputs, outputs)``."""
    return basis.inputs.eigenvalues[:, None] * basis.outputs.eigenvalues[None]


def change_basis(moments: jax.Array, old: Kronecker, new: Kronecker) -> jax.Array:
    """The diagonal, in a new basis, of a matrix that is diagonal in an old one."""
    for axis, (a, b) in enumerate(zip(old, new, strict=True)):
        if a.eigenvectors is not None:
            squares = _matmul(b.eigenvectors.T, a.eigenvectors) ** 2
            moments = _matmul(squares, moments) if axis == 0 else _matmul(moments, squares.T)
    return moments


def traces(arrays: Sequence[jax.Array]) -> jax.Array:
    """The sum of each matrix's diagonal, of a vector and other arrays that of all entries.

    Diagonals are summed together, because every single sum is several kernels to compile.
    """
    sums = {
        i: jnp.sum(array)
        for i, array in enumerate(arrays)
        if array.ndim != 2 or array.shape[0] != array.shape[1]
    }
    square = [i for i in range(len(arrays)) if i not in sums]
    if square:
        width = max(len(arrays[i]) for i in square)
        diagonals = [arrays[i].ravel()[:: len(arrays[i]) + 1] for i in square]
        padded = [jnp.pad(d, (0, width - len(d))) for d in diagonals]
        sums |= dict(zip(square, jnp.sum(jnp.stack(padded), axis=1), strict=True))
    return stack([sums[i] for i in range(len(arrays))])
