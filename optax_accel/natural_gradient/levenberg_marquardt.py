r"""How far a quadratic model of the loss can be trusted, and what damping and radius make of it.

A step :math:`\delta` should change the loss by :math:`M(\delta) - M(0)`.  The reduction ratio

.. math:: \rho = \frac{L(\theta + \delta) - L(\theta)}{M(\delta) - M(0)}

says what came of that.  Levenberg and Marquardt damp more where it is below 1/4, and less where it
is above 3/4; a trust region shrinks and grows at the same thresholds.

Moré, `The Levenberg-Marquardt algorithm: implementation and theory
<https://doi.org/10.1007/BFb0067700>`_, 1978; Martens, Grosse, `Optimizing neural networks with
Kronecker-factored approximate curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 6.5;
Nocedal, Wright, `Numerical optimization <https://doi.org/10.1007/978-0-387-40065-5>`_, 2006,
algorithm 4.1.

The thresholds, the period :math:`T_1 = 5` and :math:`\omega_1 = (19/20)^{T_1}` are those of
section 6.5, as programs written after the paper have them (public K-FAC optimizers, and the
examples of the authors' own TensorFlow package); the text itself was not at hand.  These start
from :math:`\lambda = 150`, which is for losses far larger than a mean cross entropy: here
``initial`` has to be chosen.  They add the strength :math:`\eta` of an L2 penalty to the damping;
here a penalty is part of the loss.  They adapt the factored damping on its own, from
:math:`\gamma = \sqrt{\lambda + \eta}`, every 20 steps with :math:`\omega_2 = (19/20)^{20/2}`
(section 6.6); here it is always :math:`\gamma = \sqrt\lambda`.  kfac-jax of August 2026
has the same thresholds and period, but a factor of 0.9 per step in place of 19/20, and its ratio
leaves the damping out of the model, which is part of it here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_count, check_number
from optax_accel._numerics import max_norm


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Damping that adapts to how well the quadratic model predicts the loss.

    Every :math:`T_1` steps, with :math:`\omega_1 = (19/20)^{T_1}`, the damping :math:`\lambda` is
    multiplied by :math:`\omega_1` if the reduction ratio exceeds 3/4, and divided by it if the
    ratio is below 1/4.  It stays where the predicted change is below the rounding error of the
    loss.

    Args:
      initial: :math:`\lambda` in the first step, positive; relative to the curvature of the loss.
      every: :math:`T_1`: steps between two adaptions; default 5. The period of K-FAC's inverses
        should be a multiple or a divisor of it.
      decay: in (0, 1]: the factor per step by which the damping falls, or rises by the reciprocal;
        default 19/20. 1 keeps it constant.
      minimum: the least damping, at least 0; default 1e-8. The ratio is measured on the batch that
        the step was made for, which it fits better than others: with small batches, or inverses
        that are far from exact, the damping falls too far without a larger minimum, 1e-3 say.

    Raises:
      ValueError: an argument outside its range.
      TypeError: an argument of another kind.

    Example:
      >>> import optax_accel as oa
      >>> oa.LevenbergMarquardt(0.1, every=10).decay
      0.95

    References:
      Martens and Grosse (2015), section 6.5; ``minimum`` and its default are ours. The module says
      what the constants were compared with.
    """

    initial: float
    every: int = 5
    decay: float = 19 / 20
    minimum: float = 1e-8

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_number("initial", self.initial, 0, open_low=True)
        check_count("every", self.every, 1)
        check_number("decay", self.decay, 0, 1, open_low=True)
        check_number("minimum", self.minimum, 0)

    def adapted(self, damping: jax.Array, reduction: Reduction) -> jax.Array:
        """The damping after a step with this reduction of the loss; float32 scalar."""
        rise = jnp.float32(self.decay) ** -self.every
        limits = jnp.finfo(jnp.float32)
        new = damping.astype(jnp.float32) * damping_factor(rise, reduction)
        return jnp.clip(new, jnp.maximum(self.minimum, limits.tiny), limits.max)


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    r"""A bound on the length of steps that adapts to how well the quadratic model predicts.

    Steps are shortened to :math:`\sqrt{\delta^\top G \delta} \le r`, with G the Gauss-Newton
    matrix: half the square is the change of the predictions in nats where the loss is a negative
    log-likelihood.  Every few steps the radius r becomes a quarter of the step's length if the
    reduction ratio is below 1/4, and twice as large if the ratio exceeds 3/4 and the bound was
    reached; a step that is looked at and found to raise the loss of its batch is not made.

    Args:
      radius: r in the first step, positive.
      every: steps between two adaptions; default 5. With 1 every step is looked at, which costs a
        loss per step.
      maximum: the largest radius, at least ``radius``; default 10.

    Raises:
      ValueError: an argument outside its range.
      TypeError: an argument of another kind.

    Example:
      >>> import optax_accel as oa
      >>> oa.TrustRegion(0.3, every=1)
      TrustRegion(radius=0.3, every=1, maximum=10.0)

    References:
      Nocedal and Wright (2006), algorithm 4.1, with the threshold for accepting a step at 0.
    """

    radius: float
    every: int = 5
    maximum: float = 10.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_number("radius", self.radius, 0, open_low=True)
        check_count("every", self.every, 1)
        check_number("maximum", self.maximum, 0, open_low=True)
        if self.radius > self.maximum:
            raise ValueError(
                f"`radius` must be at most `maximum`, got {self.radius!r} and {self.maximum!r}."
            )

    def adapted(self, radius: jax.Array, length: jax.Array, reduction: Reduction) -> jax.Array:
        """The radius after a step of this length, which is at most the old radius."""
        length = jnp.where(jnp.isfinite(length), length, radius).astype(radius.dtype)
        grown = jnp.where(length > 0.99 * radius, 2 * radius, radius)
        new = jnp.where(reduction.ratio > 0.75, grown, radius)
        new = jnp.where(reduction.ratio >= 0.25, new, length / 4)  # also if it is not a number
        new = jnp.where(reduction.telling, new, radius)
        return jnp.clip(new, jnp.finfo(radius.dtype).tiny, self.maximum)


class Reduction(NamedTuple):
    """The loss before and after a step, and what the model had predicted.

    Attributes:
      predicted: the change of the loss that the model predicted, negative for a decrease.
      before: the loss before the step, in at least float32.
      after: the loss after the step.
      ratio: the change of the loss over the predicted one; 1 where no decrease was predicted.
      usable: whether loss and gradient were finite before the step.
      telling: whether the loss says something about the model.
    """

    predicted: jax.Array
    before: jax.Array
    after: jax.Array
    ratio: jax.Array
    usable: jax.Array
    telling: jax.Array


def reduction_of(
    before: jax.Array,
    after: jax.Array,
    predicted: jax.Array,
    gradient: chex.ArrayTree,
    moved: jax.Array,
) -> Reduction:
    """Compares the change of the loss with the predicted one.

    Args:
      before: the loss before the step, in its own dtype.
      after: the loss after the step.
      predicted: the change that the model predicted.
      gradient: the gradient of the loss.
      moved: whether the step has changed any parameter.
    """
    eps = jnp.finfo(before.dtype).eps
    before, after = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (before, after))
    usable = jnp.isfinite(before) & jnp.isfinite(max_norm(gradient))
    ratio = jnp.where(predicted < 0, (after - before) / predicted, 1)
    ratio = jnp.where(usable & jnp.isnan(ratio), -jnp.inf, ratio)
    # What is lost in rounding, or is not a number from the start, says nothing on the model.
    telling = (-predicted > 8 * eps * jnp.abs(before)) & moved
    telling |= usable & ~jnp.isfinite(after)
    return Reduction(predicted, before, after, ratio, usable, telling)


def damping_factor(rise: Any, reduction: Reduction) -> jax.Array:
    """What the damping is multiplied by: ``rise``, its reciprocal or 1."""
    factor = jnp.where(reduction.ratio > 0.75, 1 / rise, 1)
    factor = jnp.where(reduction.ratio >= 0.25, factor, rise)  # also if it is not a number
    return jnp.where(reduction.telling, factor, 1)
