r"""Deep equilibrium layers: the output is a fixed point, and the gradient knows it.

.. math::
  z^* = f(z^*, \theta, x), \qquad
  \frac{d z^*}{d \theta} = (I - J)^{-1} \frac{\partial f}{\partial \theta}, \qquad
  J = \frac{\partial f}{\partial z}(z^*) .

Three gradients:

* implicit: the linear system above, solved for tangents and for cotangents by a fixed-point solver
  as well, :math:`u = J^T u + c`.  No step of the forward solver is kept, so memory does not depend
  on their number.  What one evaluation of f has to remember is kept while this system is solved; a
  function in :func:`jax.checkpoint` is evaluated again in each step instead, with less memory.
* phantom: from :math:`z^*`, as a constant, k damped steps
  :math:`z \leftarrow (1 - \tau) z + \tau f(z, \theta, x)` are differentiated.  It tends to the
  implicit gradient as k grows; :math:`k = \tau = 1` leaves the inverse out.
* unrolled: through all steps of the solver.

Bai, Kolter, Koltun, `Deep equilibrium models <https://arxiv.org/abs/1909.01377>`_, NeurIPS 2019
(implicit); Geng, Zhang, Bai, Wang, Lin, `On training implicit models
<https://arxiv.org/abs/2111.05177>`_, NeurIPS 2021 (phantom); Bai, Koltun, Kolter, `Stabilizing
equilibrium models by Jacobian regularization <https://arxiv.org/abs/2106.14342>`_, ICML 2021 (the
penalty); Bai, Geng, Savani, Kolter, `Deep equilibrium optical flow estimation
<https://arxiv.org/abs/2204.08442>`_, CVPR 2022 (fixed-point correction).  Faithful to these and to
the authors' code.  Ours: the implicit gradient is a rule for tangents, whose transpose is that of
the paper, so that forward mode and derivatives of any order work too; an example at which ``f``
is no longer finite is held constant by the phantom steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from optax_accel._arguments import check_flag, check_integer, check_number, shown
from optax_accel._mesh_axes import placed_like
from optax_accel._random import as_key
from optax_accel.equilibrium._checks import checked_image, checked_state
from optax_accel.equilibrium.solvers import (
    FixedPointReport,
    FixedPointSolver,
    anderson,
    broyden,
    check_solver,
    find,
)


class EquilibriumFunction(Protocol):
    """What is iterated: ``f(z, params, x)`` has the structure, shapes and dtypes of ``z``."""

    def __call__(self, z: Any, params: Any, x: Any, /) -> Any:
        """The next state."""


class Phantom(NamedTuple):
    """The phantom gradient, as :func:`phantom` makes it.

    Attributes:
      steps: k, the number of steps that are differentiated.
      damping: tau, the share of f in each.
    """

    steps: int
    damping: float


Gradient = Literal["implicit", "unrolled"] | Phantom


def phantom(steps: int = 1, damping: float = 1.0) -> Phantom:
    r"""The phantom gradient, for the argument ``gradient`` of :func:`deq`.

    Args:
      steps: k, the number of steps that are differentiated, at least 1; default 1, the one-step
        gradient of the authors' optical flow.
      damping: :math:`\tau`, the share of f in each step, in (0, 1]; default 1.  The authors take
        0.5 on CIFAR-10.

    Returns:
      The description of the gradient.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> oa.equilibrium.phantom(5, 0.5)
      Phantom(steps=5, damping=0.5)

    References:
      Geng et al., `On training implicit models <https://arxiv.org/abs/2111.05177>`_, section 3.
    """
    check_integer("steps", steps, 1)
    check_number("damping", damping, 0, 1, open_low=True)
    return Phantom(steps, damping)


def deq(
    f: EquilibriumFunction,
    z0: chex.ArrayTree,
    params: chex.ArrayTree,
    x: chex.ArrayTree,
    *,
    solver: FixedPointSolver | Any | None = None,
    gradient: Gradient = "implicit",
    backward_solver: FixedPointSolver | Any | None = None,
    corrections: int | None = None,
    batched: bool = True,
    axis_name: str | None = None,
) -> tuple[Any, FixedPointReport]:
    r"""The fixed point of ``f`` in its first argument, differentiable in ``params`` and ``x``.

    What ``f`` closes over is differentiated too.  ``z0`` is not: the fixed point does not depend on
    it.  A good one saves steps: with the fixed point of the last frame or the last epoch the solver
    starts warm.  Parameters that change the loss only through the number of steps have no gradient.

    Args:
      f: ``f(z, params, x)``, with the structure, shapes and dtypes of ``z``.
      z0: where the solver starts: a pytree of floating-point arrays whose first axis are the
        examples, (examples, ...).  Zeros in the papers.
      params: the parameters, any pytree.
      x: the input of the layer, any pytree; tokens and other integers are allowed.
      solver: of the forward pass; None (default) is ``anderson()``, the authors' choice.  A solver
        of the package optimistix, where that is installed, takes all examples as one problem,
        decides by its own tolerances and takes at most 256 steps; not with ``corrections`` or
        ``axis_name``.
      gradient: ``"implicit"`` (default), whose derivatives of any order are right where the
        solvers converge, in both modes, Hessians too; ``phantom(steps, damping)``; or
        ``"unrolled"``, which keeps all steps of the solver and takes the largest number of them.
      backward_solver: of the implicit gradient; None (default) is ``broyden()``, the authors'
        choice.  It works on tangents or cotangents of the size of ``z0``, from 0; scale
        ``tolerance`` to them, or take ``stop="relative"``.
      corrections: L, the number of supervised outputs on the way: the solver is cut in L segments
        of ``max_steps // L``, each starts at the output of the last one, and each output has a
        gradient of its own, for a loss by :func:`correction_loss`.  None (default) for one output.
      batched: False for a state without an axis of examples.
      axis_name: axis of ``pmap`` or ``shard_map`` over which ``f`` communicates, as batch
        normalization does, so that all devices have to take equally many steps; None (default) if
        it does not.

    Returns:
      The fixed point, like ``z0``, or a tuple of L with ``corrections``; and a
      :class:`~optax_accel.equilibrium.FixedPointReport` (with ``corrections`` that of the last
      segment, ``steps`` those of all), which has no gradient.

    Raises:
      ValueError: ``f(z0, params, x)`` is not like ``z0``; an argument outside its range; no arrays
        or no axis of examples in ``z0``.
      TypeError: ``z0`` is not of floating-point arrays, or an argument of another type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> f = lambda z, w, x: jnp.tanh(z @ w + x)
      >>> w, x = jnp.array([[0.5, 0.2], [0.1, 0.4]]), jnp.ones((3, 2))
      >>> z, report = oa.deq(f, jnp.zeros((3, 2)), w, x)
      >>> bool(report.converged.all()), bool(jnp.abs(f(z, w, x) - z).max() < 1e-3)
      (True, True)
      >>> loss = lambda w: jnp.sum(oa.deq(f, jnp.zeros((3, 2)), w, x)[0])
      >>> jax.grad(loss)(w).shape
      (2, 2)

    References:
      Bai et al., `Deep equilibrium models <https://arxiv.org/abs/1909.01377>`_, sections 3.1 and
      3.2; `Deep equilibrium optical flow <https://arxiv.org/abs/2204.08442>`_, section 3.3
      (corrections).
    """
    solver = anderson() if solver is None else solver
    backward_solver = broyden() if backward_solver is None else backward_solver
    _check_options(solver, backward_solver, gradient)
    check_flag("batched", batched)
    z0 = checked_state("z0", z0, batched)
    z0 = placed_like(z0, checked_image(f, (z0, params, x), "f(z, params, x)"))
    segments = 1
    if corrections is not None:
        check_integer("corrections", corrections, 1)
        segments = corrections
        if gradient == "unrolled":
            raise ValueError("`corrections` needs the gradient 'implicit' or phantom(...).")
        if not isinstance(solver, FixedPointSolver):
            raise ValueError(
                "`corrections` needs a solver of optax_accel.equilibrium, whose steps it divides; "
                f"got {shown(solver)}."
            )
        steps = solver.max_steps // segments
        if steps < 2:
            raise ValueError(
                f"`corrections` {segments} leaves segments of {steps} of the {solver.max_steps} "
                f"steps of the solver: give it `max_steps` of at least {2 * segments}."
            )
        evaluations = solver.evaluations - solver.max_steps + steps
        solver = solver._replace(max_steps=steps, evaluations=evaluations)
    outputs, reports, z = [], [], z0
    for _ in range(segments):
        z, report = _layer(f, z, params, x, solver, gradient, backward_solver, batched, axis_name)
        outputs.append(z)
        reports.append(report)
    report = reports[-1]._replace(steps=functools.reduce(jnp.add, [r.steps for r in reports]))
    return (outputs[0] if corrections is None else tuple(outputs)), lax.stop_gradient(report)


def _layer(
    f: EquilibriumFunction,
    z0: chex.ArrayTree,
    params: chex.ArrayTree,
    x: chex.ArrayTree,
    solver: FixedPointSolver,
    gradient: Gradient,
    backward_solver: FixedPointSolver,
    batched: bool,
    axis_name: str | None,
) -> tuple[chex.ArrayTree, FixedPointReport]:
    if gradient == "unrolled":
        z, report, _ = find(
            solver,
            lambda z: f(z, params, x),
            lax.stop_gradient(z0),
            batched=batched,
            axis_name=axis_name,
            differentiable=True,
        )
        return z, report
    # Constants: neither mode of differentiation looks into the loop.
    function, consts = _hoisted(f, z0, params, x)
    fixed = lax.stop_gradient((params, x, *consts))
    z, report, diverged = find(
        solver,
        lambda z: function(z, *fixed),
        lax.stop_gradient(z0),
        batched=batched,
        axis_name=axis_name,
    )
    z = lax.stop_gradient(z)
    if isinstance(gradient, Phantom):
        for _ in range(gradient.steps):
            image = _damped(gradient.damping, z, f(z, params, x))
            z = jax.tree.map(functools.partial(_held, diverged), z, image)
        return z, report
    back = functools.partial(find, backward_solver, batched=batched, axis_name=axis_name)
    return _implicit(_Static(function, back), z, (params, x, *consts)), report


def _hoisted(
    f: EquilibriumFunction, z: chex.ArrayTree, params: chex.ArrayTree, x: chex.ArrayTree
) -> tuple[EquilibriumFunction | Any, list[Any]]:
    """The function with all that it closes over as further arguments, and these.

    ``jax.closure_convert`` leaves integers, booleans and PRNG keys inside, which must not be
    tracers of another transformation where a derivative is taken later.
    """
    closed, image = jax.make_jaxpr(f, return_shape=True)(z, params, x)
    structure, count = jax.tree.structure(image), len(closed.consts)

    def function(z: Any, params: Any, x: Any, *consts: Any) -> Any:
        run = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts[:count]))
        return jax.tree.unflatten(structure, run(*jax.tree.leaves((z, params, x))))

    return function, list(closed.consts)


def _damped(damping: float, z: chex.ArrayTree, image: chex.ArrayTree) -> chex.ArrayTree:
    if damping == 1:
        return image
    return jax.tree.map(lambda a, b: (1 - damping) * a + damping * b, z, image)


def _held(diverged: jax.Array, z: jax.Array, image: jax.Array) -> jax.Array:
    """The image, except for examples that have diverged, which stay where f is finite."""
    axes = tuple(range(diverged.ndim, z.ndim))
    return jnp.where(jnp.expand_dims(diverged, axes), z, image)


class _Static(NamedTuple):
    """What the implicit rule closes over."""

    function: Any
    solve: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _implicit(static: _Static, z: chex.ArrayTree, arguments: tuple[Any, ...]) -> chex.ArrayTree:
    """The fixed point z, whose derivative is that of the implicit function theorem."""
    del static, arguments
    return z


@_implicit.defjvp
def _implicit_jvp(
    static: _Static, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    (z, arguments), (_, moved) = primals, tangents
    z = _implicit(static, z, arguments)
    _, side = jax.jvp(lambda arguments: static.function(z, *arguments), (arguments,), (moved,))
    side = placed_like(side, z)

    def residual_of(v: chex.ArrayTree) -> chex.ArrayTree:
        _, image = jax.jvp(lambda z: static.function(z, *arguments), (z,), (v,))
        return jax.tree.map(jnp.subtract, v, image)

    def solution(apply: Any, side: chex.ArrayTree) -> chex.ArrayTree:
        def step(v: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(lambda v, left, c: v - left + c, v, apply(v), side)

        found, _, _ = static.solve(step, placed_like(jax.tree.map(jnp.zeros_like, side), side))
        return found

    return z, lax.custom_linear_solve(residual_of, side, solution, transpose_solve=solution)


# -- losses ----------------------------------------------------------------------------------------


def correction_loss(losses: Iterable[chex.Numeric], gamma: float = 0.8) -> jax.Array:
    r"""The loss of fixed-point correction, :math:`\sum_i \gamma^{L - 1 - i} \ell_i`.

    Args:
      losses: the losses of the outputs of ``deq(..., corrections=L)`` in their order, scalars.
      gamma: the factor by which each weighs less than the next one, in (0, 1]; default 0.8, the
        authors'.

    Returns:
      The weighted sum; a scalar.

    Raises:
      ValueError: no losses, one that is not a scalar, or ``gamma`` outside its range.
      TypeError: ``losses`` is not a sequence, or an array.

    Example:
      >>> import optax_accel as oa
      >>> round(float(oa.equilibrium.correction_loss([1.0, 1.0, 1.0])), 4)
      2.44

    References:
      Bai et al., `Deep equilibrium optical flow <https://arxiv.org/abs/2204.08442>`_, section 3.3.
    """
    check_number("gamma", gamma, 0, 1, open_low=True)
    if not isinstance(losses, Iterable) or hasattr(losses, "dtype"):
        raise TypeError(f"`losses` must be a list or a tuple of scalars, got {shown(losses)}.")
    losses = list(losses)
    if not losses:
        raise ValueError("`losses` must contain the loss of at least one output, got none.")
    total = jnp.zeros(())
    for number, loss in enumerate(losses):
        if jnp.shape(loss) != ():
            raise ValueError(
                f"`losses` must be scalars, got one of shape {jnp.shape(loss)} at {number}: take "
                "its mean or sum."
            )
        total = gamma * total + loss
    return total


def jacobian_penalty(
    f: EquilibriumFunction,
    z: chex.ArrayTree,
    params: chex.ArrayTree,
    x: chex.ArrayTree,
    key: chex.PRNGKey | int,
    num_samples: int = 1,
) -> jax.Array:
    r"""An estimate of :math:`\|\partial f / \partial z\|_F^2 / \dim z`, for the loss.

    The mean of :math:`\|v^T J\|^2 / \dim z` over Gaussian vectors v, which is not biased.  One
    vector-Jacobian product for each of them.

    Args:
      f: the function of :func:`deq`.
      z: the fixed point, of any structure; it is differentiated like any other argument.
      params: the parameters of ``f``.
      x: the input of ``f``.
      key: PRNG key or integer seed of the vectors; a new one every step.
      num_samples: the number of vectors, at least 1; the authors take 1 or 2.

    Returns:
      The estimate, a scalar in at least float32.

    Raises:
      ValueError: ``num_samples`` is below 1; ``z`` has no entries; f(z, params, x) is not like it.
      TypeError: ``z`` is not of floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> f = lambda z, w, x: z @ w
      >>> w = jnp.array([[0.5, 0.2], [0.1, 0.4]])  # squared norm 0.46
      >>> penalty = oa.equilibrium.jacobian_penalty(f, jnp.zeros((1, 2)), w, None, 0, 4096)
      >>> bool(abs(penalty - 0.23) < 0.02)
      True

    References:
      Bai et al., `Jacobian regularization <https://arxiv.org/abs/2106.14342>`_, section 4.
    """
    check_integer("num_samples", num_samples, 1)
    z = checked_state("z", z, batched=False)
    checked_image(f, (z, params, x), "f(z, params, x)")
    _, pull = jax.vjp(lambda z: f(z, params, x), z)
    leaves, structure = jax.tree.flatten(z)

    def sample(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        (product,) = pull(jax.tree.unflatten(structure, drawn))
        squares = [
            jnp.sum(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))
            for leaf in jax.tree.leaves(product)
        ]
        return functools.reduce(jnp.add, squares)

    samples = jax.vmap(sample)(jax.random.split(as_key(key), num_samples))
    return jnp.mean(samples) / sum(leaf.size for leaf in leaves)


# -- checks ----------------------------------------------------------------------------------------


def _check_options(solver: Any, backward_solver: Any, gradient: Any) -> None:
    check_solver("solver", solver)
    check_solver("backward_solver", backward_solver)
    if isinstance(gradient, Phantom):
        phantom(*gradient)  # refuses steps and a damping that there are not
    elif not isinstance(gradient, str) or gradient not in ("implicit", "unrolled"):
        raise ValueError(
            "`gradient` must be 'implicit', 'unrolled' or optax_accel.equilibrium.phantom(steps, "
            f"damping); got {shown(gradient)}."
        )
