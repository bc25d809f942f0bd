r"""Gradients at the outputs of a network whose second moment is the curvature of the loss there.

For one example with outputs f and loss :math:`\ell` these are vectors :math:`s_c` with
:math:`E \sum_c s_c s_c^\top = \nabla_f^2 \ell`, the Fisher information of the model's predictive
distribution where the loss is its negative logarithm.  Pulled back through the network they give
the generalized Gauss-Newton matrix :math:`J^\top (\nabla_f^2 \ell) J`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._mesh_axes import filled_like
from optax_accel._random import hash_bits
from optax_accel.natural_gradient.likelihoods import Likelihood, recognize
from optax_accel.objective import Objective

Estimator = Literal["fisher", "ggn", "empirical"]
# Outputs of an example up to which a root of its loss Hessian is computed.
_MOST_OUTPUTS = 256
_Sampler = Callable[[jax.Array, Any], jax.Array]
_Draw = Callable[[_Sampler, tuple[int, ...]], jax.Array]
_Slope = Callable[[jax.Array], jax.Array]


class Samples(NamedTuple):
    """The vectors, and how much each example counts in the moments of the layers' inputs.

    Attributes:
      vectors: like the outputs, with a leading axis of samples.
      weights: ``(examples,)``, or ``(examples, *positions)`` where the loss has a weight for each
        position; only their ratios matter.
    """

    vectors: Any
    weights: jax.Array


def output_gradients(
    objective: Objective,
    outputs: chex.ArrayTree,
    estimator: Estimator,
    likelihood: Likelihood | None,
    key: chex.PRNGKey,
    step: jax.Array,
    num_examples: int,
) -> Samples:
    r"""The vectors above for every example.

    The mean over all examples (those of all replicas) of :math:`s s^\top` is the curvature of the
    loss of the whole batch, whatever weights and masks there are in the loss.  A likelihood says
    what the curvature is but for these weights, which are read off the loss: its gradient at two
    fixed points differs by the weight times a number that is known.

    Args:
      objective: of the parameters alone.
      outputs: of the network.
      estimator: ``"fisher"``: one random vector an example; ``"ggn"``: as many as an example has
        outputs, with random signs; ``"empirical"``: the gradient of the loss.
      likelihood: the distribution that the outputs parametrize; None: that which the program of the
        loss shows (``optax_accel.natural_gradient.likelihoods``), else roots of its Hessian.
      key: of the random vectors. Replicas and devices draw those of their examples.
      step: integer scalar; each step has vectors of its own.
      num_examples: the leading axis of the outputs.

    Returns:
      The vectors and the weights.

    Raises:
      ValueError: the outputs are not one array, though a likelihood is given; or an example has too
        many outputs to do without one.
    """
    leaves = jax.tree.leaves(outputs)
    dtype = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
    batch = _Batch(objective, outputs, num_examples, dtype, *_share(objective, dtype), key, step)
    if estimator == "empirical":
        return _from_gradients(batch)
    likelihood, unknown = _likelihood(objective, outputs, likelihood)
    if likelihood is None:
        return _from_loss_hessian(batch, estimator, unknown)
    return _from_likelihood(batch, estimator, likelihood)


def _likelihood(
    objective: Objective, outputs: chex.ArrayTree, given: Likelihood | None
) -> tuple[Likelihood | None, str]:
    """The likelihood, given or shown by the loss; or None, and why the loss shows none.

    Raises:
      ValueError: the loss shows another one than the given.
    """
    shown, unknown = recognize(objective, outputs)
    if given is not None and shown not in (None, given):
        raise ValueError(
            f"`likelihood` is {given!r}, but the program of the loss shows {shown!r}: leave "
            "`likelihood` out, or give the one of the loss."
        )
    return given or shown, unknown


def _share(objective: Objective, dtype: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """How much this replica counts, relative to the average one, and how much that one does."""
    weight = objective.batch_weight()
    if weight is None:
        return None, None
    average = objective.mean_of_replicas(weight).astype(dtype)
    share = weight.astype(dtype) / jnp.where(average == 0, 1, average)
    return jnp.where(average == 0, 1, share), average


class _Batch(NamedTuple):
    """The outputs for a batch, and where its random numbers come from."""

    objective: Objective
    outputs: chex.ArrayTree
    num_examples: int
    dtype: Any
    share: jax.Array | None
    average_weight: jax.Array | None
    key: chex.PRNGKey
    step: jax.Array

    def counted(self, values: jax.Array, power: float = 1.0) -> jax.Array:
        """Values times a power of the share that this replica has."""
        if self.share is None:
            return values
        used = self.share > 0  # what a replica without weight has computed may be NaN
        return jnp.where(used, (self.share**power).astype(values.dtype) * values, 0)

    def draw(self, sampler: _Sampler, shape: tuple[int, ...]) -> jax.Array:
        """Random numbers for each example, of the given shape."""
        # Hashed, not drawn one after the other: compiled several times faster.
        axis, count = self.objective.axis_name, self.num_examples
        if axis is None:
            return sampler(hash_bits(self.key, (count, *shape), self.step), self.dtype)
        bits = hash_bits(self.key, (lax.axis_size(axis) * count, *shape), self.step)
        first = lax.axis_index(axis) * count
        return sampler(lax.dynamic_slice_in_dim(bits, first, count), self.dtype)


def _from_gradients(batch: _Batch) -> Samples:
    """The gradients of the loss."""
    slopes = jax.grad(batch.objective.loss_of_outputs)(batch.outputs)
    scale: Any = batch.num_examples
    if batch.average_weight is not None:  # what counts as an example is what the loss divides by
        scale = jnp.sqrt(batch.num_examples * batch.average_weight)
    vectors = jax.tree.map(lambda g: batch.counted(jnp.asarray(scale, g.dtype) * g)[None], slopes)
    return Samples(vectors, _present(vectors, batch.num_examples, batch.dtype))


def _from_loss_hessian(batch: _Batch, estimator: Estimator, unknown: str) -> Samples:
    """Roots of the Hessian of each example's loss, or random vectors times these.

    Args:
      batch: the outputs for a batch.
      estimator: ``"fisher"`` or ``"ggn"``.
      unknown: why the loss shows no likelihood.

    Raises:
      ValueError: an example has too many outputs.
    """
    flat, restore = _flatten(batch.outputs, batch.num_examples, batch.dtype)
    _check_size(flat.shape[1], unknown, ", or take estimator='empirical'")
    root = _loss_root(batch.objective, batch.outputs, flat, restore)
    if estimator == "fisher":
        normal = batch.draw(_normal, flat.shape[1:])
        samples = jnp.einsum("nfc,nc->nf", root, normal)[None]
    else:
        samples = jnp.moveaxis(root, -1, 0)
        samples = samples * batch.draw(_sign, samples.shape[:1]).T[..., None]
    vectors = jax.vmap(restore)(batch.counted(samples, 0.5))
    return Samples(vectors, _present(vectors, batch.num_examples, batch.dtype))


def _check_size(size: int, unknown: str, alternative: str) -> None:
    """Raises if an example has too many outputs for a root of its loss Hessian."""
    if size > _MOST_OUTPUTS:
        raise ValueError(
            "the likelihood is taken from the program of the loss where that is a sum of softmax "
            "or binary cross entropies or of squared errors, with any targets, masks and weights. "
            "This loss "
            f"is not: {unknown}. Then a root of the loss Hessian of each example is taken, of at "
            f"most {_MOST_OUTPUTS} outputs; this network has {size}. Name what the outputs are, as "
            "likelihood='categorical' (logits), 'bernoulli' (logits) or 'gaussian' (means)"
            f"{alternative}."
        )


def _from_likelihood(batch: _Batch, estimator: Estimator, likelihood: Likelihood) -> Samples:
    """Roots of a known Fisher matrix, or gradients for targets that are sampled from the model."""
    slope, out = _slope(batch.objective, batch.outputs, likelihood)
    wide = out.astype(batch.dtype)
    weights = batch.counted(jnp.maximum(_WEIGHTS[likelihood](slope, wide), 0))
    scale = jnp.sqrt(batch.num_examples * weights)
    if likelihood == "categorical":
        samples = scale[None, ..., None] * _categorical(wide, estimator, batch.draw)
    else:
        samples = _independent(wide, scale, estimator, likelihood, batch.draw)
        weights = weights.mean(axis=-1) if weights.ndim > 1 else weights
    samples = samples.astype(out.dtype)
    return Samples(jax.tree.unflatten(jax.tree.structure(batch.outputs), [samples]), weights)


def _slope(
    objective: Objective, outputs: chex.ArrayTree, likelihood: Likelihood
) -> tuple[_Slope, jax.Array]:
    """The gradient of the loss as a function of the outputs, and these as one array.

    Raises:
      ValueError: they are not one array.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    if len(leaves) != 1 or leaves[0].ndim < (2 if likelihood == "categorical" else 1):
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(
            f"likelihood {likelihood!r} needs outputs that are one array with the examples along "
            "its first axis, and the classes along the last one for 'categorical'; `predict` "
            f"returns the shapes {shapes}. Return such an array; where it is several and "
            "`likelihood` was given, leave that out, and the loss decides."
        )
    (out,) = leaves

    def slope(point: jax.Array) -> jax.Array:
        point = objective.vary(filled_like(point, out))
        gradient = jax.grad(objective.loss_of_outputs)(jax.tree.unflatten(treedef, [point]))
        return jax.tree.leaves(gradient)[0]

    return slope, out


def _present(vectors: chex.ArrayTree, num_examples: int, dtype: Any) -> jax.Array:
    """1 for an example that the loss looks at, 0 for one that it leaves out."""
    seen = [
        jnp.any(jnp.moveaxis(leaf, 1, 0).reshape(num_examples, -1) != 0, axis=1)
        for leaf in jax.tree.leaves(vectors)
    ]
    return jnp.any(jnp.stack(seen), axis=0).astype(dtype)


# -- weights in the loss, from differences of its gradient --------------------------------------


def _weights_of_classes(slope: _Slope, logits: jax.Array) -> jax.Array:
    # Cross entropy with weight w has the gradient w (p - y) for any targets y: here at logits 0 and
    # where the first class has the probability 0.73.
    classes = logits.shape[-1]
    if classes == 1:
        return jnp.full(logits.shape[:-1], 1 / math.prod(logits.shape[:-1]), logits.dtype)
    first = jnp.zeros(classes, logits.dtype).at[0].set(math.log(classes - 1) + 1)
    difference = (slope(first) - slope(jnp.zeros_like(first)))[..., 0]
    return difference / (1 / (1 + math.exp(-1)) - 1 / classes)


def _weights_of_events(slope: _Slope, logits: jax.Array) -> jax.Array:
    one = jnp.ones((), logits.dtype)
    return (slope(one) - slope(-one)) / math.tanh(0.5)  # sigmoid(1) - sigmoid(-1)


def _weights_of_squares(slope: _Slope, means: jax.Array) -> jax.Array:
    # The loss is quadratic, so that points far apart do, as far as the outputs are large: the
    # targets are, too.
    far = 1 + jnp.max(jnp.abs(means))
    return (slope(far) - slope(-far)) / (2 * far)


_WEIGHTS = {
    "categorical": _weights_of_classes,
    "bernoulli": _weights_of_events,
    "gaussian": _weights_of_squares,
}


# -- random vectors -------------------------------------------------------------------------------


def _categorical(logits: jax.Array, estimator: Estimator, draw: _Draw) -> jax.Array:
    """Vectors with the second moment diag(p) - p p^T at each position."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    positions, classes = logits.shape[1:-1], logits.shape[-1]
    if estimator == "fisher":
        # The first event of Poisson processes with these rates is of each class as likely as that.
        times = -jnp.log(draw(_uniform, (*positions, classes))) / probabilities
        labels = jnp.argmin(times, axis=-1)
        return (probabilities - jax.nn.one_hot(labels, classes, dtype=logits.dtype))[None]
    # diag(p) - p p^T is the sum over classes c of p_c (e_c - p) (e_c - p)^T.
    unit = jnp.broadcast_to(jnp.eye(classes, dtype=logits.dtype), (*logits.shape, classes))
    weights = draw(_sign, (*positions, classes)) * jnp.sqrt(probabilities)
    return jnp.moveaxis(weights[..., None] * (unit - probabilities[..., None, :]), -2, 0)


def _independent(
    out: jax.Array, scale: jax.Array, estimator: Estimator, likelihood: Likelihood, draw: _Draw
) -> jax.Array:
    """Vectors whose second moment is diagonal: the variances of the targets times scale ** 2."""
    deviation = jnp.ones_like(out)
    if likelihood == "bernoulli":
        probability = jax.nn.sigmoid(out)
        deviation = jnp.sqrt(probability * (1 - probability))
    if estimator == "ggn":
        return _each_output(scale * deviation) * draw(_sign, out.shape[1:])[None]
    if likelihood == "bernoulli":
        return (scale * (probability - (draw(_uniform, out.shape[1:]) < probability)))[None]
    return (scale * draw(_normal, out.shape[1:]))[None]


def _uniform(bits: jax.Array, dtype: Any) -> jax.Array:
    """Numbers in (0, 1) from 32 random bits each."""
    return ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23


def _normal(bits: jax.Array, dtype: Any) -> jax.Array:
    return math.sqrt(2) * lax.erf_inv(2 * _uniform(bits, dtype) - 1)


def _sign(bits: jax.Array, dtype: Any) -> jax.Array:
    return 1 - 2 * (bits >> 31).astype(dtype)


def _each_output(deviation: jax.Array) -> jax.Array:
    """For each output of an example the array that holds it and else zeros."""
    shape, size = deviation.shape, math.prod(deviation.shape[1:])
    diagonal = jnp.eye(size, dtype=deviation.dtype)[:, None] * deviation.reshape(1, -1, size)
    return diagonal.reshape(size, *shape)


def _flatten(
    outputs: chex.ArrayTree, num_examples: int, dtype: Any
) -> tuple[jax.Array, Callable[[jax.Array], chex.ArrayTree]]:
    """Outputs as a matrix, a row for each example, and the inverse."""
    leaves, treedef = jax.tree.flatten(outputs)
    rows = [leaf.reshape(num_examples, -1).astype(dtype) for leaf in leaves]
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + row.shape[1])

    def restore(flat: jax.Array) -> chex.ArrayTree:
        parts = [
            flat[:, low:high].reshape(leaf.shape).astype(leaf.dtype)
            for leaf, low, high in zip(leaves, ends[:-1], ends[1:], strict=True)
        ]
        return jax.tree.unflatten(treedef, parts)

    return jnp.concatenate(rows, axis=1), restore


def _loss_root(
    objective: Objective,
    outputs: chex.ArrayTree,
    flat: jax.Array,
    restore: Callable[[jax.Array], chex.ArrayTree],
) -> jax.Array:
    r"""A root of each example's loss Hessian :math:`L L^\top`, ``(examples, outputs, outputs)``."""
    num_examples, size = flat.shape
    product = objective.loss_hessian(outputs)

    def column(unit: jax.Array) -> jax.Array:
        # An example's loss depends on its own outputs, so one product serves all examples.
        column = product(restore(jnp.broadcast_to(unit[None], flat.shape)))
        return _flatten(column, num_examples, flat.dtype)[0]

    units = objective.vary(jnp.eye(size, dtype=flat.dtype))
    hessians = num_examples * jnp.moveaxis(jax.vmap(column)(units), 0, -1)
    # Column by column instead of LAPACK's: on a CPU its batched decompositions can hang several
    # devices, and a singular matrix (of a softmax, say) has no Cholesky root.
    # The root of a rounding error is none: pivots that may be one are left out.
    error = size * jnp.finfo(flat.dtype).eps * jnp.trace(hessians, axis1=1, axis2=2)[:, None]

    def eliminate(carry: tuple[jax.Array, jax.Array], j: jax.Array) -> tuple[Any, None]:
        rest, root = carry
        diagonal = jnp.maximum(jnp.diagonal(rest, axis1=1, axis2=2), 0)
        pivot, bound = diagonal[:, j, None], jnp.sqrt(diagonal)
        entries = rest[:, :, j] / jnp.sqrt(jnp.where(pivot > error, pivot, 1))
        # A loss that is not convex has no root: what exceeds a second moment's bound is cut.
        entries = jnp.where(pivot <= error, 0, jnp.clip(entries, -bound, bound))
        rest = rest - entries[:, :, None] * entries[:, None, :]
        return (rest, root.at[:, :, j].set(entries)), None

    (_, root), _ = lax.scan(eliminate, (hessians, jnp.zeros_like(hessians)), jnp.arange(size))
    return root


# -- roots as linear functions --------------------------------------------------------------------


class LossRoot(NamedTuple):
    r"""A root R of the Hessian of the loss at the outputs, :math:`R R^\top = \nabla_f^2 \ell`.

    Attributes:
      times: R times a vector, an array ``(examples, outputs)``; the result is like the outputs.
      transposed: R transposed times a vector like the outputs.
      solve: the z with R z = u, for u in the range of R; otherwise a z that comes close.
    """

    times: Callable[[jax.Array], chex.ArrayTree]
    transposed: Callable[[chex.ArrayTree], jax.Array]
    solve: Callable[[chex.ArrayTree], jax.Array]


def loss_root(
    objective: Objective, outputs: chex.ArrayTree, likelihood: Likelihood | None, num_examples: int
) -> LossRoot:
    """The root, of this replica's loss.

    Args:
      objective: of the parameters alone.
      outputs: of the network.
      likelihood: the distribution that the outputs parametrize; None: that which the program of the
        loss shows, else roots of its Hessian for each example.
      num_examples: the leading axis of the outputs.

    Raises:
      ValueError: the outputs are not one array, though a likelihood is given; or the loss shows no
        likelihood, and an example has too many outputs to do without one.
    """
    likelihood, unknown = _likelihood(objective, outputs, likelihood)
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(outputs)), jnp.float32)
    flat, restore = _flatten(outputs, num_examples, dtype)

    def flatten(tree: chex.ArrayTree) -> jax.Array:
        return _flatten(tree, num_examples, dtype)[0]

    if likelihood is None:
        _check_size(flat.shape[1], unknown, "")
        root = _loss_root(objective, outputs, flat, restore) / math.sqrt(num_examples)
        return LossRoot(
            lambda y: restore(jnp.einsum("nfc,nc->nf", root, y)),
            lambda tree: jnp.einsum("nfc,nf->nc", root, flatten(tree)),
            lambda tree: _substituted(root, flatten(tree)),
        )
    slope, out = _slope(objective, outputs, likelihood)
    wide = out.astype(dtype)
    weights = jnp.sqrt(jnp.maximum(_WEIGHTS[likelihood](slope, wide), 0))
    # What is smaller than this next to the largest curvature is rounding.
    least = jnp.finfo(dtype).eps * jnp.max(weights)

    def over(scale: jax.Array, tree: chex.ArrayTree) -> jax.Array:
        used = scale > least
        return jnp.where(used, flatten(tree) / jnp.where(used, scale, 1), 0)

    if likelihood != "categorical":
        scale = jnp.ones_like(wide)
        if likelihood == "bernoulli":
            scale = jnp.sqrt(jax.nn.sigmoid(wide) * jax.nn.sigmoid(-wide))
        scale = (weights * scale).reshape(flat.shape)
        return LossRoot(
            lambda y: restore(scale * y),
            lambda tree: scale * flatten(tree),
            lambda tree: over(scale, tree),
        )
    # diag(p) - p p^T = R R^T with R = diag(sqrt(p)) - p sqrt(p)^T.
    logs, weights = jax.nn.log_softmax(wide, axis=-1), weights[..., None]
    p, root_p = jnp.exp(logs), jnp.exp(logs / 2)

    def times(y: jax.Array) -> chex.ArrayTree:
        y = y.reshape(wide.shape)
        along = jnp.sum(root_p * y, axis=-1, keepdims=True)
        return restore((weights * (root_p * y - p * along)).reshape(flat.shape))

    def transposed(tree: chex.ArrayTree) -> jax.Array:
        tangent = flatten(tree).reshape(wide.shape)
        mean = jnp.sum(p * tangent, axis=-1, keepdims=True)
        return (weights * root_p * (tangent - mean)).reshape(flat.shape)

    def solve(tree: chex.ArrayTree) -> jax.Array:
        # The gradient of a cross entropy sums to 0 over the classes, so that p drops out.
        return over((weights * root_p).reshape(flat.shape), tree)

    return LossRoot(times, transposed, solve)


def _substituted(root: jax.Array, right: jax.Array) -> jax.Array:
    """Solutions of lower triangular systems, 0 where a pivot was left out."""

    def eliminate(rest: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        pivot = root[:, j, j]
        value = jnp.where(pivot > 0, rest[:, j] / jnp.where(pivot > 0, pivot, 1), 0)
        return rest - root[:, :, j] * value[:, None], value

    _, values = lax.scan(eliminate, right, jnp.arange(right.shape[1]))
    return values.T
