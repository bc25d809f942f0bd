r"""Statistics of layers: Kronecker factors, second moments, gradients of examples.

With :math:`a_{nt}` the input of a layer at position t of example n (T positions; 1 without weight
sharing), a 1 appended for the bias, and :math:`g_{nt}` the gradient of that example at its output,

.. math::
  A = \frac{1}{N T} \sum_{n,t} a_{nt} a_{nt}^\top, \qquad
  B = \frac{1}{N} \sum_{n,t} g_{nt} g_{nt}^\top, \qquad
  F \approx A \otimes B .

This is K-FAC of Martens and Grosse (2015) for T = 1 and KFC of Grosse and Martens (2016) for
convolutions, whose positions are those of the output and whose inputs are the patches that a window
sees: positions are taken to be alike and their gradients uncorrelated, so that the sum over pairs
of positions is T times an expectation over one.  (KFC's :math:`\Omega` is T A, its
:math:`\Gamma` is B / T; the product is the same, and so is damping with
:math:`\pi`.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accel.natural_gradient.layers import Block, Use
from optax_accel.natural_gradient.layouts import inverse, lay_out

Values = Mapping[int, jax.Array]
Vary = Callable[[chex.ArrayTree], chex.ArrayTree]
# Nothing here tolerates the three digits of TF32 or bfloat16 products.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Kronecker(NamedTuple):
    """A matrix for each side of a layer; a vector stands for a diagonal matrix.

    Attributes:
      inputs: A, ``(inputs, inputs)`` or ``(inputs,)``; of a stack with its slices in front.
      outputs: B, ``(outputs, outputs)`` or ``(outputs,)``; likewise.
    """

    inputs: Any
    outputs: Any


def side_shapes(block: Block, max_size: int) -> Kronecker:
    """Shapes of the factors: of a matrix, or of a vector where the factor is diagonal.

    Those of a stack have its slices in front.
    """
    rows, columns = block.matrix_shape
    slices = () if block.num_slices is None else (block.num_slices,)
    full = rows <= max_size and block.kind != "embedding"
    return Kronecker(
        (*slices, rows, rows) if full else (*slices, rows),
        (*slices, columns, columns) if columns <= max_size else (*slices, columns),
    )


def inputs_of(block: Block, use: Use, values: Values, num_examples: int, dtype: Any) -> jax.Array:
    """The inputs of a layer, ``(*slices, examples, positions, inputs)``; of an embedding indices.

    There is an axis of slices where the parameter is a stack.
    """
    x = values[use.input]  # type: ignore[index]
    if use.kind == "convolution":
        x = _patches_of(use, x)
    else:
        x = x.transpose(*use.stack, *use.rows, *use.columns)
    x = _examples_first(x, len(use.stack), use.outer, num_examples)
    slices = (math.prod(x.shape[: len(use.stack)]),) if use.stacked else ()
    if use.kind == "embedding":
        x = x.reshape(*slices, num_examples, -1)
        if x.dtype.itemsize < 4:  # perhaps too narrow for the size of the table
            x = x.astype(jnp.int32)
        return jnp.clip(x, 0, block.matrix_shape[0] - 1) if dict(use.geometry)["clip"] else x
    features = block.matrix_shape[0] - block.has_bias
    left = [lay_out(values[number], ops).astype(dtype) for number, ops in use.left]
    width = len(left[0]) if left else features * use.groups
    x = x.reshape(*slices, num_examples, -1, width).astype(dtype)
    for matrix in left:
        x = _matmul(x, matrix)
    if use.scales or use.sign < 0:
        x = x * _scale_of(use, values, dtype)
    if use.groups > 1:  # of each place in the window the channels of all groups
        channels = features // math.prod(dict(use.geometry)["window"])
        by_group = x.reshape(*x.shape[:-1], -1, use.groups, channels)
        x = jnp.moveaxis(by_group, -2, 1).reshape(-1, *x.shape[1:-1], features)
    if block.has_bias:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    return x


def _examples_first(x: jax.Array, axis: int, outer: int, num_examples: int) -> jax.Array:
    """Moves the examples to the front of the axis that they are on, ``(outer, examples, rest)``."""
    if outer == 1:
        return x
    parts = x.reshape(*x.shape[:axis], outer, num_examples, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(parts, axis + 1, axis).reshape(x.shape)


def _scale_of(use: Use, values: Values, dtype: Any) -> Any:
    """By what the parameter is multiplied to give the layer's weight, or its part of that."""
    return use.sign * math.prod(values[number].ravel()[0].astype(dtype) for number in use.scales)


def gradients_of(
    use: Use, values: Values, gradients: Values, num_examples: int, dtype: Any
) -> jax.Array:
    """The gradients at a layer's output, ``(*slices, samples, examples, positions, outputs)``."""
    g = gradients[use.output]
    axes = [i + 1 for i in (*use.output_stack, *use.output_rows, *use.channels)]
    g = g.transpose(0, *axes).astype(dtype)
    stack = len(use.output_stack)
    g = _examples_first(g, 1 + stack, use.outer, num_examples)
    outputs = math.prod(g.shape[stack + len(use.output_rows) + 1 :])
    if use.kind == "embedding" and (use.scales or use.sign < 0):
        g = g * _scale_of(use, values, dtype)
    if not use.stacked:
        g = g.reshape(g.shape[0], num_examples, -1, outputs)
        for number, ops in use.right:
            g = _matmul(g, lay_out(values[number], ops).astype(dtype).T)
        return g
    slices = math.prod(g.shape[1 : stack + 1])
    g = g.reshape(g.shape[0], slices, num_examples, -1, use.groups, outputs // use.groups)
    g = jnp.moveaxis(g, (1, 4), (0, 1))
    return g.reshape(-1, *g.shape[2:])


def places_of(use: Use, values: Values, num_slices: int) -> np.ndarray | jax.Array | None:
    """Which slices of a stack those of a use are; None if they are all, in their order.

    Args:
      use: of the stack.
      values: among them computed positions.
      num_slices: of the stack.
    """
    if use.slot is None:
        return None
    size = use.slot.size
    rest = np.arange(num_slices // size)
    if use.slot.position is not None:
        return use.slot.position * len(rest) + rest
    positions = values[use.slot.number]  # type: ignore[index]
    first = jnp.clip(positions.ravel(), 0, size - 1)  # as `dynamic_slice` does
    return (first[:, None] * len(rest) + rest[None]).ravel()


def _add_slices(total: jax.Array, slices: jax.Array, places: Any) -> jax.Array:
    return total + slices if places is None else total.at[places].add(slices)


def _patches_of(use: Use, x: jax.Array) -> jax.Array:
    """The patches of a convolution, ``(*slices, examples, *positions, window size * channels)``.

    Positions are those of the window, and iterations that share the parameter.
    """
    geometry, ahead = dict(use.geometry), (*use.stack, *use.rows)
    if not ahead:
        return patches(x, **geometry)
    x = x.transpose(*ahead, *(i for i in range(x.ndim) if i not in ahead))
    sizes = x.shape[: len(ahead)]
    x = jax.vmap(lambda x: patches(x, **geometry))(x.reshape(-1, *x.shape[len(ahead) :]))
    x = x.reshape(*sizes, *x.shape[1:])
    last = range(x.ndim - 1 - len(use.rows), x.ndim - 1)
    return jnp.moveaxis(x, range(len(use.stack), len(ahead)), last)


def patches(
    x: jax.Array,
    *,
    lhs_spec: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    input_dilation: Sequence[int],
) -> jax.Array:
    """What a convolution's window sees: ``(examples, *positions, window size * channels)``.

    As ``lax.conv_general_dilated_patches`` but for the order of the features, as slices: on a CPU 2
    to 9 times faster than that function's convolution with ones and zeros.
    """
    x = x.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    interior = [(low, high, d - 1) for (low, high), d in zip(padding, input_dilation, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *interior, (0, 0, 0)])
    spatial = x.shape[1:-1]
    extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    counts = [(n - e) // s + 1 for n, e, s in zip(spatial, extent, strides, strict=True)]
    slices = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        limit = [i + (c - 1) * s + 1 for i, c, s in zip(start, counts, strides, strict=True)]
        slices.append(
            lax.slice(x, (0, *start, 0), (x.shape[0], *limit, x.shape[-1]), (1, *strides, 1))
        )
    return jnp.concatenate(slices, axis=-1)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def kronecker_statistics(
    block: Block,
    values: Values,
    gradients: Values,
    weights: jax.Array,
    shapes: Kronecker,
    dtype: Any,
) -> Kronecker:
    """A and B of one batch, summed over the uses of the parameter.

    Args:
      block: the layer.
      values: activations.
      gradients: at the layers' outputs.
      weights: how much an example counts in A, ``(examples,)``, or a position of the outputs,
        ``(examples, *positions)``; 1 on average.
      shapes: of A and B.
      dtype: of A and B.
    """
    num_examples, slices = len(weights), block.num_slices
    totals = Kronecker(*(jnp.zeros(shape, dtype) for shape in shapes))
    num_rows: Any = 0 if slices is None else jnp.zeros(slices, dtype)
    for use in block.uses:
        a = inputs_of(block, use, values, num_examples, dtype)
        g = gradients_of(use, values, gradients, num_examples, dtype)
        num_positions = a.shape[1 if slices is None else 2]
        counts = _weights_of_rows(weights, num_positions).astype(dtype)
        if slices is None:
            sums = _sums_of_products(block, counts, shapes, a, g)
            totals = jax.tree.map(jnp.add, totals, sums)
            num_rows += num_examples * num_positions
            continue
        one = Kronecker(*(shape[1:] for shape in shapes))
        places = places_of(use, values, slices)
        sums = jax.vmap(functools.partial(_sums_of_products, block, counts, one))(a, g)
        totals = jax.tree.map(lambda t, s, p=places: _add_slices(t, s, p), totals, sums)
        rows = jnp.full(len(a), num_examples * num_positions, dtype)
        num_rows = _add_slices(num_rows, rows, places)
    if slices is not None:  # a slice may be in no use
        num_rows = jnp.maximum(num_rows, 1).reshape(-1, *(1 for _ in shapes.inputs[1:]))
    return Kronecker(totals.inputs / num_rows, totals.outputs / num_examples)


def _sums_of_products(
    block: Block, counts: jax.Array, shapes: Kronecker, a: jax.Array, g: jax.Array
) -> Kronecker:
    """Sums over examples and positions of one use of a matrix."""
    outputs = gram(_rows(g), shapes.outputs)
    if block.kind == "embedding":
        zeros = jnp.zeros(shapes.inputs, g.dtype)
        index = _as_index(a.ravel(), len(zeros))
        return Kronecker(zeros.at[index].add(counts.ravel(), mode="drop"), outputs)
    return Kronecker(gram(_rows(a * jnp.sqrt(counts)[..., None]), shapes.inputs), outputs)


def tied_statistics(
    block: Block,
    values: Values,
    gradients: Values,
    weights: jax.Array,
    shapes: Kronecker,
    dtype: Any,
) -> tuple[Kronecker, ...]:
    """A and B of one batch for each way in which a tied matrix is used; arguments as above."""
    results = []
    for part, turned in block.parts():
        own = Kronecker(*reversed(shapes)) if turned else shapes
        if table := part.kind == "embedding":
            own = own._replace(inputs=own.inputs[:1])
        factors = kronecker_statistics(part, values, gradients, weights, own, dtype)
        if table and len(shapes.inputs) == 2:
            factors = factors._replace(inputs=jnp.diag(factors.inputs))
        results.append(Kronecker(*reversed(factors)) if turned else factors)
    return tuple(results)


def nearest_kronecker(terms: Sequence[Kronecker]) -> Kronecker:
    r"""The Kronecker product nearest to a sum of such, in the Frobenius norm.

    With :math:`\sum_i A_i \otimes B_i` rearranged to :math:`\sum_i \mathrm{vec}(A_i)\,
    \mathrm{vec}(B_i)^\top` it is the largest singular triple of that matrix (Van Loan, Pitsianis,
    `Approximation with Kronecker products
    <https://doi.org/10.1007/978-94-015-8196-7_17>`_, 1993, section 2), which lies in the span of
    the terms: the powers of a matrix with as many rows as there are terms lead to it.  Inner
    products of positive semidefinite matrices are not negative, so that both factors are
    semidefinite again.

    Args:
      terms: with factors of the same shapes.

    Returns:
      The factors; A has the norm 1.
    """

    def normalized(sides: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        stack = jnp.stack(sides).reshape(len(sides), -1)
        norms = jnp.linalg.norm(stack, axis=1)
        unit = stack / jnp.where(norms > 0, norms, 1)[:, None]
        return unit, norms, _matmul(unit, unit.T)

    left, left_norms, left_products = normalized([term.inputs for term in terms])
    right, right_norms, right_products = normalized([term.outputs for term in terms])
    sizes = left_norms * right_norms
    largest = jnp.max(sizes)
    sizes = sizes / jnp.where(largest > 0, largest, 1)
    # u = sum_i c_i A_i is the eigenvector of M M^T where c is that of this matrix.
    step = sizes[:, None] * _matmul(right_products * sizes[None], left_products)
    for _ in range(10):  # the power 1024
        step = _matmul(step, step)
        step = step / jnp.where(jnp.max(step) > 0, jnp.max(step), 1)
    weights = jnp.sum(step, axis=1)
    norm = jnp.sqrt(_matmul(weights, _matmul(left_products, weights)))
    weights = weights / jnp.where(norm > 0, norm, 1)
    others = largest * sizes * _matmul(left_products, weights)
    return Kronecker(
        _matmul(weights, left).reshape(terms[0].inputs.shape),
        _matmul(others, right).reshape(terms[0].outputs.shape),
    )


def _weights_of_rows(weights: jax.Array, num_positions: int) -> jax.Array:
    """Weights for the positions of a layer: those of the outputs, where there are as many."""
    weights = weights.reshape(len(weights), -1)
    if weights.shape[1] != num_positions:
        weights = weights.mean(axis=1, keepdims=True)
    return jnp.broadcast_to(weights, (len(weights), num_positions))


def gram(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums of products of columns: a matrix, or its diagonal, whichever has the given shape."""
    if len(shape) == 1:
        return jnp.sum(rows**2, axis=0)
    return _matmul(rows.T, rows)


def _as_index(indices: jax.Array, size: int) -> jax.Array:
    # What a negative index names in NumPy is out of bounds in the program; it is dropped.
    return jnp.where(indices < 0, size, indices)


def diagonal_statistics(
    block: Block, values: Values, gradients: Values, num_examples: int, dtype: Any
) -> jax.Array:
    """Mean squares of the per-example gradients of a scale or shift."""
    each = example_gradients(block, values, gradients, num_examples, dtype)
    return jnp.mean(jnp.sum(each**2, axis=0), axis=0)


def example_gradients(
    block: Block, values: Values, gradients: Values, num_examples: int, dtype: Any
) -> jax.Array:
    """The gradients of a scale or shift, ``(samples, examples, *parameter.shape)``."""
    total: Any = 0.0
    for use in block.uses:
        g = gradients[use.output].astype(dtype)
        for factor in (use.input, use.coefficient):
            if factor is not None:
                value = values[factor]  # of a scalar in a loop one for each iteration
                value = value.reshape(value.shape + (1,) * (g.ndim - 1 - value.ndim))
                g = g * jnp.broadcast_to(value, g.shape[1:]).astype(dtype)[None]
        axes = [i + 1 for i in (*use.output_rows, *use.output_stack, *use.channels)]
        g = _examples_first(g.transpose(0, *axes), 1, use.outer, num_examples)
        channels = g.shape[1 + len(use.output_rows) :]
        g = g.reshape(g.shape[0], num_examples, -1, *channels).sum(axis=2)
        if use.slot is not None:
            g = g.reshape(*g.shape[:2], -1, *channels[len(use.output_stack) :])
            zeros = jnp.zeros((*g.shape[:2], use.slot.size, *g.shape[3:]), dtype)
            g = zeros.at[:, :, places_of(use, values, use.slot.size)].add(g)
            use = dataclasses.replace(use, core_axes=(use.slot.axis, *use.core_axes))
        scale = _scale_of(use, values, dtype)
        total += scale * jax.vmap(jax.vmap(lambda core, use=use: _to_leaf(core, use, block)))(g)
    return total


def _to_leaf(core: jax.Array, use: Use, block: Block) -> jax.Array:
    """From the axes of the core that a use shows to the parameter."""
    rank = _rank(use.ops, len(block.shapes[0]))
    order = (*use.core_axes, *(i for i in range(rank) if i not in use.core_axes))  # of size 1
    core = core.reshape(core.shape + (1,) * (rank - core.ndim))
    ops = inverse((*use.ops, ("transpose", order)), block.shapes[0])
    return lay_out(core, ops)


def _rank(ops: Any, rank: int) -> int:
    return len(ops[-1][1]) if ops else rank


def eigen_statistics(
    block: Block,
    values: Values,
    gradients: Values,
    num_examples: int,
    basis: Kronecker,
    dtype: Any,
    vary: Vary,
) -> jax.Array:
    """Mean squares of the per-example gradients in the Kronecker basis, ``(inputs, outputs)``."""
    slices = block.num_slices
    rotate = functools.partial(_rotate_use, block.kind)
    rotated: list[Any] = []
    places: list[Any] = []
    for use in block.uses:
        a = inputs_of(block, use, values, num_examples, dtype)
        g = gradients_of(use, values, gradients, num_examples, dtype)
        if slices is None:
            rotated.append(rotate(basis, a, g))
            places.append(None)
        else:
            places.append(where := places_of(use, values, slices))
            own = basis if where is None else jax.tree.map(lambda u, w=where: u[w], basis)
            rotated.append(jax.vmap(rotate)(own, a, g))
    shape = block.matrix_shape
    zeros = jnp.zeros(shape if slices is None else (slices, *shape), dtype)
    each = on_slices(block)
    if block.kind == "embedding" or _uses_apart(rotated, places, block.stacked):
        # In an embedding each position of an example counts as an example.
        squares = each(functools.partial(_squares_of_positions, block.kind, shape))
        for (a, g), where in zip(rotated, places, strict=True):
            zeros = _add_slices(zeros, squares(a, g), where)
        return zeros / num_examples
    products = each(functools.partial(_einsum, "ti,sto->sio"))

    def add(total: jax.Array, example: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, None]:
        samples = example[0][1].shape[int(block.stacked)]
        gradient = jnp.zeros((*total.shape[:-2], samples, *shape), dtype)
        for (a, g), where in zip(example, places, strict=True):
            gradient = _add_slices(gradient, products(a, g), where)
        return total + jnp.sum(gradient**2, axis=-3), None

    ahead = int(block.stacked)
    examples = [(jnp.moveaxis(a, ahead, 0), jnp.moveaxis(g, ahead + 1, 0)) for a, g in rotated]
    total, _ = lax.scan(add, vary(zeros), examples)
    return total / num_examples


def on_slices(block: Block) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Maps a function of one matrix' arrays to one of those of the block."""
    return jax.vmap if block.stacked else lambda function: function


def _rotate_use(
    kind: str, basis: Kronecker, a: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a = a if kind == "embedding" else _rotate(a, basis.inputs.eigenvectors)
    return a, _rotate(g, basis.outputs.eigenvectors)


def _uses_apart(rotated: Sequence[Any], places: Sequence[Any], stacked: bool) -> bool:
    """Whether no matrix is used at two positions of an example."""
    if any(a.shape[1 + stacked] > 1 for a, _ in rotated):
        return False
    if len(rotated) == 1 and places[0] is None:
        return True
    if not all(isinstance(where, np.ndarray) for where in places):
        return False
    return len(np.unique(used := np.concatenate(places))) == len(used)


def _squares_of_positions(
    kind: str, shape: tuple[int, int], a: jax.Array, g: jax.Array
) -> jax.Array:
    """Sums of squares of the gradients of single positions."""
    if kind != "embedding":
        return _matmul(_rows(a**2).T, _rows(jnp.sum(g**2, axis=0)))
    squares = jnp.sum(g**2, axis=0).reshape(a.size, -1)
    zeros = jnp.zeros(shape, g.dtype)
    return zeros.at[_as_index(a.ravel(), shape[0])].add(squares, mode="drop")


def tied_eigen_statistics(
    block: Block,
    values: Values,
    gradients: Values,
    num_examples: int,
    basis: Kronecker,
    dtype: Any,
    vary: Vary,
) -> jax.Array:
    """As above of a tied matrix, whose gradient for an example is the sum over its uses."""
    rows, columns = basis.inputs.eigenvectors, basis.outputs.eigenvectors
    turns, uses = [], []
    for part, turned in block.parts():
        for use in part.uses:
            a = inputs_of(part, use, values, num_examples, dtype)
            g = jnp.moveaxis(gradients_of(use, values, gradients, num_examples, dtype), 1, 0)
            if turned:
                a, g = _rotate(a, columns), _rotate(g, rows)
            else:
                g = _rotate(g, columns)
                a = _rotate(a, rows) if part.kind == "dense" else a
            turns.append((part.kind, turned))
            uses.append((a, g))

    def gradient_of(kind: str, turned: bool, a: jax.Array, g: jax.Array) -> jax.Array:
        if kind == "dense":
            return _einsum("ti,sto->soi" if turned else "ti,sto->sio", a, g)
        index = _as_index(a, block.matrix_shape[0])
        zeros = jnp.zeros((len(g), *block.matrix_shape), dtype)
        added = zeros.at[:, index].add(g, mode="drop")
        return added if rows is None else _einsum("vi,svo->sio", rows, added)

    def add(total: jax.Array, example: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, None]:
        parts = zip(turns, example, strict=True)
        gradient = sum(gradient_of(*turn, *arrays) for turn, arrays in parts)
        return total + jnp.sum(gradient**2, axis=0), None

    total, _ = lax.scan(add, vary(jnp.zeros(block.matrix_shape, dtype)), uses)
    return total / num_examples


def _rotate(rows: jax.Array, vectors: jax.Array | None) -> jax.Array:
    return rows if vectors is None else _matmul(rows, vectors)
