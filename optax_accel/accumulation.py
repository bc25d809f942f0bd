r"""Micro-batches: means over a batch that is processed in parts, one after the other.

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
from optax_accel._means import as_weight, is_inexact, shares_of, sum_dtype, vary_like, weighted


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
    """Calls a function with one part of a batch after the other and averages its results.

    Part ``j`` has every ``num_micro_batches``-th example, from ``j`` on: if the examples are spread
    over devices, so are those of each part.  If they do not divide evenly, all parts have the same
    size, rounded up, except for the last, which has the remaining examples.

    Args:
      function: ``function(carry, part, index) -> (carry, result)``; ``part`` is like ``batch`` with
        fewer examples, ``index`` its number, an int32 scalar. ``carry`` keeps its shapes and
        dtypes; ``result`` is a pytree of arrays, the floating-point ones means over the examples of
        the part.
      batch: arrays with a leading axis of examples. Every part gets leaves without axes unchanged:
        numbers, flags, strings, ``None``, scalar arrays and PRNG keys (also a raw key, a uint32
        array of 2 or 4 entries, if the other arrays have another length).
      num_micro_batches: number of parts, from 1 to the number of examples.
      carry: the carry of the first call, e.g. the statistics of batch normalization.
      unroll: static; whether to write the calls out one after the other instead of in a
        ``lax.scan``. This compiles longer, but convolutions on a CPU need it: XLA runs them many
        times slower in a loop (jax#12868).
      weight: ``weight(part) -> scalar``, at least 0, the weight of a part in the mean, e.g. its
        number of valid tokens. A part of weight 0 adds nothing, even if its result is NaN; if all
        parts have weight 0, they count alike. ``None`` (default) weights parts by their number of
        examples.

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
    for name, value in (("function", function), ("weight", weight)):
        if not callable(value) and not (name == "weight" and value is None):
            raise TypeError(f"`{name}` must be a function, got {value!r}.")
    parts = _Parts(batch, num_micro_batches)
    shares = None if weight is None else _shares(parts, weight, unroll)

    def add(
        state: tuple[chex.ArrayTree, chex.ArrayTree], part: chex.ArrayTree, index: Any, size: int
    ) -> Any:
        carry, total = state
        carry, result = function(carry, part, index)
        share = size / parts.num_examples if shares is None else shares[index]
        return carry, jax.tree.map(functools.partial(_add, share), total, result)

    first = jnp.zeros((), jnp.int32)
    after, results = jax.eval_shape(lambda: function(carry, parts.at(first), first))
    total = jax.tree.map(lambda r: jnp.zeros(r.shape, sum_dtype(r.dtype)), results)
    state = jax.tree.map(vary_like, (carry, total), (after, results))
    if unroll:
        for i in range(parts.num_equal):
            index = i + _zero_after(state[1]) if i else first
            state = add(state, parts.at(index), index, parts.size)
    else:
        state, _ = lax.scan(
            lambda state, index: (add(state, parts.at(index), index, parts.size), None),
            state,
            parts.indices,
        )
    if parts.rest:
        start = parts.num_equal * parts.size + _zero_after(state[1])
        index = jnp.asarray(parts.num_equal, jnp.int32)
        state = add(state, parts.last(start), index, parts.rest)
    carry, total = state
    return carry, jax.tree.map(
        lambda t, r: t.astype(r.dtype) if is_inexact(r) else t, total, results
    )


class _Parts:
    """A batch in parts of one size, and a last one with the examples that are left.

    Attributes:
      num_examples: number of examples in the batch.
      size: number of examples in each of the equal parts.
      num_equal: number of equal parts.
      rest: number of examples in the last part; 0 if there is none.
      indices: the numbers of the equal parts.
    """

    def __init__(self, batch: chex.ArrayTree, number: int):
        self._leaves, self._treedef = jax.tree.flatten(batch)
        self._divided = _with_examples(self._leaves)
        self.num_examples = next(
            leaf.shape[0]
            for leaf, is_divided in zip(self._leaves, self._divided, strict=True)
            if is_divided
        )
        if number > self.num_examples:
            raise ValueError(f"{self.num_examples} examples do not make {number} micro-batches.")
        self.size = -(-self.num_examples // number)
        self.num_equal = self.num_examples // self.size
        self.rest = self.num_examples - self.num_equal * self.size
        self._equal = [
            leaf[: self.num_equal * self.size].reshape(self.size, self.num_equal, *leaf.shape[1:])
            if is_divided
            else None
            for leaf, is_divided in zip(self._leaves, self._divided, strict=True)
        ]
        self.indices = jnp.arange(self.num_equal, dtype=jnp.int32)

    def at(self, index: jax.Array) -> chex.ArrayTree:
        """The equal part with that number."""
        return self._select(
            lambda _, equal: lax.dynamic_index_in_dim(equal, index, axis=1, keepdims=False)
        )

    def last(self, start: chex.Numeric) -> chex.ArrayTree:
        """The last part, which starts at that example."""
        return self._select(lambda leaf, _: lax.dynamic_slice_in_dim(leaf, start, self.rest))

    def _select(self, select: Callable[[Any, Any], jax.Array]) -> chex.ArrayTree:
        leaves = zip(self._leaves, self._equal, self._divided, strict=True)
        return jax.tree.unflatten(
            self._treedef,
            [select(leaf, equal) if is_divided else leaf for leaf, equal, is_divided in leaves],
        )


def _shares(
    parts: _Parts, weight: Callable[[chex.ArrayTree], chex.Numeric], unroll: bool
) -> jax.Array:
    """How much each part counts in the mean, by its weight."""
    if unroll:
        weights = jnp.stack([as_weight(weight(parts.at(i))) for i in parts.indices])
    else:
        weights = lax.map(lambda i: as_weight(weight(parts.at(i))), parts.indices)
    if parts.rest:
        last = as_weight(weight(parts.last(parts.num_equal * parts.size)))
        weights = jnp.concatenate([weights, last[None]])
    return shares_of(weights, jnp.sum(weights), len(weights))


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
    """Which leaves of a batch have a leading axis of examples, the same for all of them."""

    def lengths() -> set[int]:
        return {
            leaf.shape[0] for leaf, is_divided in zip(leaves, divided, strict=True) if is_divided
        }

    divided = [len(getattr(leaf, "shape", ())) > 0 for leaf in leaves]
    if len(lengths()) > 1:  # raw PRNG keys have an axis, too
        divided = [
            is_divided and not (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))
            for leaf, is_divided in zip(leaves, divided, strict=True)
        ]
    if len(lengths()) != 1:
        raise ValueError(
            "a batch needs arrays with one leading axis of examples, got the shapes "
            f"{[getattr(leaf, 'shape', ()) for leaf in leaves]}; bind arrays that do not belong to "
            "examples (objective.bind) instead of passing them with the batch."
        )
    return divided


def _zero_after(tree: chex.ArrayTree) -> jax.Array:
    """The number 0, which XLA only knows after it has computed all of a tree."""
    # `optimization_barrier` does not help: on a CPU XLA drops it before it orders the operations.
    # It would then start all parts at once and keep the activations of all of them in memory.
    entries = [
        a[(0,) * a.ndim].real.astype(jnp.float32)
        for a in jax.tree.leaves(tree)
        if a.size and is_inexact(a)
    ]
    impossible = jnp.square(sum(entries, start=jnp.float32(0))) < -1
    return impossible.astype(jnp.int32)
