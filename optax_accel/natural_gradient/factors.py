r"""Statistics of layers, and what is made of them: Kronecker factors, inverses, second moments.

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
# Rows of a matrix up to which it is inverted row by row, in the first caches of a processor.
_SWEPT_BY_ROWS = 104


class Kronecker(NamedTuple):
    """A matrix for each side of a layer; a vector stands for a diagonal matrix.

    Attributes:
      inputs: A, ``(inputs, inputs)`` or ``(inputs,)``; of a stack with its slices in front.
      outputs: B, ``(outputs, outputs)`` or ``(outputs,)``; likewise.
    """

    inputs: Any
    outputs: Any


class Eigen(NamedTuple):
    """An eigendecomposition.

    Attributes:
      eigenvalues: ascending, at least 0.
      eigenvectors: in columns; None for a diagonal matrix.
    """

    eigenvalues: jax.Array
    eigenvectors: jax.Array | None


# -- statistics -----------------------------------------------------------------------------------


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
        g = g.transpose(0, *axes)
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
    means = jnp.stack(traces(factors)) / np.array([len(f) for f in factors], np.float32)
    usable = jnp.all(means.reshape(-1, 2) > 0, axis=1)
    a, b = (jnp.where(usable, side, 1) for side in (means[::2], means[1::2]))
    root = jnp.sqrt(jnp.asarray(damping, means.dtype))
    return list(root * jnp.sqrt(jnp.stack([a / b, b / a], axis=1)).ravel())


def damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """The inverse of ``factor + damping I``; NaN everywhere if that is not positive definite."""
    damping = damping.astype(factor.dtype)
    if factor.ndim == 1:
        return 1 / (factor + damping)
    damped = factor + damping * jnp.eye(len(factor), dtype=factor.dtype)
    # On a CPU the threads of LAPACK compete with those of XLA for the cores: one thread takes the
    # same time for both, two on busy cores several times longer for LAPACK's.
    return lax.platform_dependent(damped, cpu=inverse_by_sweeps, default=inverse_by_cholesky)


def inverse_by_cholesky(matrix: jax.Array) -> jax.Array:
    """The inverse of a symmetric positive definite matrix by Cholesky decomposition."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    # LAPACK's matrices lie column by column: transposed, which for these changes nothing, none is
    # copied. Two solves: the product of half with itself would be less accurate.
    root = lax.linalg.cholesky(matrix.T, symmetrize_input=False)
    half = lax.linalg.triangular_solve(root, identity, left_side=True, lower=True)
    whole = lax.linalg.triangular_solve(root, half, left_side=True, lower=True, transpose_a=True)
    return whole.T


def inverse_by_sweeps(matrix: jax.Array) -> jax.Array:
    """The inverse of a symmetric positive definite matrix by Gauss-Jordan elimination in blocks.

    All but rows of the pivots are matrix products, which XLA's threads compute, and a loop's body
    is compiled once.  Without pivoting the method is stable for these matrices (Higham, Accuracy
    and Stability of Numerical Algorithms, 2nd edition, 2002, section 14.4).

    Args:
      matrix: symmetric; without the positive pivots of a definite one the result is NaN everywhere.
    """
    size = len(matrix)
    if size <= _SWEPT_BY_ROWS:
        return lax.fori_loop(0, size, _sweep_row, matrix)
    # Of few blocks, because each of them takes a pass over the whole matrix.
    num_blocks = min(8, -(-size // _SWEPT_BY_ROWS))
    width = -(-size // num_blocks)
    inside = jnp.arange(num_blocks * width) < size
    padded = jnp.pad(matrix, (0, num_blocks * width - size)) + jnp.diag(
        jnp.where(inside, 0, jnp.ones((), matrix.dtype))
    )

    def sweep(block: jax.Array, matrix: jax.Array) -> jax.Array:
        start = block * width
        columns = lax.dynamic_slice_in_dim(matrix, start, width, axis=1)
        rows = lax.dynamic_slice_in_dim(matrix, start, width)
        pivot = inverse_by_sweeps(lax.dynamic_slice_in_dim(rows, start, width, axis=1))
        rows = lax.dynamic_update_slice_in_dim(_matmul(pivot, rows), pivot, start, axis=1)
        others = lax.dynamic_update_slice_in_dim(matrix, jnp.zeros_like(columns), start, axis=1)
        others = others - _matmul(columns, rows)
        return lax.dynamic_update_slice_in_dim(others, rows, start, axis=0)

    return lax.fori_loop(0, num_blocks, sweep, padded)[:size, :size]


def _sweep_row(index: jax.Array, matrix: jax.Array) -> jax.Array:
    """One step of Gauss-Jordan elimination, with the pivot at an index of the diagonal."""
    here = jnp.arange(len(matrix)) == index
    pivot = matrix[index, index]
    row = jnp.where(here, 1, matrix[index]) / jnp.where(pivot > 0, pivot, jnp.nan)
    others = jnp.where(here[None], 0, matrix) - matrix[:, index, None] * row[None]
    return jnp.where(here[:, None], row[None], others)


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
    inner = _rotate(inner, right) / (moments + damping)
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


def traces(arrays: Sequence[jax.Array]) -> list[jax.Array]:
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
    return [sums[i] for i in range(len(arrays))]
