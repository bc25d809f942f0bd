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
      inputs: A, ``(inputs, inputs)`` or ``(inputs,)``.
      outputs: B, ``(outputs, outputs)`` or ``(outputs,)``.
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
    """Shapes of the factors: of a matrix, or of a vector where the factor is diagonal."""
    rows, columns = block.matrix_shape
    full = rows <= max_size and block.kind != "embedding"
    return Kronecker(
        (rows, rows) if full else (rows,), (columns,) * 2 if columns <= max_size else (columns,)
    )


def inputs_of(block: Block, use: Use, values: Values, num_examples: int, dtype: Any) -> jax.Array:
    """The inputs of a layer, ``(examples, positions, inputs)``; of an embedding the indices."""
    x = values[use.input]  # type: ignore[index]
    if use.kind == "convolution":
        x = patches(x, **dict(use.geometry))
    else:
        x = x.transpose(*use.rows, *use.columns)
    if use.kind == "embedding":
        x = x.reshape(num_examples, -1)
        if x.dtype.itemsize < 4:  # perhaps too narrow for the size of the table
            x = x.astype(jnp.int32)
        return jnp.clip(x, 0, block.matrix_shape[0] - 1) if dict(use.geometry)["clip"] else x
    features = block.matrix_shape[0] - block.has_bias
    x = x.reshape(num_examples, -1, features).astype(dtype)
    if block.has_bias:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    return x


def gradients_of(use: Use, gradients: Values, num_examples: int, dtype: Any) -> jax.Array:
    """The gradients at a layer's output, ``(samples, examples, positions, outputs)``."""
    g = gradients[use.output]
    axes = [i + 1 for i in (*use.output_rows, *use.channels)]
    g = g.transpose(0, *axes).astype(dtype)
    outputs = math.prod(g.shape[len(use.output_rows) + 1 :])
    return g.reshape(g.shape[0], num_examples, -1, outputs)


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
    num_examples = len(weights)
    total_inputs: Any = 0.0
    total_outputs: Any = 0.0
    num_rows = 0
    for use in block.uses:
        a = inputs_of(block, use, values, num_examples, dtype)
        counts = _weights_of_rows(weights, a.shape[1]).astype(dtype)
        num_rows += a.shape[0] * a.shape[1]
        if block.kind == "embedding":
            zeros = jnp.zeros(shapes.inputs, dtype)
            index = _as_index(a.ravel(), len(zeros))
            total_inputs += zeros.at[index].add(counts.ravel(), mode="drop")
        else:
            total_inputs += gram(_rows(a * jnp.sqrt(counts)[..., None]), shapes.inputs)
        total_outputs += gram(
            _rows(gradients_of(use, gradients, num_examples, dtype)), shapes.outputs
        )
    return Kronecker(total_inputs / num_rows, total_outputs / num_examples)


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
                g = g * jnp.broadcast_to(values[factor], g.shape[1:]).astype(dtype)[None]
        axes = [i + 1 for i in (*use.output_rows, *use.channels)]
        g = g.transpose(0, *axes)
        channels = g.shape[1 + len(use.output_rows) :]
        g = g.reshape(g.shape[0], num_examples, -1, *channels).sum(axis=2)
        total += use.sign * jax.vmap(jax.vmap(lambda core, use=use: _to_leaf(core, use, block)))(g)
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
    rotated = []
    for use in block.uses:
        a = inputs_of(block, use, values, num_examples, dtype)
        if block.kind != "embedding":
            a = _rotate(a, basis.inputs.eigenvectors)
        g = _rotate(gradients_of(use, gradients, num_examples, dtype), basis.outputs.eigenvectors)
        rotated.append((a, g))
    if block.kind == "embedding":
        # Each position of an example counts as an example.
        total = jnp.zeros(block.matrix_shape, dtype)
        for a, g in rotated:
            squares = jnp.sum(g**2, axis=0).reshape(a.size, -1)
            total = total.at[_as_index(a.ravel(), len(total))].add(squares, mode="drop")
        return total / num_examples
    if len(rotated) == 1 and rotated[0][0].shape[1] == 1:
        ((a, g),) = rotated
        return _matmul(_rows(a**2).T, _rows(jnp.sum(g**2, axis=0))) / num_examples

    def add(total: jax.Array, example: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, None]:
        gradient = sum(_einsum("ti,sto->sio", a, g) for a, g in example)
        return total + jnp.sum(gradient**2, axis=0), None

    examples = [(a, jnp.moveaxis(g, 1, 0)) for a, g in rotated]
    total, _ = lax.scan(add, vary(jnp.zeros(block.matrix_shape, dtype)), examples)
    return total / num_examples


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
            g = jnp.moveaxis(gradients_of(use, gradients, num_examples, dtype), 1, 0)
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
    """The inverse of ``factor + damping I``, by Cholesky decomposition."""
    damping = damping.astype(factor.dtype)
    if factor.ndim == 1:
        return 1 / (factor + damping)
    identity = jnp.eye(len(factor), dtype=factor.dtype)
    # LAPACK's matrices lie column by column: transposed, which for these changes nothing, none is
    # copied. Two solves: the product of half with itself would be less accurate.
    root = lax.linalg.cholesky((factor + damping * identity).T, symmetrize_input=False)
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
) -> list[chex.ArrayTree]:
    """Results of a function of factors, each computed by one replica of an axis and sent to all.

    Matrices are assigned so that the sums of their cubed sizes are about the same on all replicas.
    (Stacking those of one size instead takes longer on a CPU, to compile and to run.)

    Args:
      function: of a factor and scalars.
      arguments: what it is called with.
      axis_name: of the replicas; None: there is one.
      vary: marks what differs between replicas.
    """
    if axis_name is None:
        return [function(*args) for args in arguments]

    def compute(*args: jax.Array) -> chex.ArrayTree:
        return vary(function(*args))

    def zeros(*args: jax.Array) -> chex.ArrayTree:
        shapes = jax.eval_shape(function, *args)
        return vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    load = [0] * lax.axis_size(axis_name)
    results: list[chex.ArrayTree] = [None] * len(arguments)
    sent: dict[int, chex.ArrayTree] = {}
    for i in sorted(range(len(arguments)), key=lambda i: -len(arguments[i][0])):
        factor = arguments[i][0]
        if factor.ndim == 1:
            results[i] = function(*arguments[i])
            continue
        owner = load.index(min(load))
        load[owner] += len(factor) ** 3
        mine = lax.axis_index(axis_name) == owner
        sent[i] = lax.cond(mine, compute, zeros, *vary(arguments[i]))
    for i, result in lax.psum(sent, axis_name).items():
        results[i] = result
    return results


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
