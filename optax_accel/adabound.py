r"""AdaBound and AMSBound: Adam with per-element rates clipped to bounds that close in on SGD's.

.. math::
  p_t &= p_{t-1} - \mathrm{clip}\Big(\frac{\eta_t \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)}
    {\sqrt{v_t} + \epsilon},\ \eta_l(t),\ \eta_u(t)\Big)\, m_t, \\
  \eta_l(t) &= f_t \Big(1 - \frac{1}{\gamma t + 1}\Big), \qquad
  \eta_u(t) = f_t \Big(1 + \frac{1}{\gamma t}\Big), \qquad t = 1, 2, \dots

with Adam's moments :math:`m, v`; in AMSBound the running maximum of :math:`v` takes its place.  The
bounds start at about 0 and infinity, where the step is Adam's, and meet at :math:`f_t`, the rate of
SGD with a momentum that averages.

Luo, Xiong, Liu, Sun, `Adaptive gradient methods with dynamic bound of learning rate
<https://arxiv.org/abs/1902.09843>`_, ICLR 2019.  Bounds and defaults as in its section 4; as in the
authors' code (``Luolc/AdaBound``): Adam's bias correction, the maximum taken of the uncorrected
second moment, ``eps`` added before the correction, and :math:`f_t = f\, \eta_t / \eta_0`, so that a
schedule of the learning rate scales the bounds too.  Therefore the learning rate is a factor of the
whole step, :math:`\mathrm{clip}(\eta a, \eta b, \eta c) = \eta\, \mathrm{clip}(a, b, c)`, and
:func:`scale_by_adabound` does without it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._adam import second_moment, zeros_for_squares
from optax_accel._arguments import (
    check_dtype,
    check_flag,
    check_floating_leaves,
    check_learning_rate,
    check_number,
    with_checked_init,
)


class ScaleByAdaBoundState(NamedTuple):
    """State of :func:`scale_by_adabound`.

    Attributes:
      count: number of updates made; int32 scalar.
      mu: first moment, like the parameters.
      nu: second moment, like the parameters; real, in at least float32.
      nu_max: running maximum of the second moment with ``amsbound``, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mu: chex.ArrayTree
    nu: chex.ArrayTree
    nu_max: chex.ArrayTree


def scale_by_adabound(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    final_scale: float = 100.0,
    gamma: float = 1e-3,
    amsbound: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's scaling with bounded per-element rates, relative to the learning rate behind it.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment before the bias correction.
      final_scale: :math:`f / \eta_0`, at least 0: the rate of SGD that the bounds close in on,
        divided by the learning rate.  The default, 100, is that of the authors' code: 0.1 / 0.001.
      gamma: speed of the bounds, greater than 0; they reach half of ``final_scale`` and twice
        ``final_scale`` after ``1 / gamma`` steps.  Near 0 all steps are Adam's, at infinity all are
        SGD's.
      amsbound: whether to divide by the root of the running maximum of the second moment, as in
        AMSBound; default False.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      A transformation with state :class:`ScaleByAdaBoundState`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_adabound(amsbound=True), optax.scale_by_learning_rate(0.01))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [round(float(u), 6) for u in updates]
      [-0.01, 0.01]

    References:
      Luo et al., `AdaBound <https://arxiv.org/abs/1902.09843>`_, section 4, algorithm 2.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_number("final_scale", final_scale, 0)
    check_number("gamma", gamma, 0, open_low=True)
    check_flag("amsbound", amsbound)
    check_dtype("mu_dtype", mu_dtype)

    def init_fn(params: chex.ArrayTree) -> ScaleByAdaBoundState:
        check_floating_leaves(params, "scale_by_adabound")
        return ScaleByAdaBoundState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=zeros_for_squares(params),
            nu_max=zeros_for_squares(params) if amsbound else None,
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByAdaBoundState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByAdaBoundState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        # The widest float: an integer count would make a 32-bit one even in x64 mode.
        t = count.astype(jnp.result_type(float))
        adam_rate = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        lower = final_scale * (1 - 1 / (gamma * t + 1))
        upper = final_scale * (1 + 1 / (gamma * t))
        # Finite where `eps` and the second moment are zero.
        upper = jnp.minimum(upper, jnp.finfo(jnp.float32).max)

        def step(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            adam, low, high = (jnp.asarray(x, v.dtype) for x in (adam_rate, lower, upper))
            rates = jnp.clip(adam / (jnp.sqrt(v) + eps), low, high)
            return (rates * m.astype(jnp.promote_types(m.dtype, v.dtype))).astype(g.dtype)

        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = second_moment(updates, state.nu, b2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsbound else None
        new_updates = jax.tree.map(step, updates, mu, nu_max if amsbound else nu)
        return new_updates, ScaleByAdaBoundState(
            count=count,
            mu=optax.tree.cast_like(mu, state.mu),
            nu=optax.tree.cast_like(nu, state.nu),
            nu_max=optax.tree.cast_like(nu_max, state.nu_max) if amsbound else None,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adabound(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    final_learning_rate: float = 0.1,
    gamma: float = 1e-3,
    amsbound: bool = False,
    base_learning_rate: float | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaBound, or AMSBound: starts as Adam and ends as SGD.

    Args:
      learning_rate: :math:`\eta`, Adam's rate, greater than 0; float or schedule. The paper's
        default is 0.001.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment before the bias correction.
      final_learning_rate: f, at least 0: the rate of SGD that the bounds close in on.
      gamma: speed of the bounds, greater than 0; they reach half of ``final_learning_rate`` and
        twice that rate after ``1 / gamma`` steps.
      amsbound: whether to divide by the root of the running maximum of the second moment, as in
        AMSBound; default False.
      base_learning_rate: :math:`\eta_0`: the bounds are scaled by ``learning_rate /
        base_learning_rate`` in each step.  ``None`` (default) is the value of a schedule at step 0;
        with a number as ``learning_rate`` nothing is scaled.  It is needed where a schedule starts
        at 0 (give the peak of the warm-up), and where ``inject_hyperparams`` holds the schedule, so
        that a number arrives here.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range, or a schedule that starts at 0 without a
        ``base_learning_rate``.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.adabound(learning_rate=0.01, final_learning_rate=0.5, gamma=0.1)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(50):
      ...     updates, state = tx.update(jax.grad(loss)(param), state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> bool(abs(param) < 0.1)
      True

    References:
      Luo et al., `AdaBound <https://arxiv.org/abs/1902.09843>`_, algorithms 2 and 3.
    """
    check_learning_rate(learning_rate)
    check_number("final_learning_rate", final_learning_rate, 0)
    base: Any = base_learning_rate
    if base is not None:
        check_number("base_learning_rate", base, 0, open_low=True)
    elif callable(learning_rate):
        base = learning_rate(0)
        if not isinstance(base, jax.core.Tracer) and not base > 0:
            raise ValueError(
                "`base_learning_rate` must be given where the schedule of the learning rate does "
                f"not start above 0 (it starts at {float(base)}), because learning_rate / "
                "base_learning_rate scales the bounds. Give the peak of the schedule."
            )
    else:
        check_number("learning_rate", learning_rate, 0, open_low=True)
        base = learning_rate
    scale = scale_by_adabound(
        b1,
        b2,
        eps,
        final_scale=_ratio(final_learning_rate, base),
        gamma=gamma,
        amsbound=amsbound,
        mu_dtype=mu_dtype,
    )
    return with_checked_init(
        optax.chain(scale, optax.scale_by_learning_rate(learning_rate)),
        functools.partial(check_floating_leaves, method="adabound"),
    )


def _ratio(final: Any, base: Any) -> Any:
    """The ratio in the widest float; finite for an injected rate of 0, which moves nothing."""
    if not isinstance(base, jax.Array):
        return final / base
    base = base.astype(jnp.result_type(float))
    return final / jnp.where(base > 0, base, 1)
