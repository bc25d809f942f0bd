r"""EKFAC: K-FAC whose eigenvalues are measured in the eigenbasis of its factors.

In the notation of ``optax_accel.natural_gradient.kfac``, with S the second moments of the
per-example gradients in the basis of :math:`A = U_A D_A U_A^\top` and
:math:`B = U_B D_B U_B^\top`, the natural gradient of a layer is

.. math::
  V = U_A \big[ (U_A^\top G\, U_B) \oslash (S + \lambda) \big] U_B^\top .

George et al., `Fast approximate natural gradient descent in a Kronecker-factored eigenbasis
<https://arxiv.org/abs/1806.03884>`_, 2018.
"""

from __future__ import annotations

import chex
import optax

from optax_accel._masking import Mask
from optax_accel.natural_gradient._transformation import (
    initial_damping,
    kl_bound,
    transformation,
    with_momentum,
)
from optax_accel.natural_gradient.estimators import Estimator
from optax_accel.natural_gradient.finding import Example
from optax_accel.natural_gradient.levenberg_marquardt import LevenbergMarquardt, TrustRegion
from optax_accel.natural_gradient.likelihoods import Likelihood
from optax_accel.natural_gradient.options import Options
from optax_accel.natural_gradient.quadratic_model import Exact
from optax_accel.objective import Objective


def scale_by_ekfac(
    objective: Objective,
    example: Example = None,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    decay: float = 0.95,
    factors_every: int = 1,
    inverses_every: int = 10,
    estimator: Estimator = "fisher",
    likelihood: Likelihood | None = None,
    norm_constraint: optax.ScalarOrSchedule | None = None,
    max_size: int = 4096,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of EKFAC's curvature matrix.

    K-FAC's eigenbasis with other eigenvalues: the second moments S of the per-example gradients in
    that basis, which are the best ones in the Frobenius norm.  The basis is refreshed every
    ``inverses_every`` steps, S every ``factors_every`` steps.  S is kept when the basis changes
    (our choice): it becomes the diagonal, in the new basis, of the matrix that it stood for.

    In addition to K-FAC's cost, S takes :math:`4 N n m` flops for a dense layer; with weight
    sharing (convolutions, positions) the gradient of each example is formed.  In an embedding each
    position of an example counts as an example.

    Args:
      objective: an :class:`~optax_accel.Objective` of the network. Only the program of its
        ``predict`` is read, to find the layers. Parameters alone do not tell how they are used, and
        the state holds a matrix for each side of a layer.
      example: keyword arguments of ``predict``, a dictionary of arrays or ``jax.ShapeDtypeStruct``,
        of which only shapes and dtypes matter. ``None`` (default) for an objective that holds its
        batch.
      damping: :math:`\lambda > 0`, float or schedule; it is added to S.
      decay: decay rate of the moving averages of the factors and of S, in [0, 1); default 0.95.
      factors_every: steps between refreshes of the factors and of S.
      inverses_every: steps between refreshes of the eigenbasis, a multiple of ``factors_every``.
      estimator: how the curvature is estimated: ``"fisher"`` (default) with one random vector per
        example at the outputs; ``"ggn"`` without sampling, with one backward pass per output;
        ``"empirical"`` from the gradients of the loss. :func:`scale_by_kfac` compares them.
      likelihood: the distribution that the outputs parametrize: ``"categorical"`` (logits),
        ``"bernoulli"`` (logits; the loss sums over the outputs) or ``"gaussian"`` (means with unit
        variance). ``None`` (default) takes it from the program of the loss, where that shows
        softmax or binary cross entropy or squared error, with any targets, masks and weights; other
        losses work, too, with up to 256 outputs per example.
      norm_constraint: c, float or schedule: the update V is multiplied by :math:`\min(1, \sqrt{c /
        \langle V, G \rangle})`. ``None`` (default) leaves its length as it is.
      max_size: a factor with more rows than this is approximated by its diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to precondition. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.

    Returns:
      A transformation with state :class:`ScaleByKFACState` and the extra arguments of
      :func:`scale_by_kfac`.

    Raises:
      ValueError, TypeError: as :func:`scale_by_kfac`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> x, y = jnp.diag(jnp.array([10.0, 1.0, 0.1])), jnp.ones((3, 1))
      >>> objective = oa.Objective(
      ...     predict=lambda params: x @ params["w"],
      ...     loss=lambda outputs: 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1)),
      ... )
      >>> tx = oa.scale_by_ekfac(objective, damping=1e-6, estimator="ggn")
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> grads = objective.grad(params)
      >>> updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
      >>> [round(-float(u), 2) for u in updates["w"][:, 0]]
      [0.1, 1.0, 10.0]
    """
    options = Options(
        method="scale_by_ekfac",
        kind="ekfac",
        objective=objective,
        example=example,
        damping=damping,
        decay=decay,
        factors_every=factors_every,
        inverses_every=inverses_every,
        estimator=estimator,
        likelihood=likelihood,
        norm_constraint=norm_constraint,
        max_size=max_size,
        key=key,
        mask=mask,
    )
    return transformation(options)


def ekfac(
    learning_rate: optax.ScalarOrSchedule | Exact,
    objective: Objective,
    example: Example = None,
    *,
    momentum: optax.ScalarOrSchedule | Exact | None = None,
    kl_clip: float | None = 1e-3,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt = 1e-3,
    decay: float = 0.95,
    factors_every: int = 1,
    inverses_every: int = 10,
    estimator: Estimator = "fisher",
    likelihood: Likelihood | None = None,
    trust_region: TrustRegion | None = None,
    max_size: int = 4096,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EKFAC with momentum and a KL clip.

    It is :func:`kfac` with the curvature of :func:`scale_by_ekfac`.

    Args:
      learning_rate: float or schedule, at least 0; or ``"exact"``, the minimum of the quadratic
        model with the exact Gauss-Newton matrix of the batch (:func:`quadratic_model`), at the
        price of two products a step.
      objective: an :class:`~optax_accel.Objective` of the network. Only the program of its
        ``predict`` is read, to find the layers. Parameters alone do not tell how they are used, and
        the state holds a matrix for each side of a layer.
      example: keyword arguments of ``predict``, a dictionary of arrays or ``jax.ShapeDtypeStruct``,
        of which only shapes and dtypes matter. ``None`` (default) for an objective that holds its
        batch.
      momentum: decay rate of the running sum of natural gradients, in [0, 1), float or schedule; or
        ``"exact"``, the multiple of the previous update at the minimum of the quadratic model.
        ``None`` (default) is 0.9 at a given learning rate and ``"exact"`` at an exact one, with
        which a fixed momentum can diverge: the minimum of the model is then taken along a line
        through a point that the previous update has chosen.
      kl_clip: :math:`\kappa`: natural gradients are multiplied by :math:`\min(1, \sqrt{\kappa /
        (\eta^2 \langle V, G \rangle)})` with the learning rate :math:`\eta`, which keeps the first
        steps, in which the curvature is small, from diverging. Default 1e-3, as in Pauloski et al.;
        ``None`` turns it off. With an exact learning rate there is no KL clip.
      damping: :math:`\lambda > 0`, float or schedule, relative to the curvature of the loss; it is
        added to the second moments S. Or a :class:`LevenbergMarquardt`, which adapts it to how well
        the quadratic model predicts.
      decay: decay rate of the moving averages of the factors and of S, in [0, 1); default 0.95.
      factors_every: steps between refreshes of the factors and of S.
      inverses_every: steps between refreshes of the eigenbasis, a multiple of ``factors_every``.
      estimator: how the curvature is estimated: ``"fisher"`` (default) with one random vector per
        example at the outputs; ``"ggn"`` without sampling, with one backward pass per output;
        ``"empirical"`` from the gradients of the loss. :func:`scale_by_kfac` compares them.
      likelihood: the distribution that the outputs parametrize: ``"categorical"`` (logits),
        ``"bernoulli"`` (logits; the loss sums over the outputs) or ``"gaussian"`` (means with unit
        variance). ``None`` (default) takes it from the program of the loss, where that shows
        softmax or binary cross entropy or squared error, with any targets, masks and weights; other
        losses work, too, with up to 256 outputs per example.
      trust_region: a :class:`TrustRegion`, which bounds the length of steps in the metric of the
        Gauss-Newton matrix, at the price of two products a step; ``None`` (default) for none.
      max_size: a factor with more rows than this is approximated by its diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to precondition. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.

    Returns:
      The optimizer; its ``update`` takes the extra arguments of :func:`scale_by_kfac`.
      The updates of a batch that is not finite are not finite, and the next ones are finite again:
      neither the curvature nor the momentum keeps anything of it.

    Raises:
      ValueError, TypeError: an argument outside its range, as in :func:`scale_by_kfac`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> objective = oa.Objective(
      ...     predict=lambda params, x: x @ params["w"],
      ...     loss=lambda outputs: 0.5 * jnp.mean(jnp.sum(outputs**2, axis=-1)),
      ... )
      >>> batch = {"x": jnp.array([[2.0, 0.0], [0.0, 0.2]])}
      >>> tx = oa.ekfac(
      ...     1.0, objective, example=batch, kl_clip=None, damping=1e-6, estimator="ggn"
      ... )
      >>> params = {"w": jnp.ones((2, 1))}
      >>> grads = objective.grad(params, **batch)
      >>> updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective, **batch)
      >>> updates["w"].round(3).tolist()
      [[-1.0], [-1.0]]
    """
    preconditioner = scale_by_ekfac(
        objective,
        example=example,
        damping=initial_damping(damping),
        decay=decay,
        factors_every=factors_every,
        inverses_every=inverses_every,
        estimator=estimator,
        likelihood=likelihood,
        norm_constraint=kl_bound(kl_clip, learning_rate),
        max_size=max_size,
        key=key,
        mask=mask,
    )
    return with_momentum(
        preconditioner,
        learning_rate,
        momentum,
        mask,
        damping=damping,
        trust_region=trust_region,
    )
