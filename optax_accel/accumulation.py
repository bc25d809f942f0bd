r"""Micro-batches: means over a batch that is seen in parts, one after the other.

.. math:: \bar f = \sum_{j=1}^{M} \frac{w_j}{w} f(B_j), \qquad w = \sum_j w_j ,

with the number of examples of a part as its weight, or another one, such as its number of tokens.
The gradient of a mean loss over a batch is such a mean, so a batch that does not fit the memory can
be trained on as a whole: one update, with one clip and one step of every schedule.
:meth:`optax_accel.Objective.accumulated` gives it to every method;
:func:`mean_over_micro_batches` is the loop itself, for a pass that also changes a state of the
model.

Neither ``optax.MultiSteps`` nor ``optax.microbatching`` is underneath.  The first keeps a second
gradient between its calls and runs the inner update at each of them, curvature included.  The
second does not take parts of unequal size, nor a state, copies the batch, and its loop cannot be
unrolled, which convolutions on a CPU need.  Memory for intermediate results and time of a step with
8 parts, as shares of the whole batch's, on two CPU cores:

============================  ==========  =================  ==============
network, examples             this        ``microbatching``  ``MultiSteps``
============================  ==========  =================  ==============
ViT-Ti, 32 x 32 pixels, 64    0.09, 0.57  0.09, 0.69         0.14, 0.60
MLP, 3,072 inputs, 4,096      0.68, 0.73  10.2, 1.65         1.48, 0.95
CNN, 128; here unrolled       0.13, 0.40  0.13, 10.5         0.11, 9.8
============================  ==========  =================  ==============
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_flag, check_integer


def mean_over_micro_batches(
    function: Callable[
        [chex.ArrayTree, chex.ArrayTree, jax.Array], tuple[chex.ArrayTree, chex.ArrayTree]
    ],
    batch: chex.ArrayTree,
    num_micro_batches: int,
    *,
    carry: chex.ArrayTree = None,
    unroll: bool = False,
    weight: Callable[[chex.ArrayTree], chex.Numeric] | None = None,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Calls a function with one part of a batch after the other; the mean of what it returns.

    Part ``j`` has every ``num_micro_batches``-th example, from ``j`` on: where the examples are
    spread over devices, so are those of each part.  If they do not split evenly, all parts have the
    same size, rounded up, but for the last, which has what is left.

    Args:
      function: ``function(carry, part, index) -> (carry, result)``; ``part`` is like ``batch`` with
        fewer examples, ``index`` its number, an int32 scalar. ``carry`` keeps its shapes and
        dtypes; ``result`` is a pytree of arrays, the floating-point ones means over the examples of
        the part.
      batch: arrays with a leading axis of examples. What has no axes is given to every part as it
        is: numbers, flags, strings, ``None``, scalar arrays and PRNG keys (also a raw key, a
        uint32 array of 2 or 4 entries, if the other arrays have another length).
      num_micro_batches: number of parts, from 1 to the number of examples.
      carry: what the first call is given, e.g. the statistics of batch normalization.
      unroll: static; write the calls out one after the other in place of a ``lax.scan``. Compiles
        longer; necessary for convolutions on a CPU, which XLA runs many times slower in a loop
        (jax#12868).
      weight: ``weight(part) -> scalar``, at least 0: how much a part counts in the mean, e.g. its
        number of valid tokens. A part of weight 0 adds nothing, even if its result is NaN; if all
        parts have weight 0, they count alike. ``None`` (default): its number of examples.

    Returns:
      ``(carry, mean)``: the carry of the last call, and the weighted mean of the results in their
      dtypes; it is summed in at least float32. Entries of the result that are not floating-point
      (counters, keys) are those of the last part.

    Raises:
      ValueError: there are fewer examples than parts, or no examples; or the shape of a result
        depends on the number of examples of its part.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> def largest_and_mean(carry, part, index):
      ...     return jnp.maximum(carry, part.max()), part.mean()
      >>> largest, mean = oa.mean_over_micro_batches(
      ...     largest_and_mean, jnp.arange(5.0), 2, carry=jnp.array(0.0)
      ... )
      >>> float(largest), float(mean)
      (4.0, 2.0)
    """
    check_integer("num_micro_batches", num_micro_batches, 1)
    check_flag("unroll", unroll)
    leaves, treedef = jax.tree.flatten(batch)
    cut = _with_examples(leaves)
    rows = next(leaf.shape[0] for leaf, is_cut in zip(leaves, cut, strict=True) if is_cut)
    if num_micro_batches > rows:
        raise ValueError(f"{rows} examples do not make {num_micro_batches} micro-batches.")
    size = -(-rows // num_micro_batches)
    whole = rows // size
    parts = [
        leaf[: whole * size].reshape(size, whole, *leaf.shape[1:]) if is_cut else None
        for leaf, is_cut in zip(leaves, cut, strict=True)
    ]

    def part_of(select: Callable[[Any, Any], jax.Array]) -> chex.ArrayTree:
        return jax.tree.unflatten(
            treedef,
            [
                select(leaf, part) if is_cut else leaf
                for leaf, part, is_cut in zip(leaves, parts, cut, strict=True)
            ],
        )

    def part_at(index: jax.Array) -> chex.ArrayTree:
        return part_of(
            lambda _, part: lax.dynamic_index_in_dim(part, index, axis=1, keepdims=False)
        )

    def rest_from(start: chex.Numeric) -> chex.ArrayTree:
        return part_of(lambda leaf, _: lax.dynamic_slice_in_dim(leaf, start, rows - whole * size))

    first = jnp.zeros((), jnp.int32)
    indices = jnp.arange(whole, dtype=jnp.int32)
    num_parts = whole + (rows > whole * size)
    shares = None
    if weight is not None:
        if unroll:
            weights = jnp.stack([as_weight(weight(part_at(i))) for i in indices])
        else:
            weights = lax.map(lambda i: as_weight(weight(part_at(i))), indices)
        if num_parts > whole:
            last = as_weight(weight(rest_from(whole * size)))
            weights = jnp.concatenate([weights, last[None]])
        shares = shares_of(weights, jnp.sum(weights), num_parts)

    def add(
        state: tuple[chex.ArrayTree, chex.ArrayTree], part: chex.ArrayTree, index: Any, num: int
    ) -> Any:
        carry, total = state
        carry, result = function(carry, part, index)
        share = num / rows if shares is None else shares[index]
        return carry, jax.tree.map(functools.partial(_add, share), total, result)

    after, results = jax.eval_shape(lambda: function(carry, part_at(first), first))
    total = jax.tree.map(lambda r: jnp.zeros(r.shape, _sum_dtype(r.dtype)), results)
    state = jax.tree.map(_vary_like, (carry, total), (after, results))
    if unroll:
        for i in range(whole):
            index = i + _zero_after(state[1]) if i else first
            state = add(state, part_at(index), index, size)
    else:
        state, _ = lax.scan(
            lambda state, index: (add(state, part_at(index), index, size), None), state, indices
        )
    if num_parts > whole:
        start = whole * size + _zero_after(state[1])
        index = jnp.asarray(whole, jnp.int32)
        state = add(state, rest_from(start), index, rows - whole * size)
    carry, total = state
    return carry, jax.tree.map(
        lambda t, r: t.astype(r.dtype) if is_inexact(r) else t, total, results
    )


def as_weight(value: Any) -> jax.Array:
    """The weight of a part of the data, a scalar in the widest float dtype.

    Raises:
      ValueError: it is not a scalar.
    """
    weight = jnp.asarray(value)
    if weight.shape != ():
        raise ValueError(
            f"`weight` must return a scalar, got shape {weight.shape}; sum over the examples, e.g. "
            "weight=lambda mask: jnp.sum(mask)."
        )
    return weight.astype(jnp.result_type(float))


def shares_of(weight: jax.Array, total: jax.Array, number: int) -> jax.Array:
    """Weights over their total; where all of them are 0, the parts count alike."""
    return jnp.where(total == 0, 1 / number, weight / jnp.where(total == 0, 1, total))


def weighted(share: jax.Array, value: jax.Array) -> jax.Array:
    """A share of a value in at least float32; a share of 0 is 0 of any value, NaN included."""
    wide = value.astype(_sum_dtype(value.dtype))
    return jnp.where(share != 0, share.astype(wide.dtype) * wide, 0)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating-point or complex number or array, which has a mean."""
    if isinstance(leaf, float | complex):
        return True
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _sum_dtype(dtype: Any) -> Any:
    is_sum = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.float32) if is_sum else dtype


def _add(share: Any, total: jax.Array, result: jax.Array) -> jax.Array:
    result = jnp.asarray(result)
    if result.shape != total.shape:
        raise ValueError(
            f"a result has shape {total.shape} for one micro-batch and {result.shape} for another "
            "of a different size; return means over the examples instead of one entry for each."
        )
    if not is_inexact(result):
        return result
    if isinstance(share, jax.Array):
        return total + weighted(share, result).astype(total.dtype)
    return total + share * result.astype(total.dtype)


def _with_examples(leaves: list[Any]) -> list[bool]:
    """Which leaves of a batch have a leading axis of examples; all of these the same."""

    def lengths() -> set[int]:
        return {leaf.shape[0] for leaf, is_cut in zip(leaves, cut, strict=True) if is_cut}

    cut = [len(getattr(leaf, "shape", ())) > 0 for leaf in leaves]
    if len(lengths()) > 1:  # raw PRNG keys have an axis, too
        cut = [
            is_cut and not (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))
            for leaf, is_cut in zip(leaves, cut, strict=True)
        ]
    if len(lengths()) != 1:
        raise ValueError(
            "a batch needs arrays with one leading axis of examples, got the shapes "
            f"{[getattr(leaf, 'shape', ()) for leaf in leaves]}; bind what belongs to no example "
            "(objective.bind) instead of giving it with the batch."
        )
    return cut


def vary_over(tree: chex.ArrayTree, axis_name: str | None) -> chex.ArrayTree:
    """Marks replicated values as differing between the replicas of a ``shard_map`` axis.

    The gradient with respect to a value that ``shard_map`` knows to be replicated is summed over
    the axis behind the scenes; a mean on top would then be wrong by the number of replicas.
    """
    if axis_name is None or axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def vary(x: jax.Array) -> jax.Array:
        try:
            return lax.pcast(x, axis_name, to="varying")
        except ValueError:  # it varies already
            return x

    return jax.tree.map(vary, tree)


def _vary_like(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Marked as differing between the replicas of a ``shard_map`` between which ``like`` does."""
    kind = getattr(like, "manual_axis_type", None)
    varying = getattr(like, "vma", None) if kind is None else kind.varying
    for axis_name in varying or ():
        x = vary_over(x, axis_name)
    return x


def _zero_after(tree: chex.ArrayTree) -> jax.Array:
    """The number 0, which XLA does not know before it has computed all of a tree."""
    # On a CPU it drops `optimization_barrier` before it orders the operations, would then start all
    # parts at once, and their activations would be in memory together.
    entries = [
        a[(0,) * a.ndim].real.astype(jnp.float32)
        for a in jax.tree.leaves(tree)
        if a.size and is_inexact(a)
    ]
    impossible = jnp.square(sum(entries, start=jnp.float32(0))) < -1
    return impossible.astype(jnp.int32)
