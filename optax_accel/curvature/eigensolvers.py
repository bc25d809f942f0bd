"""What the matrix-free eigensolvers for symmetric operators on pytrees share.

:func:`~optax_accel.curvature.lanczos` is the one to start with: it takes the fewest products from a
cold start. :func:`~optax_accel.curvature.block_iteration` starts from a basis that is nearly right,
multiplies a whole block at a time and can filter with a Chebyshev polynomial;
:func:`~optax_accel.curvature.subspace_sweep` is its single step.
:func:`~optax_accel.curvature.lobpcg` wraps JAX's own solver. All but the last work leaf by leaf, so
sharded parameters stay sharded, and only small matrices leave the blocks.

Lanczos and the block iteration run in one of two loops. ``loop="graph"`` builds a
``lax.while_loop``, so that the solver can be part of a compiled function. ``loop="host"`` is a
Python loop around compiled pieces, for products that cannot be traced (accumulated over a loader)
or that XLA runs slowly inside loops (convolutions on a CPU, jax#12868); give it a product that is
compiled already. The pieces between two products are compiled once per tree of shapes, whatever the
operator is; inside a compiled function, their ``jit`` adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_choice, check_integer, check_number
from optax_accel.curvature import blocks

Order = Literal["algebraic", "magnitude", "smallest", "both"]
# The orders whose leading eigenvalues a shifted power step can make the largest in magnitude.
PowerOrder = Literal["algebraic", "magnitude"]
ORDERS: tuple[Order, ...] = ("algebraic", "magnitude", "smallest", "both")
POWER_ORDERS: tuple[PowerOrder, ...] = ("algebraic", "magnitude")
Loop = Literal["graph", "host"]
T = TypeVar("T")

# Anything smaller than this many ulps of the largest entry seen counts as zero.
_ULPS = 10


class Eigenpairs(NamedTuple):
    """The result of an eigensolver.

    Attributes:
      eigenvalues: Ritz values ``(k,)``, the leading one first.
      basis: orthonormal block of the Ritz vectors, leaves ``(k, *shape)``, in the same order.
      residual_norms: ``|A u - theta u|`` of each pair, ``(k,)``, or a bound of it (from
        ``lanczos`` after a second sequence). A symmetric operator has an eigenvalue within this
        distance of the Ritz value.
      num_products: operator-vector products used; int32 scalar.
      converged: ``(k,)``, whether the estimated relative error of each eigenvalue is within the
        tolerance (without one: half of the dtype's digits, ``eps ** 0.5``). With
        ``lanczos(tolerance=)`` it is true only if, in addition, a sequence from a fresh random
        vector, orthogonal to those pairs, has shown no eigenvalue that should stand among the
        ``k``, so that copies of a multiple eigenvalue are counted. ``lanczos`` without a tolerance
        or with ``confirm=False``,
        ``block_iteration`` and ``lobpcg`` judge each pair by itself: copies of which the start had
        no part may be missing.
      smallest: the smallest Ritz value seen, an estimate of the bottom of the spectrum; infinite if
        there was none.
    """

    eigenvalues: jax.Array
    basis: chex.ArrayTree
    residual_norms: jax.Array
    num_products: jax.Array
    converged: jax.Array
    smallest: jax.Array


def no_pairs(like: chex.ArrayTree) -> Eigenpairs:
    """The result where no eigenpairs are wanted."""
    dtype = blocks.scalar_dtype(like)
    empty = jnp.zeros((0,), dtype)
    return Eigenpairs(
        eigenvalues=empty,
        basis=blocks.zeros(0, like),
        residual_norms=empty,
        num_products=jnp.zeros((), jnp.int32),
        converged=jnp.zeros((0,), bool),
        smallest=jnp.asarray(jnp.inf, dtype),
    )


def check_settings(
    num_directions: int,
    num_products: int,
    order: str,
    tolerance: float | None,
    loop: str,
    orders: Sequence[str] = POWER_ORDERS,
) -> None:
    """Raises if a setting that the solvers share is outside its range."""
    check_integer("num_directions", num_directions, 0)
    check_integer("num_products", num_products, 0)
    check_choice("order", order, tuple(orders))
    check_choice("loop", loop, ("graph", "host"))
    if tolerance is not None:
        check_number("tolerance", tolerance, 0, 1, open_low=True, open_high=True)


def score(eigenvalues: jax.Array, order: Order) -> jax.Array:
    """Numbers by which eigenvalues are ordered: the largest leads.

    With ``"both"``, where a place depends on all the others, it is the eigenvalue itself.
    """
    if order == "smallest":
        return -eigenvalues
    return jnp.abs(eigenvalues) if order == "magnitude" else eigenvalues


def sorting_key(eigenvalues: jax.Array, order: Order, first: chex.Numeric = 0) -> jax.Array:
    """Numbers by which eigenvalues are sorted: the one with the smallest number leads.

    Args:
      eigenvalues: ``(m,)``, ascending.
      order: which eigenvalues lead. With ``"both"`` the largest comes first, then the smallest, the
        second largest, the second smallest and so on.
      first: the place of the first one that counts; those before it are no eigenvalues.
    """
    if order != "both":
        return -score(eigenvalues, order)
    num = eigenvalues.shape[0]
    place = jnp.arange(num)
    from_top, from_bottom = 2 * (num - 1 - place), 2 * (place - first) + 1
    return jnp.minimum(from_top, from_bottom).astype(eigenvalues.dtype)


def would_lead(eigenvalues: jax.Array, leading: jax.Array, order: Order) -> jax.Array:
    """Whether eigenvalues would stand among the leading ones ``(k,)``, or beside the last."""
    if order != "both":
        return score(eigenvalues, order) >= score(leading[-1], order)
    among = eigenvalues >= leading[::2][-1]
    return among | (eigenvalues <= leading[1::2][-1]) if leading.shape[0] > 1 else among


def outward(leading: jax.Array, order: Order) -> jax.Array | int:
    """The signs of the directions in which eigenvalues lie that would lead even more."""
    if order == "magnitude":
        return jnp.sign(leading)
    if order == "both":
        return 1 - 2 * (jnp.arange(leading.shape[0]) % 2).astype(leading.dtype)
    return 1 if order == "algebraic" else -1


def relative_tolerance(tolerance: Any, eigenvalues: jax.Array) -> Any:
    """The tolerance; without one, half of the dtype's digits."""
    return jnp.sqrt(jnp.finfo(eigenvalues.dtype).eps) if tolerance is None else tolerance


def rounding_error(scale: jax.Array) -> jax.Array:
    """What counts as zero beside numbers of this scale."""
    return _ULPS * jnp.finfo(scale.dtype).eps * scale


def is_accurate(
    eigenvalues: jax.Array, errors: jax.Array, tolerance: Any, scale: jax.Array
) -> jax.Array:
    """Whether errors are within the relative tolerance, or lost in the rounding at this scale."""
    rounding = rounding_error(scale)
    return errors <= relative_tolerance(tolerance, eigenvalues) * jnp.abs(eigenvalues) + rounding


def run_while(loop: Loop, condition: Callable[[T], Any], body: Callable[[T], T], state: T) -> T:
    """Repeats the body while the condition holds."""
    if loop == "graph":
        return lax.while_loop(condition, body, state)
    while condition(state):
        state = body(state)
    return state


def run_times(loop: Loop, times: int, body: Callable[[T], T], state: T) -> T:
    """Repeats the body a fixed number of times."""
    if loop == "graph":
        return lax.fori_loop(0, times, lambda _, state: body(state), state)
    for _ in range(times):
        state = body(state)
    return state


def run_if(loop: Loop, condition: Any, function: Callable[[T], T], state: T) -> T:
    """Applies the function if the condition holds."""
    if loop == "graph":
        return lax.cond(condition, function, lambda state: state, state)
    return function(state) if condition else state
