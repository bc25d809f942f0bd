r"""Micro-batches: means over a batch that is seen in parts, one after the other.

.. math:: \bar f = \sum_{j=1}^{M} \frac{n_j}{n} f(B_j), \qquad n = \sum_j n_j .

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

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_integer


def mean_over_micro_batches(
    function: Callable[
        [chex.ArrayTree, chex.ArrayTree, jax.Array], tuple[chex.ArrayTree, chex.ArrayTree]
    ],
    batch: chex.ArrayTree,
    num_micro_batches: int,
    *,
    carry: chex.ArrayTree = None,
    unroll: bool = False,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Calls a function with one part of a batch after the other; the mean of what it returns.

    Part ``j`` has every ``num_micro_batches``-th example, from ``j`` on: where the examples are
    spread over devices, so are those of each part.  If they do not split evenly, all parts have the
    same size, rounded up, but for the last, which has what is left.

    Args:
      function: ``function(carry, part, index) -> (carry, result)``; ``part`` is like ``batch`` with
        fewer examples, ``index`` its number, an int32 scalar. ``carry`` keeps its shapes and
        dtypes; ``result`` is a pytree of float arrays, a mean over the examples of the part.
      batch: arrays with a leading axis of examples.
      num_micro_batches: number of parts, from 1 to the number of examples.
      carry: what the first call is given, e.g. the statistics of batch normalization.
      unroll: static; write the calls out one after the other in place of a ``lax.scan``. Compiles
        longer; necessary for convolutions on a CPU, which XLA runs many times slower in a loop
        (jax#12868).

    Returns:
      ``(carry, mean)``: the carry of the last call, and the mean of the results, weighted with the
      number of examples, in their dtypes; it is summed in at least float32.

    Raises:
      ValueError: there are fewer examples than parts, or no examples.

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
    shapes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            "a batch needs arrays with one leading axis of examples, got the shapes "
            f"{[leaf.shape for leaf in jax.tree.leaves(batch)]}."
        )
    ((rows,),) = shapes
    if num_micro_batches > rows:
        raise ValueError(f"{rows} examples do not make {num_micro_batches} micro-batches.")
    size = -(-rows // num_micro_batches)
    whole = rows // size
    parts = jax.tree.map(lambda a: a[: whole * size].reshape(size, whole, *a.shape[1:]), batch)

    def part_at(index: jax.Array) -> chex.ArrayTree:
        return jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index, axis=1, keepdims=False), parts
        )

    def add(
        state: tuple[chex.ArrayTree, chex.ArrayTree], part: chex.ArrayTree, index: jax.Array
    ) -> Any:
        carry, total = state
        weight = jax.tree.leaves(part)[0].shape[0] / rows
        carry, result = function(carry, part, index)
        total = jax.tree.map(lambda t, r: t + weight * r.astype(t.dtype), total, result)
        return carry, total

    first = jnp.zeros((), jnp.int32)
    after, results = jax.eval_shape(lambda: function(carry, part_at(first), first))
    total = jax.tree.map(
        lambda r: jnp.zeros(r.shape, jnp.promote_types(r.dtype, jnp.float32)), results
    )
    state = jax.tree.map(_vary_like, (carry, total), (after, results))
    if unroll:
        for i in range(whole):
            index = i + _zero_after(state[1]) if i else first
            state = add(state, part_at(index), index)
    else:
        state, _ = lax.scan(
            lambda state, index: (add(state, part_at(index), index), None),
            state,
            jnp.arange(whole, dtype=jnp.int32),
        )
    if rows > whole * size:
        start = whole * size + _zero_after(state[1])
        last = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, start, rows - whole * size), batch
        )
        state = add(state, last, jnp.asarray(whole, jnp.int32))
    carry, total = state
    return carry, jax.tree.map(lambda t, r: t.astype(r.dtype), total, results)


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
    entries = [a[(0,) * a.ndim].astype(jnp.float32) for a in jax.tree.leaves(tree) if a.size]
    impossible = jnp.square(sum(entries, start=jnp.float32(0))) < -1
    return impossible.astype(jnp.int32)
