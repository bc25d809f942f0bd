r"""K-FAC and EKFAC: natural gradients with one Kronecker product for each layer.

With G the gradient of a layer's weights as a matrix (inputs, outputs; the bias is its last row), A
and B second moments of its inputs and of the gradients at its outputs
(:mod:`~optax_accel.natural_gradient.factors`), and damping :math:`\lambda`,

.. math::
  V &= (A + \pi \sqrt\lambda I)^{-1}\, G\, (B + \tfrac{\sqrt\lambda}{\pi} I)^{-1}
    && \text{K-FAC, factored damping,} \\
  V &= U_A \big[ (U_A^\top G\, U_B) \oslash (d_A d_B^\top + \lambda) \big] U_B^\top
    && \text{K-FAC, damping in the eigenbasis,} \\
  V &= U_A \big[ (U_A^\top G\, U_B) \oslash (S + \lambda) \big] U_B^\top
    && \text{EKFAC,}

:math:`A = U_A D_A U_A^\top`, :math:`B = U_B D_B U_B^\top`, S the second moments of per-example
gradients in that basis.  Other parameters have a diagonal block,
:math:`V = G \oslash (s + \lambda)`.

Martens, Grosse, `Optimizing neural networks with Kronecker-factored approximate curvature
<https://arxiv.org/abs/1503.05671>`_, 2015; Grosse, Martens, `A Kronecker-factored approximate
Fisher matrix for convolution layers <https://arxiv.org/abs/1602.01407>`_, 2016; George et al.,
`Fast approximate natural gradient descent in a Kronecker-factored eigenbasis
<https://arxiv.org/abs/1806.03884>`_, 2018; Pauloski et al., `Convolutional neural network training
with distributed K-FAC <https://arxiv.org/abs/2007.00784>`_, 2020: damping in the eigenbasis, the
two periods, the KL clip, inverses spread over devices.

Ours: layers are found in the program of ``predict`` instead of being registered
(:mod:`~optax_accel.natural_gradient.layers`); factors start from zero and are corrected for it, as
Adam's moments are; a batch with numbers that are not finite leaves the curvature as it was, and the
state counts it.  Left out: the rescaling of the step by the quadratic model and the adaption of the
damping to it (Martens, Grosse, sections 6.4 to 7).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    check_choice,
    check_count,
    check_number,
    is_placeholder,
    known_integer,
    static_integer,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, with_fixed_leaves
from optax_accel._random import as_key
from optax_accel.natural_gradient import factors as stats
from optax_accel.natural_gradient.estimators import Estimator, Likelihood, output_gradients
from optax_accel.natural_gradient.factors import Kronecker
from optax_accel.natural_gradient.finding import Example, check_example, find, warn_of_diagonals
from optax_accel.natural_gradient.layers import Block
from optax_accel.objective import Objective
from optax_accel.refresh import (
    RefreshLike,
    announce_factors,
    check_factor_periods,
    of_factors,
)

Damping = Literal["factored", "eigen"]


class ScaleByKFACState(NamedTuple):
    """State of :func:`scale_by_kfac` and :func:`scale_by_ekfac`.

    The tuples have one entry for each line of :func:`describe_layers`.

    Attributes:
      count: number of updates made; int32 scalar.
      rng_key: PRNG key of the sampled outputs.
      step_scale: what the last update was multiplied by, 1 or less with ``norm_constraint``.
      accepted: whether the last refresh took all that it measured and computed; boolean scalar.
      rejected: how many batches were refused, because a factor or a moment of theirs was not
        finite; int32 scalar. Such a batch changes none of the averages.
      rejected_inverses: how many inverses or eigendecompositions of layers were not finite, and the
        old ones kept; int32 scalar.
      factor_weight: 1 - decay ** (number of accepted batches): what factors and moments are to be
        divided by.
      factors: for a layer its ``inputs`` A and ``outputs`` B, for other parameters their second
        moments; moving averages that start at 0.
      inverses: for a layer what is multiplied: the damped inverses of A and B, or their
        eigendecompositions (``eigenvalues`` and ``eigenvectors``); else None.
      moments: of EKFAC, for a layer the second moments S in the eigenbasis; else None.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    rng_key: chex.PRNGKey
    step_scale: jax.Array
    accepted: jax.Array
    rejected: jax.Array
    rejected_inverses: jax.Array
    factor_weight: jax.Array
    factors: tuple[Any, ...]
    inverses: tuple[Any, ...]
    moments: tuple[Any, ...]


def scale_by_kfac(
    objective: Objective,
    example: Example = None,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_kind: Damping = "factored",
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

    One element of an Optax chain, to be placed first, where the updates are gradients; what follows
    (momentum, weight decay, learning rate) works on the natural gradient.  ``update`` takes:

    * ``value_fn``: the :class:`~optax_accel.Objective` of this step's batch, built from ``predict``
      and ``loss``; required.
    * ``curvature_value_fn``: another one, on whose batch the curvature is estimated; default
      ``value_fn``.
    * ``refresh``: ``None`` (default): factors and inverses are refreshed inside the compiled step,
      by ``lax.cond`` on the step count.  A static Python value drives them from the host, so that
      the loop alternates compiled steps without conditionals (required for speed with convolutions
      on a CPU): ``False`` refreshes nothing, ``"factors"`` the factors, ``"inverses"`` (or True,
      ``"cold"`` and ``"warm"``, the words for trackers) both; :func:`~optax_accel.refresh_at` gives
      the value for a step.  The first step needs ``"inverses"``: before, there is no curvature,
      and gradients pass (divided by 1 + damping in the eigenbasis).

    The loss must be a mean over the examples, which the leading axis of the outputs counts, or a
    mean with weights (a mask, for instance), for which factors are those of the weighted examples:
    with a ``likelihood`` exactly, with weights of positions, too, where a layer has as many of them
    as the outputs; without one the moments A are those of all examples alike that the loss looks
    at.  On several replicas such a loss has to declare its ``weight``
    (:class:`~optax_accel.Objective`); if it does not, all replicas count alike.

    Where examples depend on each other (batch normalization in training mode), gradients per
    example are approximate: what flows through the statistics of the batch is shared out among its
    examples.  Time-major networks are matched as others are, except that examples and positions may
    be mixed up where a diagonal or EKFAC keeps them apart.

    Cost of a step, for dense layers of n inputs and m outputs at N examples and positions: a
    forward and half a backward pass (the forward one shared with the gradient under ``jit``) and
    :math:`2 N (n^2 + m^2)` flops when factors are refreshed, about :math:`2 (n^3 + m^3)` for
    inverses and ten times that for eigendecompositions, and :math:`2 n m (n + m)` to apply them
    (twice that in the eigenbasis).  Memory: :math:`2 (n^2 + m^2)` numbers.

    On a CPU, jaxlib 0.10 can hang when several batched decompositions run at once, as they do under
    ``vmap``.

    With an ``axis_name`` of the objective (``shard_map``, ``pmap``) factors are means over the
    replicas, each factor is inverted by one replica, and the inverses are exchanged: beside the
    gradient's all-reduce each step sends on average :math:`b \sum (n^2 + m^2) (1/F + 1/K)` bytes, b
    the size of a float (4) and F and K the two periods.  Updates do not depend on the number of
    replicas.  In global-view ``jit`` the compiler decides.

    Args:
      objective: what the network looks like: an objective, of whose ``predict`` only the program is
        read, when a state is made.  Parameters alone do not tell how they are used, and the state
        holds a matrix for each side of a layer.
      example: keyword arguments of ``predict``, arrays or ``jax.ShapeDtypeStruct`` (a batch, of
        which only shapes matter); None for an objective that holds its batch.
      damping: :math:`\lambda > 0`, float or schedule. 1e-3 as in Pauloski et al.  Relative to the
        curvature of the loss: tune it together with the learning rate.
      damping_kind: ``"factored"`` (default): added to each factor, as above; inverses by Cholesky
        decomposition.  A new value acts when inverses are refreshed.  ``"eigen"``: added to the
        eigenvalues of the Kronecker product, which is exact; about ten times as expensive.
      decay: of the moving averages of factors, in [0, 1). 0.95 in both papers.
      factors_every: steps between refreshes of the factors.
      inverses_every: steps between refreshes of the inverses, a multiple of ``factors_every``.
      estimator: the curvature.  ``"fisher"``: one random vector s an example at the outputs,
        :math:`E\, s s^\top = \nabla_f^2 \ell`; with a ``likelihood`` from targets sampled from the
        model, else :math:`s = (\nabla_f^2 \ell)^{1/2} \xi` with a normal :math:`\xi`, for any
        loss: an unbiased estimate of the generalized Gauss-Newton matrix at the price of one
        backward pass, the standard choice.  ``"ggn"``: that matrix without sampling, C backward
        passes for C outputs.  ``"empirical"``: the gradients of the loss, as in Pauloski et al.:
        cheapest and for any number of outputs, but no curvature (Kunstner et al., 2019).
      likelihood: what kind of loss it is: ``"categorical"`` (cross entropy, outputs are logits),
        ``"bernoulli"`` (binary cross entropy, logits), ``"gaussian"`` (squared error); weights and
        constant factors are read off the loss, at the price of two of its gradients with respect
        to the outputs. None (default): whatever the loss is, up to 256 outputs an example.
      norm_constraint: c: the update V is multiplied by :math:`\min(1, \sqrt{c / \langle V, G
        \rangle})`, float or schedule; None: not.  A KL clip :math:`\kappa` at learning rate
        :math:`\eta` is :math:`c = \kappa / \eta^2`, as :func:`kfac` sets it.
      max_size: a factor with more rows is taken for diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to precondition; updates of others pass unchanged.  None: all.

    Returns:
      A transformation with state :class:`ScaleByKFACState`.

    Raises:
      ValueError: an argument outside its range; an example that lacks arguments of ``predict``; in
        ``init``: ``predict`` cannot be evaluated on it; in ``update``: ``value_fn`` is missing, a
        plain function, or of another network.
      TypeError: an argument of another kind; parameters that are not real floating point.

    Warns:
      UserWarning: a matrix of parameters has no Kronecker block, for the reasons listed.

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
    check_choice("damping_kind", damping_kind, get_args(Damping))
    return _transformation(
        "scale_by_kfac",
        damping_kind,
        objective,
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
    that basis, the best ones in the Frobenius norm.  The basis is refreshed every
    ``inverses_every`` steps, S every ``factors_every``.  A new basis does not make S forget (our
    choice): it becomes the diagonal, in the new basis, of the matrix that it was.

    Beside K-FAC's cost S takes :math:`4 N n m` flops more for a dense layer; with weight sharing
    (convolutions, positions) the gradient of each example is formed.  In an embedding the positions
    of an example are taken for examples of their own.

    Args:
      objective: what the network looks like: an objective, of whose ``predict`` only the program is
        read, when a state is made.
      example: keyword arguments of ``predict``, arrays or ``jax.ShapeDtypeStruct``, of which only
        shapes matter; ``None`` for an objective that holds its batch.
      damping: :math:`\lambda > 0`, float or schedule; it is added to S.
      decay: of the moving averages of the factors and of S, in [0, 1); default 0.95.
      factors_every: steps between refreshes of the factors and of S.
      inverses_every: steps between refreshes of the eigenbasis, a multiple of ``factors_every``.
      estimator: the curvature: ``"fisher"`` (default) from one random vector an example at the
        outputs; ``"ggn"``, the same matrix without sampling, one backward pass an output;
        ``"empirical"``, from the gradients of the loss. :func:`scale_by_kfac` compares them.
      likelihood: what the outputs are: ``"categorical"`` (logits), ``"bernoulli"`` (logits; the
        loss is a sum over outputs), ``"gaussian"`` (means with unit variance). ``None`` (default):
        whatever the loss is, up to 256 outputs an example.
      norm_constraint: c, float or schedule: the update V is multiplied by :math:`\min(1, \sqrt{c /
        \langle V, G \rangle})`. ``None`` (default): its length is left as it is.
      max_size: a factor with more rows than this is approximated by its diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to precondition; updates of others pass unchanged. ``None``
        (default): all.

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
    return _transformation(
        "scale_by_ekfac",
        "ekfac",
        objective,
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


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    example: Example = None,
    *,
    momentum: float = 0.9,
    kl_clip: float | None = 1e-3,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_kind: Damping = "factored",
    decay: float = 0.95,
    factors_every: int = 1,
    inverses_every: int = 10,
    estimator: Estimator = "fisher",
    likelihood: Likelihood | None = None,
    max_size: int = 4096,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC with momentum and a KL clip.

    Args:
      learning_rate: float or schedule.
      objective: what the network looks like: an objective, of whose ``predict`` only the program is
        read, when a state is made.
      example: keyword arguments of ``predict``, arrays or ``jax.ShapeDtypeStruct``, of which only
        shapes matter; ``None`` for an objective that holds its batch.
      momentum: of the natural gradients, in [0, 1).
      kl_clip: :math:`\kappa`: natural gradients are multiplied by :math:`\min(1, \sqrt{\kappa /
        (\eta^2 \langle V, G \rangle)})` with the learning rate :math:`\eta`; 1e-3 in Pauloski et
        al.  It keeps the first steps, in which curvature is small, from diverging. ``None``
        turns it off.
      damping: :math:`\lambda > 0`, float or schedule, relative to the curvature of the loss: tune
        it together with the learning rate.
      damping_kind: ``"factored"`` (default): added to each factor, whose inverses are Cholesky
        decompositions. ``"eigen"``: added to the eigenvalues of the Kronecker product, which is
        exact and about ten times as expensive.
      decay: of the moving averages of the factors, in [0, 1); default 0.95.
      factors_every: steps between refreshes of the factors.
      inverses_every: steps between refreshes of the inverses, a multiple of ``factors_every``.
      estimator: the curvature: ``"fisher"`` (default) from one random vector an example at the
        outputs; ``"ggn"``, the same matrix without sampling, one backward pass an output;
        ``"empirical"``, from the gradients of the loss. :func:`scale_by_kfac` compares them.
      likelihood: what the outputs are: ``"categorical"`` (logits), ``"bernoulli"`` (logits; the
        loss is a sum over outputs), ``"gaussian"`` (means with unit variance). ``None`` (default):
        whatever the loss is, up to 256 outputs an example.
      max_size: a factor with more rows than this is approximated by its diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to precondition; updates of others pass unchanged. ``None``
        (default): all.

    Returns:
      The optimizer; its ``update`` takes the extra arguments of :func:`scale_by_kfac`.

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
        damping=damping,
        damping_kind=damping_kind,
        decay=decay,
        factors_every=factors_every,
        inverses_every=inverses_every,
        estimator=estimator,
        likelihood=likelihood,
        norm_constraint=_norm_constraint(kl_clip, learning_rate),
        max_size=max_size,
        key=key,
        mask=mask,
    )
    return _with_momentum(preconditioner, learning_rate, momentum, mask)


def ekfac(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective,
    example: Example = None,
    *,
    momentum: float = 0.9,
    kl_clip: float | None = 1e-3,
    damping: optax.ScalarOrSchedule = 1e-3,
    decay: float = 0.95,
    factors_every: int = 1,
    inverses_every: int = 10,
    estimator: Estimator = "fisher",
    likelihood: Likelihood | None = None,
    max_size: int = 4096,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EKFAC with momentum and a KL clip.

    It is :func:`kfac` with the curvature of :func:`scale_by_ekfac`.

    Args:
      learning_rate: float or schedule.
      objective: what the network looks like: an objective, of whose ``predict`` only the program is
        read, when a state is made.
      example: keyword arguments of ``predict``, arrays or ``jax.ShapeDtypeStruct``, of which only
        shapes matter; ``None`` for an objective that holds its batch.
      momentum: of the natural gradients, in [0, 1).
      kl_clip: :math:`\kappa`: natural gradients are multiplied by :math:`\min(1, \sqrt{\kappa /
        (\eta^2 \langle V, G \rangle)})` with the learning rate :math:`\eta`; 1e-3 in Pauloski et
        al.  It keeps the first steps, in which curvature is small, from diverging. ``None``
        turns it off.
      damping: :math:`\lambda > 0`, float or schedule, relative to the curvature of the loss; it is
        added to the second moments S.
      decay: of the moving averages of the factors and of S, in [0, 1); default 0.95.
      factors_every: steps between refreshes of the factors and of S.
      inverses_every: steps between refreshes of the eigenbasis, a multiple of ``factors_every``.
      estimator: the curvature: ``"fisher"`` (default) from one random vector an example at the
        outputs; ``"ggn"``, the same matrix without sampling, one backward pass an output;
        ``"empirical"``, from the gradients of the loss. :func:`scale_by_kfac` compares them.
      likelihood: what the outputs are: ``"categorical"`` (logits), ``"bernoulli"`` (logits; the
        loss is a sum over outputs), ``"gaussian"`` (means with unit variance). ``None`` (default):
        whatever the loss is, up to 256 outputs an example.
      max_size: a factor with more rows than this is approximated by its diagonal.
      key: PRNG key or integer seed of the random vectors.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to precondition; updates of others pass unchanged. ``None``
        (default): all.

    Returns:
      The optimizer; its ``update`` takes the extra arguments of :func:`scale_by_kfac`.

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
        damping=damping,
        decay=decay,
        factors_every=factors_every,
        inverses_every=inverses_every,
        estimator=estimator,
        likelihood=likelihood,
        norm_constraint=_norm_constraint(kl_clip, learning_rate),
        max_size=max_size,
        key=key,
        mask=mask,
    )
    return _with_momentum(preconditioner, learning_rate, momentum, mask)


def _norm_constraint(
    kl_clip: Any, learning_rate: optax.ScalarOrSchedule
) -> optax.ScalarOrSchedule | None:
    check_number("learning_rate", learning_rate, 0, allow_schedule=True)
    if kl_clip is None:
        return None
    check_number("kl_clip", kl_clip, 0, open_low=True)
    return lambda count: kl_clip / jnp.asarray(value_of(learning_rate, count)) ** 2


def _with_momentum(
    preconditioner: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    check_number("momentum", momentum, 0, 1, open_high=True)
    return optax.chain(
        preconditioner,
        with_fixed_leaves(lambda _: optax.trace(momentum), mask),
        with_fixed_leaves(lambda _: optax.scale_by_learning_rate(learning_rate), mask),
    )


# -- the transformation ---------------------------------------------------------------------------


def _transformation(
    name: str,
    kind: Literal["factored", "eigen", "ekfac"],
    objective: Objective,
    example: Example,
    *,
    damping: optax.ScalarOrSchedule,
    decay: float,
    factors_every: int,
    inverses_every: int,
    estimator: Estimator,
    likelihood: Likelihood | None,
    norm_constraint: optax.ScalarOrSchedule | None,
    max_size: int,
    key: chex.PRNGKey | int,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    if not isinstance(objective, Objective):
        hint = ""
        if isinstance(objective, jax.Array):
            hint = " Optax's injection takes it for a schedule: use optax_accel.inject_hyperparams."
        raise TypeError(
            f"{name}: `objective` must be an optax_accel.Objective(predict, loss), whose program "
            f"tells how the parameters are used; got {type(objective).__name__}.{hint}"
        )
    check_example(name, objective, example)
    check_number("damping", damping, 0, open_low=True, allow_schedule=True)
    check_number("decay", decay, 0, 1, open_high=True)
    check_factor_periods(factors_every, inverses_every)
    check_choice("estimator", estimator, get_args(Estimator))
    if likelihood is not None:
        check_choice("likelihood", likelihood, get_args(Likelihood))
    if norm_constraint is not None:
        check_number("norm_constraint", norm_constraint, 0, open_low=True, allow_schedule=True)
    check_count("max_size", max_size, 1)
    initial_key = as_key(key)

    # Found once for each structure of the parameters.
    structures: dict[Any, tuple[Block, ...]] = {}

    def blocks_of(params: chex.ArrayTree) -> tuple[Block, ...]:
        leaves, treedef = jax.tree.flatten(params)
        known = treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if known not in structures:
            shapes = [jax.ShapeDtypeStruct(*leaf) for leaf in known[1]]
            abstract = jax.tree.unflatten(treedef, shapes)
            structures[known] = find(objective, abstract, example, mask, method=name).blocks
            warn_of_diagonals(name, structures[known], stacklevel=3)
        return structures[known]

    def initial_state(blocks: tuple[Block, ...], dtypes: Sequence[Any]) -> ScaleByKFACState:
        limit = static_integer("max_size", max_size, 1)  # it decides shapes
        factors: list[Any] = []
        inverses: list[Any] = []
        moments: list[Any] = []
        for block in blocks:
            dtype = jnp.result_type(jnp.float32, *(dtypes[i] for i in block.leaves))
            if not block.kronecker:
                factors.append(jnp.zeros(block.shapes[0], dtype))
                inverses.append(None)
                moments.append(None)
                continue
            shapes = stats.side_shapes(block, limit)
            factors.append(Kronecker(*(jnp.zeros(shape, dtype) for shape in shapes)))
            inverses.append(Kronecker(*(_identity(shape, dtype, kind) for shape in shapes)))
            moments.append(jnp.zeros(block.matrix_shape, dtype) if kind == "ekfac" else None)
        used = {dtypes[i] for block in blocks for i in block.leaves}
        return ScaleByKFACState(
            count=jnp.zeros((), jnp.int32),
            rng_key=jnp.copy(initial_key),
            step_scale=jnp.ones((), jnp.float32),
            accepted=jnp.ones((), bool),
            rejected=jnp.zeros((), jnp.int32),
            rejected_inverses=jnp.zeros((), jnp.int32),
            factor_weight=jnp.zeros((), jnp.result_type(jnp.float32, *used)),
            factors=tuple(factors),
            inverses=tuple(inverses),
            moments=tuple(moments),
        )

    def init_fn(params: chex.ArrayTree) -> ScaleByKFACState:
        announce_factors(factors_every, inverses_every)
        if is_placeholder(params):
            # Nothing in the state is like the parameters: the factors are like the layers.  Which
            # these are, a placeholder does not tell; where it is open, a leaf stands for all.
            if len(structures) == 1:
                (((_, leaves), blocks),) = structures.items()
                return initial_state(blocks, [dtype for _, dtype in leaves])
            leaf: Any = jnp.zeros(())
            return initial_state((), ())._replace(factors=leaf, inverses=leaf, moments=leaf)
        check_params(params, name)
        check_selected(params, mask, name)
        return initial_state(blocks_of(params), list(map(jnp.result_type, jax.tree.leaves(params))))

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByKFACState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        refresh: RefreshLike = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByKFACState]:
        refresh = of_factors(refresh)
        check_params(params, name, "tx.update(grads, state, params, value_fn=objective)")
        blocks, count = blocks_of(params), state.count
        strength = value_of(damping, count)

        def refreshed(state: ScaleByKFACState, invert: bool | jax.Array) -> ScaleByKFACState:
            own = curvature_value_fn is not None
            current = as_objective(
                curvature_value_fn if own else value_fn,
                extra_args,
                method=name,
                params=params,
                why="measure the curvature at its outputs",
                argument="curvature_value_fn" if own else "value_fn",
                needs_outputs=True,
            )
            source = state.rng_key, state.count
            batch = _measure(name, current, params, blocks, mask, estimator, likelihood, source)
            new = _average_factors(state, batch, decay)
            if invert is True:
                new = _invert(new, batch, strength, kind)
            elif invert is not False:

                def inverted(state: ScaleByKFACState) -> ScaleByKFACState:
                    return _invert(state, batch, strength, kind)

                new = lax.cond(invert, inverted, lambda state: state, new)
            return _average_moments(state, new, batch, decay) if kind == "ekfac" else new

        if refresh is None:
            periods = known_integer(factors_every), known_integer(inverses_every)
            together = None not in periods and periods[0] == periods[1]
            invert = together or count % inverses_every == 0
            if periods[0] == 1:
                state = refreshed(state, invert)
            else:
                state = lax.cond(
                    count % factors_every == 0,
                    lambda state: refreshed(state, invert),
                    lambda state: state,
                    state,
                )
        elif refresh:
            state = refreshed(state, refresh == "inverses")

        bound = None if norm_constraint is None else value_of(norm_constraint, count)
        # Integers and keys that are masked out may have no update at all, None.
        treedef: Any = jax.tree.structure(params)
        leaves = treedef.flatten_up_to(updates)
        leaves, scale = _precondition(leaves, state, blocks, strength, bound)
        new_updates = jax.tree.unflatten(treedef, leaves)
        return new_updates, state._replace(count=optax.safe_increment(count), step_scale=scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _identity(shape: tuple[int, ...], dtype: Any, kind: str) -> Any:
    ones = jnp.ones(shape[:1], dtype)
    if len(shape) == 1:
        return ones if kind == "factored" else stats.Eigen(ones, None)
    identity = jnp.eye(shape[0], dtype=dtype)
    return identity if kind == "factored" else stats.Eigen(ones, identity)


class _Batch(NamedTuple):
    """What one batch tells of the curvature."""

    objective: Objective
    blocks: tuple[Block, ...]
    num_examples: int
    values: Any
    gradients: Any
    generic: Any
    weights: jax.Array  # of examples (and positions), 1 on average over all replicas


def _measure(
    name: str,
    objective: Objective,
    params: chex.ArrayTree,
    blocks: tuple[Block, ...],
    mask: Mask,
    estimator: Estimator,
    likelihood: Likelihood | None,
    source: tuple[jax.Array, jax.Array],
) -> _Batch:
    """Evaluates the network on a batch, and gradients at its layers for a vector of each output."""
    params = objective.vary(params)
    network = find(objective, params, mask=mask, method=name)
    for expected, found in itertools.zip_longest(blocks, network.blocks):
        if expected is None or found is None or expected.signature != found.signature:
            raise ValueError(
                f"{name}: this step's network is not the one it was built with. Expected "
                f"{expected and expected.signature}, found {found and found.signature}. If they "
                "are the same, build with an example batch of the usual size."
            )
    n = network.num_examples
    outputs, pullback, values = network.capture(jax.tree.leaves(params), objective.vary)
    samples, weights = output_gradients(objective, outputs, estimator, likelihood, *source, n)
    weights = weights / objective.mean_of_replicas(jnp.mean(weights))
    # Pulled back as large as the gradient of the mean loss: a rule of the user's that is not linear
    # (clipping) then does what it does there.
    samples = jax.tree.map(lambda s: s / n, samples)
    if jax.tree.leaves(samples)[0].shape[0] == 1:
        pulled = pullback(jax.tree.map(lambda s: s[0], samples))
        pulled = jax.tree.map(lambda g: g[None], pulled)
    else:
        pulled = jax.vmap(pullback)(samples)
    gradients, generic = jax.tree.map(lambda g: n * g, pulled)
    return _Batch(objective, network.blocks, n, values, gradients, generic, weights)


def _average_factors(state: ScaleByKFACState, batch: _Batch, decay: Any) -> ScaleByKFACState:
    """Moving averages of the factors, unless the batch gives numbers that are not finite."""
    n, axis = batch.num_examples, batch.objective.axis_name
    means: list[Any] = []
    squares = {}
    for i, (block, old) in enumerate(zip(batch.blocks, state.factors, strict=True)):
        dtype = jax.tree.leaves(old)[0].dtype
        new: Any
        if block.kronecker:
            shapes = Kronecker(*(side.shape for side in old))
            new = stats.kronecker_statistics(
                block, batch.values, batch.gradients, batch.weights, shapes, dtype
            )
        elif block.kind == "generic":
            # The squared mean gradient of n independent examples, times n.
            new = batch.generic[block.leaves[0]].astype(dtype) / n
            squares[i] = n * (1 if axis is None else lax.axis_size(axis))
        else:
            new = stats.diagonal_statistics(block, batch.values, batch.gradients, n, dtype)
        means.append(new)
    means = batch.objective.mean_of_replicas(means)
    for i, num_examples in squares.items():
        means[i] = num_examples * jnp.sum(means[i] ** 2, axis=0)
    # A matrix of sums of products with entries that are not finite has such a diagonal.
    leaves = [
        leaf if isinstance(m, Kronecker) else leaf.ravel()
        for m in means
        for leaf in jax.tree.leaves(m)
    ]
    finite = jnp.isfinite(sum(stats.traces(leaves)))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        kept = jnp.asarray(decay, old.dtype)
        return lax.select(finite, kept * old + (1 - kept) * new.astype(old.dtype), old)

    factors = jax.tree.map(average, state.factors, tuple(means))
    weight = average(state.factor_weight, jnp.ones_like(state.factor_weight))
    return state._replace(
        accepted=finite, rejected=state.rejected + ~finite, factors=factors, factor_weight=weight
    )


def _invert(state: ScaleByKFACState, batch: _Batch, damping: Any, kind: str) -> ScaleByKFACState:
    """New inverses or eigendecompositions; old ones stay where they are not finite.

    Before the first batch is accepted there is nothing to invert.
    """
    chosen = [i for i, block in enumerate(batch.blocks) if block.kronecker]
    factors = [factor for i in chosen for factor in state.factors[i]]
    scale = _corrected(jnp.ones_like(state.factor_weight), state.factor_weight)
    arguments: list[tuple[jax.Array, ...]] = [
        (scale.astype(factor.dtype) * factor,) for factor in factors
    ]
    function: Any = stats.eigendecomposition
    if kind == "factored":
        function, strengths = stats.damped_inverse, stats.split_damping(factors, damping)
        arguments = [(*args, s) for args, s in zip(arguments, strengths, strict=True)]
    results = stats.share(function, arguments, batch.objective.axis_name, batch.objective.vary)
    inverses, moments = list(state.inverses), list(state.moments)
    failed = jnp.zeros((), jnp.int32)
    for i, inputs, outputs in zip(chosen, results[::2], results[1::2], strict=True):
        new, old = Kronecker(inputs, outputs), state.inverses[i]
        # A decomposition that fails is NaN everywhere; diagonal factors cannot fail.
        finite = jnp.isfinite(sum(leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(new)))
        new = _choose(finite & (state.factor_weight > 0), new, old)
        failed += ~finite & (state.factor_weight > 0)
        if kind == "ekfac":
            moments[i] = stats.change_basis(moments[i], old, new)
        inverses[i] = new
    return state._replace(
        accepted=state.accepted & (failed == 0),
        rejected_inverses=state.rejected_inverses + failed,
        inverses=tuple(inverses),
        moments=tuple(moments),
    )


def _average_moments(
    before: ScaleByKFACState, state: ScaleByKFACState, batch: _Batch, decay: Any
) -> ScaleByKFACState:
    """The moving average of EKFAC's second moments.

    Args:
      before: the state before the batch, which stays if the batch's moments are not finite.
      state: with the factors and the basis to which the batch has led.
      batch: the batch.
      decay: of the average.
    """
    new = [
        stats.eigen_statistics(
            block,
            batch.values,
            batch.gradients,
            batch.num_examples,
            basis,
            old.dtype,
            batch.objective.vary,
        )
        for block, basis, old in zip(batch.blocks, state.inverses, state.moments, strict=True)
        if old is not None
    ]
    means = batch.objective.mean_of_replicas(new)
    finite = jnp.isfinite(sum(jnp.sum(mean) for mean in means))
    usable = state.rejected == before.rejected
    remaining = iter(means)

    def average(old: jax.Array) -> jax.Array:
        kept = jnp.asarray(decay, old.dtype)
        return jnp.where(usable, kept * old + (1 - kept) * next(remaining), old)

    def estimates(state: ScaleByKFACState) -> chex.ArrayTree:
        return state.factor_weight, state.factors, state.inverses, state.moments

    state = state._replace(moments=jax.tree.map(average, state.moments))
    refused = usable & ~finite
    weight, factors, inverses, moments = _choose(refused, estimates(before), estimates(state))
    return state._replace(
        accepted=state.accepted & ~refused,
        rejected=state.rejected + refused,
        factor_weight=weight,
        factors=factors,
        inverses=inverses,
        moments=moments,
    )


def _choose(condition: jax.Array, one: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda a, b: lax.select(condition, a, b), one, other)


def _corrected(average: jax.Array, weight: jax.Array, otherwise: Any = 0) -> jax.Array:
    """A moving average that started at 0, divided by the weights it has."""
    weight = weight.astype(average.dtype)
    return jnp.where(weight > 0, average / jnp.where(weight > 0, weight, 1), otherwise)


def _precondition(
    leaves: list[Any],
    state: ScaleByKFACState,
    blocks: tuple[Block, ...],
    damping: Any,
    bound: Any,
) -> tuple[list[Any], jax.Array]:
    """The natural gradient and what it was multiplied by to keep its norm within bounds."""
    new = dict[int, jax.Array]()
    product: Any = 0.0
    for block, factors, inverses, moments in zip(
        blocks, state.factors, state.inverses, state.moments, strict=True
    ):
        dtype = jax.tree.leaves(factors)[0].dtype
        strength = jnp.asarray(damping, dtype)
        wide = {i: jnp.asarray(leaves[i], dtype) for i in block.leaves}
        if not block.kronecker:
            (i,) = block.leaves
            new[i] = wide[i] / (_corrected(factors, state.factor_weight, 1) + strength)
            product += jnp.sum(new[i] * wide[i])
            continue
        gradient = block.to_matrix(wide)
        if isinstance(inverses.inputs, stats.Eigen):
            values = stats.kronecker_eigenvalues(inverses)
            if moments is not None:
                values = _corrected(moments, state.factor_weight, 1)
            result = stats.apply_in_basis(inverses, values, strength, gradient)
        else:
            result = stats.apply_inverses(inverses, gradient)
        product += jnp.sum(result * gradient)
        new.update(zip(block.leaves, block.from_matrix(result), strict=True))
    scale = jnp.ones((), jnp.float32)
    if bound is not None:
        ratio = bound / jnp.where(product > 0, product, 1)
        scale = jnp.where(product > 0, jnp.minimum(1, jnp.sqrt(ratio)), 1).astype(jnp.float32)
        new = {i: scale.astype(leaf.dtype) * leaf for i, leaf in new.items()}
    for i, leaf in new.items():
        new[i] = leaf.astype(jnp.result_type(leaves[i]))
    return [new.get(i, leaf) for i, leaf in enumerate(leaves)], scale
