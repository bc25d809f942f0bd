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
schedule of the learning rate scales the bounds too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import check_number, value_of


class ScaleByAdaBoundState(NamedTuple):
    """State of :func:`scale_by_adabound`.

    Attributes:
      count: number of updates made; int32 scalar.
      mu: first moment, like the parameters.
      nu: second moment, like the parameters (real).
      nu_max: running maximum of the second moment with ``amsbound``, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mu: chex.ArrayTree
    nu: chex.ArrayTree
    nu_max: chex.ArrayTree


def scale_by_adabound(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    final_lr: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    gamma: float = 1e-3,
    eps: float = 1e-8,
    *,
    amsbound: bool = False,
    base_lr: float | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's step with bounded per-element rates, not yet negated.

    What is clipped is the rate of each element, the learning rate included, so that it is an
    argument here and not a factor chained behind; :func:`adabound` is this and a change of sign.

    Args:
      learning_rate: :math:`\eta`, Adam's rate, greater than 0; float or schedule.
      final_lr: f, the rate of SGD that the bounds close in on.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      gamma: speed of the bounds, greater than 0; they reach half of ``final_lr`` and twice of it
        after ``1 / gamma`` steps.  Near 0 all steps are Adam's, at infinity all are SGD's.
      eps: added to the root of the second moment before the bias correction.
      amsbound: divides by the root of the running maximum of the second moment: AMSBound.
      base_lr: :math:`\eta_0`: the bounds are scaled by ``learning_rate / base_lr`` in each step.
        ``None`` (default): a schedule's value at step 0; no scaling for a number.  Needed where a
        schedule starts at 0 (warm-up: give its peak), or where ``inject_hyperparams`` holds the
        schedule, which makes it a number here.
      mu_dtype: dtype of the first moment; ``None``: that of the parameters.

    Returns:
      A transformation with state :class:`ScaleByAdaBoundState`.

    Raises:
      ValueError: an argument outside its range, or a schedule that starts at 0 and no ``base_lr``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_adabound(0.01, amsbound=True), optax.scale(-1.0))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [round(float(u), 6) for u in updates]
      [-0.01, 0.01]

    References:
      Luo et al., `AdaBound <https://arxiv.org/abs/1902.09843>`_, section 4, algorithm 2.
    """
    check_number("learning_rate", learning_rate, 0, open_low=True, allow_schedule=True)
    check_number("final_lr", final_lr, 0)
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    check_number("gamma", gamma, 0, open_low=True)
    check_number("eps", eps, 0)
    if base_lr is not None:
        check_number("base_lr", base_lr, 0, open_low=True)
    elif callable(learning_rate):
        base_lr = learning_rate(0)
        if not isinstance(base_lr, jax.core.Tracer) and not base_lr > 0:
            raise ValueError(
                "`base_lr` must be given where the schedule of the learning rate does not start "
                f"above 0 (it starts at {float(base_lr)}), because learning_rate / base_lr scales "
                "the bounds. Give the schedule's peak."
            )

    def init_fn(params: chex.ArrayTree) -> ScaleByAdaBoundState:
        def zeros() -> chex.ArrayTree:
            return jax.tree.map(lambda p: jnp.zeros_like(jnp.real(p)), params)

        return ScaleByAdaBoundState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=zeros(),
            nu_max=zeros() if amsbound else None,
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
        rate = value_of(learning_rate, state.count)
        final = final_lr if base_lr is None else final_lr * rate / base_lr
        adam_rate = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)
        lower, upper = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))

        def step(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            wide = jnp.promote_types(v.dtype, jnp.float32)
            adam, low, high = (jnp.asarray(x, wide) for x in (adam_rate, lower, upper))
            rates = jnp.clip(adam / (jnp.sqrt(v.astype(wide)) + eps), low, high)
            return (rates * m).astype(g.dtype)

        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsbound else None
        new_updates = jax.tree.map(step, updates, mu, nu_max if amsbound else nu)
        return new_updates, ScaleByAdaBoundState(
            count=count,
            mu=optax.tree.cast_like(mu, state.mu),
            nu=optax.tree.cast_like(nu, state.nu),
            nu_max=optax.tree.cast_like(nu_max, state.nu_max),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adabound(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    final_lr: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    gamma: float = 1e-3,
    eps: float = 1e-8,
    *,
    amsbound: bool = False,
    base_lr: float | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaBound, and AMSBound with ``amsbound=True``: from Adam to SGD as training goes on.

    For the weight decay of the authors' code (L2), chain ``optax.add_decayed_weights`` before it.

    Args:
      learning_rate: Adam's rate, greater than 0; float or schedule.
      final_lr: the rate of SGD that the bounds close in on.
      b1: as in :func:`scale_by_adabound`, like the following ones.
      b2: see there.
      gamma: see there.
      eps: see there.
      amsbound: see there.
      base_lr: see there.
      mu_dtype: see there.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`scale_by_adabound`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.adabound(learning_rate=0.01, final_lr=0.5, gamma=0.1)
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
    scale_by = scale_by_adabound(
        learning_rate,
        final_lr,
        b1,
        b2,
        gamma,
        eps,
        amsbound=amsbound,
        base_lr=base_lr,
        mu_dtype=mu_dtype,
    )
    return optax.chain(scale_by, optax.scale(-1.0))
