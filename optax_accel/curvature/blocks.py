"""Linear algebra on blocks of vectors that are pytrees.

A *block* of ``k`` vectors is a pytree like the parameters whose leaves have one more, leading, axis
of length ``k``.  Nothing here flattens the parameters into one vector: every contraction runs leaf
by leaf and only ``k x k`` matrices leave it, so sharded parameters stay sharded.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accel._random import hash_bits, map_with_keys


def dimension(tree: chex.ArrayTree) -> int:
    """Number of scalars in a pytree of arrays (or of shapes): the length of its vector."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def scalar_dtype(tree: chex.ArrayTree) -> jnp.dtype:
    """The dtype in which inner products of a block are accumulated (float32 if empty)."""
    leaves = jax.tree.leaves(tree)
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))


def inner(left: chex.ArrayTree, right: chex.ArrayTree) -> jax.Array:
    """All inner products of two blocks of ``k`` and ``m`` vectors: a ``(k, m)`` matrix.

    Accumulated in :func:`scalar_dtype`, at least float32, whatever dtype a block is stored in.
    """
    dtype = scalar_dtype((left, right))
    # With several contracted axes, XLA's CPU backend transposes one block first, which triples the
    # time. Merging them avoids that, but gathers a leaf that is sharded along an inner axis.
    merge = jax.device_count() == 1

    def leaf_products(a: jax.Array, b: jax.Array) -> jax.Array:
        if merge:
            a, b = (x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in (a, b))
        axes = tuple(range(1, a.ndim))
        common = jnp.promote_types(a.dtype, b.dtype)
        return lax.dot_general(
            a.astype(common),
            b.astype(common),
            ((axes, axes), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    products = jax.tree.leaves(jax.tree.map(leaf_products, left, right))
    if not products:
        return jnp.zeros((0, 0), dtype)
    return functools.reduce(jnp.add, products)


def combine(coefficients: jax.Array, block: chex.ArrayTree) -> chex.ArrayTree:
    """Linear combinations of a block's ``k`` vectors.

    Args:
      coefficients: ``(k,)`` for one vector or ``(m, k)`` for a block of ``m``.
      block: leaves ``(k, *shape)``.

    Returns:
      Leaves ``(*shape)`` or ``(m, *shape)``, of the block's dtype; summed in at least float32.
    """

    def leaf_combination(b: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(b.dtype, jnp.float32)
        sums = lax.dot_general(
            coefficients.astype(dtype),
            b.astype(dtype),
            (((coefficients.ndim - 1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )
        return sums.astype(b.dtype)

    return jax.tree.map(leaf_combination, block)


def as_block(vector: chex.ArrayTree) -> chex.ArrayTree:
    """A vector as a block of one."""
    return jax.tree.map(lambda x: x[None], vector)


def concatenate(first: chex.ArrayTree, second: chex.ArrayTree) -> chex.ArrayTree:
    """The rows of two blocks, one after the other."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def rows(block: chex.ArrayTree, start: int, stop: int) -> chex.ArrayTree:
    """The vectors ``start`` to ``stop - 1`` of a block."""
    return jax.tree.map(lambda b: b[start:stop], block)


def random(key: chex.PRNGKey, like: chex.ArrayTree) -> chex.ArrayTree:
    """A vector of uniform entries in [-1, 1), with the shapes and dtypes of ``like``."""
    return _random(key, *_structure(like))


def _structure(like: chex.ArrayTree) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    leaves, treedef = jax.tree.flatten(like)
    return treedef, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)


# Outside of `jit`, each of the operations would be a program: thirty, and seventy for a basis.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(
    key: chex.PRNGKey, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]
) -> chex.ArrayTree:
    def leaf(leaf_key: jax.Array, x: Any) -> jax.Array:
        return _uniform(hash_bits(leaf_key, x.shape), x.dtype)

    return map_with_keys(leaf, key, jax.tree.unflatten(treedef, leaves))


def _uniform(bits: jax.Array, dtype: Any) -> jax.Array:
    return (bits.astype(dtype) * 2.0**-31 - 1).astype(dtype)


def random_block(
    key: chex.PRNGKey, like: chex.ArrayTree, num: int, first: chex.Numeric = 0
) -> chex.ArrayTree:
    """The vectors ``first`` to ``first + num - 1`` of a sequence of uniform entries in [-1, 1).

    The entries are numbered through the leaves, so that a vector in one array has the same ones.
    Compiled much sooner than :func:`random`, because no key is derived for each array.
    """
    leaves, treedef = jax.tree.flatten(like)
    size = np.uint32(dimension(like) % 2**32)
    step = jnp.zeros((), jnp.uint32)  # the key is hashed, not split, which would compile longer
    starts = (jnp.asarray(first).astype(jnp.uint32) + jnp.arange(num, dtype=jnp.uint32)) * size
    drawn, offset = [], 0
    for leaf in leaves:
        bits = functools.partial(hash_bits, key, leaf.shape, step)
        block = jax.vmap(bits)(starts + np.uint32(offset % 2**32))
        drawn.append(_uniform(block, leaf.dtype))
        offset += math.prod(leaf.shape)
    return jax.tree.unflatten(treedef, drawn)


def random_basis(key: chex.PRNGKey, like: chex.ArrayTree, num: int) -> chex.ArrayTree:
    """A random orthonormal block of ``num`` vectors with the shapes and dtypes of ``like``."""
    return _random_basis(key, *_structure(like), num)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random_basis(
    key: chex.PRNGKey, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], num: int
) -> chex.ArrayTree:
    keys = jax.random.split(key, num)
    return orthonormalize(jax.vmap(lambda each: _random(each, treedef, leaves))(keys))


def zeros(num: int, like: chex.ArrayTree) -> chex.ArrayTree:
    """A block of ``num`` zero vectors, placed like the leaves where these have a named sharding."""
    return jax.tree.map(
        lambda x: _placed(jnp.zeros((num, *x.shape), x.dtype), x, leading=True), like
    )


def place(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """A vector placed like the leaves of ``like`` where these have a named sharding."""
    return jax.tree.map(_placed, tree, like)


def _placed(x: jax.Array, like: Any, leading: bool = False) -> jax.Array:
    sharding = None if isinstance(like, jax.core.Tracer) else getattr(like, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return x
    spec = jax.P(None, *sharding.spec) if leading else sharding.spec
    return jax.device_put(x, jax.NamedSharding(sharding.mesh, spec))


class Packing:
    """Vectors in few arrays, with the same numbers.

    The work on a vector compiles to a few operations for each of its arrays. On one device all of
    them become one, flattened; on several, those of equal shapes are stacked, as the layers of a
    deep network have them: that keeps the axes of the arrays, and with them their sharding.

    Args:
      like: the vectors' structure, shapes and dtypes.
      largest: arrays with more entries than this are left as they are, because packing copies;
        ``None`` (default) packs all.
      merge: whether arrays are flattened into one instead of stacked; ``None`` (default): where
        there is one device.

    Attributes:
      joint: for each packed array, whether it holds several.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_accel.curvature import blocks
      >>> vector = {"a": jnp.ones(2), "b": jnp.ones((2, 3)), "c": jnp.zeros(2)}
      >>> stacked = blocks.Packing(vector, merge=False)
      >>> [x.shape for x in stacked.pack(vector)]
      [(2, 2), (2, 3)]
      >>> merged = blocks.Packing(vector, merge=True)
      >>> [x.shape for x in merged.pack(vector)]
      [(10,)]
      >>> merged.unpack(merged.pack(vector))["c"].tolist()
      [0.0, 0.0]
    """

    def __init__(
        self, like: chex.ArrayTree, *, largest: int | None = None, merge: bool | None = None
    ):
        leaves, self._treedef = jax.tree.flatten(like)
        self._shapes = [leaf.shape for leaf in leaves]
        self._merge = jax.device_count() == 1 if merge is None else merge
        groups: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            alone = largest is not None and math.prod(leaf.shape) > largest
            # The type of an array names its sharding, where that is explicit.
            kind = jnp.dtype(leaf.dtype) if self._merge else jax.typeof(leaf)
            groups.setdefault(i if alone else kind, []).append(i)
        self._groups = list(groups.values())
        self.joint = tuple(len(group) > 1 for group in self._groups)

    def pack(self, tree: chex.ArrayTree, *, axis: int = 0) -> tuple[jax.Array, ...]:
        """The arrays of a vector, or with ``axis=1`` of a block of vectors."""
        leaves = jax.tree.leaves(tree)

        def together(parts: list[jax.Array]) -> jax.Array:
            if len(parts) == 1:
                return parts[0]
            if not self._merge:
                return jnp.stack(parts, axis)
            flat = [part.reshape(*part.shape[:axis], -1) for part in parts]
            return jnp.concatenate(flat, axis)

        return tuple(together([leaves[i] for i in group]) for group in self._groups)

    def unpack(self, arrays: tuple[jax.Array, ...], *, axis: int = 0) -> chex.ArrayTree:
        """The inverse of :meth:`pack`."""
        leaves: dict[int, jax.Array] = {}
        for array, group in zip(arrays, self._groups, strict=True):
            if len(group) == 1:
                leaves[group[0]] = array
            elif not self._merge:
                for j, i in enumerate(group):
                    leaves[i] = lax.index_in_dim(array, j, axis, keepdims=False)
            else:
                ends = np.cumsum([math.prod(self._shapes[i]) for i in group])
                for i, part in zip(group, jnp.split(array, ends[:-1], axis), strict=True):
                    leaves[i] = part.reshape(*part.shape[:axis], *self._shapes[i])
        return jax.tree.unflatten(self._treedef, [leaves[i] for i in range(len(leaves))])

    def random_block(
        self, key: chex.PRNGKey, like: chex.ArrayTree, num: int, first: chex.Numeric = 0
    ) -> tuple[jax.Array, ...]:
        """What :func:`random_block` gives, packed; a single array is drawn at once."""
        arrays = jax.eval_shape(self.pack, like)
        if len(arrays) == 1:
            return random_block(key, arrays, num, first)
        return self.pack(random_block(key, like, num, first), axis=1)


def identity(like: chex.ArrayTree) -> chex.ArrayTree:
    """The block of all unit vectors, ``dimension(like)`` rows. For tiny problems only."""
    size = dimension(like)
    leaves, treedef = jax.tree.flatten(like)
    parts, offset = [], 0
    for leaf in leaves:
        count = math.prod(leaf.shape)
        part = jnp.eye(size, count, -offset, dtype=leaf.dtype)
        parts.append(part.reshape(size, *leaf.shape))
        offset += count
    return jax.tree.unflatten(treedef, parts)


def orthonormalize(
    block: chex.ArrayTree,
    *,
    rotation: jax.Array | None = None,
    gram: jax.Array | None = None,
) -> chex.ArrayTree:
    """Orthonormal rows with the span of a block's rows, by scaled, shifted Cholesky QR.

    One round needs two passes over the block and one ``k x k`` factorization (and, for sharded
    leaves, one ``k x k`` all-reduce), against the serial column sweeps of Householder QR.  Rows are
    scaled to unit length first, so that only their angles count.  Where these are far from zero
    (their correlations sum to less than 1/2 in each row, so that the condition number is at most 3,
    by Gershgorin) one round is orthogonal to a few roundings.  Otherwise a shift of a few ``k *
    eps`` keeps the factorization alive for dependent rows (Fukaya et al., `Shifted Cholesky QR
    <https://doi.org/10.1137/18M1218212>`_, 2020) and a second round follows: orthogonal to machine
    precision for condition numbers up to about ``eps ** -0.5`` (Yamamoto et al., Roundoff error
    analysis of CholeskyQR2, ETNA 44, 2015).  Rows are processed in order: the first keep their
    directions.

    Args:
      block: leaves ``(k, *shape)``.
      rotation: ``(k, k)``, combines the rows first, at no cost; default: none.
      gram: the inner products of the rows, ``(k, k)``, if they are known already, which saves a
        pass; default: they are computed.

    Returns:
      A block of the same shape. A zero row stays zero.
    """
    if gram is None:
        gram = inner(block, block)
    if rotation is not None:
        gram = rotation @ gram @ rotation.T

    transform, well_conditioned = _cholesky_transform(gram, first=True)
    if rotation is not None:
        transform = transform @ rotation
    return lax.cond(well_conditioned, _same, _second_round, combine(transform, block))


def _cholesky_transform(gram: jax.Array, *, first: bool) -> tuple[jax.Array, jax.Array]:
    """Combinations of the rows with these inner products that make them orthonormal."""
    num = gram.shape[0]
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    correlation = scale[:, None] * gram * scale[None, :]
    others = jnp.abs(correlation) * (1 - jnp.eye(num, dtype=gram.dtype))
    well_conditioned = jnp.max(jnp.sum(others, axis=1), initial=0) < 0.5
    # The shift shortens the rows a little, so rows that are nearly orthonormal, as all are in the
    # second round, go without; a one takes the place of the zero pivot of a zero row.
    shift = 11 * num * jnp.finfo(gram.dtype).eps * first * ~well_conditioned
    shift = jnp.where(norms > 0, shift, 1).astype(gram.dtype)
    factor = jnp.linalg.cholesky(correlation + jnp.diag(shift))
    transform = lax.linalg.triangular_solve(factor, jnp.diag(scale), left_side=True, lower=True)
    return transform, well_conditioned


# The branches are not closures: outside `jit`, those would be compiled anew at every call.
def _same(block: chex.ArrayTree) -> chex.ArrayTree:
    return block


def _second_round(block: chex.ArrayTree) -> chex.ArrayTree:
    return combine(_cholesky_transform(inner(block, block), first=False)[0], block)
