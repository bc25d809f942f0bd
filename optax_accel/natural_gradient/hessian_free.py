r"""Hessian-free optimization: Newton-like steps with Gauss-Newton products and conjugate gradients.

.. math::
  (G + \lambda I)\, d = -g, \qquad
  q(s) = g^\top s + \tfrac12 s^\top G s, \qquad
  \rho = \frac{L(x + s) - L(x)}{q(s)} \quad \text{for the step } s = \alpha d ,

with G the generalized Gauss-Newton matrix of a curvature batch, solved by the method of conjugate
gradients (CG) from a warm start.  The damping :math:`\lambda` rises where the quadratic model q
promised more than was gained (:math:`\rho < 1/4`, a loss that did not change included) and falls
where it can be trusted (:math:`\rho > 3/4`): the rule of Levenberg and Marquardt.  It stays where
the promise is below the rounding error of the loss, or the step below that of the parameters.

Martens, `Deep learning via Hessian-free optimization
<https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`_, ICML 2010; Martens, Sutskever,
`Training deep and recurrent networks with Hessian-free optimization
<https://www.cs.toronto.edu/~jmartens/docs/HF_book_chapter.pdf>`_, 2012.

Faithful: the Gauss-Newton matrix, the damping and its rule, the warm start, the threshold of
relative progress, the power in the preconditioner.  Our reading: CG is JAX's, which stops by the
norm of the residual only, so it is run for a window of iterations at a time and the progress is
looked at between windows.  Every window starts CG afresh from where it got: one product more, and
some of the speed of convergence lost; so windows grow, to half of the iterations made (in the
papers a tenth, without restarts).  The model in rho is the undamped one.  The diagonal in the
preconditioner is that of G, estimated with random signs as in AdaHessian (Yao et al.,
`<https://arxiv.org/abs/2006.00719>`_, 2021); the papers' sum of squared gradients of single
examples cannot be had from a loss that is only known as a whole.  The papers' line search is a
halving of steps that raise the loss.  Left out: the choice among earlier iterates of CG.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    as_arrays,
    check_count,
    check_flag,
    check_number,
    known_integer,
    value_of,
)
from optax_accel._derivatives import LinearFunction
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import max_norm, stack
from optax_accel.natural_gradient.conjugate_gradients import Solution, solve
from optax_accel.natural_gradient.levenberg_marquardt import (
    Reduction,
    damping_factor,
    reduction_of,
)
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, announce_cost

_NAME = "hessian_free"
# The average of the estimates of the diagonal remembers about ten steps, like momentum.
_MEMORY = 0.9


class HessianFreeState(NamedTuple):
    """State of :func:`hessian_free`; every field can be read with ``optax.tree.get``.

    Attributes:
      count: number of updates made; int32 scalar.
      damping: lambda, as it will be in the next step; float32 scalar.
      direction: d of the last step, where the next one starts from; like the parameters, at least
        float32 (masked-out leaves are ``optax.MaskedNode``).
      num_iterations: iterations of CG in the last step, counted in whole windows (it ends earlier
        where it solves the system up to rounding); int32 scalar.
      reduction_ratio: rho of the last step, before it was halved: the change of the loss over the
        predicted one, 1 on quadratic losses and where nothing was promised, negative where the loss
        rose; float32 scalar.
      model_decrease: the decrease of the loss that the model predicted, ``-q``; float32 scalar.
      step_size: what d was multiplied by in the last step: the learning rate, or a part of it where
        the loss would have risen (0: no step was made); float32 scalar.
      diagonal_rms: root of the average of the squared estimates of the diagonal of G; without the
        preconditioner an empty tuple.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    damping: jax.Array
    direction: chex.ArrayTree
    num_iterations: jax.Array
    reduction_ratio: jax.Array
    model_decrease: jax.Array
    step_size: jax.Array
    diagonal_rms: chex.ArrayTree


def hessian_free(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float = 1.0,
    damping_factor: float = 1.5,
    max_iterations: int = 250,
    tolerance: float = 5e-4,
    decay: float = 0.95,
    max_halvings: int = 10,
    precondition: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Solves for a damped Gauss-Newton step with conjugate gradients, no matrix being formed.

    ``update`` takes these extra arguments:

    * ``value_fn``: the loss of the incoming gradient, evaluated before and after the step;
      an :class:`~optax_accel.Objective` made of ``predict`` and ``loss``, which give the
      Gauss-Newton products.  The loss should be convex in the outputs, as the usual ones are.
    * ``curvature_value_fn``: the objective whose Gauss-Newton matrix is used; default
      ``value_fn``.  A part of the batch makes products cheaper; the gradient should come from a
      large one.

    A step costs 2 losses, a product to look at the warm start, and a product an iteration plus 2 a
    window; a product costs about 2 gradients.  The iterations are a loop in the compiled step, in
    which XLA runs convolutions 6 to 300 times slower on CPU (jax#12868); on accelerators, and for
    dense networks, loops are as fast as the rest.  Under ``vmap`` all members iterate as long as
    one of them does.

    Args:
      learning_rate: :math:`\alpha`, float or schedule; default 1, which goes to where the model is
        lowest.
      damping: :math:`\lambda` in the first step, at least 0; default 1, for losses that are means
        over examples. A damping of 0 stays 0, for systems that have a solution without it.
      damping_factor: what the damping is multiplied or divided by when it changes, at least 1;
        default 3/2, as in both papers. 1 keeps the damping constant.
      max_iterations: the most iterations of CG in a step, at least 1; default 250, as in Martens
        (2010).
      tolerance: CG stops when over the last k iterations the damped model fell by less than a
        fraction ``k * tolerance`` of its whole fall; default 5e-4, as in Martens (2010). With 0 it
        goes on until the model falls no more.
      decay: in [0, 1]; CG starts from the last direction times this, unless the model prefers to
        start from zero. Default 0.95, as in Martens and Sutskever (2012); 0 always starts from
        zero.
      max_halvings: how often a step is halved as long as it raises the loss of its own batch; if
        the loss still rises then, the step is left out. A halving costs a loss. With 0 all steps
        are made whole.
      precondition: whether to solve with the preconditioner :math:`(\operatorname{diag} G +
        \lambda)^{3/4}`, with a running estimate of the diagonal that takes one product per step;
        default False.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to optimize. The others are held fixed, and their updates pass
        through unchanged. ``None`` (default) selects all leaves. Use this instead of
        ``optax.masked``, inside which the loss cannot be evaluated.

    Returns:
      An optimizer with state :class:`HessianFreeState`.  Memory: about 6 copies of the parameters,
      and what a gradient stores.

    Raises:
      ValueError: an argument outside its range, here; in ``update``: missing ``value_fn`` or
        ``params``, other parameters than those of ``init``, or an objective without ``predict``.
      TypeError: an argument of another kind; parameters that are not real floating point, outputs
        that are not floating point.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 3.0, 5.0])
      >>> objective = oa.Objective(lambda w: x @ w, lambda out: jnp.mean((out - y) ** 2))
      >>> tx = oa.hessian_free(damping=0.0)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(objective.grad(params), state, params, value_fn=objective)
      >>> [round(float(w), 3) for w in optax.apply_updates(params, updates)]  # least squares
      [1.0, 2.0]
      >>> round(float(optax.tree.get(state, "reduction_ratio")), 3)
      1.0

    References:
      Martens (2010), section 4; Martens and Sutskever (2012), sections 4 to 8.
    """
    settings = _Settings(
        learning_rate=learning_rate,
        damping=damping,
        damping_factor=damping_factor,
        max_iterations=max_iterations,
        tolerance=tolerance,
        decay=decay,
        max_halvings=max_halvings,
        precondition=precondition,
        mask=mask,
    )

    def update_fn(
        updates: chex.ArrayTree,
        state: HessianFreeState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, HessianFreeState]:
        check_undivided(params, _NAME)
        params = None if params is None else as_arrays(params)
        chosen = None if params is None else resolve(params, mask)

        def objective_of(function: Any, argument: str, why: str) -> Objective:
            objective = as_objective(
                function,
                extra_args,
                method=_NAME,
                params=params,
                why=why,
                argument=argument,
                needs_outputs=curvature_value_fn is None,
            )
            return objective.precompose(lambda part: merge(part, params, chosen))

        loss = objective_of(value_fn, "value_fn", "compare the loss with what was predicted")
        curved = loss
        if curvature_value_fn is not None:
            curved = objective_of(curvature_value_fn, "curvature_value_fn", "take its curvature")
        position, incoming = select(params, chosen), select(updates, chosen)
        if not jax.tree.leaves(incoming):  # nothing to move
            return updates, state._replace(count=optax.safe_increment(state.count))
        step, state = _step(settings, state, position, incoming, loss, curved)
        return merge(step, updates, chosen), state

    return optax.GradientTransformationExtraArgs(
        functools.partial(_initial_state, settings), update_fn
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The arguments of :func:`hessian_free`, checked."""

    learning_rate: optax.ScalarOrSchedule
    damping: float
    damping_factor: float
    max_iterations: int
    tolerance: float
    decay: float
    max_halvings: int
    precondition: bool
    mask: Mask

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, 0, allow_schedule=True)
        check_number("damping", self.damping, 0)
        check_number("damping_factor", self.damping_factor, 1)
        check_count("max_iterations", self.max_iterations, 1)
        check_number("tolerance", self.tolerance, 0)
        check_number("decay", self.decay, 0, 1)
        check_count("max_halvings", self.max_halvings, 0)
        check_flag("precondition", self.precondition)


def _initial_state(settings: _Settings, params: chex.ArrayTree) -> HessianFreeState:
    check_params(params, _NAME)
    check_selected(params, settings.mask, _NAME)
    check_undivided(params, _NAME)
    announce_cost(
        Cost(
            f"up to {settings.max_iterations} iterations of conjugate gradients, one "
            "Gauss-Newton product each, and the loss before and after the step"
        )
    )
    params = as_arrays(params)
    selected = select(params, resolve(params, settings.mask))

    def zeros() -> chex.ArrayTree:
        return jax.tree.map(lambda p: jnp.zeros_like(_widen(p)), selected)

    return HessianFreeState(
        count=jnp.zeros((), jnp.int32),
        damping=jnp.array(settings.damping, jnp.float32),
        direction=zeros(),
        num_iterations=jnp.zeros((), jnp.int32),
        reduction_ratio=jnp.ones((), jnp.float32),
        model_decrease=jnp.zeros((), jnp.float32),
        step_size=jnp.zeros((), jnp.float32),
        diagonal_rms=zeros() if settings.precondition else (),
    )


def _step(
    settings: _Settings,
    state: HessianFreeState,
    position: chex.ArrayTree,
    incoming: chex.ArrayTree,
    loss: Objective,
    curved: Objective,
) -> tuple[chex.ArrayTree, HessianFreeState]:
    """The step and the new state.

    Args:
      settings: of the method.
      state: before the step.
      position: the parameters that are optimized.
      incoming: their gradient.
      loss: whose gradient that is.
      curved: whose Gauss-Newton matrix is taken.
    """
    gradient = jax.tree.map(_widen, incoming)
    curvature = curved.gauss_newton(position)
    # So that the first damping can be changed by inject_hyperparams, like all other numbers.
    damping = jnp.where(state.count == 0, settings.damping, state.damping)
    solution, rms = _solve(settings, state, damping, gradient, curvature, curved)
    rate = value_of(settings.learning_rate, state.count)
    line = _Line(loss, position, solution.direction, incoming)
    reduction = _measure(line, solution, rate, gradient)
    factor = damping_factor(settings.damping_factor, reduction)
    failed = reduction.usable & (solution.broken > 0)
    factor = jnp.where(failed, settings.damping_factor, factor)
    size = _halved(settings.max_halvings, line, reduction, rate)
    step = line.step(size)
    finite = jnp.isfinite(max_norm(solution.direction))
    limits = jnp.finfo(jnp.float32)
    new_damping = jnp.clip((damping * factor).astype(jnp.float32), limits.tiny, limits.max)
    return step, HessianFreeState(
        count=optax.safe_increment(state.count),
        # Positive damping stays positive and finite, so that it can change again.
        damping=jnp.where(damping > 0, new_damping, 0).astype(jnp.float32),
        # Nothing bad is started from.
        direction=jax.tree.map(lambda d: jnp.where(finite, d, 0), solution.direction),
        num_iterations=jnp.round(solution.num_iterations).astype(jnp.int32),
        reduction_ratio=reduction.ratio.astype(jnp.float32),
        model_decrease=-reduction.predicted.astype(jnp.float32),
        step_size=size.astype(jnp.float32),
        diagonal_rms=rms,
    )


def _solve(
    settings: _Settings,
    state: HessianFreeState,
    damping: jax.Array,
    gradient: chex.ArrayTree,
    curvature: LinearFunction,
    curved: Objective,
) -> tuple[Solution, chex.ArrayTree]:
    """The direction, and the running estimate of the diagonal."""
    rms, diagonal = state.diagonal_rms, None
    if settings.precondition:
        rms, diagonal = _diagonal(curvature, rms, state.count)
    start = jax.tree.map(lambda d: d * jnp.asarray(settings.decay, d.dtype), state.direction)

    # JAX's CG takes everything in a shard_map that has collectives for different between the
    # devices; the mean of what is the same says that it is, and keeps rounding from adding up.
    def product(vector: chex.ArrayTree) -> chex.ArrayTree:
        return curved.vary(curvature(vector))

    problem = curved.vary((damping, gradient, start, diagonal))
    solution = solve(
        product,
        *problem,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
    )
    return curved.mean(solution), rms


class _Line(NamedTuple):
    """The loss along a direction."""

    loss: Objective
    position: chex.ArrayTree
    direction: chex.ArrayTree
    incoming: chex.ArrayTree  # has the dtypes of steps

    def step(self, size: Any) -> chex.ArrayTree:
        return jax.tree.map(
            lambda d, u: jnp.where(size == 0, 0, jnp.asarray(size, d.dtype) * d).astype(u.dtype),
            self.direction,
            self.incoming,
        )

    def end(self, size: Any) -> chex.ArrayTree:
        return optax.apply_updates(self.position, self.step(size))

    def loss_after(self, size: Any) -> jax.Array:
        return _widen(self.loss(self.end(size)))


def _measure(line: _Line, solution: Solution, rate: Any, gradient: chex.ArrayTree) -> Reduction:
    """The loss before and after a whole step, and what the model had predicted."""
    # In units that neither overflow nor underflow before they are multiplied.
    predicted = rate * solution.slope + rate**2 * solution.bending / 2
    predicted = predicted * solution.scale[0] * solution.scale[1]
    before, moved = line.loss(line.position), _differ(line.end(rate), line.position)
    return reduction_of(before, line.loss_after(rate), predicted, gradient, moved)


def _halved(max_halvings: Any, line: _Line, reduction: Reduction, rate: Any) -> jax.Array:
    """The size of the step: the rate, halved as long as the loss rises; 0 where it still does."""
    telling = reduction.telling

    def rises(after: jax.Array) -> jax.Array:
        return telling & ~((after <= reduction.before) & jnp.isfinite(after))

    size = jnp.where(telling, rate, rate)  # to shard_map, like what it will be compared with
    if known_integer(max_halvings) == 0:
        return size
    size, after, _ = lax.while_loop(
        lambda carry: rises(carry[1]) & (carry[2] < max_halvings),
        lambda carry: (carry[0] / 2, line.loss_after(carry[0] / 2), carry[2] + 1),
        (size, reduction.after, jnp.where(telling, 0, 0)),
    )
    return jnp.where(rises(after) & (max_halvings > 0), 0, size)


def _diagonal(
    curvature: LinearFunction, rms: chex.ArrayTree, count: jax.Array
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The root of the running mean of squared estimates ``v * G v``, and the diagonal it gives."""
    # The same on all replicas; the probes of different steps are independent.
    key = jax.random.fold_in(jax.random.key(0), count)
    probe = optax.tree.random_like(key, rms, sampler=jax.random.rademacher)
    estimate = jax.tree.map(jnp.multiply, probe, curvature(probe))
    rms = jax.tree.map(
        # Its own squares would overflow long before the estimates do.
        lambda r, e: jnp.hypot(
            _MEMORY**0.5 * r, (1 - _MEMORY) ** 0.5 * jnp.where(jnp.isfinite(e), e, 0)
        ),
        rms,
        estimate,
    )
    correction = jnp.sqrt(1 - _MEMORY ** (count + 1))
    return rms, jax.tree.map(lambda r: r / correction.astype(r.dtype), rms)


def _differ(tree: chex.ArrayTree, other: chex.ArrayTree) -> jax.Array:
    """Whether any entry of two trees differs."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return jnp.any(stack([jnp.any(a != b) for a, b in pairs]))


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
