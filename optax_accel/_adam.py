"""Adam for methods that change one thing in it, safe in every precision."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import check_floating_leaves


def scale_by_adam(
    method: str,
    b1: Any,
    b2: Any,
    eps: Any,
    *,
    b1_decay: Any = 1.0,
    bias_offset: Any = 0,
    eps_before_correction: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, bit for bit in float32, with the changes that our methods need.

    Second moments are kept, and divided by, in at least float32: in float16 ``eps`` and the squares
    of small gradients are zero.  Where a denominator is zero the update is zero.

    Args:
      method: the name that errors carry.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      b1_decay: the first moment decays by ``b1 * b1_decay ** t`` at the zero-based step t.
      bias_offset: added to the exponents of the bias corrections.
      eps_before_correction: adds ``eps`` to the root before the bias correction.
      mu_dtype: dtype of the first moment; None means that of the parameters.
    """

    def init_fn(params: chex.ArrayTree) -> optax.ScaleByAdamState:
        check_floating_leaves(params, method)
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=zeros_for_squares(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: optax.ScaleByAdamState,
        params: chex.ArrayTree | None = None,
    ) -> tuple[chex.ArrayTree, optax.ScaleByAdamState]:
        del params
        constant = not isinstance(b1_decay, jax.Array) and b1_decay == 1
        count = optax.safe_increment(state.count)
        step_b1 = b1 if constant else b1 * b1_decay**state.count
        mu = optax.tree.update_moment(updates, state.mu, step_b1, 1)
        nu = second_moment(updates, state.nu, b2)
        mu_hat = optax.tree.bias_correction(mu, b1, count + bias_offset)
        nu_hat = optax.tree.bias_correction(nu, b2, count + bias_offset)
        shift = eps
        if eps_before_correction:
            # The widest float: an integer count would make a 32-bit one even in x64 mode.
            t = (count + bias_offset).astype(jnp.result_type(float))
            shift = eps / jnp.sqrt(1 - b2**t)
        new_updates = jax.tree.map(
            lambda m, v, g: divide(m, jnp.sqrt(v) + shift).astype(g.dtype), mu_hat, nu_hat, updates
        )
        return new_updates, optax.ScaleByAdamState(
            count=count,
            mu=optax.tree.cast_like(mu, state.mu),
            nu=optax.tree.cast_like(nu, state.nu),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def zeros_for_squares(params: chex.ArrayTree) -> chex.ArrayTree:
    """Zeros for the squared moduli of gradients: real, at least float32."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.finfo(_wide(p)).dtype), params)


def second_moment(updates: chex.ArrayTree, moment: chex.ArrayTree, decay: Any) -> chex.ArrayTree:
    """The running mean of squared moduli, squared in at least float32."""
    wide = jax.tree.map(lambda g: jnp.asarray(g, _wide(g)), updates)
    return optax.tree.update_moment_per_elem_norm(wide, moment, decay, 2)


def squared_modulus(gradient: jax.Array) -> jax.Array:
    """The squares of the absolute values, real and in at least float32."""
    return optax.tree.update_moment_per_elem_norm(jnp.asarray(gradient, _wide(gradient)), 0, 0, 2)


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient in the wider of the two dtypes, 0 where the denominator is."""
    usable = denominator != 0  # NaN stays NaN, which then can be seen
    wide = jnp.promote_types(numerator.dtype, denominator.dtype)
    safe = jnp.where(usable, denominator, jnp.ones_like(denominator)).astype(wide)
    quotient = numerator.astype(wide) / safe
    return jnp.where(usable, quotient, jnp.zeros_like(quotient))


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
