r"""QHM and QHAdam: the update is a weighted mean of the gradient and its running mean.

QHM averages gradients with the decay :math:`\beta`, then mixes the mean with the current one:

.. math::
  m_t = \beta m_{t-1} + (1-\beta) g_t, \qquad
  \theta_t = \theta_{t-1} - \eta \, [(1-\nu) g_t + \nu m_t] .

QHAdam does the same to both moments of Adam, after their bias correction:

.. math::
  \theta_t = \theta_{t-1} - \eta \,
  \frac{(1-\nu_1) g_t + \nu_1 \hat m_t}{\sqrt{(1-\nu_2) g_t^2 + \nu_2 \hat v_t} + \epsilon} .

Ma and Yarats, `Quasi-hyperbolic momentum and Adam for deep learning
<https://arxiv.org/abs/1810.06801>`_, ICLR 2019.  Faithful: both rules, the defaults that the
authors recommend (``nu`` 0.7 and ``beta`` 0.999, QHAdam as in the README of their code,
``facebookresearch/qhoptim``), and the maps from other methods' parameters.
Ours: schedules for the coefficients, and the bias correction in a form that keeps its digits in
float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._adam import divide, squared_modulus, zeros_for_squares
from optax_accel._arguments import (
    check_dtype,
    check_floating_leaves,
    check_learning_rate,
    check_number,
    value_of,
    with_checked_init,
)
from optax_accel._numerics import one_minus_power

_check_decay = functools.partial(check_number, low=0, high=1, open_high=True, allow_schedule=True)
_check_discount = functools.partial(check_number, allow_schedule=True)


class ScaleByQHMState(NamedTuple):
    """State of :func:`scale_by_qhm`.

    Attributes:
      count: number of updates made; int32 scalar.
      mu: running mean of the gradients, like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mu: chex.ArrayTree


def scale_by_qhm(
    beta: optax.ScalarOrSchedule = 0.999,
    nu: optax.ScalarOrSchedule = 0.7,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Quasi-hyperbolic momentum: ``(1 - nu) * g + nu * m`` with the running mean ``m``.

    With ``nu=0`` it passes gradients on, with ``nu=1`` it is momentum with dampening
    (``optax.ema(beta, debias=False)``), and with ``nu=beta`` it is ``1 - beta`` times Nesterov's
    momentum (``optax.trace(beta, nesterov=True)``).  It keeps one copy of the parameters.

    Args:
      beta: decay of the running mean, in [0, 1); float or schedule.
      nu: weight of the running mean, a float or schedule; between 0 and 1 the update is a weighted
        mean. Other methods map to values outside of it, so that any number is allowed.
      accumulator_dtype: dtype of the running mean; ``None`` (default) is that of the parameters.

    Returns:
      A transformation with state :class:`ScaleByQHMState`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_qhm(0.9, 0.7), optax.scale_by_learning_rate(0.1))
      >>> param = jnp.array(1.0)
      >>> updates, state = tx.update(param, tx.init(param), param)
      >>> round(float(updates), 6)
      -0.037

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, section 3.
    """
    _check_decay("beta", beta)
    _check_discount("nu", nu)
    check_dtype("accumulator_dtype", accumulator_dtype)

    def init_fn(params: chex.ArrayTree) -> ScaleByQHMState:
        check_floating_leaves(params, "scale_by_qhm")
        mu = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return ScaleByQHMState(jnp.zeros((), jnp.int32), mu)

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByQHMState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByQHMState]:
        del params, extra_args
        decay, weight = value_of(beta, state.count), value_of(nu, state.count)
        mu = optax.tree.update_moment(updates, state.mu, decay, 1)
        new_updates = jax.tree.map(
            lambda g, m: ((1 - weight) * g + weight * m).astype(g.dtype), updates, mu
        )
        return new_updates, ScaleByQHMState(
            optax.safe_increment(state.count), optax.tree.cast_like(mu, state.mu)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def qhm(
    learning_rate: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule = 0.999,
    nu: optax.ScalarOrSchedule = 0.7,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with quasi-hyperbolic momentum.

    The running mean is dampened, so that a rate of SGD with momentum ``b`` becomes ``rate / (1 -
    b)`` here: 0.1 becomes 1 for 0.9, the authors' default.  Weight decay is a link of the chain:
    ``optax.chain(optax.add_decayed_weights(5e-4), oa.qhm(1.0))`` adds it to the gradient.

    Args:
      learning_rate: float or schedule, at least 0; the authors use 1.
      beta: decay of the running mean, in [0, 1); float or schedule.
      nu: weight of the running mean, usually in [0, 1]; float or schedule.
      accumulator_dtype: dtype of the running mean; ``None`` (default) is that of the parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.qhm(learning_rate=0.1, beta=0.9, nu=0.7)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.grad(loss)(param), state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> round(float(param), 6)
      0.826502

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, section 3.
    """
    check_learning_rate(learning_rate)
    return with_checked_init(
        optax.chain(
            scale_by_qhm(beta, nu, accumulator_dtype=accumulator_dtype),
            optax.scale_by_learning_rate(learning_rate),
        ),
        functools.partial(check_floating_leaves, method="qhm"),
    )


class ScaleByQHAdamState(NamedTuple):
    """State of :func:`scale_by_qh_adam`.

    Attributes:
      count: number of updates made; int32 scalar.
      mu: bias-corrected first moment, like the parameters.
      nu: bias-corrected second moment, like the parameters; real, in at least float32.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def scale_by_qh_adam(
    b1: optax.ScalarOrSchedule = 0.995,
    b2: optax.ScalarOrSchedule = 0.999,
    nu1: optax.ScalarOrSchedule = 0.7,
    nu2: optax.ScalarOrSchedule = 1.0,
    eps: float = 1e-8,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's scaling with quasi-hyperbolic moments.

    The moments are averaged with the decay :math:`b' = 1 - (1-b)/(1-b^t)` in step t, which makes
    them those that Adam has after its bias correction.  A schedule gives ``b`` at each step.  With
    ``nu1=nu2=1`` the updates are Adam's.

    Args:
      b1: decay of the first moment, in [0, 1); float or schedule.
      b2: decay of the second moment, in [0, 1); float or schedule.
      nu1: weight of the first moment beside the gradient, usually in [0, 1]; float or schedule.
      nu2: weight of the second moment beside the squared gradient, in [0, 1]; float or schedule.
      eps: added to the root in the denominator, at least 0.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      A transformation with state :class:`ScaleByQHAdamState`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_qh_adam(), optax.scale_by_learning_rate(1e-3))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [round(float(u), 6) for u in updates]
      [-0.001, 0.001]

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_.
    """
    _check_decay("b1", b1)
    _check_decay("b2", b2)
    _check_discount("nu1", nu1)
    check_number("nu2", nu2, 0, 1, allow_schedule=True)
    check_number("eps", eps, 0)
    check_dtype("mu_dtype", mu_dtype)

    def init_fn(params: chex.ArrayTree) -> ScaleByQHAdamState:
        check_floating_leaves(params, "scale_by_qh_adam")
        return ScaleByQHAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=zeros_for_squares(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByQHAdamState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByQHAdamState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        # The weights of the newest gradient and of its square.
        new1, new2 = (
            (1 - decay) / one_minus_power(decay, count)
            for decay in (value_of(b1, state.count), value_of(b2, state.count))
        )
        weight1, weight2 = value_of(nu1, state.count), value_of(nu2, state.count)

        def mean(g: jax.Array, m: jax.Array) -> jax.Array:
            return m + new1.astype(m.dtype) * (g - m)

        def mean_square(g: jax.Array, v: jax.Array) -> jax.Array:
            return v + new2.astype(v.dtype) * (squared_modulus(g) - v)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            square = (1 - weight2) * squared_modulus(g) + weight2 * v
            mixed = (1 - weight1) * g + weight1 * m
            return divide(mixed, jnp.sqrt(square) + eps).astype(g.dtype)

        mu = jax.tree.map(mean, updates, state.mu)
        nu = jax.tree.map(mean_square, updates, state.nu)
        return jax.tree.map(direction, updates, mu, nu), ScaleByQHAdamState(
            count=count,
            mu=optax.tree.cast_like(mu, state.mu),
            nu=optax.tree.cast_like(nu, state.nu),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def qh_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.995,
    b2: optax.ScalarOrSchedule = 0.999,
    nu1: optax.ScalarOrSchedule = 0.7,
    nu2: optax.ScalarOrSchedule = 1.0,
    eps: float = 1e-8,
    *,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """QHAdam: Adam with quasi-hyperbolic moments.

    Weight decay is a link of the chain: ``optax.chain(oa.scale_by_qh_adam(),
    optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3))`` decouples it from the
    scaling (QHAdamW).

    Args:
      learning_rate: float or schedule, at least 0; the authors' default is 0.001.
      b1: decay of the first moment, in [0, 1); float or schedule.
      b2: decay of the second moment, in [0, 1); float or schedule.
      nu1: weight of the first moment beside the gradient, usually in [0, 1]; float or schedule.
      nu2: weight of the second moment beside the squared gradient, in [0, 1]; float or schedule.
      eps: added to the root in the denominator, at least 0.
      mu_dtype: dtype of the first moment; ``None`` (default) is that of the parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.qh_adam(learning_rate=0.1)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss)(param), state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> bool(abs(param) < 0.3)
      True

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_.
    """
    check_learning_rate(learning_rate)
    return with_checked_init(
        optax.chain(
            scale_by_qh_adam(b1, b2, nu1, nu2, eps, mu_dtype=mu_dtype),
            optax.scale_by_learning_rate(learning_rate),
        ),
        functools.partial(check_floating_leaves, method="qh_adam"),
    )


class QHMParameters(NamedTuple):
    """The first arguments of :func:`qhm`, in its order: ``oa.qhm(*parameters)``.

    Attributes:
      learning_rate: the learning rate.
      beta: decay of the running mean.
      nu: weight of the running mean.
    """

    learning_rate: float
    beta: float
    nu: float


class QHAdamParameters(NamedTuple):
    """The first arguments of :func:`qh_adam`, in its order: ``oa.qh_adam(*parameters)``.

    Attributes:
      learning_rate: the learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      nu1: weight of the first moment beside the gradient.
      nu2: weight of the second moment beside the squared gradient.
    """

    learning_rate: float
    b1: float
    b2: float
    nu1: float
    nu2: float


def qhm_from_pid(proportional: float, integral: float, derivative: float) -> QHMParameters:
    """The parameters with which QHM is a PID controller of the gradient.

    Args:
      proportional: gain of the gradient, not 0; its sign is opposite to that of ``derivative``.
      integral: gain of the sum of the gradients, greater than 0.
      derivative: gain of the change of the gradient, not 0.

    Returns:
      The parameters of :func:`qhm`.

    Raises:
      ValueError: gains for which there are no such parameters.

    Example:
      >>> import optax_accel as oa
      >>> oa.qhm_from_pid(proportional=-0.1, integral=0.1, derivative=0.9)
      QHMParameters(learning_rate=0.1, beta=0.9, nu=0.11111111111111112)

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, and their code
      (``common/param_conv.py``).
    """
    check_number("proportional", proportional)
    check_number("integral", integral, 0, open_low=True)
    check_number("derivative", derivative)
    if derivative == 0 or derivative == proportional:
        raise ValueError(
            "`derivative` must be neither 0 nor equal to `proportional`, got "
            f"{derivative!r} and {proportional!r}."
        )
    beta = derivative / (derivative - proportional)
    return _qhm_parameters(integral, beta, proportional**2 / (integral * derivative))


def qhm_from_synthesized_nesterov(learning_rate: float, b1: float, b2: float) -> QHMParameters:
    """The parameters with which QHM is the synthesized Nesterov variant.

    That method has one coefficient for the momentum of the iterates, ``b1``, and another for the
    point at which the gradient is taken, ``b2``; with equal ones it is Nesterov's method.

    Args:
      learning_rate: the method's learning rate, at least 0.
      b1: coefficient of the momentum, in (0, 1).
      b2: coefficient of the point at which the gradient is taken.

    Returns:
      The parameters of :func:`qhm`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> [round(x, 6) for x in oa.qhm_from_synthesized_nesterov(0.1, 0.9, 0.9)]
      [1.0, 0.9, 0.9]

    References:
      Lessard, Recht, Packard, `Analysis and design of optimization algorithms via integral
      quadratic constraints <https://arxiv.org/abs/1408.3595>`_; the map is that of Ma and Yarats,
      `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, and their code
      (``common/param_conv.py``).
    """
    check_number("learning_rate", learning_rate, 0)
    check_number("b1", b1, 0, 1, open_low=True, open_high=True)
    check_number("b2", b2)
    return _qhm_parameters(learning_rate / (1 - b1), b1, 1 - (1 - b1) / b1 * b2)


def qhm_from_accsgd(delta: float, kappa: float, xi: float, eps: float = 0.7) -> QHMParameters:
    """The parameters with which QHM is AccSGD.

    Args:
      delta: the short step of AccSGD, at least 0: its learning rate.
      kappa: the ratio of its long to its short step, at least 1.
      xi: its statistical advantage, greater than 0 and at most the root of ``kappa``.
      eps: its constant, in (0, 1]; 0.7 in its paper.

    Returns:
      The parameters of :func:`qhm`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> [round(x, 4) for x in oa.qhm_from_accsgd(0.1, kappa=1000.0, xi=10.0)]
      [0.4529, 0.9882, 0.7792]

    References:
      Kidambi, Netrapalli, Jain, Kakade, `On the insufficiency of existing momentum schemes for
      stochastic optimization <https://arxiv.org/abs/1803.05591>`_; the map is that of Ma and
      Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, and their code
      (``common/param_conv.py``).
    """
    check_number("delta", delta, 0)
    check_number("kappa", kappa, 1)
    check_number("xi", xi, 0, math.sqrt(kappa), open_low=True)
    check_number("eps", eps, 0, 1, open_low=True)
    return _qhm_parameters(
        delta * eps * (1 + xi) / (1 + eps),
        (kappa - eps**2 * xi) / (kappa + eps * xi),
        (eps * xi - 1) / (eps * (1 + xi)),
    )


def _qhm_parameters(learning_rate: float, beta: float, nu: float) -> QHMParameters:
    check_number("beta of QHM", beta, 0, 1, open_high=True)
    return QHMParameters(learning_rate, beta, nu)


def qh_adam_from_nadam(
    learning_rate: float, b1: float = 0.9, b2: float = 0.999
) -> QHAdamParameters:
    """The parameters with which QHAdam is NAdam, up to the bias correction of the first moment.

    Args:
      learning_rate: NAdam's learning rate, at least 0.
      b1: NAdam's decay of the first moment, in [0, 1).
      b2: NAdam's decay of the second moment, in [0, 1).

    Returns:
      The parameters of :func:`qh_adam`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> oa.qh_adam_from_nadam(1e-3)
      QHAdamParameters(learning_rate=0.001, b1=0.9, b2=0.999, nu1=0.9, nu2=1.0)

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_.
    """
    check_number("learning_rate", learning_rate, 0)
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    return QHAdamParameters(learning_rate, b1, b2, nu1=b1, nu2=1.0)
