r"""K-FAC: natural gradients with one Kronecker product for each layer.

With G the gradient of a layer's weights as a matrix (inputs, outputs; the bias is its last row), A
and B second moments of its inputs and of the gradients at its outputs
(``optax_accel.natural_gradient.factors``), and damping :math:`\lambda`, the natural gradient is

.. math::
  V &= (A + \pi \sqrt\lambda I)^{-1}\, G\, (B + \tfrac{\sqrt\lambda}{\pi} I)^{-1}
    && \text{with factored damping,} \\
  V &= U_A \big[ (U_A^\top G\, U_B) \oslash (d_A d_B^\top + \lambda) \big] U_B^\top
    && \text{with damping in the eigenbasis,}

where :math:`A = U_A D_A U_A^\top` and :math:`B = U_B D_B U_B^\top`.  Other parameters have a
diagonal block, :math:`V = G \oslash (s + \lambda)`.

Martens, Grosse, `Optimizing neural networks with Kronecker-factored approximate curvature
<https://arxiv.org/abs/1503.05671>`_, 2015; Grosse, Martens, `A Kronecker-factored approximate
Fisher matrix for convolution layers <https://arxiv.org/abs/1602.01407>`_, 2016; Pauloski et al.,
`Convolutional neural network training with distributed K-FAC <https://arxiv.org/abs/2007.00784>`_,
2020: damping in the eigenbasis, the two periods, the KL clip, inverses spread over devices.

Ours: layers are found in the program of ``predict`` instead of being registered
(``optax_accel.natural_gradient.finding``); factors start from zero and are corrected for it, as
Adam's moments are; a batch with numbers that are not finite leaves the curvature as it was, and the
state counts it.  The rescaling of the step by the quadratic model and the adaption of the damping
to it (Martens, Grosse, sections 6.4, 6.5 and 7) are options of :func:`kfac`, and of any chain by
:func:`quadratic_model`.  Left out: the separate adaption of the factored damping (section 6.6).
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import optax

from optax_accel._arguments import check_choice
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

DampingKind = Literal["factored", "eigen"]


def scale_by_kfac(
    objective: Objective,
    example: Example = None,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_kind: DampingKind = "factored",
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
    r"""Multiplies gradients by the inverse of K-FAC's curvature matrix.

    Place it first in an Optax chain, where the updates are gradients; what follows (momentum,
    weight decay, learning rate) works on the natural gradient.  ``update`` takes:

    * ``value_fn``: the :class:`~optax_accel.Objective` of this step's batch, built from ``predict``
      and ``loss``; required.
    * ``curvature_value_fn``: another objective, on whose batch the curvature is estimated; default
      ``value_fn``.
    * ``refresh``: with ``None`` (default), factors and inverses are refreshed inside the compiled
      step, by ``lax.cond`` on the step count.  With a static Python value the host decides, so that
      the loop alternates compiled steps without conditionals (required for speed with convolutions
      on a CPU): ``False`` refreshes nothing, ``"factors"`` the factors, ``"inverses"`` (or True,
      ``"cold"`` and ``"warm"``, the words for trackers) both; :func:`~optax_accel.refresh_at` gives
      the value for a step.  The first step needs ``"inverses"``: before it there is no curvature,
      and gradients pass (divided by 1 + damping in the eigenbasis).
    * ``damping``: takes the place of the argument of that name in this step, as
      :func:`quadratic_model` gives it; default None.

    The loss must be a mean over the examples, which are counted along the leading axis of the
    outputs, or a weighted mean, as with a mask.  With a ``likelihood`` the factors are exactly
    those of the weighted examples, and of weighted positions where a layer has as many positions as
    the outputs; without one, the moments A count alike all examples that the loss looks at.  On
    several replicas a weighted loss has to declare its ``weight``
    (:class:`~optax_accel.Objective`); otherwise all replicas count alike.

    Where examples depend on each other (batch normalization in training mode), gradients per
    example are approximate: what flows through the statistics of the batch is divided among its
    examples.  The layers of time-major networks are found, too, but where a diagonal or EKFAC needs
    examples and positions apart, they may be mixed up.

    Cost of a step, for dense layers of n inputs and m outputs at N examples and positions: a
    forward and half a backward pass (the forward one shared with the gradient under ``jit``) and
    :math:`2 N (n^2 + m^2)` flops when factors are refreshed, about :math:`2 (n^3 + m^3)` for
    inverses (eigendecompositions took two to three times as long on one CPU core), and
    :math:`2 n m (n + m)` to apply them (twice that in the eigenbasis).  Memory:
    :math:`2 (n^2 + m^2)` numbers.

    A matrix that is used in two ways, as the table of an embedding and as the projection to the
    outputs (tied embeddings), or also transposed, has the Kronecker product nearest to the sum of
    those of its uses.  For two blocks instead, give ``predict`` two parameters.  Where a layer's
    weight is a sum or a matrix product of parameters (low-rank adapters), each of them has a block;
    where it is another function of parameters that are used in nothing else (normalized weights),
    the block is that of the weight, damping included, and pseudoinverses of the function's
    derivative lead from and to the parameters (``optax_accel.natural_gradient.effective``).

    Layers stacked on an axis, which a loop scans or indexes, have factors of their own, as have the
    heads of a batched matmul and the groups of a convolution: the state holds them with a leading
    axis of slices. Parameters that all iterations of a loop share (over time) have one block, the
    iterations being positions of the layer.

    On a CPU, jaxlib 0.10 can hang when several batched decompositions run at once, as they do under
    ``vmap``; those of a stack run one after the other there.

    With an ``axis_name`` of the objective (``shard_map``, ``pmap``) factors are means over the
    replicas, each factor is inverted by one replica, and the inverses are exchanged: beside the
    gradient's all-reduce each step sends on average :math:`b \sum (n^2 + m^2) (1/F + 1/K)` bytes, b
    the size of a float (4) and F and K the two periods.  Updates do not depend on the number of
    replicas.  In global-view ``jit`` the compiler decides.

    Args:
      objective: an :class:`~optax_accel.Objective` of the network. Only the program of its
        ``predict`` is read, to find the layers. Parameters alone do not tell how they are used, and
        the state holds a matrix for each side of a layer.
      example: keyword arguments of ``predict``, a dictionary of arrays or ``jax.ShapeDtypeStruct``,
        of which only shapes and dtypes matter. ``None`` (default) for an objective that holds its
        batch.
      damping: :math:`\lambda > 0`, float or schedule; default 1e-3, as in Pauloski et al. It is
        relative to the curvature of the loss: tune it together with the learning rate.
      damping_kind: where the damping is added: ``"factored"`` (default) to each factor, as above,
        with inverses of the damped factors; a new value acts when inverses are refreshed.
        ``"eigen"`` to the eigenvalues of the Kronecker product, which is exact; the decompositions
        took two to three times as long as inverses on one CPU core.
      decay: decay rate of the moving averages of the factors, in [0, 1); default 0.95, as in
        Martens, Grosse (2015, section 5).
      factors_every: steps between refreshes of the factors.
      inverses_every: steps between refreshes of the inverses, a multiple of ``factors_every``.
      estimator: how the curvature is estimated. ``"fisher"`` (default), the standard choice, pulls
        one random vector s per example back from the outputs, with :math:`E\, s s^\top = \nabla_f^2
        \ell`: with a ``likelihood`` from targets sampled from the model, else :math:`s =
        (\nabla_f^2 \ell)^{1/2} \xi` with a normal :math:`\xi`, for any loss. It is an unbiased
        estimate of the generalized Gauss-Newton matrix at the price of one backward pass. ``"ggn"``
        is that matrix without sampling, at the price of C backward passes for C outputs.
        ``"empirical"`` takes the gradients of the loss, as Pauloski et al. do: it is the cheapest
        and works for any number of outputs, but is not a curvature (Kunstner et al., 2019).
      likelihood: the distribution that the outputs parametrize: ``"categorical"`` (cross entropy,
        outputs are logits), ``"bernoulli"`` (binary cross entropy, logits) or ``"gaussian"``
        (squared error). Weights and constant factors are read off the loss, at the price of two of
        its gradients with respect to the outputs. ``None`` (default) takes the likelihood from the
        program of the loss, where that shows softmax or binary cross entropy or squared error, with
        any targets, masks and weights; other losses work, too, with up to 256 outputs per example.
      norm_constraint: c, float or schedule: the update V is multiplied by :math:`\min(1, \sqrt{c /
        \langle V, G \rangle})`. ``None`` (default) leaves its length as it is. A KL clip
        :math:`\kappa` at learning rate :math:`\eta` is :math:`c = \kappa / \eta^2`, as :func:`kfac`
        sets it.
      max_size: a factor with more rows than this is approximated by its diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to precondition. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.

    Returns:
      A transformation with state :class:`ScaleByKFACState`. ``optax.tree.map_params`` shows its
      factors, inverses and moments to ``transform_non_params`` as whole tuples, because the layers
      they belong to are not known before there are parameters.

    Raises:
      ValueError: an argument outside its range; an example that lacks arguments of ``predict``; in
        ``init``: ``predict`` cannot be evaluated on it; in ``update``: ``value_fn`` is missing, a
        plain function, or of another network.
      TypeError: an argument of another kind; parameters that are not real floating point.

    Warns:
      UserWarning: a matrix of parameters has no Kronecker block, or less than half of the
        parameters have one, for the reasons listed; once for each network.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> x, y = jnp.diag(jnp.array([10.0, 1.0, 0.1])), jnp.ones((3, 1))
      >>> objective = oa.Objective(
      ...     predict=lambda params: x @ params["w"],
      ...     loss=lambda outputs: 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1)),
      ... )
      >>> tx = optax.chain(
      ...     oa.scale_by_kfac(objective, damping=1e-6, damping_kind="eigen", estimator="ggn"),
      ...     optax.scale_by_learning_rate(1.0),
      ... )
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> state = tx.init(params)
      >>> grads = objective.grad(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=objective)
      >>> params = optax.apply_updates(params, updates)  # the solution is 0.1, 1, 10
      >>> [round(float(p), 2) for p in params["w"][:, 0]]
      [0.1, 1.0, 10.0]
    """
    check_choice("damping_kind", damping_kind, get_args(DampingKind))
    options = Options(
        method="scale_by_kfac",
        kind=damping_kind,
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


def kfac(
    learning_rate: optax.ScalarOrSchedule | Exact,
    objective: Objective,
    example: Example = None,
    *,
    momentum: optax.ScalarOrSchedule | Exact | None = None,
    kl_clip: float | None = 1e-3,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt = 1e-3,
    damping_kind: DampingKind = "factored",
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
    r"""K-FAC with momentum and a KL clip.

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
      damping: :math:`\lambda > 0`, float or schedule; default 1e-3, as in Pauloski et al. It is
        relative to the curvature of the loss: tune it together with the learning rate. Or a
        :class:`LevenbergMarquardt`, which adapts it to how well the quadratic model predicts.
      damping_kind: where the damping is added: ``"factored"`` (default) to each factor, which is
        then inverted; ``"eigen"`` to the eigenvalues of the Kronecker product,
        which is exact; the decompositions took two to three times as long as inverses on one CPU
        core.
      decay: decay rate of the moving averages of the factors, in [0, 1); default 0.95, as in
        Martens, Grosse (2015, section 5).
      factors_every: steps between refreshes of the factors.
      inverses_every: steps between refreshes of the inverses, a multiple of ``factors_every``.
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
      ValueError, TypeError: as :func:`scale_by_kfac`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> objective = oa.Objective(
      ...     predict=lambda params, x: x @ params["w"],
      ...     loss=lambda outputs, y: 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1)),
      ... )
      >>> batch = {"x": jnp.diag(jnp.array([10.0, 1.0, 0.1])), "y": jnp.ones((3, 1))}
      >>> settings = {"momentum": 0.0, "kl_clip": None, "damping": 1e-6, "estimator": "ggn"}
      >>> tx = oa.kfac(0.5, objective, example=batch, **settings)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = objective.grad(params, **batch)
      ...     updates, state = tx.update(grads, state, params, value_fn=objective, **batch)
      ...     return optax.apply_updates(params, updates), state
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     params, state = step(params, state)
      >>> bool(objective(params, **batch) < 1e-3)  # 0.5 at the start
      True
    """
    preconditioner = scale_by_kfac(
        objective,
        example=example,
        damping=initial_damping(damping),
        damping_kind=damping_kind,
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
