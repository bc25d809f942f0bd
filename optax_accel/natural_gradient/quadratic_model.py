r"""Learning rate, momentum and damping from the exact quadratic model of the loss.

A preconditioner (K-FAC, say) turns the gradient g into a direction :math:`\Delta`.  With the
previous update :math:`\delta_0`, the Gauss-Newton matrix G of the batch, and damping
:math:`\lambda`, the update is

.. math::
  \delta = -\alpha \Delta + \mu \delta_0, \qquad
  M(\delta) = L(\theta) + g^\top \delta + \tfrac12 \delta^\top (G + \lambda I)\, \delta ,

with the learning rate :math:`\alpha` and the momentum :math:`\mu` that minimize M, the solution of
a system of two equations.  However rough the preconditioner is, the length of the step is right.

Martens, Grosse, `Optimizing neural networks with Kronecker-factored approximate curvature
<https://arxiv.org/abs/1503.05671>`_, 2015, sections 6.4 (learning rate), 6.5 (damping) and 7
(momentum).

Faithful: the model with its damping, the two equations, the reduction ratio.  Ours: any element of
a chain can be the preconditioner, and is given the damping as the extra argument ``damping``; in
place of a system that is singular up to rounding (the first step has no previous update) the
learning rate alone is solved for; the trust region.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._arguments import as_arrays, check_inner, check_number, value_of
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import max_norm
from optax_accel.curvature import blocks
from optax_accel.natural_gradient.levenberg_marquardt import (
    LevenbergMarquardt,
    TrustRegion,
    reduction_of,
)
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, RefreshLike, announce_cost, announce_damping, of_damping

Exact: TypeAlias = Literal["exact"]
Damping: TypeAlias = optax.ScalarOrSchedule | LevenbergMarquardt
_NAME = "quadratic_model"


class QuadraticModelState(NamedTuple):
    """State of :func:`quadratic_model`; its scalars can be read with ``optax.tree.get``.

    Attributes:
      count: number of updates made; int32 scalar.
      damping_value: lambda, as it will be in the next step where it adapts; float32 scalar.
      trust_radius: the radius, as it will be in the next step; infinite without a trust region.
      reduction_ratio: the change of the loss over the predicted one when it was last measured; 1
        before that.
      model_decrease: the decrease of the loss that the model predicted, when it was last computed;
        float32 scalar.
      step_size: alpha of the last step; float32 scalar.
      step_momentum: mu of the last step; float32 scalar.
      previous_update: the last finite update of the selected parameters, in at least float32; an
        empty tuple with momentum 0.
      inner_state: of the preconditioner.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    damping_value: jax.Array
    trust_radius: jax.Array
    reduction_ratio: jax.Array
    model_decrease: jax.Array
    step_size: jax.Array
    step_momentum: jax.Array
    previous_update: chex.ArrayTree
    inner_state: optax.OptState


def quadratic_model(
    preconditioner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule | Exact = "exact",
    momentum: optax.ScalarOrSchedule | Exact = "exact",
    *,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt,
    trust_region: TrustRegion | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps along a preconditioned gradient whose length comes from the quadratic model.

    ``update`` takes these extra arguments and hands them, ``damping`` and all others on to the
    preconditioner:

    * ``value_fn``: the :class:`~optax_accel.Objective` of this step's batch, built from ``predict``
      and ``loss``; required.
    * ``curvature_value_fn``: another objective, whose Gauss-Newton matrix is taken; default
      ``value_fn``.  A part of the batch makes the products cheaper.
    * ``refresh``: with ``None`` (default), damping and radius are adapted inside the compiled step,
      by ``lax.cond`` on the step count.  With a static Python value the host decides:
      :func:`~optax_accel.refresh_at` gives it (:class:`~optax_accel.Refresh` has a field
      ``damping``).

    Cost of a step: two Gauss-Newton products, vectorized (one without momentum); none where
    learning rate and momentum are given and there is no trust region.  Where damping or radius
    adapt, two losses in addition, and a product if there was none.

    Args:
      preconditioner: maps gradients to directions of which the negative is downhill, e.g.
        :func:`scale_by_kfac`, :func:`scale_by_batch_gauss_newton`, or a chain. If its ``update``
        takes ``damping``, it is given that of this step.
      learning_rate: ``"exact"`` (default) for the minimum of the model; or a float or schedule, at
        least 0.
      momentum: ``"exact"`` (default) for the minimum of the model; or a float or schedule in [0,
        1), by which the previous update is multiplied.
      damping: :math:`\lambda` of the model and of the preconditioner: a positive float, a schedule,
        or a :class:`LevenbergMarquardt` that adapts it.
      trust_region: a :class:`TrustRegion` that bounds the length of steps in the metric of the
        Gauss-Newton matrix; ``None`` (default) leaves it as it is.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to optimize. The others are held fixed, and what the
        preconditioner makes of their updates passes through. ``None`` (default) selects all leaves.

    Returns:
      An optimizer with state :class:`QuadraticModelState`.  Memory: a copy of the parameters beside
      the preconditioner's.

    Raises:
      ValueError: an argument outside its range, here; in ``update``: missing ``value_fn`` or
        ``params``, or an objective without ``predict``.
      TypeError: an argument of another kind; selected parameters that are not real floating point.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> objective = oa.Objective(lambda w: w, lambda out: 2 * (out[0] - 1) ** 2 + out[1] ** 2)
      >>> tx = oa.quadratic_model(optax.identity(), damping=1e-6)  # conjugate gradients
      >>> params = jnp.array([0.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     grads = objective.grad(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(params, jnp.array([1.0, 0.0]), atol=1e-5))
      True

    References:
      Martens and Grosse (2015), sections 6.4, 6.5 and 7.
    """
    settings = _Settings(learning_rate, momentum, damping, trust_region, mask)
    check_inner(preconditioner, "preconditioner")
    inner = optax.with_extra_args_support(preconditioner)

    def init_fn(params: chex.ArrayTree) -> QuadraticModelState:
        check_params(params, _NAME)
        check_selected(params, mask, _NAME)
        check_undivided(params, _NAME)
        if settings.every is not None:
            announce_damping(settings.every)
        announce_cost(Cost(settings.cost()))
        selected = select(as_arrays(params), resolve(params, mask))
        return QuadraticModelState(
            count=jnp.zeros((), jnp.int32),
            damping_value=jnp.asarray(settings.initial_damping, jnp.float32),
            trust_radius=jnp.asarray(
                jnp.inf if trust_region is None else trust_region.radius, jnp.float32
            ),
            reduction_ratio=jnp.ones((), jnp.float32),
            model_decrease=jnp.zeros((), jnp.float32),
            step_size=jnp.zeros((), jnp.float32),
            step_momentum=jnp.zeros((), jnp.float32),
            previous_update=(
                jax.tree.map(lambda p: jnp.zeros_like(_widen(p)), selected)
                if settings.remembers
                else ()
            ),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: QuadraticModelState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        refresh: RefreshLike = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, QuadraticModelState]:
        due = of_damping(refresh)
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
                needs_outputs=True,
            )
            return objective.precompose(lambda part: merge(part, params, chosen))

        loss = objective_of(value_fn, "value_fn", "compare the loss with the quadratic model")
        curved = loss
        if curvature_value_fn is not None:
            curved = objective_of(curvature_value_fn, "curvature_value_fn", "take its curvature")
            extra_args["curvature_value_fn"] = curvature_value_fn
        now = settings.damping_at(state)
        directions, inner_state = inner.update(
            updates,
            state.inner_state,
            params,
            value_fn=value_fn,
            refresh=refresh,
            **{**extra_args, "damping": now},
        )
        state = state._replace(inner_state=inner_state, damping_value=now)
        incoming, direction = select(updates, chosen), select(directions, chosen)
        if not jax.tree.leaves(incoming):  # nothing to move
            return directions, state._replace(count=optax.safe_increment(state.count))
        problem = _Problem(
            loss, curved, select(params, chosen), jax.tree.map(_widen, incoming), now
        )
        step, state = _step(settings, problem, state, direction, due)
        return merge(step, directions, chosen), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of :func:`quadratic_model`, checked."""

    learning_rate: Any
    momentum: Any
    damping: Damping
    trust_region: TrustRegion | None
    mask: Mask

    def __post_init__(self) -> None:
        check_rate("learning_rate", self.learning_rate)
        check_rate("momentum", self.momentum, 1)
        check_damping(self.damping)
        if not isinstance(self.trust_region, TrustRegion | None):
            raise TypeError(
                "`trust_region` must be an optax_accel.TrustRegion, such as TrustRegion(0.3), or "
                f"None; got {self.trust_region!r}."
            )
        _ = self.every  # which raises if there are two of them

    @property
    def remembers(self) -> bool:
        """Whether the previous update is part of the next one."""
        return not (isinstance(self.momentum, int | float) and self.momentum == 0)

    @property
    def in_every_step(self) -> bool:
        """Whether every step needs products."""
        return "exact" in (self.learning_rate, self.momentum) or self.trust_region is not None

    @property
    def every(self) -> int | None:
        """Steps between two measurements of the reduction ratio; None if nothing adapts."""
        periods = [
            rule.every
            for rule in (self.damping, self.trust_region)
            if isinstance(rule, LevenbergMarquardt | TrustRegion)
        ]
        if len(set(periods)) > 1:
            raise ValueError(
                "damping and trust region adapt to the same measurements: give both the same "
                f"`every`, got {periods[0]} and {periods[1]}."
            )
        return periods[0] if periods else None

    def cost(self) -> str:
        """What a step evaluates for it, in words."""
        vectors = 1 + self.remembers
        parts = [f"{vectors} Gauss-Newton products"] if self.in_every_step else []
        if self.every is not None:
            product = "" if self.in_every_step else "a Gauss-Newton product and "
            rhythm = "step" if self.every == 1 else f"{self.every} steps"
            parts.append(f"{product}the loss before and after the step every {rhythm}")
        return ", ".join(parts) or "nothing"

    @property
    def initial_damping(self) -> Any:
        if isinstance(self.damping, LevenbergMarquardt):
            return self.damping.initial
        return value_of(self.damping, jnp.zeros((), jnp.int32))

    def damping_at(self, state: QuadraticModelState) -> jax.Array:
        """The damping of the step that comes after this state."""
        if isinstance(self.damping, LevenbergMarquardt):
            return state.damping_value
        return jnp.asarray(value_of(self.damping, state.count), jnp.float32)


def check_damping(damping: Damping) -> None:
    """Raises if a damping is not a positive number, a schedule or one that adapts.

    Raises:
      ValueError: a number that is not positive.
      TypeError: neither a number nor a schedule nor a :class:`LevenbergMarquardt`.
    """
    if isinstance(damping, LevenbergMarquardt):
        return
    numeric = isinstance(damping, int | float | np.number | jax.Array)
    if isinstance(damping, type) or not (numeric or callable(damping)):
        raise TypeError(
            "`damping` must be a number, a schedule or an optax_accel.LevenbergMarquardt, such as "
            f"LevenbergMarquardt(1.0); got {damping!r}."
        )
    check_number("damping", damping, 0, open_low=True, allow_schedule=True)


def check_rate(name: str, value: Any, high: float = jnp.inf) -> None:
    """Raises if it is neither ``"exact"`` nor a number of at least 0 and below ``high``."""
    if isinstance(value, str):
        if value != "exact":
            raise ValueError(f"`{name}` must be a number, a schedule or 'exact', got {value!r}.")
        return
    check_number(name, value, 0, high, open_high=high < jnp.inf, allow_schedule=True)


class _Problem(NamedTuple):
    """What a step is made for: a loss, its curvature, and where it is."""

    loss: Objective
    curved: Objective
    position: chex.ArrayTree
    gradient: chex.ArrayTree
    damping: jax.Array


class _Model(NamedTuple):
    """The quadratic model on the span of a few vectors, as a function of their coefficients."""

    slopes: jax.Array
    bendings: jax.Array
    matrix: jax.Array

    @classmethod
    def of(cls, problem: _Problem, basis: chex.ArrayTree) -> _Model:
        product = problem.curved.gauss_newton(problem.position)
        bendings = blocks.inner(basis, jax.vmap(product)(basis))
        bendings = (bendings + bendings.T) / 2
        matrix = bendings + problem.damping.astype(bendings.dtype) * blocks.inner(basis, basis)
        slopes = blocks.inner(basis, blocks.as_block(problem.gradient))[:, 0]
        return cls(slopes.astype(matrix.dtype), bendings, matrix)

    def change(self, coefficients: jax.Array) -> jax.Array:
        return coefficients @ self.slopes + coefficients @ self.matrix @ coefficients / 2

    def length(self, coefficients: jax.Array) -> jax.Array:
        """The length of the combination in the metric of the undamped curvature."""
        return jnp.sqrt(jnp.maximum(coefficients @ self.bendings @ coefficients, 0))

    def minimum(self, given: tuple[Any, ...]) -> jax.Array:
        """The coefficients at which it is lowest, where those that are not None are given."""
        s, m = self.slopes, self.matrix
        if len(s) == 1:
            return jnp.asarray([_quotient(-s[0], m[0, 0]) if given[0] is None else given[0]])
        first, second = given
        if first is None and second is None:
            # Of the second vector what is conjugate to the first one, unless that is rounding.
            part = _quotient(m[0, 1], m[0, 0])
            rest = m[1, 1] - part * m[0, 1]
            apart = rest > jnp.sqrt(jnp.finfo(m.dtype).eps) * m[1, 1]
            second = jnp.where(apart, _quotient(part * s[0] - s[1], rest), 0)
        elif second is None:
            second = _quotient(-(s[1] + first * m[0, 1]), m[1, 1])
        if first is None:
            first = _quotient(-(s[0] + second * m[0, 1]), m[0, 0])
        return jnp.stack([jnp.asarray(c, m.dtype) for c in (first, second)])


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """0 where the denominator is 0: there is no such direction."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


def _step(
    settings: _Settings,
    problem: _Problem,
    state: QuadraticModelState,
    direction: chex.ArrayTree,
    due: bool | None,
) -> tuple[chex.ArrayTree, QuadraticModelState]:
    """The update of the selected parameters, and the new state."""
    vectors = [jax.tree.map(_widen, direction)]
    if settings.remembers:
        vectors.append(state.previous_update)
    basis = jax.tree.map(lambda *rows: jnp.stack(rows), *vectors)
    given = [
        None if isinstance(value, str) else value_of(value, state.count)
        for value in (settings.learning_rate, settings.momentum)
    ]
    given[0] = None if given[0] is None else -given[0]
    model, region = None, settings.trust_region
    if settings.in_every_step:
        model = _Model.of(problem, basis)
        coefficients = model.minimum(tuple(given[: len(vectors)]))
        if region is not None:
            length = model.length(coefficients)
            inside = jnp.where(length > 0, state.trust_radius / jnp.where(length > 0, length, 1), 1)
            coefficients *= jnp.minimum(1, inside).astype(coefficients.dtype)
        state = state._replace(model_decrease=jnp.float32(-model.change(coefficients)))
    else:
        coefficients = jnp.stack([jnp.asarray(c, jnp.float32) for c in given[: len(vectors)]])
    exact = blocks.combine(coefficients[None], basis)
    exact = jax.tree.map(lambda leaf: leaf[0], exact)
    update = jax.tree.map(lambda e, d: e.astype(d.dtype), exact, direction)
    accepted: Any = True
    if settings.every is not None and due is not False:

        def measured(state: QuadraticModelState) -> tuple[QuadraticModelState, jax.Array]:
            return _measure(settings, problem, state, exact, update, model, coefficients)

        if due or settings.every == 1:
            state, accepted = measured(state)
        else:
            state, accepted = lax.cond(
                state.count % settings.every == 0,
                measured,
                lambda state: (state, jnp.ones((), bool)),
                state,
            )
    if region is not None:
        exact, update, coefficients = jax.tree.map(
            lambda x: jnp.where(accepted, x, 0), (exact, update, coefficients)
        )
    # The update shows what is not finite; in the state it would stay in all later ones.
    finite = jnp.isfinite(max_norm(exact))
    previous = state.previous_update
    if settings.remembers:
        previous = jax.tree.map(lambda new, old: jnp.where(finite, new, old), exact, previous)
    return update, state._replace(
        count=optax.safe_increment(state.count),
        step_size=-coefficients[0].astype(jnp.float32),
        step_momentum=coefficients[-1].astype(jnp.float32)
        if settings.remembers
        else jnp.zeros((), jnp.float32),
        previous_update=previous if settings.remembers else (),
    )


def _measure(
    settings: _Settings,
    problem: _Problem,
    state: QuadraticModelState,
    exact: chex.ArrayTree,
    update: chex.ArrayTree,
    model: _Model | None,
    coefficients: jax.Array,
) -> tuple[QuadraticModelState, jax.Array]:
    """Adapts damping and radius; says whether the step may be made."""
    if model is None:
        model = _Model.of(problem, blocks.as_block(exact))
        coefficients = jnp.ones(1, model.slopes.dtype)
    change = model.change(coefficients)
    before = problem.loss(problem.position)
    after = problem.loss(optax.apply_updates(problem.position, update))
    reduction = reduction_of(before, after, change, problem.gradient, max_norm(update) > 0)
    state = state._replace(
        reduction_ratio=reduction.ratio.astype(jnp.float32),
        model_decrease=-change.astype(jnp.float32),
    )
    if isinstance(settings.damping, LevenbergMarquardt):
        new = settings.damping.adapted(state.damping_value, reduction)
        state = state._replace(damping_value=new)
    if settings.trust_region is None:
        return state, jnp.ones((), bool)
    length = model.length(coefficients)
    radius = settings.trust_region.adapted(state.trust_radius, length, reduction)
    return state._replace(trust_radius=radius), ~reduction.telling | (reduction.ratio > 0)


def _widen(x: jax.Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))
