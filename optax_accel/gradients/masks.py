r"""Gradient sampling: train on a random part of every gradient.

At each step every gradient entry is kept with probability ``rate`` and set to zero otherwise:
:math:`\phi_t = \Omega_t \odot g_t` with independent Bernoulli(``rate``) entries of
:math:`\Omega_t`. The mask acts on the gradient only: moments decay for every entry, so entries that
are not sampled still move on their momentum.

Yun, `Stochastic gradient sampling for enhancing neural networks training
<https://arxiv.org/abs/2310.17042>`_, 2023.  Rule and defaults as in the only public port (the
paper's tables and its author's code were not available to us); the one-based exponent of the bias
correction is our reading, ``bias_offset=1`` is the port's.  Masking comes after back-propagation:
it saves no gradient computation.  In the steady state the step is about ``sqrt(rate)`` of Adam's,
since the first moment shrinks by ``rate`` and the root of the second by ``sqrt(rate)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._adam import scale_by_adam
from optax_accel._arguments import (
    check_count,
    check_dtype,
    check_flag,
    check_floating_leaves,
    check_learning_rate,
    check_number,
    check_numeric_leaves,
    value_of,
    with_checked_init,
)
from optax_accel._random import as_key, hash_bits, map_with_keys

Sampler = Callable[[jax.Array, chex.ArrayTree, Any], chex.ArrayTree]


def bernoulli_per_element(key: chex.PRNGKey, tree: chex.ArrayTree, rate: Any) -> chex.ArrayTree:
    """Independent Bernoulli(``rate``) masks for every entry.

    Random bits dominate the cost of a mask: eight bits an entry from JAX's threefry take two to
    three times as long as a whole Adam update on a CPU.  Here each entry hashes its index with two
    key words of its leaf, drawn from ``key``: a counter-based generator of a few integer operations
    that fuses into the update and needs no memory.  It is not suited to cryptography.

    Args:
      key: PRNG key of the step; replicas with the same key draw the same mask.
      tree: the gradients.
      rate: probability of keeping an entry, in [0, 1], with a resolution of ``2 ** -24``.

    Returns:
      Boolean masks like ``tree``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel import bernoulli_per_element
      >>> mask = bernoulli_per_element(jax.random.key(0), jnp.zeros((100, 100)), 0.8)
      >>> bool(abs(mask.mean() - 0.8) < 0.02)
      True
    """
    limit = (jnp.asarray(rate, jnp.float32) * 2**24).astype(jnp.uint32)

    def mask(leaf_key: jax.Array, leaf: jax.Array) -> jax.Array:
        return hash_bits(leaf_key, leaf.shape) >> 8 < limit

    return map_with_keys(mask, key, tree)


def bernoulli_per_tensor(key: chex.PRNGKey, tree: chex.ArrayTree, rate: Any) -> chex.ArrayTree:
    """One Bernoulli(``rate``) decision for each leaf; for comparison, not in the paper.

    Args:
      key: PRNG key of the step.
      tree: the gradients.
      rate: probability of keeping a leaf, in [0, 1].

    Returns:
      Boolean scalars in the structure of ``tree``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel import bernoulli_per_tensor
      >>> bernoulli_per_tensor(jax.random.key(0), {"w": jnp.zeros((3, 2))}, 1.0)["w"].tolist()
      True
    """
    return map_with_keys(lambda k, _: jax.random.uniform(k) < rate, key, tree)


class SampleGradientsState(NamedTuple):
    """State of :func:`sample_gradients`.

    Attributes:
      count: number of updates made; int32 scalar.
      rng_key: the PRNG key given at construction; step ``t`` draws from ``fold_in(rng_key, t)``.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    rng_key: chex.PRNGKey


def sample_gradients(
    rate: optax.ScalarOrSchedule = 0.8,
    *,
    key: chex.PRNGKey | int = 0,
    sampler: Sampler | None = None,
    rescale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps each gradient entry with probability ``rate``, else sets it to zero.

    Under data parallelism all replicas draw the same mask, since all hold the same key.

    Args:
      rate: probability of keeping an entry, in (0, 1]; float or schedule. 1 keeps everything. The
        default, 0.8, is that of the public port of StochGradAdam.
      key: PRNG key or integer seed.
      sampler: a function ``(key, gradients, rate) -> masks`` that decides which entries are kept.
        ``None`` (default) is :func:`bernoulli_per_element`, the paper's;
        :func:`bernoulli_per_tensor` keeps or drops whole leaves; any other function may be given,
        for example one that returns fixed masks.
      rescale: whether to divide the kept entries by ``rate``, so that the expectation is the
        gradient. False (default) as in the paper.

    Returns:
      A transformation with state :class:`SampleGradientsState`.

    Raises:
      ValueError: ``rate`` outside (0, 1].
      TypeError: ``key`` is neither a key nor an integer; in ``init`` and ``update``: leaves that
        are not numbers or, with ``rescale``, not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.sample_gradients(rate=0.5, key=0), optax.sgd(1.0))
      >>> grads = jnp.ones(1000)
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> bool(400 < -updates.sum() < 600)
      True
    """
    check_number("rate", rate, 0, 1, open_low=True, allow_schedule=True)
    check_flag("rescale", rescale)
    draw = bernoulli_per_element if sampler is None else sampler
    if not callable(draw):
        raise TypeError(
            f"`sampler` must be a function (key, tree, rate) -> masks, got {sampler!r}. Under "
            "optax.inject_hyperparams use optax_accel.inject_hyperparams, which keeps functions."
        )
    initial_key = as_key(key)

    def check_leaves(tree: chex.ArrayTree) -> None:
        if rescale:
            check_floating_leaves(tree, "sample_gradients with `rescale`")
        else:
            check_numeric_leaves(tree, "sample_gradients")

    def init_fn(params: chex.ArrayTree) -> SampleGradientsState:
        check_leaves(params)
        # A copy, so that a donated state does not take the caller's key with it.
        return SampleGradientsState(jnp.zeros((), jnp.int32), jnp.copy(initial_key))

    def update_fn(
        updates: chex.ArrayTree,
        state: SampleGradientsState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, SampleGradientsState]:
        del params, extra_args
        check_leaves(updates)
        step_rate = value_of(rate, state.count)
        masks = draw(jax.random.fold_in(state.rng_key, state.count), updates, step_rate)

        def keep(mask: jax.Array, g: jax.Array) -> jax.Array:
            if rescale:
                wide = jnp.promote_types(g.dtype, jnp.float32)
                kept = (g.astype(wide) / jnp.asarray(step_rate, wide)).astype(g.dtype)
            else:
                kept = g
            return jnp.where(mask, kept, jnp.zeros_like(g))

        sampled = jax.tree.map(keep, masks, updates)
        return sampled, SampleGradientsState(optax.safe_increment(state.count), state.rng_key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stoch_grad_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    rate: optax.ScalarOrSchedule = 0.8,
    key: chex.PRNGKey | int = 0,
    weight_decay: float = 0.0,
    b1_decay: float = 1.0,
    bias_offset: int = 0,
    sampler: Sampler | None = None,
    rescale: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """StochGradAdam: Adam on sampled gradients.

    Args:
      learning_rate: float or schedule, at least 0. The public port's default is 0.001.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      rate: probability of keeping a gradient entry, in (0, 1]; float or schedule. 1 is Adam, bit
        for bit in float32; the default, 0.8, is the public port's.
      key: PRNG key or integer seed.
      weight_decay: coupled L2 decay, added to the gradient before the mask; needs ``params`` in
        ``update`` when it is not 0.
      b1_decay: factor d of the port's ``b1_t = b1 * d ** (t - 1)``; 1 (default) keeps ``b1``
        constant.  The bias correction uses the constant ``b1``, as in the port.
      bias_offset: 1 gives the port's bias correction, with the exponent ``t + 1``, whose first step
        is 0.744 of the learning rate; 0 (default) is Adam's.
      sampler: a function ``(key, gradients, rate) -> masks`` that decides which entries are kept;
        ``None`` (default) is :func:`bernoulli_per_element`, the paper's.
      rescale: whether to divide the kept entries by ``rate``, so that the expectation is the
        gradient. False (default) as in the paper.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.stoch_grad_adam(learning_rate=0.1, rate=0.8, key=0)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> set(round(float(u), 4) for u in updates) <= {-0.1, 0.0}
      True

    References:
      Yun, `Stochastic gradient sampling <https://arxiv.org/abs/2310.17042>`_, 2023.
    """
    check_learning_rate(learning_rate)
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_number("weight_decay", weight_decay, 0)
    check_number("b1_decay", b1_decay, 0, 1)
    check_count("bias_offset", bias_offset, 0)
    check_dtype("mu_dtype", mu_dtype)
    decays = isinstance(weight_decay, jax.Array) or weight_decay != 0
    chain = optax.chain(
        *([optax.add_decayed_weights(weight_decay)] if decays else []),
        sample_gradients(rate, key=key, sampler=sampler, rescale=rescale),
        scale_by_adam(
            "stoch_grad_adam",
            b1,
            b2,
            eps,
            b1_decay=b1_decay,
            bias_offset=bias_offset,
            mu_dtype=mu_dtype,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_checked_init(
        chain, functools.partial(check_floating_leaves, method="stoch_grad_adam")
    )
