"""Products of two arrays that are computed from a part of their terms, and their derivatives."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._means import varying_axes
from optax_accel._random import as_key
from optax_accel.gradients.sampled_terms import Sampling

_Axes: TypeAlias = frozenset[str]


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """A product of two arrays, linear in each.

    Attributes:
      multiply: the product.
      terms: axes of a and of b that are summed over.
      examples: axes of a and of the product that number the examples.
      features: axes of b and of the product that number the outputs.
    """

    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    terms: tuple[int, int]
    examples: tuple[int, int]
    features: tuple[int, int]


def sampled(
    product: Bilinear, sampling: Sampling, a: jax.Array, b: jax.Array, key: Any
) -> jax.Array:
    """The product, sampled, with the derivative that belongs to where it is sampled."""
    if sampling.needs_key:
        if key is None:
            raise TypeError(
                f"method={sampling.method!r} and norm_rows={sampling.norm_rows!r} draw at random: "
                "give a `key`, another one at each step, such as jax.random.fold_in(key, step)."
            )
        key = as_key(key)
    else:
        key = None
    varying = varying_axes(a), varying_axes(b)
    if sampling.where == "backward":
        return _backward_sampled(product, sampling, varying)(a, b, key)
    n = a.shape[product.terms[0]]
    if (k := sampling.count(n)) == n:
        return product.multiply(a, b)
    return _forward_sampled(product, sampling, k, varying)(a, b, key)


def _forward_sampled(
    product: Bilinear, sampling: Sampling, k: int, varying: tuple[_Axes, _Axes]
) -> Callable[..., jax.Array]:
    """The product of chosen terms; its derivative is that of these, or of all of them."""

    def forward(a: jax.Array, b: jax.Array, key: Any) -> tuple[jax.Array, Any]:
        keys = _split(key)
        lie = (product.terms[0], product.examples[0]), (product.terms[1], product.features[0])
        weights = _norms(b, *lie[1], sampling, keys[0])
        if sampling.scores == "both":
            weights = weights * _norms(a, *lie[0], sampling, keys[1])
        terms = sampling.terms(weights, keys[2], k)
        parts = [
            jnp.take(x, terms.indices, axis, mode="clip", unique_indices=True)
            for x, axis in zip((a, b), product.terms, strict=True)
        ]
        scaled = int(parts[0].size > parts[1].size)  # the smaller one
        parts[scaled] = _times(parts[scaled], terms.scales, product.terms[scaled])
        if sampling.where == "forward_only":
            return product.multiply(*parts), (a, b)
        result, pullback = jax.vjp(product.multiply, *parts)
        n = len(weights)
        position = (
            jnp.full(n, n, jnp.int32)
            .at[terms.indices]
            .set(jnp.arange(len(terms.indices), dtype=jnp.int32), unique_indices=True)
        )
        return result, (pullback, position, {scaled: terms.scales})

    def backward(residuals: Any, gradient: jax.Array) -> tuple[Any, Any, None]:
        if sampling.where == "forward_only":
            a, b = residuals
            of_a, of_b = jax.vjp(product.multiply, a, b)[1](gradient)
            return of_a, of_b, None
        pullback, position, scales = residuals
        gradients = []
        for i, (part, axis) in enumerate(zip(pullback(gradient), product.terms, strict=True)):
            part = _times(part, scales.get(i), axis)
            # A gather: XLA scatters columns five times slower on a CPU.
            whole = jnp.take(part, position, axis, mode="fill", fill_value=0)
            gradients.append(_sum_where_shared(whole, varying[i]))
        return gradients[0], gradients[1], None

    return _with_derivative(forward, backward)


def _backward_sampled(
    product: Bilinear, sampling: Sampling, varying: tuple[_Axes, _Axes]
) -> Callable[..., jax.Array]:
    """The exact product, each of whose derivative's two products is sampled by itself."""

    def forward(a: jax.Array, b: jax.Array, key: Any) -> tuple[jax.Array, Any]:
        return product.multiply(a, b), (a, b, key)

    def part(
        other: jax.Array, gradient: jax.Array, axes: tuple[int, int], index: int, key: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The chosen terms of ``other``, scaled, and those of the gradient."""
        n = other.shape[axes[0]]
        if (k := sampling.count(n, index)) == n:
            return other, gradient
        keys, side = _split(key), 1 - index
        weights = _norms(other, axes[0], product.terms[side], sampling, keys[0])
        along = (product.examples if index == 0 else product.features)[1]
        weights = weights * _norms(gradient, axes[1], along, sampling, keys[1])
        terms = sampling.terms(weights, keys[2], k)
        chosen = [
            jnp.take(x, terms.indices, axis, mode="clip", unique_indices=True)
            for x, axis in zip((other, gradient), axes, strict=True)
        ]
        return _times(chosen[0], terms.scales, axes[0]), chosen[1]

    def backward(residuals: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        a, b, key = residuals
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        some, slope = part(b, gradient, product.features, 0, keys[0])
        (of_a,) = jax.linear_transpose(lambda a: product.multiply(a, some), a)(slope)
        some, slope = part(a, gradient, product.examples, 1, keys[1])
        (of_b,) = jax.linear_transpose(lambda b: product.multiply(some, b), b)(slope)
        return _sum_where_shared(of_a, varying[0]), _sum_where_shared(of_b, varying[1]), None

    return _with_derivative(forward, backward)


def _with_derivative(
    forward: Callable[..., tuple[jax.Array, Any]], backward: Callable[..., Any]
) -> Callable[..., jax.Array]:
    @jax.custom_vjp
    def function(a: jax.Array, b: jax.Array, key: Any) -> jax.Array:
        return forward(a, b, key)[0]

    function.defvjp(forward, backward)
    return function


def _split(key: Any) -> Sequence[Any]:
    return (None, None, None) if key is None else tuple(jax.random.split(key, 3))


def _norms(x: jax.Array, axis: int, along: int, sampling: Sampling, key: Any) -> jax.Array:
    """The norms of the slices of an axis, from some consecutive entries of another one."""
    rows = sampling.norm_rows
    if rows is not None and rows < x.shape[along]:
        first = jax.random.randint(key, (), 0, x.shape[along] - rows + 1)
        x = lax.dynamic_slice_in_dim(x, first, rows, along)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    others = tuple(i for i in range(x.ndim) if i != axis)
    return jnp.sqrt(jnp.sum(jnp.real(x * jnp.conj(x)), others))


def _times(x: jax.Array, scales: jax.Array | None, axis: int) -> jax.Array:
    if scales is None:
        return x
    shape = [1] * x.ndim
    shape[axis] = len(scales)
    wide = jnp.promote_types(x.dtype, scales.dtype)
    return (x.astype(wide) * scales.reshape(shape).astype(wide)).astype(x.dtype)


def _sum_where_shared(gradient: jax.Array, varying: _Axes) -> jax.Array:
    """The gradient of a value that replicas share is the sum of theirs."""
    axes = varying_axes(gradient) - varying
    return lax.psum(gradient, tuple(sorted(axes))) if axes else gradient


def dot(
    a: jax.Array,
    b: jax.Array,
    dimension_numbers: Any,
    *,
    sampling: Sampling,
    key: Any,
    **arguments: Any,
) -> jax.Array:
    """``lax.dot_general``, sampled; with batch axes each pair of matrices is sampled by itself."""
    contracted, batch = (
        tuple(tuple(map(int, axes)) for axes in pair) for pair in dimension_numbers
    )
    if batch[0]:
        a, b = (
            jnp.moveaxis(x, axes, range(len(axes))) for x, axes in zip((a, b), batch, strict=True)
        )
        sizes = a.shape[: len(batch[0])]
        moved = [
            tuple(axis - sum(i < axis for i in axes) for axis in inner)
            for inner, axes in zip(contracted, batch, strict=True)
        ]
        flat = [x.reshape(-1, *x.shape[len(sizes) :]) for x in (a, b)]
        keys = jax.random.split(as_key(key), len(flat[0])) if sampling.needs_key else None

        def one(a: jax.Array, b: jax.Array, key: Any) -> jax.Array:
            return dot(a, b, (moved, ((), ())), sampling=sampling, key=key, **arguments)

        result = jax.vmap(one, in_axes=(0, 0, None if keys is None else 0))(flat[0], flat[1], keys)
        return result.reshape(*sizes, *result.shape[1:])
    free = [
        [i for i in range(x.ndim) if i not in inner]
        for x, inner in zip((a, b), contracted, strict=True)
    ]
    shape = [x.shape[i] for x, axes in zip((a, b), free, strict=True) for i in axes]
    (a, inner), (b, outer) = (
        _as_matrix(x, axes, inner) for x, axes, inner in zip((a, b), free, contracted, strict=True)
    )
    multiply = functools.partial(
        lax.dot_general, dimension_numbers=(((inner,), (outer,)), ((), ())), **arguments
    )
    product = Bilinear(multiply, (inner, outer), (1 - inner, 0), (1 - outer, 1))
    return sampled(product, sampling, a, b, key).reshape(shape)


def _as_matrix(x: jax.Array, free: list[int], contracted: tuple[int, ...]) -> tuple[jax.Array, int]:
    """An array as a matrix, and the axis of it that is contracted."""
    if x.ndim == 2 and len(contracted) == 1:
        return x, contracted[0]
    rows = math.prod(x.shape[i] for i in free)
    columns = math.prod(x.shape[i] for i in contracted)
    return x.transpose(*free, *contracted).reshape(rows, columns), 1


def convolution(
    a: jax.Array,
    b: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    sampling: Sampling,
    key: Any,
    dimension_numbers: Any = None,
    **arguments: Any,
) -> jax.Array:
    """``lax.conv_general_dilated`` of one group, sampled over input channels.

    Raises:
      ValueError: there are groups.
    """
    for name in ("feature_group_count", "batch_group_count"):
        if (groups := arguments.get(name, 1)) != 1:
            raise ValueError(
                f"A sampled convolution chooses among the input channels that all outputs share; "
                f"got {name}={groups}, allowed is 1. Leave convolutions with groups exact."
            )
    numbers = lax.conv_dimension_numbers(a.shape, b.shape, dimension_numbers)
    multiply = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        dimension_numbers=numbers,
        **arguments,
    )
    product = Bilinear(
        multiply,
        (numbers.lhs_spec[1], numbers.rhs_spec[1]),
        (numbers.lhs_spec[0], numbers.out_spec[0]),
        (numbers.rhs_spec[0], numbers.out_spec[1]),
    )
    return sampled(product, sampling, a, b, key)
