"""Subspaces in the metric of an optimizer's diagonal preconditioner.

An optimizer that divides its step by a diagonal D descends as plain SGD does in the coordinates
z = D^(1/2) theta: there its step is D^(1/2) times the update, the gradient D^(-1/2) g, and the
Hessian D^(-1/2) H D^(-1/2).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import shown
from optax_accel._extra_args import check_params
from optax_accel.curvature import Preconditioner
from optax_accel.objective import Objective

Metric = Literal["euclidean", "preconditioned"]


class Roots(NamedTuple):
    """Between parameters and the coordinates in which a preconditioned step is a plain one.

    Attributes:
      roots: ``D^(1/2)`` of the preconditioner's diagonal D; 0 where that is infinite.
      inverses: ``D^(-1/2)``.
    """

    roots: chex.ArrayTree
    inverses: chex.ArrayTree

    @classmethod
    def of(cls, diagonal: chex.ArrayTree) -> Roots:
        def root(d: Any) -> jax.Array:
            d = jnp.asarray(d)
            d = d.astype(jnp.promote_types(d.dtype, jnp.float32))
            return jnp.where(jnp.isfinite(d), jnp.sqrt(d), 0)

        roots = jax.tree.map(root, diagonal)
        inverses = jax.tree.map(lambda r: jnp.where(r > 0, 1 / jnp.where(r > 0, r, 1), 0), roots)
        return cls(roots, inverses)

    def change(
        self,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        is_update: bool,
    ) -> tuple[Objective | None, chex.ArrayTree, chex.ArrayTree]:
        """What a tracker is given in the other coordinates, with the parameters as the origin."""

        def moved(step: chex.ArrayTree) -> chex.ArrayTree:
            steps = scaled(step, self.inverses)
            return jax.tree.map(lambda p, s: p + s, params, steps)

        if objective is not None:
            objective = objective.precompose(moved)
        # A gradient and a step change in opposite ways.
        gradient = scaled(gradient, self.roots if is_update else self.inverses)
        return objective, jax.tree.map(jnp.zeros_like, params), gradient


def scaled(tree: chex.ArrayTree, factors: chex.ArrayTree) -> chex.ArrayTree:
    """The product entry by entry, in the dtypes of the tree."""

    def leaf(x: jax.Array, factor: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, factor.dtype)
        return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)

    return jax.tree.map(leaf, tree, factors)


def check_metric(metric: Metric, preconditioner: Preconditioner | None) -> None:
    """Raises if a metric and a preconditioner do not go together."""
    if (metric == "preconditioned") != (preconditioner is not None):
        raise ValueError(
            '`metric="preconditioned"` and `preconditioner` go together: give both, such as '
            "preconditioner=optax_accel.curvature.adam_preconditioner() for base=optax.adam, or "
            f"none of them; got metric={metric!r} and preconditioner={shown(preconditioner)}."
        )
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        raise TypeError(
            "`preconditioner` must be a Preconditioner, such as "
            "optax_accel.curvature.adam_preconditioner(), got "
            f"{getattr(preconditioner, '__name__', shown(preconditioner))}."
        )


def chain_in_metric(
    base: optax.GradientTransformation,
    projection: optax.GradientTransformationExtraArgs,
    preconditioner: Preconditioner,
) -> optax.GradientTransformationExtraArgs:
    """The chain of both, in which the projection is told the preconditioner of the base's step."""
    base = optax.with_extra_args_support(base)
    call = "tx.update(grads, state, params, value_fn=objective)"

    def init_fn(params: chex.ArrayTree) -> optax.OptState:
        return base.init(params), projection.init(params)

    def update_fn(
        updates: chex.ArrayTree,
        state: optax.OptState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        check_params(params, "a projection in the metric of a preconditioner", call)
        updates, base_state = base.update(updates, state[0], params, **extra_args)
        diagonal = preconditioner.diagonal(base_state, params)
        updates, projection_state = projection.update(
            updates, state[1], params, preconditioner_diagonal=diagonal, **extra_args
        )
        return updates, (base_state, projection_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
