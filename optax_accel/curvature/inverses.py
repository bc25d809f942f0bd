r"""Products with the inverse of an operator, by conjugate gradients or a Neumann series.

Both solve :math:`(A + \delta I) x = b` from products with :math:`A` alone, stop by the residual
:math:`\|b - (A + \delta I) x\| / \|b\|`, and report it after each product.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_choice, check_integer, check_number, check_product
from optax_accel._numerics import divided, max_norm, norm, power_of_two, vdot
from optax_accel.curvature._lanczos import lanczos
from optax_accel.curvature._vectors import check_vector
from optax_accel.curvature.eigensolvers import Loop, run_while
from optax_accel.curvature.estimates import Operator
from optax_accel.curvature.low_rank import NystromApproximation

Method = Literal["cg", "neumann"]

# Products for the largest eigenvalue, from which the step of the Neumann series follows.
_STEP_PRODUCTS = 10
# A Neumann series whose residual has grown so much beyond the first one does not converge.
_DIVERGED = 10.0
# The measured residual may exceed the tolerance by rounding errors of the recurrence.
_SLACK = 1.01


class InverseProduct(NamedTuple):
    """An approximate solution of a linear system, and how good it is.

    Attributes:
      solution: the vector, like the right-hand side.
      residual_norm: the norm of the residual relative to that of the right-hand side, scalar,
        measured with a product of its own after the last iteration.
      residual_norms: the same after 0, 1, 2, ... iterations, as the recurrence has it, ``(most
        iterations + 1,)``; nan beyond the last one.
      num_products: products with the operator, int32 scalar: one per iteration, one for the
        measurement, one for a start, and those that found the step of a Neumann series.
      converged: whether the measured residual is within the tolerance.
      smallest_curvature: the smallest Rayleigh quotient of the damped operator along the directions
        of the iterations, scalar. Where it is not positive, the damped operator is not positive
        definite: conjugate gradients then stop before that direction.
    """

    solution: chex.ArrayTree
    residual_norm: jax.Array
    residual_norms: jax.Array
    num_products: jax.Array
    converged: jax.Array
    smallest_curvature: jax.Array


class _State(NamedTuple):
    solution: chex.ArrayTree
    residual: chex.ArrayTree
    direction: chex.ArrayTree
    descent: jax.Array  # <residual, preconditioned residual>
    history: jax.Array
    iterations: jax.Array
    smallest: jax.Array
    going_on: jax.Array


def inverse_product(
    operator: Operator,
    vector: chex.ArrayTree,
    *,
    damping: chex.Numeric = 0.0,
    method: Method = "cg",
    preconditioner: Operator | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    start: chex.ArrayTree | None = None,
    step_size: chex.Numeric | None = None,
    loop: Loop | None = None,
) -> InverseProduct:
    r"""The product of a vector with :math:`(A + \delta I)^{-1}`, from products with :math:`A`.

    ``"cg"``: conjugate gradients, for a positive definite damped operator; the fewest products.
    ``"neumann"``: the series :math:`a \sum_j (I - a M (A + \delta I))^j M b`, with step size
    :math:`a` and preconditioner :math:`M`, which adds up for :math:`0 < a < 2 / \lambda_{max}`: as
    many terms as one likes, a linear function of the vector however few, as implicit derivatives
    take them.

    Args:
      operator: a symmetric operator: a :class:`~optax_accel.curvature.CurvatureOperator` or a
        function of a pytree.
      vector: the right-hand side, a vector of the operator: for one with ``where=``,
        ``operator.select(gradient)``.
      damping: what is added to the diagonal, at least 0; default: 0.
      method: ``"cg"`` (default) or ``"neumann"``.
      preconditioner: multiplies a vector by an approximate inverse of the damped operator, which is
        symmetric positive definite, such as :meth:`NystromApproximation.inverse
        <optax_accel.curvature.NystromApproximation.inverse>`; default: none.
      tolerance: relative norm of the residual at which the iterations end, in (0, 1); default:
        1e-5, as in ``jax.scipy.sparse.linalg.cg``.
      max_iterations: most iterations, each of one product; default: 100.
      start: where to start from, like ``vector``; default: zero.
      step_size: step of the Neumann series, above 0. Default: with a preconditioner 1; without one
        the inverse of a bound for the largest eigenvalue, from 10 products of Lanczos (our
        choice).
      loop: ``"graph"`` for a ``lax.while_loop`` around the products, ``"host"`` for a Python loop,
        which operators over ``batches`` need and which is faster for convolutions on a CPU.
        Default: ``"graph"`` where the vector or the operator is traced, else ``"host"``.

    Returns:
      The solution and a report.

    Raises:
      ValueError: the method or the loop is unknown, a number is outside its range, or ``vector`` or
        ``start`` has another structure or other shapes than the vectors of the operator.
      TypeError: the operator or the preconditioner is not a function, the preconditioner is an
        approximation of the operator rather than of its inverse, or a count is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_accel.curvature import inverse_product
      >>> diagonal = jnp.array([1.0, 4.0, 9.0])
      >>> found = inverse_product(lambda v: diagonal * v, jnp.ones(3), damping=1.0)
      >>> [round(float(x), 4) for x in found.solution], bool(found.converged)
      ([0.5, 0.2, 0.1], True)
      >>> int(found.num_products)  # three iterations and the measurement
      4

    References:
      Hestenes, Stiefel, *Methods of conjugate gradients for solving linear systems*, 1952;
      Lorraine, Vicol, Duvenaud, `Optimizing millions of hyperparameters by implicit differentiation
      <https://arxiv.org/abs/1911.02590>`_, 2020, section 3.1, for the series.
    """
    _check(operator, damping, method, preconditioner, tolerance, max_iterations, step_size, loop)
    vector = jax.tree.map(jnp.asarray, vector)
    if (like := getattr(operator, "like", None)) is not None:
        check_vector("inverse_product, `vector`", like, vector)
    if start is not None:
        check_vector("inverse_product, `start`", vector, start)
    if loop is None:
        loop = "graph" if _traced((vector, start, getattr(operator, "_linear", None))) else "host"
    unit = power_of_two(max_norm(vector))
    right = divided(vector, unit)
    products = 0
    if method == "neumann" and step_size is None:
        step_size, products = _step_size(operator, right, damping, preconditioner, loop)

    def damped(x: chex.ArrayTree) -> chex.ArrayTree:
        return _damped(operator(x), x, damping)

    def precondition(x: chex.ArrayTree) -> chex.ArrayTree:
        return x if preconditioner is None else _cast_like(preconditioner(x), x)

    if start is None:
        first, residual = jax.tree.map(jnp.zeros_like, right), right
    else:
        first = divided(_cast_like(jax.tree.map(jnp.asarray, start), right), unit)
        residual = _subtract(right, damped(first))
        products += 1
    size = norm(right)
    state = _begin(first, residual, precondition(residual), size, tolerance, max_iterations)

    def iterate(state: _State) -> _State:
        image = damped(state.direction)
        if method == "cg":
            state = _conjugate_step(state, image, size, tolerance)
            return _conjugate_direction(state, precondition(state.residual))
        state = _series_step(state, image, step_size, size, tolerance)
        return state._replace(direction=precondition(state.residual))

    state = run_while(loop, lambda s: s.going_on & (s.iterations < max_iterations), iterate, state)
    measured = _relative(norm(_subtract(right, damped(state.solution))), size)
    return InverseProduct(
        solution=jax.tree.map(lambda x: x * unit.astype(x.dtype), state.solution),
        residual_norm=measured,
        residual_norms=state.history,
        num_products=state.iterations + products + 1,
        converged=measured <= _SLACK * tolerance,
        smallest_curvature=state.smallest,
    )


def _check(
    operator: Any,
    damping: Any,
    method: str,
    preconditioner: Any,
    tolerance: Any,
    max_iterations: Any,
    step_size: Any,
    loop: Any,
) -> None:
    check_product("operator", operator)
    check_number("damping", damping, 0)
    check_choice("method", method, ("cg", "neumann"))
    if preconditioner is not None:
        check_product("preconditioner", preconditioner)
        if isinstance(preconditioner, NystromApproximation):
            raise TypeError(
                "`preconditioner` must approximate the inverse of the damped operator, got a "
                "Nyström approximation of the operator itself: give "
                "preconditioner=approximation.inverse(damping)."
            )
    check_number("tolerance", tolerance, 0, 1, open_low=True, open_high=True)
    check_integer("max_iterations", max_iterations, 1)
    if step_size is not None:
        check_number("step_size", step_size, 0, open_low=True)
        if method == "cg":
            raise ValueError(
                "`step_size` is that of method='neumann'; conjugate gradients find their own: "
                "leave it out."
            )
    if loop is not None:
        check_choice("loop", loop, ("graph", "host"))


def _step_size(
    operator: Operator,
    like: chex.ArrayTree,
    damping: chex.Numeric,
    preconditioner: Operator | None,
    loop: Loop,
) -> tuple[chex.Numeric, int]:
    """A step size for which the series should converge, and the products that it took."""
    if preconditioner is not None:
        return 1.0, 0
    num = min(_STEP_PRODUCTS, sum(leaf.size for leaf in jax.tree.leaves(like)))
    pairs = lanczos(
        operator, like, 1, key=jax.random.key(0), num_products=num, order="magnitude", loop=loop
    )
    # An eigenvalue lies within the residual of the Ritz value, which comes from below.
    largest = jnp.abs(pairs.eigenvalues[0]) + pairs.residual_norms[0] + damping
    return jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 1), num


# -- pieces between two products, compiled once per tree of shapes ---------------------------------


@jax.jit
def _damped(image: chex.ArrayTree, x: chex.ArrayTree, damping: chex.Numeric) -> chex.ArrayTree:
    return jax.tree.map(
        lambda i, v: i.astype(v.dtype) + jnp.asarray(damping, v.dtype) * v, image, x
    )


def _cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


@jax.jit
def _subtract(left: chex.ArrayTree, right: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(jnp.subtract, left, right)


def _relative(length: jax.Array, size: jax.Array) -> jax.Array:
    return jnp.where(size > 0, length / jnp.where(size > 0, size, 1), length)


def _along(x: chex.ArrayTree, factor: jax.Array, direction: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda a, d: a + factor.astype(a.dtype) * d, x, direction)


def _begin(
    first: chex.ArrayTree,
    residual: chex.ArrayTree,
    direction: chex.ArrayTree,
    size: jax.Array,
    tolerance: Any,
    max_iterations: int,
) -> _State:
    relative = _relative(norm(residual), size)
    history = jnp.full((max_iterations + 1,), jnp.nan, size.dtype).at[0].set(relative)
    return _State(
        solution=first,
        residual=residual,
        direction=direction,
        descent=vdot(residual, direction),
        history=history,
        iterations=jnp.zeros((), jnp.int32),
        smallest=jnp.full((), jnp.inf, size.dtype),
        going_on=relative > tolerance,
    )


def _quotient(direction: chex.ArrayTree, image: chex.ArrayTree) -> tuple[jax.Array, jax.Array]:
    """``<d, A d>`` and the Rayleigh quotient."""
    bending, square = vdot(direction, image), vdot(direction, direction)
    return bending, jnp.where(square > 0, bending / jnp.where(square > 0, square, 1), jnp.inf)


@jax.jit
def _conjugate_step(
    state: _State, image: chex.ArrayTree, size: jax.Array, tolerance: Any
) -> _State:
    """Moves to the minimum along the direction, unless the operator bends the other way there."""
    bending, quotient = _quotient(state.direction, image)
    sound = (bending > 0) & jnp.isfinite(bending) & (state.descent > 0)
    step = jnp.where(sound, state.descent / jnp.where(sound, bending, 1), 0)
    residual = _along(state.residual, -step, image)
    residual = jax.tree.map(lambda n, o: jnp.where(sound, n, o), residual, state.residual)
    iterations = state.iterations + 1
    relative = _relative(norm(residual), size)
    return state._replace(
        solution=_along(state.solution, step, state.direction),
        residual=residual,
        history=state.history.at[iterations].set(relative.astype(state.history.dtype)),
        iterations=iterations,
        smallest=jnp.minimum(state.smallest, quotient.astype(state.smallest.dtype)),
        going_on=sound & (relative > tolerance),
    )


@jax.jit
def _conjugate_direction(state: _State, preconditioned: chex.ArrayTree) -> _State:
    descent = vdot(state.residual, preconditioned)
    ratio = jnp.where(
        state.descent > 0, descent / jnp.where(state.descent > 0, state.descent, 1), 0
    )
    direction = _along(preconditioned, ratio, state.direction)
    return state._replace(direction=direction, descent=descent)


@jax.jit
def _series_step(
    state: _State, image: chex.ArrayTree, step_size: chex.Numeric, size: jax.Array, tolerance: Any
) -> _State:
    """Adds a term of the series."""
    _, quotient = _quotient(state.direction, image)
    step = jnp.asarray(step_size, state.descent.dtype)
    residual = _along(state.residual, -step, image)
    iterations = state.iterations + 1
    relative = _relative(norm(residual), size)
    return state._replace(
        solution=_along(state.solution, step, state.direction),
        residual=residual,
        history=state.history.at[iterations].set(relative.astype(state.history.dtype)),
        iterations=iterations,
        smallest=jnp.minimum(state.smallest, quotient.astype(state.smallest.dtype)),
        # Also false for a residual that is not a number.
        going_on=(relative > tolerance) & (relative < _DIVERGED * jnp.maximum(state.history[0], 1)),
    )


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
