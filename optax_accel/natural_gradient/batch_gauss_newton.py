r"""Gauss-Newton steps that are solved for in the space of the batch's outputs.

For n examples with c outputs each, J the Jacobian of all outputs (n c rows, a column for each
parameter) and R a root of the Hessian of the loss at the outputs, :math:`R R^\top = \nabla_f^2
\ell`, which contains the 1/n of a mean, the damped Gauss-Newton system has two forms:

.. math::
  (J^\top R R^\top J + \lambda I)\, d = g
  \quad\Longleftrightarrow\quad
  d = J^\top R\, y, \quad (R^\top J J^\top R + \lambda I)\, y = z
  \quad \text{for } g = J^\top R\, z .

The right one has n c unknowns: it is the smaller one where the parameters outnumber the outputs of
the batch.  With squared error :math:`R = I / \sqrt n`, and the matrix is :math:`J J^\top / n +
\lambda I`.  Where the loss is a negative log-likelihood with natural parameters, as softmax cross
entropy of logits, d is the exact natural gradient of the batch.

Ren, Goldfarb, `Efficient subsampled Gauss-Newton and natural gradient methods for training neural
networks <https://arxiv.org/abs/1906.02353>`_, 2019; Cai et al., `Gram-Gauss-Newton method
<https://arxiv.org/abs/1905.11675>`_, 2019; Korbit et al., `Exact Gauss-Newton optimization for
training deep neural networks <https://arxiv.org/abs/2405.14402>`_, 2024.

Ours: roots of the loss Hessian, which make the system symmetric for any convex loss, so that it can
be solved by conjugate gradients and by Cholesky decomposition.  Gradients need not lie in the row
space (weight decay, clipping, another batch): for :math:`g = J^\top R z + r`

.. math::
  d = J^\top R\, y + r / \lambda, \qquad
  (R^\top J J^\top R + \lambda I)\, y = z - R^\top J r / \lambda ,

which is the Sherman-Morrison-Woodbury formula for r alone.  The solution z for the gradient of the
batch itself is multiplied so that r is as short as possible: for that gradient, however long, r is
rounding error, and d free of the cancellation of that formula.  Cholesky decomposition uses the
formula twice, the second time for the residual.  Conjugate gradients do not divide by
:math:`\lambda`: their vectors are :math:`J^\top R\, y + c\, r` with a number c of each, on which
:math:`G + \lambda I` acts as :math:`(y, c) \mapsto (R^\top J (J^\top R\, y + c\, r) + \lambda y,
\lambda c)`, in the inner product of the parameters.  So they are conjugate gradients on the system
of the parameters, which minimize the damped quadratic model on a Krylov space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    as_arrays,
    check_choice,
    check_count,
    check_number,
    static_integer,
    value_of,
)
from optax_accel._derivatives import check_outputs
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._means import joined_over, shares_of, vary_over
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import divided, max_norm, power_of_two, vdot
from optax_accel.curvature.blocks import Packing
from optax_accel.natural_gradient._transformation import initial_damping, with_momentum
from optax_accel.natural_gradient.conjugate_gradients import LARGEST_JOINED
from optax_accel.natural_gradient.estimators import loss_root
from optax_accel.natural_gradient.levenberg_marquardt import LevenbergMarquardt, TrustRegion
from optax_accel.natural_gradient.likelihoods import Likelihood
from optax_accel.natural_gradient.quadratic_model import Exact, check_rate
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, announce_cost

Solver = Literal["cg", "cholesky"]
_NAME = "scale_by_batch_gauss_newton"


class ScaleByBatchGaussNewtonState(NamedTuple):
    """State of :func:`scale_by_batch_gauss_newton`.

    Attributes:
      count: number of updates made; int32 scalar.
      solver_iterations: iterations of CG in the last step, 0 with Cholesky; int32 scalar.
      solver_residual: norm of the residual ``g - (G + damping I) d`` of the last step over that of
        the gradient g; float32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    solver_iterations: jax.Array
    solver_residual: jax.Array


def scale_by_batch_gauss_newton(
    *,
    damping: optax.ScalarOrSchedule = 1e-2,
    solver: Solver = "cg",
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    block_size: int = 32,
    likelihood: Likelihood | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of the batch's damped Gauss-Newton matrix.

    ``update`` takes these extra arguments:

    * ``value_fn``: the :class:`~optax_accel.Objective` of this step's batch, built from ``predict``
      and ``loss``; required.  An example's loss must depend on its own outputs only, which are
      counted along the leading axis; weights and masks in the loss are allowed.
    * ``curvature_value_fn``: another objective, whose Gauss-Newton matrix is used; default
      ``value_fn``.
    * ``damping``: takes the place of the argument of that name in this step, as
      :func:`quadratic_model` gives it; default None.

    Cost of a step: with ``"cg"`` 3 Jacobian products at the start and end and two more an iteration
    (one forward, one backward), and the memory of a few gradients; with ``"cholesky"`` 9 and two
    for each of the n c outputs, a third of :math:`(n c)^3` flops, the kernel's :math:`(n c)^2`
    numbers and ``block_size`` copies of the parameters.  Both are loops in the compiled step, in
    which XLA runs convolutions 6 to 300 times slower on CPU (jax#12868).

    With an ``axis_name`` of the objective each replica holds the rows of its own examples.  CG
    sends a gradient an iteration; Cholesky sends one for each output of the whole batch, and every
    replica decomposes the whole kernel.

    Args:
      damping: :math:`\lambda > 0`, float or schedule; default 1e-2, for losses of about 1 that are
        means over examples. With ``"cholesky"`` a smaller damping than :math:`8 \varepsilon
        \operatorname{tr} R^\top J J^\top R`, with the machine epsilon :math:`\varepsilon`, counts
        as that: it would be lost in rounding errors.
      solver: ``"cg"`` (default), conjugate gradients, never forms the Jacobian; ``"cholesky"``
        forms the matrix of the system, for a few hundred outputs in all.
      max_iterations: the most iterations of CG, at least 1; default 50.
      tolerance: CG stops where the residual is below this fraction of the gradient, at least 0;
        default 1e-4.
      block_size: rows of the Jacobian that Cholesky's kernel is formed from at a time, at least 1;
        default 32. It does nothing with CG.
      likelihood: the distribution that the outputs parametrize: ``"categorical"`` (logits),
        ``"bernoulli"`` (logits; the loss sums over the outputs) or ``"gaussian"`` (means with unit
        variance). ``None`` (default) takes it from the program of the loss, where that shows
        softmax or binary cross entropy or squared error; other convex losses work, too, with up to
        256 outputs per example.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to precondition. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.

    Returns:
      A transformation with state :class:`ScaleByBatchGaussNewtonState`.

    Raises:
      ValueError: an argument outside its range, here; in ``update``: missing ``value_fn`` or
        ``params``, an objective without ``predict``, a batch without examples, or more outputs than
        can do without a likelihood.
      TypeError: an argument of another kind; parameters or outputs that are not real floating
        point.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> x, y = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), jnp.array([1.0, 2.0])
      >>> objective = oa.Objective(lambda w: x @ w, lambda out: 0.5 * jnp.mean((out - y) ** 2))
      >>> tx = oa.scale_by_batch_gauss_newton(damping=0.5)
      >>> w = jnp.zeros(3)
      >>> grads = objective.grad(w)
      >>> d, state = tx.update(grads, tx.init(w), w, value_fn=objective)
      >>> dense = jnp.linalg.solve(x.T @ x / 2 + 0.5 * jnp.eye(3), grads)
      >>> bool(jnp.allclose(d, dense, atol=1e-5)), int(state.solver_iterations)
      (True, 2)
    """
    settings = _Settings(
        damping=damping,
        solver=solver,
        max_iterations=max_iterations,
        tolerance=tolerance,
        block_size=block_size,
        likelihood=likelihood,
    )

    def init_fn(params: chex.ArrayTree) -> ScaleByBatchGaussNewtonState:
        check_params(params, _NAME)
        check_selected(params, mask, _NAME)
        check_undivided(params, _NAME)
        announce_cost(Cost(settings.cost()))
        zero = jnp.zeros((), jnp.int32)
        return ScaleByBatchGaussNewtonState(zero, jnp.copy(zero), jnp.zeros((), jnp.float32))

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByBatchGaussNewtonState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        damping: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByBatchGaussNewtonState]:
        apart = curvature_value_fn is not None
        check_undivided(params, _NAME)
        params = None if params is None else as_arrays(params)
        objective = as_objective(
            curvature_value_fn if apart else value_fn,
            extra_args,
            method=_NAME,
            params=params,
            why="take the Jacobian of its outputs",
            argument="curvature_value_fn" if apart else "value_fn",
            needs_outputs=True,
        )
        chosen = resolve(params, mask)
        objective = objective.precompose(lambda part: merge(part, params, chosen))
        position, incoming = select(params, chosen), select(updates, chosen)
        count = optax.safe_increment(state.count)
        if not jax.tree.leaves(incoming):  # nothing to move
            return updates, state._replace(count=count)
        if damping is None:
            damping = value_of(settings.damping, state.count)
        rows = _Rows.at(objective, position, settings.likelihood)
        direction, iterations, residual = _solve(settings, rows, incoming, damping)
        direction = jax.tree.map(lambda d, u: d.astype(u.dtype), direction, incoming)
        return merge(direction, updates, chosen), ScaleByBatchGaussNewtonState(
            count, iterations, residual.astype(jnp.float32)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def batch_gauss_newton(
    learning_rate: optax.ScalarOrSchedule | Exact = 1.0,
    *,
    momentum: optax.ScalarOrSchedule | Exact = 0.0,
    damping: optax.ScalarOrSchedule | LevenbergMarquardt | None = None,
    trust_region: TrustRegion | None = None,
    solver: Solver = "cg",
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    block_size: int = 32,
    likelihood: Likelihood | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss-Newton steps, exact for their batch, solved for in the space of its outputs.

    Args:
      learning_rate: float or schedule, at least 0, default 1, a whole Gauss-Newton step; or
        ``"exact"``, the minimum of the quadratic model, which differs where CG stops early.
      momentum: decay rate of the running sum of steps, in [0, 1), float or schedule, default 0; or
        ``"exact"``, the multiple of the previous update at the minimum of the quadratic model.
      damping: :math:`\lambda > 0`, float or schedule; or a :class:`LevenbergMarquardt`, which
        adapts it to how well the quadratic model predicts the loss. ``None`` (default) is
        ``LevenbergMarquardt(1.0, minimum=1e-3)``, at the price of two losses and a product every
        five steps. The model is always right about the batch that a step is fitted to: on small
        batches the minimum is what keeps steps from following the noise, and has to be tuned.
        With ``"cholesky"`` a damping below the rounding errors of the matrix counts as large as
        they are, :math:`8 \varepsilon \operatorname{tr} R^\top J J^\top R`.
      trust_region: a :class:`TrustRegion`, which bounds the length of steps in the metric of the
        Gauss-Newton matrix; ``None`` (default) for none.
      solver: ``"cg"`` (default), conjugate gradients, never forms the Jacobian; ``"cholesky"``
        forms the matrix of the system, for a few hundred outputs in all.
      max_iterations: the most iterations of CG, at least 1; default 50.
      tolerance: CG stops where the residual is below this fraction of the gradient, at least 0;
        default 1e-4.
      block_size: rows of the Jacobian that Cholesky's kernel is formed from at a time, at least 1;
        default 32. It does nothing with CG.
      likelihood: the distribution that the outputs parametrize: ``"categorical"`` (logits),
        ``"bernoulli"`` (logits; the loss sums over the outputs) or ``"gaussian"`` (means with unit
        variance). ``None`` (default) takes it from the program of the loss, where that shows
        softmax or binary cross entropy or squared error; other convex losses work, too, with up to
        256 outputs per example.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to optimize. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.

    Returns:
      The optimizer; its ``update`` takes the extra arguments of
      :func:`scale_by_batch_gauss_newton`. The updates of a batch that is not finite are not
      finite, and the next ones are finite again: the momentum keeps nothing of it.

    Raises:
      ValueError, TypeError: as :func:`scale_by_batch_gauss_newton`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> x, y = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), jnp.array([1.0, 2.0])
      >>> objective = oa.Objective(lambda w: x @ w, lambda out: 0.5 * jnp.mean((out - y) ** 2))
      >>> tx = oa.batch_gauss_newton(1.0, damping=1e-4, solver="cholesky")
      >>> w = jnp.zeros(3)
      >>> updates, _ = tx.update(objective.grad(w), tx.init(w), w, value_fn=objective)
      >>> bool(objective(optax.apply_updates(w, updates)) < 1e-6)  # 1.25 at the start
      True
    """
    check_rate("learning_rate", learning_rate)
    if damping is None:
        damping = LevenbergMarquardt(1.0, minimum=1e-3)
    preconditioner = scale_by_batch_gauss_newton(
        damping=initial_damping(damping),
        solver=solver,
        max_iterations=max_iterations,
        tolerance=tolerance,
        block_size=block_size,
        likelihood=likelihood,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The arguments of :func:`scale_by_batch_gauss_newton`, checked."""

    damping: optax.ScalarOrSchedule
    solver: Solver
    max_iterations: int
    tolerance: float
    block_size: int
    likelihood: Likelihood | None

    def __post_init__(self) -> None:
        check_number("damping", self.damping, 0, open_low=True, allow_schedule=True)
        check_choice("solver", self.solver, get_args(Solver))
        check_count("max_iterations", self.max_iterations, 1)
        check_number("tolerance", self.tolerance, 0)
        check_count("block_size", self.block_size, 1)
        if self.likelihood is not None:
            check_choice("likelihood", self.likelihood, get_args(Likelihood))

    def cost(self) -> str:
        """What a step evaluates, in words."""
        if self.solver == "cholesky":
            return "the Jacobian of the batch's outputs, and the Cholesky decomposition of a matrix"
        return (
            f"up to {self.max_iterations} iterations of conjugate gradients, one product with the "
            "Jacobian and one with its transpose each"
        )


class _Rows(NamedTuple):
    r"""The linear map :math:`B = J^\top R` of the whole batch, whose rows the replicas share.

    Attributes:
      times: B times a vector ``(examples, outputs)`` of each replica, summed over them.
      transposed: this replica's rows of B transposed times a vector like the parameters.
      start: z with ``B z = g`` for the gradient g of the batch, of this replica.
      axis_name: of the replicas, or None.
    """

    times: Callable[[jax.Array], chex.ArrayTree]
    transposed: Callable[[chex.ArrayTree], jax.Array]
    start: jax.Array
    axis_name: str | None

    @classmethod
    def at(
        cls, objective: Objective, position: chex.ArrayTree, likelihood: Likelihood | None
    ) -> _Rows:
        """The map at some parameters."""
        axis = objective.axis_name
        outputs, push, pull = objective.jacobian(position)
        check_outputs("The Gauss-Newton matrix", outputs, jnp.floating)
        shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
        if any(0 in shape[:1] for shape in shapes):
            raise ValueError(
                f"{_NAME} counts examples along the leading axis of the outputs of `predict`, "
                f"which must not be empty; got the shapes {shapes}. Leave out empty batches."
            )
        leading = {shape[:1] for shape in shapes}
        num_examples = shapes[0][0] if len(leading) == 1 and shapes[0] else 1
        root = loss_root(objective, outputs, likelihood, num_examples)
        share: Any = 1.0  # what this replica's loss counts in the mean, and its root
        if axis is not None:
            weight = objective.batch_weight()
            weight = jnp.ones(()) if weight is None else weight
            weight = vary_over(weight, axis)
            share = shares_of(weight, lax.psum(weight, axis), lax.axis_size(axis))
        slope = jax.grad(objective.loss_of_outputs)(outputs)

        def part(y: jax.Array) -> jax.Array:
            root_share = jnp.sqrt(jnp.asarray(share, y.dtype))
            return jnp.where(root_share > 0, root_share * y, 0)  # else it may be NaN

        def times(y: jax.Array) -> chex.ArrayTree:
            pulled = jax.tree.map(_widen, pull(root.times(part(y))))
            return _sum(jax.tree.map(lambda leaf: jnp.where(share > 0, leaf, 0), pulled), axis)

        def transposed(vector: chex.ArrayTree) -> jax.Array:
            tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, position)
            return part(root.transposed(push(vary_over(tangent, axis))))

        return cls(times, transposed, part(root.solve(slope)), axis)

    def joined(self, packing: Packing) -> _Rows:
        """The map for vectors that are packed."""
        return self._replace(
            times=lambda y: packing.pack(self.times(y)),
            transposed=lambda vector: self.transposed(packing.unpack(vector)),
        )

    def product(self, y: jax.Array) -> jax.Array:
        """This replica's part of B transposed B times y."""
        return vary_over(self.transposed(self.times(y)), self.axis_name)

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The inner product of two vectors of outputs, over all replicas."""
        return _sum(jnp.sum(a * b), self.axis_name)


def _solve(
    settings: _Settings, rows: _Rows, incoming: chex.ArrayTree, damping: Any
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The direction, the iterations made and the relative residual."""
    gradient = jax.tree.map(_widen, incoming)
    # Every operation on vectors is compiled anew for each of their arrays.
    packing = Packing(gradient, largest=LARGEST_JOINED)
    gradient, rows = packing.pack(gradient), rows.joined(packing)
    # Both are divided by powers of two, which costs no digit, so that their squares are finite.
    size = power_of_two(max_norm(gradient))
    gradient = divided(gradient, size)
    own = rows.times(rows.start)
    own_size = power_of_two(max_norm(own))
    start, own = divided(rows.start, own_size), divided(own, own_size)
    squared = vdot(own, own)
    part = vdot(gradient, own) / jnp.where(squared > 0, squared, 1)
    rest = jax.tree.map(lambda g, o: g - part.astype(g.dtype) * o, gradient, own)
    right = part.astype(start.dtype) * start
    strength = jnp.asarray(damping, right.dtype)
    if settings.solver == "cg":
        solved = _conjugate_gradients(settings, rows, gradient, right, rest, strength)
    else:
        solved = _cholesky(settings, rows, gradient, right, rest, strength)
    direction, residual, iterations = solved
    squared = vdot(gradient, gradient)
    direction = packing.unpack(jax.tree.map(lambda d: d * size.astype(d.dtype), direction))
    return direction, iterations, jnp.sqrt(residual / jnp.where(squared > 0, squared, 1))


class _Point(NamedTuple):
    """Where CG is. A pair (y, c) stands for the vector ``B y + c r`` of the parameters."""

    solution: tuple[jax.Array, jax.Array]
    residual: tuple[jax.Array, jax.Array]
    search: tuple[jax.Array, jax.Array]
    search_image: jax.Array  # B transposed times the search direction
    search_squared: jax.Array  # the squared norm of the search direction
    squared: jax.Array  # the squared norm of the residual
    iterations: jax.Array


def _conjugate_gradients(
    settings: _Settings,
    rows: _Rows,
    gradient: chex.ArrayTree,
    right: jax.Array,
    rest: chex.ArrayTree,
    strength: jax.Array,
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The solution, the squared norm of the residual, and the number of iterations."""
    right = vary_over(right, rows.axis_name)

    def expanded(pair: tuple[jax.Array, jax.Array]) -> chex.ArrayTree:
        y, c = pair
        return jax.tree.map(lambda b, r: b + c.astype(r.dtype) * r, rows.times(y), rest)

    def image_of(vector: chex.ArrayTree) -> jax.Array:
        return vary_over(rows.transposed(vector), rows.axis_name)

    def moved(point: Any, size: jax.Array, by: Any) -> Any:
        return jax.tree.map(lambda a, b: a + size * b, point, by)

    squared = vdot(gradient, gradient).astype(right.dtype)
    # Below its rounding error a residual falls no more.
    goal = jnp.maximum(settings.tolerance, jnp.finfo(right.dtype).eps) ** 2 * squared

    def going_on(point: _Point) -> jax.Array:
        return (point.squared > goal) & (point.iterations < settings.max_iterations)

    def iterate(point: _Point) -> _Point:
        # The matrix is B B^T + strength I: its product with (y, c) is that of the image and c.
        y, c = point.search
        product = (point.search_image + strength * y, strength * c)
        bending = rows.dot(point.search_image, point.search_image)
        size = point.squared / (bending + strength * point.search_squared)
        residual = moved(point.residual, -size, product)
        vector = expanded(residual)
        squared = vdot(vector, vector).astype(right.dtype)
        kept = squared / point.squared
        return _Point(
            moved(point.solution, size, point.search),
            residual,
            moved(residual, kept, point.search),
            image_of(vector) + kept * point.search_image,
            squared + kept**2 * point.search_squared,  # residuals are orthogonal to old searches
            squared,
            point.iterations + 1,
        )

    first = (right, jnp.ones((), right.dtype))
    nothing = (jnp.zeros_like(right), jnp.zeros((), right.dtype))
    zero = jnp.zeros((), jnp.int32)
    start = _Point(nothing, first, first, image_of(gradient), squared, squared, zero)
    last = lax.while_loop(going_on, iterate, start)
    # What is not finite is in `rest`, and shows: 0 times NaN is NaN.
    return expanded(last.solution), last.squared, last.iterations


def _cholesky(
    settings: _Settings,
    rows: _Rows,
    gradient: chex.ArrayTree,
    right: jax.Array,
    rest: chex.ArrayTree,
    strength: jax.Array,
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The solution, the squared norm of the residual, and no iterations."""
    solve, used = _decomposed(settings, rows, right, strength)

    def solution(right: jax.Array, rest: chex.ArrayTree) -> chex.ArrayTree:
        rest = jax.tree.map(lambda r: r / used.astype(r.dtype), rest)
        return jax.tree.map(jnp.add, rows.times(solve(right - rows.transposed(rest))), rest)

    def residual_of(direction: chex.ArrayTree) -> chex.ArrayTree:
        product = rows.times(rows.transposed(direction))
        return jax.tree.map(
            lambda g, p, d: g - p - strength.astype(d.dtype) * d, gradient, product, direction
        )

    direction = solution(right, rest)
    # Of the rest the rows remove most where it is a combination of them, which costs digits; the
    # residual of the sum has them.
    more = solution(jnp.zeros_like(right), residual_of(direction))
    direction = jax.tree.map(jnp.add, direction, more)
    residual = residual_of(direction)
    return direction, vdot(residual, residual), jnp.zeros((), jnp.int32)


def _decomposed(
    settings: _Settings, rows: _Rows, like: jax.Array, strength: jax.Array
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Solves with the matrix of the system, which all replicas form and decompose.

    Returns:
      What solves, and the damping that it is done with.
    """
    axis, size = rows.axis_name, like.size
    replicas, first = (1, 0) if axis is None else (lax.axis_size(axis), lax.axis_index(axis) * size)

    def row(index: jax.Array) -> jax.Array:
        unit = jax.nn.one_hot(index - first, size, dtype=like.dtype)  # 0 on other replicas
        return rows.product(unit.reshape(like.shape)).ravel()

    block = min(static_integer("block_size", settings.block_size, 1), replicas * size)
    kernel = lax.map(row, vary_over(jnp.arange(replicas * size), axis), batch_size=block)
    kernel = joined_over(kernel, axis, axis=1)
    kernel = (kernel + kernel.T) / 2
    # Less damping than this would be lost in the rounding errors of the decomposition.
    limits = jnp.finfo(kernel.dtype)
    used = jnp.maximum(strength, 8 * limits.eps * jnp.trace(kernel) + limits.tiny)
    diagonal = used * jnp.eye(len(kernel), dtype=kernel.dtype)
    factor = jax.scipy.linalg.cho_factor(kernel + diagonal)

    def solve(right: jax.Array) -> jax.Array:
        solution = jax.scipy.linalg.cho_solve(factor, joined_over(right.ravel(), axis))
        return lax.dynamic_slice_in_dim(solution, first, size).reshape(like.shape)

    return solve, used


def _sum(tree: chex.ArrayTree, axis_name: str | None) -> chex.ArrayTree:
    if axis_name is None:
        return tree
    return lax.psum(vary_over(tree, axis_name), axis_name)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
