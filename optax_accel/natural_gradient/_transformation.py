"""The transformation that K-FAC and EKFAC share, and the optimizers made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import check_number, is_placeholder, known_integer, value_of
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, with_fixed_leaves
from optax_accel._mesh_axes import with_auto_axes
from optax_accel._numerics import max_norm, total
from optax_accel._random import as_key
from optax_accel.hyperparams import with_schedules
from optax_accel.natural_gradient import factors as stats
from optax_accel.natural_gradient.finding import warn_of_diagonals
from optax_accel.natural_gradient.inverses import (
    Eigen,
    apply_in_basis,
    apply_inverses,
    kronecker_eigenvalues,
)
from optax_accel.natural_gradient.layers import Block
from optax_accel.natural_gradient.levenberg_marquardt import LevenbergMarquardt, TrustRegion
from optax_accel.natural_gradient.options import Options
from optax_accel.natural_gradient.quadratic_model import (
    Damping,
    Exact,
    check_damping,
    check_rate,
    quadratic_model,
)
from optax_accel.natural_gradient.refreshing import measure, update_curvature
from optax_accel.natural_gradient.state import ScaleByKFACState, corrected, initial_state
from optax_accel.refresh import Cost, RefreshLike, announce_cost, announce_factors, of_factors


def transformation(options: Options) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverse of a curvature matrix with a block for each layer."""
    key = as_key(options.key)
    # Remembered, because every trace of a step asks again; it depends on nothing else. So what it
    # warns of is said once.
    find_blocks = functools.cache(functools.partial(_find_blocks, options))

    def init_fn(params: chex.ArrayTree) -> ScaleByKFACState:
        announce_factors(options.factors_every, options.inverses_every)
        announce_cost(
            Cost(
                f"a forward pass and the backward passes of the estimator {options.estimator!r} "
                f"every {_steps(options.factors_every)}, inverses every "
                f"{_steps(options.inverses_every)}"
            )
        )
        if is_placeholder(params):
            # Nothing in the state is like the parameters: the factors are like the layers. Which
            # these are, a placeholder does not tell; a leaf stands for all of them.
            leaf: Any = jnp.zeros(())
            empty = initial_state(options, key, (), ())
            return empty._replace(factors=leaf, inverses=leaf, moments=leaf)
        check_params(params, options.method)
        check_selected(params, options.mask, options.method)
        treedef, leaves = _structure(params)
        blocks = find_blocks(treedef, leaves)
        return initial_state(options, key, blocks, [dtype for _, dtype in leaves])

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByKFACState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        refresh: RefreshLike = None,
        damping: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByKFACState]:
        due = of_factors(refresh)
        check_params(params, options.method, "tx.update(grads, state, params, value_fn=objective)")
        treedef, leaves = _structure(params)
        blocks, count = find_blocks(treedef, leaves), state.count
        _check_factors(options, state, blocks, [dtype for _, dtype in leaves])
        if damping is None:
            damping = value_of(options.damping, count)

        def refreshed(state: ScaleByKFACState, invert: bool | jax.Array) -> ScaleByKFACState:
            apart = curvature_value_fn is not None
            objective = as_objective(
                curvature_value_fn if apart else value_fn,
                extra_args,
                method=options.method,
                params=params,
                why="measure the curvature at its outputs",
                argument="curvature_value_fn" if apart else "value_fn",
                needs_outputs=True,
            )
            batch = measure(options, state, objective, params, blocks)

            def update(state: ScaleByKFACState, arrays: Any, damping: Any, invert: Any) -> Any:
                return update_curvature(options, state, batch.with_arrays(arrays), damping, invert)

            if isinstance(invert, bool):
                return with_auto_axes(
                    functools.partial(update, invert=invert), state, batch.arrays, damping
                )
            return with_auto_axes(update, state, batch.arrays, damping, invert)

        if due is None:
            state = _refresh_when_due(options, state, refreshed)
        elif due:
            state = refreshed(state, due == "inverses")
        bound = None
        if options.norm_constraint is not None:
            bound = value_of(options.norm_constraint, count)
        # Integers and keys that are masked out may have no update at all, None.
        gradient = treedef.flatten_up_to(updates)
        arguments = gradient, jax.tree.leaves(params), state, damping, bound
        new, scale = with_auto_axes(
            functools.partial(_precondition, blocks), *arguments, out_like=(gradient, None)
        )
        state = state._replace(count=optax.safe_increment(count), step_scale=scale)
        return jax.tree.unflatten(treedef, new), state

    update_fn.__qualname__ = f"{options.method}.<locals>.update_fn"  # what `describe` calls it
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _steps(number: Any) -> str:
    known = known_integer(number)  # None for an array that `optax.inject_hyperparams` made in `jit`
    if known is None:
        return "given number of steps"
    return "step" if known == 1 else f"{known} steps"


def _structure(params: chex.ArrayTree) -> tuple[Any, tuple[tuple[Any, Any], ...]]:
    """What layers depend on: the structure of the parameters, their shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _check_factors(
    options: Options, state: ScaleByKFACState, blocks: tuple[Block, ...], dtypes: Sequence[Any]
) -> None:
    """Raises if the factors are those of a network with other parameters."""
    if known_integer(options.max_size) is None:  # Optax's injection made an array of it
        return
    new = jax.eval_shape(lambda: initial_state(options, as_key(0), blocks, dtypes).factors)
    kept, needed = ([leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state.factors, new))
    if kept != needed:
        raise ValueError(
            f"{options.method}: these are not the parameters that `init` was called with. Its "
            f"factors have the shapes {kept}, these parameters need {needed}. After a change of "
            "the network call `init` again."
        )


def _find_blocks(
    options: Options, treedef: Any, leaves: Sequence[tuple[Any, Any]]
) -> tuple[Block, ...]:
    abstract = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    blocks = options.find(options.objective, abstract, options.example).blocks
    warn_of_diagonals(options.method, blocks)
    return blocks


def _refresh_when_due(
    options: Options,
    state: ScaleByKFACState,
    refreshed: Callable[[ScaleByKFACState, bool | jax.Array], ScaleByKFACState],
) -> ScaleByKFACState:
    """A refresh that is decided on in the graph."""
    factors_every, inverses_every = options.factors_every, options.inverses_every
    periods = known_integer(factors_every), known_integer(inverses_every)
    together = None not in periods and periods[0] == periods[1]
    invert = together or state.count % inverses_every == 0
    if periods[0] == 1:
        return refreshed(state, invert)
    return lax.cond(
        state.count % factors_every == 0,
        lambda state: refreshed(state, invert),
        lambda state: state,
        state,
    )


def _precondition(
    blocks: tuple[Block, ...],
    leaves: list[Any],
    params: list[Any],
    state: ScaleByKFACState,
    damping: Any,
    bound: Any,
) -> tuple[list[Any], jax.Array]:
    """The natural gradient and what it was multiplied by to keep its norm within bounds."""
    new = dict[int, jax.Array]()
    products = list[jax.Array]()
    for block, factors, inverses, moments in zip(
        blocks, state.factors, state.inverses, state.moments, strict=True
    ):
        dtype = jax.tree.leaves(factors)[0].dtype
        strength = jnp.asarray(damping, dtype)
        wide = {i: jnp.asarray(leaves[i], dtype) for i in block.leaves}
        if not block.kronecker:
            (i,) = block.leaves
            new[i] = wide[i] / (corrected(factors, state.factor_weight, 1) + strength)
            products.append(jnp.sum(new[i] * wide[i]))
            continue
        gradient, each = block.to_matrix(wide, params), stats.on_slices(block)
        if isinstance(inverses.inputs, Eigen):
            values = each(kronecker_eigenvalues)(inverses)
            if moments is not None:
                values = corrected(moments, state.factor_weight, 1)
            result = each(functools.partial(apply_in_basis, damping=strength))(
                inverses, values, gradient=gradient
            )
        else:
            result = each(apply_inverses)(inverses, gradient)
        products.append(jnp.sum(result * gradient))
        new.update(zip(block.leaves, block.from_matrix(result, params), strict=True))
    scale = jnp.ones((), jnp.float32)
    if bound is not None:
        product = total(products)
        ratio = bound / jnp.where(product > 0, product, 1)
        scale = jnp.where(product > 0, jnp.minimum(1, jnp.sqrt(ratio)), 1).astype(jnp.float32)
        new = {i: scale.astype(leaf.dtype) * leaf for i, leaf in new.items()}
    for i, leaf in new.items():
        new[i] = leaf.astype(jnp.result_type(leaves[i]))
    return [new.get(i, leaf) for i, leaf in enumerate(leaves)], scale


# -- the optimizers -------------------------------------------------------------------------------


def kl_bound(
    kl_clip: Any, learning_rate: optax.ScalarOrSchedule | Exact
) -> optax.ScalarOrSchedule | None:
    """The ``norm_constraint`` of a KL clip at a learning rate; None at an exact one."""
    check_rate("learning_rate", learning_rate)
    if kl_clip is None:
        return None
    check_number("kl_clip", kl_clip, 0, open_low=True)
    if isinstance(learning_rate, str):
        return None
    return lambda count: kl_clip / jnp.asarray(value_of(learning_rate, count)) ** 2


def initial_damping(damping: Damping) -> optax.ScalarOrSchedule:
    """The damping before it adapts, if it does."""
    check_damping(damping)
    return damping.initial if isinstance(damping, LevenbergMarquardt) else damping


def with_momentum(
    preconditioner: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule | Exact,
    momentum: Any,
    mask: Mask,
    *,
    damping: Damping,
    trust_region: TrustRegion | None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation followed by momentum and the learning rate, given or of the model."""
    if momentum is None:
        momentum = "exact" if isinstance(learning_rate, str) else 0.9
    check_rate("momentum", momentum, 1)
    adapts = isinstance(damping, LevenbergMarquardt) or trust_region is not None
    if adapts or isinstance(learning_rate, str) or isinstance(momentum, str):
        return quadratic_model(
            preconditioner,
            learning_rate,
            momentum,
            damping=damping,
            trust_region=trust_region,
            mask=mask,
        )
    # A decay of 0 keeps what is not finite: 0 times NaN is NaN.
    static = isinstance(momentum, int | float) and momentum == 0
    if callable(momentum):
        average = with_schedules(_trace, decay=momentum)()
    else:
        average = optax.identity() if static else _trace(momentum)
    return optax.chain(
        preconditioner,
        with_fixed_leaves(lambda _: average, mask),
        with_fixed_leaves(lambda _: optax.scale_by_learning_rate(learning_rate), mask),
    )


def _trace(decay: Any) -> optax.GradientTransformation:
    """``optax.trace``, which sums only updates that are finite, but lets the others through."""
    init_fn, add = optax.trace(decay)

    def update_fn(
        updates: chex.ArrayTree, state: optax.OptState, params: chex.ArrayTree | None = None
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        updates, new = add(updates, state, params)
        finite = jnp.isfinite(max_norm(updates))
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    return optax.GradientTransformation(init_fn, update_fn)
