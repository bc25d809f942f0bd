"""The Hessian of a loss and its two parts, Gauss-Newton and functional Hessian, as operators."""

from __future__ import annotations

from typing import Any

import chex

from optax_accel._derivatives import LinearFunction
from optax_accel._masking import Mask
from optax_accel.curvature.operators import Batch, Batches, CurvatureOperator, build
from optax_accel.objective import Objective


def hessian(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    batches: Batches | None = None,
    where: Mask = None,
    **batch: Any,
) -> CurvatureOperator:
    """The Hessian of the loss.

    Args:
      objective: the loss; products are differentiated by its ``hvp_mode``.
      params: the parameters at which the curvature is taken.
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
      TypeError: ``objective`` is not an Objective, an argument that it needs is missing,
        ``batches`` is not a re-iterable of dicts, or a parameter is not real.
      ValueError: both ``batches`` and a batch were given, or the data is empty.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective(lambda w, x: x @ w, lambda out, y: jnp.mean((out - y) ** 2) / 2)
      >>> x, y, w = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.zeros(2), jnp.ones(2)
      >>> curvature.hessian(objective, w, x=x, y=y).dense().tolist()
      [[1.0, 1.0], [1.0, 2.0]]
      >>> data = [{"x": x[:1], "y": y[:1]}, {"x": x[1:], "y": y[1:]}]
      >>> curvature.hessian(objective, w, batches=data).dense().tolist()
      [[1.0, 1.0], [1.0, 2.0]]
    """
    return build("hessian", _hessian, objective, params, batches, where, batch)


def gauss_newton(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    batches: Batches | None = None,
    where: Mask = None,
    **batch: Any,
) -> CurvatureOperator:
    """The generalized Gauss-Newton matrix of the loss, positive semidefinite for convex losses.

    Args:
      objective: the loss, built from ``predict`` and ``loss``.
      params: the parameters at which the curvature is taken.
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
      ValueError: the objective was built from a value function, both ``batches`` and a batch were
        given, or the data is empty.
      TypeError: ``objective`` is not an Objective, an argument that it needs is missing,
        ``batches`` is not a re-iterable of dicts, or a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
      >>> curvature.gauss_newton(objective, jnp.array([2.0, 3.0])).dense().tolist()
      [[9.0, 6.0], [6.0, 4.0]]

    References:
      Schraudolph, `Fast curvature matrix-vector products
      <https://doi.org/10.1162/08997660260028683>`_, 2002.
    """
    return build(
        "gauss_newton",
        _gauss_newton,
        objective,
        params,
        batches,
        where,
        batch,
        needs_outputs=True,
    )


def functional_hessian(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    batches: Batches | None = None,
    where: Mask = None,
    **batch: Any,
) -> CurvatureOperator:
    """The functional Hessian, ``hessian - gauss_newton``: the curvature of the network itself.

    A product costs what one of the Hessian does.

    Args:
      objective: the loss, built from ``predict`` and ``loss``.
      params: the parameters at which the curvature is taken.
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
      ValueError: the objective was built from a value function, both ``batches`` and a batch were
        given, or the data is empty.
      TypeError: ``objective`` is not an Objective, an argument that it needs is missing,
        ``batches`` is not a re-iterable of dicts, or a parameter is not real.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> from optax_accel import curvature
      >>> objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
      >>> curvature.functional_hessian(objective, jnp.array([2.0, 3.0])).dense().tolist()
      [[0.0, 1.0], [1.0, 0.0]]

    References:
      Singh, Bachmann, Hofmann, `Analytic insights into structure and rank of neural network Hessian
      maps <https://arxiv.org/abs/2106.16225>`_, 2021.
    """
    return build(
        "functional_hessian",
        _functional_hessian,
        objective,
        params,
        batches,
        where,
        batch,
        needs_outputs=True,
    )


def _hessian(objective: Objective, params: chex.ArrayTree, batch: Batch) -> LinearFunction:
    return objective.hessian(params, **batch)


def _gauss_newton(objective: Objective, params: chex.ArrayTree, batch: Batch) -> LinearFunction:
    return objective.gauss_newton(params, **batch)


def _functional_hessian(
    objective: Objective, params: chex.ArrayTree, batch: Batch
) -> LinearFunction:
    return objective.functional_hessian(params, **batch)
