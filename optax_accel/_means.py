"""What is computed in parts: weights of micro-batches; means and joined arrays of replicas."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax


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
    wide = value.astype(sum_dtype(value.dtype))
    return jnp.where(share != 0, share.astype(wide.dtype) * wide, 0)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating-point or complex number or array, which has a mean."""
    if isinstance(leaf, float | complex):
        return True
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def sum_dtype(dtype: Any) -> Any:
    """The dtype to sum in: at least float32 for numbers that have a mean."""
    has_mean = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.float32) if has_mean else dtype


def as_array(leaf: Any) -> Any:
    """An array in place of a Python number; any other leaf unchanged."""
    return jnp.asarray(leaf) if isinstance(leaf, bool | int | float | complex) else leaf


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


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a ``shard_map`` along which an array, or what stands for one, differs."""
    kind = jax.typeof(x) if isinstance(x, jax.Array) else x
    manual = getattr(kind, "manual_axis_type", None)
    varying = getattr(kind, "vma", None) if manual is None else manual.varying
    return frozenset(varying or ())


def vary_like(x: jax.Array, like: Any) -> jax.Array:
    """Marks a value as differing between replicas of a ``shard_map`` wherever ``like`` does."""
    for axis_name in varying_axes(like):
        x = vary_over(x, axis_name)
    return x


def mean_over(
    tree: chex.ArrayTree,
    axis_name: str | None,
    where: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> chex.ArrayTree:
    """The mean of the floating-point leaves over the replicas of an axis.

    Args:
      tree: this replica's values.
      axis_name: the axis; ``None`` means a single replica.
      where: boolean scalar, whether to average in this step; ``None`` means always.
      weight: how much this replica counts, a scalar; ``None`` means that all count alike.
    """
    if axis_name is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [is_inexact(leaf) for leaf in leaves]
    values = [jnp.asarray(x) for x, is_chosen in zip(leaves, chosen, strict=True) if is_chosen]

    def mean(values: list[jax.Array]) -> list[jax.Array]:
        if weight is None:
            return lax.pmean(values, axis_name)
        local = vary_over(weight, axis_name)
        share = shares_of(local, lax.psum(local, axis_name), lax.axis_size(axis_name))
        return lax.psum([weighted(share, x).astype(x.dtype) for x in values], axis_name)

    if where is None:
        values = mean(values)
    else:
        values = lax.cond(
            where,
            lambda values: vary_over(mean(values), axis_name),
            lambda values: values,
            vary_over(values, axis_name),
        )
    means = iter(values)
    return jax.tree.unflatten(
        treedef, [next(means) if c else x for c, x in zip(chosen, leaves, strict=True)]
    )


def joined_over(x: jax.Array, axis_name: str | None, axis: int = 0) -> jax.Array:
    """The arrays of all replicas, joined along one of their axes in the order of the replicas."""
    return x if axis_name is None else lax.all_gather(x, axis_name, axis=axis, tiled=True)


def fixed_if_unused(tree: chex.ArrayTree, weight: jax.Array | None) -> chex.ArrayTree:
    """The same values, without derivative where the weight is 0.

    The loss of a part without weight may be 0 / 0, whose derivative is NaN even when multiplied by
    0. Leaving out both the value and, here, the derivative keeps the NaN from spreading.
    """
    if weight is None:
        return tree

    def fixed(leaf: Any) -> jax.Array:
        return jnp.where(weight == 0, lax.stop_gradient(leaf), leaf)

    return jax.tree.map(fixed, tree)
