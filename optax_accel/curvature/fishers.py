"""Fisher matrices as operators: exact, empirical, and the covariance of the gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from optax_accel._arguments import check_choice
from optax_accel._derivatives import LinearFunction, congruence, jacobian_of
from optax_accel._masking import Mask
from optax_accel._means import fixed_if_unused, shares_of, weighted
from optax_accel.curvature import blocks
from optax_accel.curvature.operators import Batch, Batches, CurvatureOperator, build, has_axis
from optax_accel.objective import Objective


def fisher(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    likelihood: Literal["categorical", "gaussian"] = "categorical",
    batches: Batches | None = None,
    where: Mask = None,
    **batch: Any,
) -> CurvatureOperator:
    """The Fisher information of the model's predictive distribution, exact: nothing is sampled.

    It equals the Gauss-Newton matrix of the mean negative log-likelihood, whatever loss the
    objective has; only the outputs of the objective are used, and all examples count alike. Where
    the objective declares a ``weight``, its loss must be the weighted mean of that negative
    log-likelihood (up to a factor), and examples, or positions, count as they do in the loss: those
    under a mask not at all.

    Args:
      objective: the loss, built from ``predict`` and ``loss``; ``predict`` returns one array.
      params: the parameters at which the curvature is taken.
      likelihood: ``"categorical"`` (default): outputs are logits ``(..., classes)``, and the mean
        is over all axes but the last. ``"gaussian"``: outputs are means of unit-variance Gaussians
        (half the squared error, summed over outputs), and the mean is over the leading axis; an
        output of shape ``()`` is one example.
      batches: data in batches, a re-iterable of dicts of keyword arguments of the objective; their
        leaves' leading axis counts examples, and the last batch may be smaller.
      where: the leaves that the operator acts on, the others being held fixed: a pytree of booleans
        like the parameters (or a prefix of it), or a function of them that returns one; ``None``
        (default): all.
      **batch: one batch in memory instead of ``batches``: the keyword arguments of the objective.
        Neither is needed if the objective holds its data.

    Returns:
      The operator.

    Raises:
      ValueError: the likelihood is unknown, the outputs do not suit it, the objective was built
        from a value function, both ``batches`` and a batch were given, or the data is empty.
      TypeError: ``objective`` is not an Objective, an argument that it needs is missing,
        ``batches`` is not a re-iterable of dicts, or a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective(predict=lambda w, x: x @ w, loss=jnp.mean)
      >>> w, x = jnp.zeros((1, 2)), jnp.ones((5, 1))  # two classes, equally likely
      >>> curvature.fisher(objective, w, x=x).dense().tolist()
      [[0.25, -0.25], [-0.25, 0.25]]

    References:
      Martens, `New insights and perspectives on the natural gradient method
      <https://arxiv.org/abs/1412.1193>`_, 2020, sections 5 and 9.
    """
    check_choice("likelihood", likelihood, ("categorical", "gaussian"))
    linearize = functools.partial(_fisher, likelihood)
    return build(
        f"fisher, {likelihood}",
        linearize,
        objective,
        params,
        batches,
        where,
        batch,
        needs_outputs=True,
    )


def empirical_fisher(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    batches: Batches | None = None,
    where: Mask = None,
    **batch: Any,
) -> CurvatureOperator:
    """The empirical Fisher matrix: the second moment of the per-example gradients.

    The per-example losses are the objective's, on batches of one example: every keyword argument's
    leaves are cut along their leading axis (leaves without axes are shared by all examples). A
    model whose examples see each other, as in batch normalization in training mode, has no
    per-example losses in this sense.

    Args:
      objective: the loss; for a batch the mean over its examples.
      params: the parameters at which the curvature is taken.
      batches: data in batches, a re-iterable of dicts of keyword arguments of the objective; their
        leaves' leading axis counts examples, and the last batch may be smaller.
      where: the leaves that the operator acts on, the others being held fixed: a pytree of booleans
        like the parameters (or a prefix of it), or a function of them that returns one; ``None``
        (default): all.
      **batch: one batch in memory instead of ``batches``: the keyword arguments of the objective.
        One of the two is needed, because an objective that holds its data cannot be cut into
        examples.

    Returns:
      The operator.

    Raises:
      ValueError: there is no data, the leading axes of its leaves differ, or both ``batches`` and a
        batch were given.
      TypeError: ``objective`` is not an Objective, an argument that it needs is missing,
        ``batches`` is not a re-iterable of dicts, or a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective.from_value_fn(lambda w, x: jnp.mean(x @ w))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])  # the per-example gradients
      >>> curvature.empirical_fisher(objective, jnp.zeros(2), x=x).dense().tolist()
      [[1.0, 1.0], [1.0, 2.0]]

    References:
      Kunstner, Balles, Hennig, `Limitations of the empirical Fisher approximation
      <https://arxiv.org/abs/1905.12558>`_, 2019.
    """
    return build(
        "empirical_fisher",
        _gradient_moment,
        objective,
        params,
        batches,
        where,
        batch,
        per_example=True,
    )


def gradient_covariance(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    batches: Batches | None = None,
    where: Mask = None,
    **batch: Any,
) -> CurvatureOperator:
    """The covariance of the per-example gradients: the empirical Fisher matrix, centred.

    The mean gradient is that of the whole data; with ``batches`` it takes one more pass, made when
    the operator is built.

    Args:
      objective: the loss; for a batch the mean over its examples.
      params: the parameters at which the curvature is taken.
      batches: data in batches, a re-iterable of dicts of keyword arguments of the objective; their
        leaves' leading axis counts examples, and the last batch may be smaller.
      where: the leaves that the operator acts on, the others being held fixed: a pytree of booleans
        like the parameters (or a prefix of it), or a function of them that returns one; ``None``
        (default): all.
      **batch: one batch in memory instead of ``batches``: the keyword arguments of the objective.
        One of the two is needed, because an objective that holds its data cannot be cut into
        examples.

    Returns:
      The operator.

    Raises:
      ValueError: there is no data, the leading axes of its leaves differ, or both ``batches`` and a
        batch were given.
      TypeError: ``objective`` is not an Objective, an argument that it needs is missing,
        ``batches`` is not a re-iterable of dicts, or a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective.from_value_fn(lambda w, x: jnp.mean(x @ w))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> curvature.gradient_covariance(objective, jnp.zeros(2), x=x).dense().tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    return build(
        "gradient_covariance",
        _gradient_moment,
        objective,
        params,
        batches,
        where,
        batch,
        per_example=True,
        centred=True,
    )


def _fisher(
    likelihood: str, objective: Objective, params: chex.ArrayTree, batch: Batch
) -> LinearFunction:
    outputs, push, pull = objective.jacobian(params, **batch)
    if not isinstance(outputs, jax.Array) or (likelihood == "categorical" and not outputs.ndim):
        need = "one array of logits (..., classes)" if likelihood == "categorical" else "one array"
        got = jax.tree.map(jnp.shape, outputs)
        raise ValueError(f"fisher: `predict` must return {need}, got the shapes {got}.")
    if likelihood == "categorical":
        information = Partial(_categorical_information, jax.nn.softmax(outputs, axis=-1))
    else:
        information = Partial(_gaussian_information)
    shares = _shares_in_loss(objective, outputs, information, batch)
    middle = Partial(_mean_information, information, shares)
    params = objective.vary(params)
    return objective.mean_product(Partial(congruence, push, middle, pull), params, **batch)


def _categorical_information(probabilities: jax.Array, tangent: jax.Array) -> jax.Array:
    mean = jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
    return probabilities * (tangent - mean)


def _gaussian_information(tangent: jax.Array) -> jax.Array:
    return tangent


def _mean_information(
    information: LinearFunction, shares: jax.Array, tangent: jax.Array
) -> jax.Array:
    return shares * information(tangent)


def _shares_in_loss(
    objective: Objective, outputs: jax.Array, information: Partial, batch: Batch
) -> jax.Array:
    """The share of each position in the mean: like the outputs, or with a last axis of length 1.

    The shares are equal, unless the objective declares a weight. Then its loss is a weighted mean
    of negative log-likelihoods, so its Hessian at a position is a multiple of the Fisher
    information there, and one product with each gives the factor. The weights are the same for all
    outputs, so they are taken at outputs of 0, where the information is not lost in rounding as it
    is where the network is sure of a class.
    """
    axes: tuple[int, ...]
    if information.func is _categorical_information:
        number = outputs.size // outputs.shape[-1]
        information = Partial(
            _categorical_information, jnp.full_like(outputs, 1 / outputs.shape[-1])
        )
        probe = jnp.zeros_like(outputs).at[..., 0].set(1)
        total, axes = 1.0, (-1,)
    else:
        number = outputs.shape[0] if outputs.ndim else 1
        probe = jnp.ones_like(outputs)
        total, axes = outputs.size / number, ()  # a mean over examples of sums over outputs
    if not objective.has_weight:
        return jnp.full((1,) * outputs.ndim, 1 / number, outputs.dtype)
    product = objective.loss_hessian(objective.vary(jnp.zeros_like(outputs)), **batch)
    bent = jnp.sum(probe * product(probe), axes, keepdims=True)
    known = jnp.sum(probe * information(probe), axes, keepdims=True)
    ratio = jnp.where(known > 0, bent / jnp.where(known > 0, known, 1), 0)
    everything = jnp.sum(ratio)
    return jnp.where(everything > 0, total * ratio / jnp.where(everything > 0, everything, 1), 0)


def _gradient_moment(
    objective: Objective, params: chex.ArrayTree, batch: Batch, mean_gradient: chex.ArrayTree = None
) -> LinearFunction:
    params = objective.vary(params)

    def of_each(function: Callable[..., Any], batch: Batch) -> Any:
        leaves, treedef = jax.tree.flatten(batch)

        def one(example: dict[int, jax.Array]) -> Any:
            parts = [example.get(i, leaf) for i, leaf in enumerate(leaves)]
            return function(jax.tree.unflatten(treedef, parts))

        return jax.vmap(one)({i: leaf[:, None] for i, leaf in enumerate(leaves) if has_axis(leaf)})

    def losses(p: chex.ArrayTree, batch: Batch) -> jax.Array:
        def one(example: dict[str, Any]) -> jax.Array:
            # An example of weight 0 has no derivative, even where its loss is 0 / 0.
            fixed = fixed_if_unused(p, objective.batch_weight(**example))
            return objective.local(fixed, **example)

        return of_each(one, batch)

    weights = of_each(lambda example: objective.batch_weight(**example), batch)
    _, push, pull = jacobian_of(objective.hvp_mode, losses, params, batch)
    product = Partial(_second_moment, push, pull, mean_gradient, weights)
    return objective.mean_product(product, params, **batch)


def _second_moment(
    push: LinearFunction,
    pull: LinearFunction,
    mean_gradient: chex.ArrayTree,
    weights: jax.Array | None,
    vector: chex.ArrayTree,
) -> chex.ArrayTree:
    slopes = push(vector)  # the per-example gradients times the vector, (examples,)
    if mean_gradient is not None:
        mean = blocks.inner(blocks.as_block(mean_gradient), blocks.as_block(vector))[0]
        slopes = slopes - mean.astype(slopes.dtype)
    if weights is None:
        slopes = slopes / slopes.size
    else:
        shares = shares_of(weights, jnp.sum(weights), slopes.size)
        slopes = weighted(shares, slopes).astype(slopes.dtype)
    return pull(slopes)
