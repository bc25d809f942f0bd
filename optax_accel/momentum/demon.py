r"""Demon: decaying momentum.

The momentum :math:`\beta_t` decays so that the total influence of a gradient on later steps,
:math:`\beta_t / (1 - \beta_t)`, falls linearly to zero:

.. math::
  \beta_t = \beta_0 \, \frac{1 - t/T}{(1 - \beta_0) + \beta_0 (1 - t/T)} .

Chen, Wolfe, Li, Kyrillidis, `Demon: Improved neural network training with momentum decay
<https://arxiv.org/abs/1910.04952>`_ (v4), ICASSP 2022.  Faithful: the schedule (equation of section
2), Algorithm 1 (Demon SGDM) and Algorithm 2 (Demon Adam, ``form="paper"``).  Ours: the delayed
start, ``form="ema"``, and steps counted from zero, so that the first one uses ``momentum`` itself.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._adam import divide, second_moment, zeros_for_squares
from optax_accel._arguments import (
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_floating_leaves,
    check_learning_rate,
    check_number,
    known_integer,
    with_checked_init,
)
from optax_accel.hyperparams import with_schedules


def demon_schedule(init_value: float, decay_steps: int, delay_steps: int = 0) -> optax.Schedule:
    r"""The momentum of Demon: from ``init_value`` at step 0 to 0 at step ``decay_steps``.

    Args:
      init_value: :math:`\beta_0` in [0, 1); the paper tunes it in {0.9, 0.95, 0.97}.
      decay_steps: T, the step (not the epoch) at which the momentum reaches 0, counted from step 0
        and including ``delay_steps``; usually the length of training.  It stays 0 afterwards.
      delay_steps: number of steps that hold ``init_value`` before the decay, less than
        ``decay_steps``; 0 in the paper. An older post by its first author delays the decay by 75 %
        of the training.

    Returns:
      A schedule: a function of the zero-based step count, traceable.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> schedule = oa.demon_schedule(0.9, 10)
      >>> [round(float(schedule(t)), 4) for t in (0, 5, 9, 10, 99)]
      [0.9, 0.8182, 0.4737, 0.0, 0.0]

    References:
      Chen et al., `Demon <https://arxiv.org/abs/1910.04952>`_, section 2.
    """
    check_number("init_value", init_value, 0, 1, open_high=True)
    check_count("decay_steps", decay_steps, 1)
    check_count("delay_steps", delay_steps, 0)
    known = known_integer(delay_steps), known_integer(decay_steps)
    if None not in known and known[0] >= known[1]:  # type: ignore[operator]
        raise ValueError(
            f"`delay_steps` must be less than `decay_steps`, got {known[0]} and {known[1]}."
        )

    def schedule(count: Any) -> jax.Array:
        # The widest float: a 32-bit count divided by an integer is a 32-bit float even in x64 mode.
        count = jnp.asarray(count, jnp.result_type(float))
        elapsed = (count - delay_steps) / (decay_steps - delay_steps)
        remaining = 1 - jnp.clip(elapsed, 0, 1)
        return init_value * remaining / ((1 - init_value) + init_value * remaining)

    return schedule


def scale_by_demon(
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    decay_steps: int,
    delay_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum that decays by :func:`demon_schedule`.

    ``v = momentum_t * v + g``, and ``v`` is the update; ``optax.trace`` with a scheduled decay.

    Args:
      momentum: initial momentum, in [0, 1).
      nesterov: whether the update has Nesterov's form; default False, as in the paper.
      accumulator_dtype: dtype of ``v``; ``None`` (default) is that of the parameters.
      decay_steps: step at which the momentum reaches 0.
      delay_steps: steps before the decay, less than ``decay_steps``; 0 in the paper.

    Returns:
      A transformation with state :class:`~optax_accel.WithSchedulesState`; the current momentum is
      ``state.scheduled["momentum"]``.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_demon(decay_steps=1000), optax.scale_by_learning_rate(0.1))
      >>> state = tx.init(jnp.zeros(2))
    """
    check_number("momentum", momentum, 0, 1, open_high=True)
    check_flag("nesterov", nesterov)
    check_dtype("accumulator_dtype", accumulator_dtype)
    schedule = demon_schedule(momentum, decay_steps, delay_steps)

    def trace(momentum: jax.Array) -> optax.GradientTransformation:  # names it in the state
        return with_checked_init(
            optax.trace(momentum, nesterov, accumulator_dtype),
            functools.partial(check_floating_leaves, method="scale_by_demon"),
        )

    return with_schedules(trace, momentum=schedule)()


def demon_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    decay_steps: int,
    delay_steps: int = 0,
    learning_rate_in_momentum: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Demon SGDM: SGD with decaying momentum.

    Args:
      learning_rate: float or schedule, at least 0; the paper's runs hold it constant.
      momentum: initial momentum, in [0, 1); the paper tunes it in {0.9, 0.95, 0.97}.
      nesterov: whether the update has Nesterov's form; default False, as in the paper.
      accumulator_dtype: dtype of the momentum; ``None`` (default) is that of the parameters.
      decay_steps: step at which the momentum reaches 0, usually the number of training steps.
      delay_steps: steps before the decay, less than ``decay_steps``; 0 in the paper.
      learning_rate_in_momentum: whether to accumulate ``learning_rate * g``, as Algorithm 1 writes
        it, instead of multiplying the accumulated gradient by the rate (default), as Optax and the
        paper's text do.  With a constant rate the two agree.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.demon_sgd(learning_rate=0.1, decay_steps=4)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.grad(loss)(param), state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> round(float(param), 6)
      0.274305

    References:
      Chen et al., `Demon <https://arxiv.org/abs/1910.04952>`_, Algorithm 1.
    """
    check_learning_rate(learning_rate)
    check_flag("learning_rate_in_momentum", learning_rate_in_momentum)
    parts = [
        scale_by_demon(
            momentum,
            nesterov,
            accumulator_dtype,
            decay_steps=decay_steps,
            delay_steps=delay_steps,
        ),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return with_checked_init(
        optax.chain(*(reversed(parts) if learning_rate_in_momentum else parts)),
        functools.partial(check_floating_leaves, method="demon_sgd"),
    )


class ScaleByDemonAdamState(NamedTuple):
    """State of :func:`scale_by_demon_adam`.

    Attributes:
      count: number of updates made; int32 scalar.
      momentum: the momentum of the last update (before the first: of the first); scalar.
      momentum_product: product of all momenta used so far; scalar.
      mu: first moment, like the parameters.
      nu: second moment, like the parameters; real, in at least float32.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    momentum: jax.Array
    momentum_product: jax.Array
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def scale_by_demon_adam(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    decay_steps: int,
    delay_steps: int = 0,
    form: Literal["paper", "ema"] = "paper",
    nu_bias_correction: bool | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam whose first moment decays by :func:`demon_schedule`.

    ``form="paper"`` is Algorithm 2: the first moment sums gradients, :math:`m_t = g_t + \beta_t
    m_{t-1}`, without the factor :math:`1 - \beta_t`, so that the momentum changes while the weight
    of the current gradient does not.  Near a momentum of 0.9 its steps are about 10 times Adam's:
    tune the learning rate down.  ``form="ema"`` averages, :math:`m_t = (1-\beta_t) g_t + \beta_t
    m_{t-1}`, and divides by the exact normalizer :math:`1 - \prod_{j \le t} \beta_j`: Adam, for a
    constant :math:`\beta`.

    Args:
      b1: initial momentum in [0, 1), or another schedule of the momentum in place of Demon's, for
        which ``decay_steps`` and ``delay_steps`` have no effect.
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator: inside the root if the second moment is not corrected, as in
        Algorithm 2, otherwise outside, as in Adam.
      decay_steps: step at which the momentum reaches 0.
      delay_steps: steps before the decay, less than ``decay_steps``; 0 in the paper.
      form: ``"paper"`` (default) sums gradients in the first moment, ``"ema"`` averages them.
      nu_bias_correction: whether to divide the second moment by ``1 - b2 ** t``.  ``None``
        (default) means False for ``"paper"``, as in Algorithm 2, and True for ``"ema"``.  A
        footnote says that the description leaves the step out for clarity, so the published runs
        may have had it.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      A transformation with state :class:`ScaleByDemonAdamState`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(
      ...     oa.scale_by_demon_adam(decay_steps=1000), optax.scale_by_learning_rate(1e-4))
      >>> state = tx.init(jnp.zeros(2))
      >>> round(float(optax.tree.get(state, "momentum")), 4)
      0.9

    References:
      Chen et al., `Demon <https://arxiv.org/abs/1910.04952>`_, Algorithm 2 and footnote 1.
    """
    if not callable(b1):
        check_number("b1", b1, 0, 1, open_high=True)
    check_number("b2", b2, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_choice("form", form, ("paper", "ema"))
    check_flag("nu_bias_correction", nu_bias_correction, optional=True)
    check_dtype("mu_dtype", mu_dtype)
    schedule = b1 if callable(b1) else demon_schedule(b1, decay_steps, delay_steps)
    average = form == "ema"
    correct_nu = average if nu_bias_correction is None else nu_bias_correction

    def momentum_at(count: jax.Array) -> jax.Array:
        return jnp.asarray(schedule(count), jnp.result_type(float))

    def init_fn(params: chex.ArrayTree) -> ScaleByDemonAdamState:
        check_floating_leaves(params, "scale_by_demon_adam")
        count = jnp.zeros((), jnp.int32)
        momentum = momentum_at(count)
        return ScaleByDemonAdamState(
            count=count,
            momentum=momentum,
            momentum_product=jnp.ones_like(momentum),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=zeros_for_squares(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByDemonAdamState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByDemonAdamState]:
        del params, extra_args
        momentum = momentum_at(state.count)
        product = state.momentum_product * momentum
        count = optax.safe_increment(state.count)
        mu_norm = 1 - product if average else 1
        nu_norm = 1 - b2 ** count.astype(momentum.dtype) if correct_nu else 1

        def first_moment(g: jax.Array, m: jax.Array) -> jax.Array:
            beta = momentum.astype(m.dtype)
            return beta * m + (1 - beta) * g if average else g + beta * m

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            m, v = m / mu_norm, v / nu_norm
            root = jnp.sqrt(v) + eps if correct_nu else jnp.sqrt(v + eps)
            return divide(m, root).astype(g.dtype)

        mu = jax.tree.map(first_moment, updates, state.mu)
        nu = second_moment(updates, state.nu, b2)
        new_updates = jax.tree.map(direction, updates, mu, nu)
        return new_updates, ScaleByDemonAdamState(
            count=count,
            momentum=momentum,
            momentum_product=product,
            mu=optax.tree.cast_like(mu, state.mu),
            nu=optax.tree.cast_like(nu, state.nu),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def demon_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    decay_steps: int,
    delay_steps: int = 0,
    form: Literal["paper", "ema"] = "paper",
    nu_bias_correction: bool | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Demon Adam: Adam with a decaying first moment.

    Args:
      learning_rate: float or schedule, at least 0. With ``form="paper"`` about a tenth of Adam's.
      b1: initial momentum in [0, 1), or another schedule of the momentum in place of Demon's, for
        which ``decay_steps`` and ``delay_steps`` have no effect.
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator: inside the root if the second moment is not corrected, as in
        Algorithm 2, otherwise outside, as in Adam.
      decay_steps: step at which the momentum reaches 0, usually the number of training steps.
      delay_steps: steps before the decay, less than ``decay_steps``; 0 in the paper.
      form: ``"paper"`` (default) sums gradients in the first moment, ``"ema"`` averages them.
      nu_bias_correction: whether to divide the second moment by ``1 - b2 ** t``; ``None``
        (default) means False for ``"paper"``, as in Algorithm 2, and True for ``"ema"``.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.demon_adam(learning_rate=0.01, decay_steps=4, nu_bias_correction=True)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.grad(loss)(param), state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> round(float(param), 6)
      0.91868

    References:
      Chen et al., `Demon <https://arxiv.org/abs/1910.04952>`_, Algorithm 2.
    """
    check_learning_rate(learning_rate)
    adam = scale_by_demon_adam(
        b1,
        b2,
        eps,
        decay_steps=decay_steps,
        delay_steps=delay_steps,
        form=form,
        nu_bias_correction=nu_bias_correction,
        mu_dtype=mu_dtype,
    )
    return with_checked_init(
        optax.chain(adam, optax.scale_by_learning_rate(learning_rate)),
        functools.partial(check_floating_leaves, method="demon_adam"),
    )
