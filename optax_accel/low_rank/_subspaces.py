"""Parameters seen as matrices, and the low-rank subspaces of their gradients.

A parameter is seen as one matrix, or as a stack of them, one of whose sides is projected.  With its
axes in the order *stack, projected side, other side* a gradient is ``H`` of shape
``(*stack, d, e)``; a basis ``Q`` of shape ``(*stack, d, r)`` reduces it to ``Q^H H``, and ``Q N``
leads back.  States keep both in the axes of the parameter, each reduced axis of length 1 or ``r``,
so that they can be sharded as the parameter is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from optax.contrib import GaLoreDimensionNumbers

from optax_accel._arguments import known_integer, value_of
from optax_accel._masking import Mask, merge, resolve, select

Projection: TypeAlias = Literal["short", "long"]
Method: TypeAlias = Literal["svd", "range_finder"]
DimensionNumbers: TypeAlias = (
    GaLoreDimensionNumbers | chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree] | None
)
PROJECTIONS = ("short", "long")
METHODS = ("svd", "range_finder")
# Power iterations of the range finder: with one, a gradient's norm is captured to a few per cent,
# with two to well within one (Halko et al., 2011, section 4.5, and `tests/low_rank`).
_POWER_ITERATIONS = 2


class DecayAfterStepState(NamedTuple):
    """State of `decay_after_step`: the number of updates made, an int32 scalar."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count


class Layout(NamedTuple):
    """Which axes of a parameter form its matrices; Python integers, all non-negative.

    Attributes:
      shape: the parameter's shape.
      stack: axes that number the matrices.
      side: axes of the side that is projected.
      other: axes of the other side.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    side: tuple[int, ...]
    other: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes d of the projected and e of the other side."""
        return self._size(self.side), self._size(self.other)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The shape of one number for each matrix."""
        return tuple(self.shape[axis] for axis in self.stack)

    def matrix(self, array: jax.Array) -> jax.Array:
        """``(*stack, d, e)`` from an array like the parameter."""
        return self._matrix(array, self.shape)

    def like_parameter(self, matrix: jax.Array) -> jax.Array:
        """An array like the parameter from ``(*stack, d, e)``."""
        return self._array(matrix, self.shape)

    def reduced_shape(self, rank: int) -> tuple[int, ...]:
        """The shape in which a state keeps ``(*stack, r, e)``."""
        return self._replaced(self.side, rank)

    def reduced_matrix(self, array: jax.Array) -> jax.Array:
        """``(*stack, r, e)`` from an array of `reduced_shape`."""
        return self._matrix(array, array.shape)

    def reduced_array(self, matrix: jax.Array) -> jax.Array:
        """An array of `reduced_shape` from ``(*stack, r, e)``."""
        return self._array(matrix, self.reduced_shape(matrix.shape[-2]))

    def basis_shape(self, rank: int) -> tuple[int, ...]:
        """The shape in which a state keeps ``(*stack, d, r)``."""
        return self._replaced(self.other, rank)

    def basis_matrix(self, array: jax.Array) -> jax.Array:
        """``(*stack, d, r)`` from an array of `basis_shape`."""
        return self._matrix(array, array.shape)

    def basis_array(self, matrix: jax.Array) -> jax.Array:
        """An array of `basis_shape` from ``(*stack, d, r)``."""
        return self._array(matrix, self.basis_shape(matrix.shape[-1]))

    def _size(self, axes: tuple[int, ...], shape: tuple[int, ...] | None = None) -> int:
        return math.prod((shape or self.shape)[axis] for axis in axes)

    def _replaced(self, axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
        lengths = {**dict.fromkeys(axes, 1), axes[-1]: rank}
        return tuple(lengths.get(axis, length) for axis, length in enumerate(self.shape))

    @property
    def _order(self) -> tuple[int, ...]:
        return self.stack + self.side + self.other

    def _matrix(self, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        stack = tuple(shape[axis] for axis in self.stack)
        sizes = self._size(self.side, shape), self._size(self.other, shape)
        return array.transpose(self._order).reshape(*stack, *sizes)

    def _array(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        inverse = sorted(range(len(shape)), key=self._order.__getitem__)
        return matrix.reshape([shape[axis] for axis in self._order]).transpose(inverse)


def flatten(tree: chex.ArrayTree) -> tuple[list[Any], Any]:
    """The leaves of a tree and its structure."""
    return jax.tree.flatten(tree)


def layouts(
    params: chex.ArrayTree,
    dimension_numbers: DimensionNumbers,
    projection: Projection,
    rank: int,
    method: str,
) -> list[Layout | None]:
    """The layout of each leaf, None for those that are not projected.

    Raises:
      ValueError: dimension numbers that do not fit a parameter, or a rank above the sizes of every
        matrix or of one that the dimension numbers name.
    """
    paths = jax.tree_util.tree_leaves_with_path(params)
    named = dimension_numbers is not None
    numbers = _numbers(params, dimension_numbers, method)
    found = [
        _layout(jax.tree_util.keystr(path) or "(root)", leaf, number, projection, method)
        for (path, leaf), number in zip(paths, numbers, strict=True)
    ]
    fits = [layout is not None and rank <= min(layout.sizes) for layout in found]
    for (path, leaf), layout, fit in zip(paths, found, fits, strict=True):
        if named and layout is not None and not fit:
            raise ValueError(
                f"{method}: the rank must be at most {min(layout.sizes)} for the parameter "
                f"{jax.tree_util.keystr(path) or '(root)'} of shape {leaf.shape}, which "
                f"`dimension_numbers` makes a matrix of {' x '.join(map(str, layout.sizes))}; got "
                f"{rank}. Lower the rank, or give None for this parameter."
            )
    if paths and not any(fits):
        largest = max((min(layout.sizes) for layout in found if layout), default=0)
        raise ValueError(
            f"{method} found nothing to project: "
            + (
                f"the rank is {rank}, but the smaller side of the largest matrix is {largest}. "
                "Lower the rank."
                if largest
                else "no parameter has two axes or more, or `dimension_numbers` leaves out "
                "all that have. Use optax.adam for these."
            )
        )
    return [layout if fit else None for layout, fit in zip(found, fits, strict=True)]


def _numbers(
    params: chex.ArrayTree, given: DimensionNumbers, method: str
) -> list[GaLoreDimensionNumbers | None]:
    leaves, structure = flatten(params)
    if given is None or isinstance(given, GaLoreDimensionNumbers):
        # Kernels of convolutions become matrices of (window and inputs) x outputs.
        return [
            (given or GaLoreDimensionNumbers(range(leaf.ndim - 1), -1)) if leaf.ndim > 1 else None
            for leaf in leaves
        ]
    tree = given(params) if callable(given) else given
    try:
        numbers = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{method}: `dimension_numbers` must be a tree like the parameters, with a "
            f"GaLoreDimensionNumbers or None for each: {error}"
        ) from error
    for number in numbers:
        if not (number is None or isinstance(number, GaLoreDimensionNumbers)):
            raise ValueError(
                f"{method}: `dimension_numbers` must hold optax.contrib.GaLoreDimensionNumbers or "
                f"None for each parameter, got {number!r}."
            )
    return numbers


def _layout(
    path: str,
    leaf: Any,
    number: GaLoreDimensionNumbers | None,
    projection: Projection,
    method: str,
) -> Layout | None:
    if number is None:
        return None
    groups = []
    for axes in (number.reduction_axis, number.output_axis):
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if not all(-leaf.ndim <= axis < leaf.ndim for axis in axes):
            raise ValueError(
                f"{method}: {number} names an axis that the parameter {path} of shape "
                f"{leaf.shape} does not have."
            )
        groups.append(tuple(axis % leaf.ndim for axis in axes))
    rows, columns = groups
    if not rows or not columns or len({*rows, *columns}) < len(rows + columns):
        raise ValueError(
            f"{method}: {number} must name at least one axis for each side of the matrix, and none "
            f"twice; the parameter {path} has shape {leaf.shape}."
        )
    stack = tuple(axis for axis in range(leaf.ndim) if axis not in rows + columns)
    layout = Layout(tuple(leaf.shape), stack, columns, rows)
    size_of_columns, size_of_rows = layout.sizes
    if 0 in leaf.shape:
        return None
    if (size_of_rows >= size_of_columns) == (projection == "short"):
        return layout
    return layout._replace(side=rows, other=columns)


def known_rank(name: str, rank: Any) -> int:
    """The Python integer of a rank, which decides the shape of a state.

    Raises:
      TypeError: it is traced.
    """
    known = known_integer(rank)
    if known is None:
        raise TypeError(
            f"`{name}` decides the shape of the state and must be known when it is made, got a "
            "traced array. Under `jit` or `eval_shape`, use optax_accel.inject_hyperparams instead "
            "of Optax's: it keeps static arguments as they are."
        )
    return known


def empty_basis(layout: Layout | None, rank: int, dtype: Any) -> Any:
    """What a state holds before the first refresh; ``MaskedNode`` for what is not projected."""
    return optax.MaskedNode() if layout is None else jnp.zeros(layout.basis_shape(rank), dtype)


def reduce(layout: Layout, gradient: jax.Array, basis: jax.Array) -> jax.Array:
    """``Q^H H`` in the axes of the parameter, in the gradient's dtype."""
    reduced = reduced_by(layout.basis_matrix(basis), layout.matrix(gradient))
    return layout.reduced_array(reduced)


def reduced_by(columns: jax.Array, matrix: jax.Array) -> jax.Array:
    """``Q^H H`` of ``(*stack, d, r)`` and ``(*stack, d, e)``, in the dtype of the latter."""
    return jnp.conj(columns.astype(matrix.dtype).mT) @ matrix


def lead_back(
    layout: Layout, update: jax.Array, basis: jax.Array, scale: Any, dtype: Any
) -> jax.Array:
    """``scale * Q N`` in the shape of the parameter."""
    columns = layout.basis_matrix(basis).astype(update.dtype)
    # The factor goes to the smaller matrix.
    return layout.like_parameter(columns @ (scale * layout.reduced_matrix(update))).astype(dtype)


def widened(array: jax.Array) -> jax.Array:
    """The array in at least float32, for decompositions."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def replaced(new: jax.Array, old: jax.Array) -> jax.Array:
    """New bases in the signs and the dtype of the old ones; the old one where it is not finite.

    Decompositions leave the sign of each column open, but moments belong to columns: each new one
    gets the sign with which its inner product with the old one is not negative.
    """
    inner = jnp.sum(jnp.conj(new) * old.astype(new.dtype), axis=-2, keepdims=True)
    size = jnp.abs(inner)
    sign = jnp.where(size > 0, inner / jnp.where(size > 0, size, 1), 1)
    usable = jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    return jnp.where(usable, (sign * new).astype(old.dtype), old)


def decay_after_step(
    learning_rate: optax.ScalarOrSchedule, weight_decay: Any, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """Adds ``-learning_rate * weight_decay`` times the stepped parameters to their updates."""

    def init_fn(params: chex.ArrayTree) -> DecayAfterStepState:
        resolve(params, mask)
        return DecayAfterStepState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: chex.ArrayTree,
        state: DecayAfterStepState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, DecayAfterStepState]:
        del extra_args
        if params is None:
            raise ValueError("weight decay needs the parameters: tx.update(grads, state, params).")
        factor = value_of(learning_rate, state.count) * weight_decay

        def decayed(update: jax.Array, param: jax.Array) -> jax.Array:
            return (update - factor * (param + update)).astype(update.dtype)

        chosen = resolve(params, mask)
        parts = (select(tree, chosen) for tree in (updates, params))
        new_updates = merge(jax.tree.map(decayed, *parts), updates, chosen)
        return new_updates, DecayAfterStepState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def svd(matrix: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """The leading left singular vectors and the squares of all singular values.

    Args:
      matrix: ``(*stack, d, e)``, real or complex.
      columns: number of vectors, at most the smaller of d and e.

    Returns:
      ``(*stack, d, columns)``, and the squares in descending order.
    """
    vectors, values, _ = jnp.linalg.svd(matrix, full_matrices=False)
    return vectors[..., :columns], values**2


def range_finder(matrix: jax.Array, columns: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `svd`, from products with a few columns (Halko et al., 2011, algorithms 4.4 and 5.3).

    Args:
      matrix: ``(*stack, d, e)``, real or complex.
      columns: number of vectors, at most that of ``start``.
      start: ``(*stack, d, s)``, columns to start from: an old basis, random numbers.

    Returns:
      ``(*stack, d, columns)``, and the squares of the ``s`` singular values found.
    """
    adjoint = jnp.conj(matrix.mT)
    basis = start
    for _ in range(_POWER_ITERATIONS):
        basis, _ = jnp.linalg.qr(matrix @ (adjoint @ basis))
    small = jnp.conj(basis.mT) @ matrix
    squares, rotation = jnp.linalg.eigh(small @ jnp.conj(small.mT))  # in ascending order
    vectors = basis @ jnp.flip(rotation[..., -columns:], -1)
    return vectors, jnp.flip(jnp.maximum(squares, 0), -1)


def start_columns(random: jax.Array, old: jax.Array, columns: int, cold: Any) -> jax.Array:
    """Where `range_finder` starts: the old basis, if it is one, and random columns beside it.

    Args:
      random: what `random_columns` gave.
      old: the old basis, ``(*stack, d, r)``.
      columns: number of columns, at least r and at most d.
      cold: whether the old basis is left out and all columns are random.
    """
    *stack, size, rank = old.shape
    start = random[:size, :columns].astype(old.dtype) / math.sqrt(size)
    start = jnp.broadcast_to(start, (*stack, size, columns))
    return start.at[..., :rank].set(jnp.where(cold, start[..., :rank], old))


def random_columns(key: chex.PRNGKey, shapes: Iterable[tuple[int, int]]) -> jax.Array:
    """Normal numbers from which all matrices of a refresh take theirs.

    They are drawn once because the program of a generator is as long as the rest of a range finder.

    Args:
      key: PRNG key of the refresh.
      shapes: ``(d, s)`` of each range finder.

    Returns:
      The numbers, float32, as many rows and columns as the largest one needs.
    """
    rows, columns = map(max, zip(*shapes, strict=True))
    return jax.random.normal(key, (rows, columns), jnp.float32)
