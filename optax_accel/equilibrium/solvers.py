r"""Solvers of fixed points: Anderson acceleration, Broyden's method and plain iteration.

Each finds :math:`z = f(z)` for every example of a batch by itself, with

.. math::
  r_k = f(z_k) - z_k

as its residual: an example whose residual is below the tolerance, or 0, is frozen, and one whose
values are no longer finite keeps an iterate at which f is (the best one, or in plain iteration the
last one), while the others go on.

* Anderson, with the last n pairs (at most ``memory``), residuals as the rows of G, and mixing beta:

  .. math::
    \begin{pmatrix} 0 & 1^T \\ 1 & G G^T + \lambda I \end{pmatrix}
    \begin{pmatrix} \nu \\ \alpha \end{pmatrix} = \begin{pmatrix} 1 \\ 0 \end{pmatrix}, \qquad
    z_{k+1} = \beta \sum_i \alpha_i f(z_i) + (1 - \beta) \sum_i \alpha_i z_i .

* Broyden's "good" update of the inverse :math:`B = -I + U V^T` of the residual's Jacobian, with
  :math:`\Delta z` and :math:`\Delta r` the last changes:

  .. math::
    v^T = \Delta z^T B, \qquad u = \frac{\Delta z - B \Delta r}{v^T \Delta r}, \qquad
    z_{k+1} = z_k - B r_k .

Bai, Kolter, Koltun, `Deep equilibrium models <https://arxiv.org/abs/1909.01377>`_, NeurIPS 2019;
Bai, Geng, Savani, Kolter, `Deep equilibrium optical flow estimation
<https://arxiv.org/abs/2204.08442>`_, CVPR 2022.  Faithful to the authors' code: the updates, the
order and number of evaluations, what is returned, and the defaults.  Ours: that converged examples
are frozen (the authors' loops end when the worst example of the batch has converged, as ours do,
and change the others until then), the relative ridge, and what happens to values that are not
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_choice, check_flag, check_integer, check_number, shown
from optax_accel._means import vary_like
from optax_accel._mesh_axes import placed_like, with_auto_axes
from optax_accel.equilibrium._checks import checked_image, checked_state
from optax_accel.equilibrium._optimistix import is_optimistix_solver, solve_by_optimistix

Stop = Literal["absolute", "relative"]
Loop = Literal["while", "unrolled"]
Function = Callable[[chex.ArrayTree], chex.ArrayTree]
# The authors' stagnation test of Broyden's method: `broyden` in solvers.py of deq-flow.
_WINDOW, _NEAR, _FLAT = 30, 3.0, 1.3
_TINY = 1e-8  # added to the norm by which relative residuals are divided: the same code


class FixedPointReport(NamedTuple):
    """What a solver says of each example; without an axis of examples these are scalars.

    Attributes:
      residual: the norm of f(z) - z at the best iterate; (examples,), at least float32. For states
        of lower precision it is of the iterate in float32, before that is rounded to its dtype.
      relative_residual: the same, divided by the norm of f(z).
      steps: evaluations of f until the example converged or the solver stopped; int32.
      converged: whether the residual came below the tolerance, or was 0; bool.
      residuals: the residual of every evaluation, (evaluations, examples), of the kind that the
        solver stops by; NaN where the solver had stopped.
    """

    residual: jax.Array
    relative_residual: jax.Array
    steps: jax.Array
    converged: jax.Array
    residuals: jax.Array

    def check(self) -> None:
        """Raises ``ValueError`` if an example did not converge; outside of ``jit``.

        The message shows how the residual of the worst one went.

        Raises:
          ValueError: an example did not converge.
          TypeError: within ``jit``, where the values are not known.
        """
        if isinstance(self.converged, jax.core.Tracer):
            raise TypeError(
                "check() of a report looks at its values, which are not known within jit, grad or "
                "vmap: return the report, and check it outside."
            )
        converged = jnp.atleast_1d(self.converged)
        if bool(converged.all()):
            return
        paths = self.residuals.reshape(self.residuals.shape[0], -1)
        distance = jnp.where(converged, -jnp.inf, jnp.atleast_1d(self.residual))
        path = [float(residual) for residual in paths[:, int(jnp.argmax(distance))]]
        path = [residual for residual in path if not math.isnan(residual)]
        if not path:
            raise ValueError(
                f"{int((~converged).sum())} of {converged.size} examples did not reach their fixed "
                "point: f is not finite at z0. Look for NaN in the parameters and in the input, or "
                "start where f is defined."
            )
        shown = ", ".join(f"{residual:.3g}" for residual in path[:3])
        shown += f", ..., {path[-1]:.3g}" if len(path) > 3 else ""
        raise ValueError(
            f"{int((~converged).sum())} of {converged.size} examples did not reach their fixed "
            f"point in {len(path)} evaluations; the residuals of the farthest one: {shown}. Where "
            "they grow, f does not contract: make it (weight normalization, a smaller "
            "initialization, jacobian_penalty in the loss); where they fall, give the solver more "
            "`max_steps`, or a larger `tolerance`."
        )


class FixedPointSolver(NamedTuple):
    """A solver with its options, as :func:`anderson`, :func:`broyden` and :func:`fixed_point` make.

    Attributes:
      name: of the function that made it.
      init: ``init(z, evaluations)`` makes its memory for states of shape (examples, size).
      update: ``update(step, z, image, memory, running)`` gives the next state and memory; what it
        gives for examples that are not ``running`` is not used.
      max_steps: the most steps.
      evaluations: the evaluations of f that these take.
      tolerance: of the residual.
      stop: the residual that is compared with it, ``"absolute"`` or ``"relative"``.
      loop: ``"while"`` or ``"unrolled"``.
      result: what it returns, ``"best_image"``, ``"best_iterate"`` or ``"last_image"``.
      stagnates: whether it stops where the residual no longer changes.
    """

    name: str
    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
    max_steps: int
    evaluations: int
    tolerance: float
    stop: Stop
    loop: Loop
    result: Literal["best_image", "best_iterate", "last_image"]
    stagnates: bool = False


def anderson(
    max_steps: int = 40,
    tolerance: float = 1e-3,
    *,
    memory: int = 6,
    ridge: float = 1e-4,
    relative_ridge: float = 0.0,
    mixing: float = 1.0,
    stop: Stop = "absolute",
    loop: Loop = "while",
) -> FixedPointSolver:
    r"""Anderson acceleration, the authors' solver of the forward pass.

    It evaluates f ``max_steps`` times and returns f at the best iterate.

    Args:
      max_steps: the most evaluations of f, at least 2; default 40, the authors'.
      tolerance: an example has converged when its residual is below this, at least 0; default
        1e-3, the authors'.
      memory: the number of pairs that are mixed, at least 1; default 6, the authors'.
      ridge: :math:`\lambda`, at least 0; default 1e-4, the authors'.  It is absolute: residuals of
        about its root and less are no longer reduced much by mixing.
      relative_ridge: added to :math:`\lambda`, as a multiple of the mean squared norm of the
        residuals, at least 0; default 0.  With ``ridge=0`` and 1e-8 here residuals fall to the
        precision of the dtype.
      mixing: beta, in (0, 1]; default 1, the authors'.
      stop: whether the ``"absolute"`` residual (default) or the ``"relative"`` one, divided by the
        norm of f(z), is compared with ``tolerance``.
      loop: ``"while"`` (default) ends when all examples have converged; ``"unrolled"`` writes all
        steps into the program, which on a CPU is many times faster for convolutions (jax#12868).

    Returns:
      The solver.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> oa.equilibrium.anderson(20, memory=4).evaluations
      20

    References:
      Bai et al., `Deep equilibrium optical flow <https://arxiv.org/abs/2204.08442>`_, section 3.
    """
    _check(max_steps, 2, tolerance, stop, loop)
    check_integer("memory", memory, 1)
    check_number("ridge", ridge, 0)
    check_number("relative_ridge", relative_ridge, 0)
    check_number("mixing", mixing, 0, 1, open_low=True)

    def init(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        empty = _rows_like(z, memory)
        return empty, empty

    def update(
        step: jax.Array,
        z: jax.Array,
        image: jax.Array,
        pairs: tuple[jax.Array, jax.Array],
        running: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        # Of examples that have stopped nothing may enter the derivatives: 0 times infinity.
        iterates, images = (
            _where(running, lax.dynamic_update_index_in_dim(old, new, step % memory, 1), 0)
            for old, new in zip(pairs, (z, image), strict=True)
        )
        present = jnp.arange(memory) <= step
        residuals = images - iterates
        gram = jnp.einsum("bmd,bnd->bmn", residuals, residuals, precision="highest")
        gram = _where(running, gram, jnp.broadcast_to(jnp.eye(memory, dtype=z.dtype), gram.shape))

        def weigh(gram: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
            return mixing_weights(gram, present, ridge, relative_ridge)

        weights, solved = with_auto_axes(weigh, gram, present, out_like=(gram[:, 0], gram[:, 0, 0]))
        mixed = _combined(weights, images)
        if mixing != 1:
            mixed = mixing * mixed + (1 - mixing) * _combined(weights, iterates)
        # The first step of the authors' loop is a plain one, whatever the mixing.
        return _where(solved & (step > 0), mixed, image), (iterates, images)

    return FixedPointSolver(
        "anderson", init, update, max_steps, max_steps, tolerance, stop, loop, "best_image"
    )


def broyden(
    max_steps: int = 40,
    tolerance: float = 1e-3,
    *,
    memory: int | None = None,
    stop: Stop = "absolute",
    loop: Loop = "while",
) -> FixedPointSolver:
    """Broyden's method with limited memory, the authors' solver of the backward pass.

    It evaluates f ``max_steps + 1`` times, has no line search and returns the best iterate itself.
    As in the authors' code it also stops where the residual has been almost constant for 30 steps
    and is below three times the tolerance.

    Args:
      max_steps: the most steps, at least 1; default 40, the authors'.
      tolerance: an example has converged when its residual is below this, at least 0; default
        1e-3, the authors'.
      memory: the number of updates that are kept, of which the oldest is overwritten, at least 1;
        None (default) keeps all.
      stop: whether the ``"absolute"`` residual (default) or the ``"relative"`` one, divided by the
        norm of f(z), is compared with ``tolerance``.
      loop: ``"while"`` (default) ends when all examples have converged; ``"unrolled"`` writes all
        steps into the program, which on a CPU is many times faster for convolutions (jax#12868).

    Returns:
      The solver.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> oa.equilibrium.broyden(20, memory=4).evaluations
      21

    References:
      Bai et al., `Deep equilibrium models <https://arxiv.org/abs/1909.01377>`_, section 3.1.3.
    """
    _check(max_steps, 1, tolerance, stop, loop)
    if memory is not None:
        check_integer("memory", memory, 1)
    kept = max_steps if memory is None else min(memory, max_steps)

    def init(z: jax.Array) -> tuple[jax.Array, ...]:
        empty, zeros = _rows_like(z, kept), _rows_like(z, 1)[:, 0]
        return empty, empty, zeros, zeros

    def inverse(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return _combined(jnp.einsum("bmd,bd->bm", v, x, precision="highest"), u) - x

    def update(
        step: jax.Array,
        z: jax.Array,
        image: jax.Array,
        memory: tuple[jax.Array, ...],
        running: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        # Of examples that have stopped nothing may enter the derivatives: 0 times infinity.
        u, v, last_z, last_residual = (_where(running, kept, 0) for kept in memory)
        z, image = _where(running, z, 0), _where(running, image, 0)
        residual = image - z
        moved, changed = z - last_z, residual - last_residual
        row = inverse(v, u, moved)
        divisor = jnp.einsum("bd,bd->b", row, changed, precision="highest")[:, None]
        usable = (divisor != 0) & jnp.isfinite(divisor) & (step > 0)
        column = (moved - inverse(u, v, changed)) / jnp.where(usable, divisor, 1)
        slot = (step - 1) % kept
        u = lax.dynamic_update_index_in_dim(u, jnp.where(usable, column, 0), slot, 1)
        v = lax.dynamic_update_index_in_dim(v, jnp.where(usable, row, 0), slot, 1)
        return z - inverse(u, v, residual), (u, v, z, residual)

    return FixedPointSolver(
        "broyden",
        init,
        update,
        max_steps,
        max_steps + 1,
        tolerance,
        stop,
        loop,
        "best_iterate",
        True,
    )


def fixed_point(
    max_steps: int = 40,
    tolerance: float = 1e-3,
    *,
    stop: Stop = "absolute",
    loop: Loop = "while",
) -> FixedPointSolver:
    """Plain iteration of f, of which the last value is returned.

    Args:
      max_steps: the most evaluations of f, at least 1; default 40. The authors' released models of
        optical flow take 36 and 40.
      tolerance: an example has converged when its residual is below this, at least 0; default
        1e-3, the authors'.
      stop: whether the ``"absolute"`` residual (default) or the ``"relative"`` one, divided by the
        norm of f(z), is compared with ``tolerance``.
      loop: ``"while"`` (default) ends when all examples have converged; ``"unrolled"`` writes all
        steps into the program, which on a CPU is many times faster for convolutions (jax#12868).

    Returns:
      The solver.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> oa.equilibrium.fixed_point(12).evaluations
      12
    """
    _check(max_steps, 1, tolerance, stop, loop)
    return FixedPointSolver(
        "fixed_point",
        lambda z: (),
        lambda step, z, image, memory, running: (image, memory),
        max_steps,
        max_steps,
        tolerance,
        stop,
        loop,
        "last_image",
    )


def _check(max_steps: int, low: int, tolerance: float, stop: str, loop: str) -> None:
    check_integer("max_steps", max_steps, low)
    check_number("tolerance", tolerance, 0)
    check_choice("stop", stop, ("absolute", "relative"))
    check_choice("loop", loop, ("while", "unrolled"))


def check_solver(name: str, value: Any) -> None:
    """Raises ``TypeError`` if an argument is not a solver of ours or of optimistix."""
    if not isinstance(value, FixedPointSolver) and not is_optimistix_solver(value):
        raise TypeError(
            f"`{name}` must be a solver, as optax_accel.equilibrium.anderson(), broyden() or "
            f"fixed_point() make, or one of optimistix; got {shown(value)}."
        )


def mixing_weights(
    gram: jax.Array, present: jax.Array, ridge: Any, relative_ridge: Any
) -> tuple[jax.Array, jax.Array]:
    """Weights of sum 1 for which the mixed residual is least, with the ridge of the module.

    Args:
      gram: inner products of the residuals of each example, (examples, pairs, pairs).
      present: which of the pairs there are, (pairs,).
      ridge: the absolute ridge.
      relative_ridge: the ridge as a multiple of the mean squared norm of the residuals.

    Returns:
      The weights, (examples, pairs), 0 for absent pairs; and for each example whether there are
      such weights, (examples,): where the system is singular they are 0, and constant.
    """
    examples, size, dtype = gram.shape[0], gram.shape[-1], gram.dtype
    there = present.astype(dtype)
    gram = jnp.where(jnp.broadcast_to(present[:, None] & present[None], gram.shape), gram, 0)
    squares = jnp.trace(gram, axis1=1, axis2=2) / there.sum()
    ridges = jnp.broadcast_to((ridge + relative_ridge * squares)[:, None], (examples, size))
    # Absent pairs are coupled to nothing: their weight is 0.
    diagonal = jnp.where(jnp.broadcast_to(present, ridges.shape), ridges, 1)
    edge = jnp.broadcast_to(there, (examples, size))
    first = jnp.concatenate([jnp.zeros((examples, 1), dtype), edge], 1)
    rest = gram + diagonal[:, :, None] * jnp.eye(size, dtype=dtype)[None]
    system = jnp.concatenate([first[:, None], jnp.concatenate([edge[:, :, None], rest], 2)], 1)
    first_row = jnp.eye(size + 1, 1, dtype=dtype)
    sides = vary_like(jnp.broadcast_to(first_row, (examples, size + 1, 1)), system)
    factors, _, order = lax.linalg.lu(lax.stop_gradient(system))
    eliminated = jax.vmap(_eliminated)
    solved = jnp.isfinite(eliminated(factors, order, sides)).all((1, 2))
    # A guard behind the solution would come too late: the derivative would be 0 times infinity.
    identity = jnp.broadcast_to(jnp.eye(size + 1, dtype=dtype), system.shape)
    system, factors = _where(solved, system, identity), _where(solved, factors, identity)
    solution = lax.custom_linear_solve(
        lambda y: jnp.matmul(system, y, precision="highest"),
        sides,
        lambda _, side: eliminated(factors, order, side),
        symmetric=True,
    )
    return _where(solved, solution[:, 1:, 0], 0), solved


def _eliminated(factors: jax.Array, order: jax.Array, side: jax.Array) -> jax.Array:
    """The solution of one linear system, from its triangular factors and the order of its rows."""
    half = jax.scipy.linalg.solve_triangular(factors, side[order], lower=True, unit_diagonal=True)
    return jax.scipy.linalg.solve_triangular(factors, half)


def _where(chosen: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    """Some examples of one array, the others of another one or of a constant."""
    return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _rows_like(z: jax.Array, rows: int) -> jax.Array:
    """Zeros with so many rows for each example, which lie where the examples lie."""
    # Unlike `zeros_like`, it varies over the axes of a `shard_map` that z varies over.
    zeros = jnp.where(jnp.zeros((), bool), z, 0)
    return jnp.broadcast_to(zeros[:, None], (z.shape[0], rows, z.shape[1]))


def _combined(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.einsum("bm,bmd->bd", weights, rows, precision="highest")


# -- the loop --------------------------------------------------------------------------------------


class _Carry(NamedTuple):
    step: jax.Array
    z: jax.Array
    memory: Any
    found: jax.Array
    iterate: jax.Array
    diverged: jax.Array
    residual: jax.Array
    relative_residual: jax.Array
    least: jax.Array
    steps: jax.Array
    converged: jax.Array
    running: jax.Array
    residuals: jax.Array


def solve(
    solver: FixedPointSolver | Any,
    f: Function,
    z0: chex.ArrayTree,
    *,
    batched: bool = True,
    axis_name: str | None = None,
    differentiable: bool = False,
) -> tuple[chex.ArrayTree, FixedPointReport]:
    """Finds the fixed point of a function of pytrees.

    Args:
      solver: the solver; one of the package optimistix, where that is installed, takes all examples
        as one problem, decides by its own tolerances and takes at most 256 steps.
      f: maps a state to one of the same structure, shapes and dtypes.
      z0: where it starts: a pytree of floating-point arrays, the first axis of all of them the
        examples.
      batched: False for a state without an axis of examples, which is one example.
      axis_name: axis over which f communicates, so that all devices have to take equally many
        steps; None (default) if it does not.
      differentiable: whether reverse mode has to go through the steps, whose number is then always
        the largest.

    Returns:
      The state, and the report.

    Raises:
      TypeError: ``z0`` is not of floating-point arrays, or an argument is of another type.
      ValueError: f(z0) is not like ``z0``; no entries, no axis of examples or examples of different
        numbers in ``z0``; ``axis_name`` with a solver of optimistix.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> solver = oa.equilibrium.broyden(10, 1e-6)
      >>> z, report = oa.equilibrium.solve(solver, jnp.cos, jnp.ones(()), batched=False)
      >>> round(float(z), 4), bool(report.converged)
      (0.7391, True)
    """
    check_solver("solver", solver)
    check_flag("batched", batched)
    check_flag("differentiable", differentiable)
    z0 = checked_state("z0", z0, batched)
    z0 = placed_like(z0, checked_image(f, (z0,), "f(z)"))
    z, report, _ = find(
        solver, f, z0, batched=batched, axis_name=axis_name, differentiable=differentiable
    )
    return z, report


def find(
    solver: FixedPointSolver | Any,
    f: Function,
    z0: chex.ArrayTree,
    *,
    batched: bool,
    axis_name: str | None,
    differentiable: bool = False,
) -> tuple[chex.ArrayTree, FixedPointReport, jax.Array]:
    """What :func:`solve` does, of arguments that have been checked.

    Args:
      solver: see :func:`solve`, as for the others.
      f: the function.
      z0: where it starts, of arrays that lie where those of ``f(z0)`` lie.
      batched: whether there is an axis of examples.
      axis_name: axis over which f communicates, or None.
      differentiable: whether reverse mode has to go through the steps.

    Returns:
      The state; the report; and for each example whether it met values that are not finite.
    """
    if is_optimistix_solver(solver):
        z, fields = solve_by_optimistix(
            solver, f, z0, batched=batched, axis_name=axis_name, differentiable=differentiable
        )
        return z, FixedPointReport(**fields), ~jnp.isfinite(fields["residual"])
    pack, unpack = _packing(z0, batched)

    def image_of(z: jax.Array) -> jax.Array:
        return pack(f(unpack(z)))

    def body(carry: _Carry) -> _Carry:
        return _advance(solver, image_of, carry)

    def goes_on(carry: _Carry) -> jax.Array:
        left = jnp.any(carry.running)
        if axis_name is not None:
            left = lax.pmax(left.astype(jnp.int32), axis_name) > 0
        return left & (carry.step < solver.evaluations)

    carry = _start(solver, pack(z0))
    if solver.loop == "unrolled":
        for _ in range(solver.evaluations):
            carry = body(carry)
    elif differentiable:
        carry = lax.fori_loop(0, solver.evaluations, lambda _, carry: body(carry), carry)
    else:
        carry = lax.while_loop(goes_on, body, carry)
    report = FixedPointReport(
        *(carry.residual, carry.relative_residual),
        *(carry.steps, carry.converged, carry.residuals),
    )
    # What follows from an image near overflow is not finite: the iterate before it is safe.
    found, diverged = _where(carry.diverged, carry.iterate, carry.found), carry.diverged
    if not batched:
        report, diverged = jax.tree.map(lambda field: field[..., 0], (report, diverged))
    return unpack(found), report, diverged


def _start(solver: FixedPointSolver, z: jax.Array) -> _Carry:
    zeros = _rows_like(z, 1).sum((1, 2))  # one for each example
    endless, no = zeros + jnp.inf, zeros > 0
    return _Carry(
        step=jnp.zeros((), jnp.int32),
        z=z,
        memory=solver.init(z),
        found=z,
        iterate=lax.stop_gradient(z),
        diverged=no,
        residual=endless,
        relative_residual=endless,
        least=endless,
        steps=no.astype(jnp.int32),
        converged=no,
        running=~no,
        residuals=jnp.broadcast_to(zeros + jnp.nan, (solver.evaluations, *zeros.shape)),
    )


def _advance(
    solver: FixedPointSolver, image_of: Callable[[jax.Array], jax.Array], carry: _Carry
) -> _Carry:
    """One evaluation of f, and the step that follows from it."""
    image = image_of(carry.z)
    # Nothing but comparisons and the report depends on these.
    fixed = lax.stop_gradient(image)
    residual = jnp.linalg.norm(fixed - lax.stop_gradient(carry.z), axis=-1)
    relative_residual = residual / (jnp.linalg.norm(fixed, axis=-1) + _TINY)
    compared = residual if solver.stop == "absolute" else relative_residual
    finite = carry.running & jnp.isfinite(residual)
    better = finite & ((compared < carry.least) | (solver.result == "last_image"))
    converged = carry.converged | (finite & ((compared < solver.tolerance) | (residual == 0)))
    diverged = carry.diverged | (carry.running & ~finite)
    iterate = _where(better, lax.stop_gradient(carry.z), carry.iterate)
    shown = jnp.where(carry.running, compared, jnp.nan)
    residuals = lax.dynamic_update_index_in_dim(carry.residuals, shown, carry.step, 0)
    running = finite & ~converged
    if solver.stagnates and solver.evaluations > _WINDOW:
        running &= ~_is_stagnant(solver, residuals, carry.step)
    z, memory = solver.update(carry.step, carry.z, image, carry.memory, running)
    usable = jnp.isfinite(lax.stop_gradient(z)).all(-1)
    z = _where(running, _where(usable, z, image), _where(diverged, iterate, carry.z))
    kept = carry.z if solver.result == "best_iterate" else image
    return _Carry(
        step=carry.step + 1,
        z=z,
        memory=memory,
        found=_where(better, kept, carry.found),
        iterate=iterate,
        diverged=diverged,
        residual=jnp.where(better, residual, carry.residual),
        relative_residual=jnp.where(better, relative_residual, carry.relative_residual),
        least=jnp.where(better, compared, carry.least),
        steps=carry.steps + carry.running.astype(jnp.int32),
        converged=converged,
        running=running,
        residuals=residuals,
    )


def _is_stagnant(solver: FixedPointSolver, residuals: jax.Array, step: jax.Array) -> jax.Array:
    """Whether the residuals of the last steps are alike, and near the tolerance."""
    window = lax.dynamic_slice_in_dim(residuals, step - _WINDOW + 1, _WINDOW)
    alike = jnp.max(window, 0) < _FLAT * jnp.min(window, 0)
    return (step > _WINDOW) & alike & (window[-1] < _NEAR * solver.tolerance)


def _packing(
    z0: chex.ArrayTree, batched: bool
) -> tuple[Callable[[chex.ArrayTree], jax.Array], Callable[[jax.Array], chex.ArrayTree]]:
    """Functions from a state to an array of (examples, size), in at least float32, and back."""
    leaves, structure = jax.tree.flatten(z0)
    examples = leaves[0].shape[0] if batched else 1
    dtype = jnp.result_type(*(jnp.promote_types(leaf.dtype, jnp.float32) for leaf in leaves))
    sizes = [leaf.size // examples for leaf in leaves]

    def pack(z: chex.ArrayTree) -> jax.Array:
        parts = zip(jax.tree.leaves(placed_like(z, z0)), sizes, strict=True)
        return jnp.concatenate(
            [leaf.reshape(examples, size).astype(dtype) for leaf, size in parts], axis=1
        )

    def unpack(flat: jax.Array) -> chex.ArrayTree:
        parts, start = [], 0
        for leaf, size in zip(leaves, sizes, strict=True):
            part = flat[:, start : start + size]
            parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
            start += size
        return jax.tree.unflatten(structure, parts)

    return pack, unpack
