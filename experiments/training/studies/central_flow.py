r"""Central flows: differential equations for the time-averaged course of an optimizer.

An optimizer that steps by :math:`-P^{-1} \nabla L`, with the diagonal :math:`P` that holds its
learning rate too, is at the edge of stability where the largest eigenvalue of :math:`P^{-1/2} H
P^{-1/2}` is :math:`c = 2`. There it oscillates along the eigenvectors :math:`P^{1/2} u_1, \dots`,
with a covariance :math:`\Sigma = \sum_{ij} X_{ij} u_i u_j^\top` that grows where the loss still
sharpens and shrinks where it flattens. Averaged over the oscillations

.. math::
  \frac{dw}{dt} &= -P(\nu)^{-1} \Big(\nabla L + \tfrac12 \nabla_w \langle \Sigma, H \rangle\Big), \\
  \frac{d\nu}{dt} &= \frac{1 - b_2}{b_2} \Big(\nabla L^2 + \mathrm{diag}(H \Sigma H) - \nu\Big),

time counted in steps, where :math:`\nu`, the mean of the squared gradients, is RMSprop's alone: of
gradient descent :math:`P = 1 / \eta`. The covariance is the one that keeps all eigenvalues at or
below :math:`c` with no more effort than needed (Cohen et al., 2025, sections 3 and 5). With
:math:`u_i^\top P u_j = \delta_{ij}` the matrix :math:`u_i^\top (H - c P) u_j` changes at a rate
:math:`A - B X` that both equations give: :math:`X \succeq 0`, the next matrix is negative
semidefinite, and where :math:`X` acts it is zero. For gradient descent and one direction this is
the gradient projected onto the surface of constant sharpness :math:`S`: :math:`X = \max(0,
-\langle \nabla S, \nabla L \rangle) / (\frac12 |\nabla S|^2)`.

Our reading:

* Which directions are at the edge is decided by the step itself. Over a time :math:`\delta` the
  matrix :math:`K` becomes :math:`K + \delta (A - B X)`. The condition on it is that of a small
  quadratic program, :math:`\min_{X \succeq 0} \frac12 \langle X, B X \rangle - \langle X, A + K /
  \delta \rangle`, which accelerated projected gradients solve; directions that stay below the edge
  get nothing, and rounding does not accumulate.
* Where :math:`X` acts, :math:`H u = c P u`. This form of :math:`H u` in :math:`H \Sigma H` makes
  :math:`B` symmetric.
* Adam has no flow in the paper. Its first moment :math:`m` averages the oscillation away, so that
  it follows the mean gradient: :math:`dm/dt = (1 - b_1) / b_1\, (\nabla L + \frac12 \nabla \langle
  \Sigma, H \rangle - m)`, :math:`dw/dt = -P^{-1} m`, and :math:`c = 2 (1 + b_1) / (1 - b_1)`. A
  covariance moves the curvature only after the lag of the momentum, :math:`b_1 / (1 - b_1)` steps;
  :math:`\delta` in the program is longer by it, and :math:`A` and :math:`B` are those without
  momentum.

The time-averaged loss is then :math:`L(\bar w) + \frac12 \langle \Sigma, H \rangle`, to second
order. Without the covariance the equations are those of the stable flow, for gradient descent the
gradient flow.

References:
  Cohen, Damian, Talwalkar, Kolter, Lee, `Understanding optimization in deep learning with central
  flows <https://arxiv.org/abs/2410.24206>`_, ICLR 2025.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel import curvature
from optax_accel.curvature import blocks

Loss = Callable[[jax.Array], jax.Array]
_ITERATIONS = 200  # of the quadratic program, at most; its unknown is a matrix of a few rows
_TOLERANCE = 1e-6  # of it, relative; float32 rounds at 6e-8
_EXTRA = 4  # tracked directions behind those that may be at the edge: they let it converge
_FEWEST, _MOST = 4, 64  # Euler steps of the stable flow in each step of the optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How an optimizer steps: gradient descent, RMSprop or Adam of Optax.

    Attributes:
      learning_rate: the learning rate.
      b1: decay of the first moment, 0 for none.
      b2: decay of the second moment, None for none.
      eps: what is added to the second moment, or to its root.
      corrects: whether it is Adam, which corrects the bias of the moments and adds eps to the root.
    """

    learning_rate: float
    b1: float = 0.0
    b2: float | None = None
    eps: float = 1e-8
    corrects: bool = False

    @property
    def threshold(self) -> float:
        """The eigenvalue of the preconditioned Hessian at the edge (Cohen et al., 2022, eq. 2)."""
        return 2 * (1 + self.b1) / (1 - self.b1)

    @property
    def lag(self) -> float:
        """Steps by which the first moment is behind."""
        return self.b1 / (1 - self.b1)

    @property
    def forgets(self) -> float:
        """How fast the second moment forgets, in each step.

        An average that includes the present gradient follows it by ``(1 - b2) / b2`` of what is
        left of the difference after the step.
        """
        return 0.0 if self.b2 is None else (1 - self.b2) / self.b2

    def divisor(self, square: jax.Array, count: jax.Array) -> jax.Array:
        """What the gradient, or its mean, is divided by.

        Args:
          square: the second moment, (dimension,).
          count: the number of gradients in it.
        """
        if self.b2 is None:
            return jnp.full_like(square, 1 / self.learning_rate)
        if not self.corrects:
            return jnp.sqrt(square + self.eps) / self.learning_rate
        root = jnp.sqrt(square / (1 - self.b2**count)) + self.eps
        return (1 - self.b1**count) * root / self.learning_rate


class FlowPoint(NamedTuple):
    """A point of a flow.

    Attributes:
      params: the parameters as one vector, (dimension,), float32.
      mean: the first moment, (dimension,); not used without momentum.
      square: the second moment, (dimension,); not used by gradient descent. Parameters where it is
        zero, which never had a gradient, stay where they are.
      number: of the gradients in the moments.
      basis: leading eigenvectors of the preconditioned Hessian, (tracked, dimension).
      shift: what the tracking adds to the spectrum so that its top leads.
    """

    params: jax.Array
    mean: jax.Array
    square: jax.Array
    number: jax.Array
    basis: jax.Array
    shift: jax.Array


class FlowReading(NamedTuple):
    """What is read at a point of a central flow.

    Attributes:
      params: the parameters, (dimension,).
      loss: the loss there.
      ratio: the largest eigenvalue of the preconditioned Hessian over its threshold.
      predicted_loss: the time-averaged loss of the optimizer.
      variance: the trace of the covariance, the mean squared length of the oscillation.
    """

    params: jax.Array
    loss: jax.Array
    ratio: jax.Array
    predicted_loss: jax.Array
    variance: jax.Array


class _Search(NamedTuple):
    """Where the quadratic program is: X, the point ahead of it, momentum, number of steps."""

    x: jax.Array
    ahead: jax.Array
    weight: jax.Array
    number: jax.Array


def covariance(growth: jax.Array, gram: jax.Array) -> jax.Array:
    r"""The smallest covariance that stops all growth of curvature.

    Solves :math:`\min_{X \succeq 0} \frac12 \langle X, B X \rangle - \langle X, A \rangle` by
    projected gradients with momentum (FISTA), whose step is the reciprocal of the trace of B, until
    a step moves X by no more than rounding does.

    >>> growth, gram = jnp.diag(jnp.array([3.0, -1.0])), jnp.eye(4).reshape(2, 2, 2, 2)
    >>> covariance(growth, gram).round(4).tolist()
    [[3.0, 0.0], [0.0, 0.0]]

    Args:
      growth: A, the rate at which the curvature grows without oscillations, symmetric, (k, k).
      gram: B as a tensor, (k, k, k, k), symmetric and positive semidefinite as an operator.

    Returns:
      X, (k, k). Where B is zero, so that no covariance stops the growth, it is zero.
    """
    k = growth.shape[0]
    matrix = gram.reshape(k * k, k * k)
    # The trace bounds the largest eigenvalue, and the operator is of low rank: few steps are lost.
    bound = jnp.trace(matrix)
    step = jnp.where(bound > 0, 1 / jnp.where(bound > 0, bound, 1), 0)

    def project(x: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh((x + x.T) / 2)
        return (vectors * jnp.maximum(values, 0)[None]) @ vectors.T

    def body(carry: _Search) -> _Search:
        slope = (matrix @ carry.ahead.reshape(-1)).reshape(k, k) - growth
        new = project(carry.ahead - step * slope)
        weight = (1 + jnp.sqrt(1 + 4 * carry.weight**2)) / 2
        move = new - carry.x
        # Momentum that points uphill is dropped (O'Donoghue, Candes, 2015, section 3.2).
        uphill = jnp.sum((carry.ahead - new) * move) > 0
        ahead = jnp.where(uphill, new, new + (carry.weight - 1) / weight * move)
        weight = jnp.where(uphill, 1.0, weight)
        still = jnp.linalg.norm(move) <= _TOLERANCE * jnp.linalg.norm(new)
        return _Search(new, ahead, weight, jnp.where(still, _ITERATIONS, carry.number + 1))

    zero = jnp.zeros_like(growth)
    start = _Search(zero, zero, jnp.ones((), growth.dtype), jnp.zeros((), jnp.int32))
    found: _Search = lax.while_loop(lambda carry: carry.number < _ITERATIONS, body, start)
    return found.x


def curvature_slopes(loss: Loss, params: jax.Array, basis: jax.Array) -> jax.Array:
    """The gradients of the Hessian's entries in a basis.

    Args:
      loss: function of one vector.
      params: the vector, (dimension,).
      basis: directions, (k, dimension).

    Returns:
      The gradient of ``u_i^T H u_j`` at fixed directions, (k, k, dimension).
    """
    k = basis.shape[0]
    rows, columns = jnp.triu_indices(k)

    def entry(params: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
        def along(params: jax.Array) -> jax.Array:
            return jax.jvp(loss, (params,), (v,))[1]

        return jax.jvp(along, (params,), (u,))[1]

    slopes = jax.vmap(jax.grad(entry), (None, 0, 0))(params, basis[rows], basis[columns])
    whole = jnp.zeros((k, k, params.shape[0]), slopes.dtype)
    return whole.at[rows, columns].set(slopes).at[columns, rows].set(slopes)


def track(loss: Loss, rule: Rule, point: FlowPoint) -> tuple[jax.Array, FlowPoint]:
    """One warm-started sweep of block iteration on the preconditioned Hessian.

    Args:
      loss: function of one vector.
      rule: of the optimizer.
      point: where the flow is.

    Returns:
      The eigenvalues in the basis that came in, from the largest on; the point with the next basis.
    """
    root = jnp.sqrt(_inverse(rule, point))
    _, product = jax.linearize(jax.grad(loss), point.params)
    values, basis, smallest = curvature.subspace_sweep(
        jax.vmap(lambda v: root * product(root * v)), point.basis, shift=point.shift
    )
    shift = jnp.maximum(0.9 * point.shift, -smallest)
    return values, point._replace(basis=basis, shift=shift)


def start_flow(
    loss: Loss,
    rule: Rule,
    params: jax.Array,
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    tracked: int,
    sweeps: int = 40,
) -> FlowPoint:
    """The first point of a flow, with its leading eigenvectors.

    Args:
      loss: function of one vector.
      rule: of the optimizer.
      params: where the flow starts, (dimension,).
      moments: the first and the second moment of the optimizer, (dimension,), with the gradient at
        this point in them, and the number of gradients in them. None for gradient descent.
      tracked: number of tracked directions.
      sweeps: number of sweeps from random directions.

    Returns:
      The point.
    """
    one = jnp.ones_like(params)
    mean, square, count = moments or (jnp.zeros_like(params), one, jnp.zeros(()))
    random = jax.random.normal(jax.random.key(0), (tracked, params.shape[0]))
    basis = blocks.orthonormalize(random)
    point = FlowPoint(params, mean, square, count, basis, jnp.zeros(()))

    def sweep(point: FlowPoint, _: None) -> tuple[FlowPoint, None]:
        return track(loss, rule, point)[1], None

    return lax.scan(sweep, point, length=sweeps)[0]


def flow_step(
    loss: Loss, rule: Rule, point: FlowPoint, *, time: float, unstable: int
) -> tuple[FlowPoint, FlowReading]:
    """An Euler step of the central flow, with the eigenvectors as they are.

    Args:
      loss: function of one vector.
      rule: of the optimizer.
      point: where the flow is.
      time: how far to go, in steps of the optimizer.
      unstable: number of directions that may be at the edge, fewer than those tracked.

    Returns:
      The next point, and what is read at this one.
    """
    inverse, edge = _inverse(rule, point), rule.threshold
    value, gradient = jax.value_and_grad(loss)(point.params)
    _, product = jax.linearize(jax.grad(loss), point.params)
    leading = jnp.sqrt(inverse)[None] * point.basis[:unstable]
    hessian = leading @ jax.vmap(product)(leading).T
    hessian = (hessian + hessian.T) / 2
    slopes = curvature_slopes(loss, point.params, leading)
    drift = rule.forgets * (gradient**2 - point.square)
    divisor, change = jax.jvp(
        rule.divisor, (point.square, point.number), (drift, jnp.ones_like(point.number))
    )
    _, slope = jax.jvp(
        rule.divisor,
        (point.square, point.number),
        (jnp.ones_like(drift), jnp.zeros_like(point.number)),
    )
    change, slope = (jnp.where(inverse > 0, each, 0) for each in (change, slope))
    # Squared gradients of an oscillation along u_i and u_j, where H u = edge P u.
    pairs = leading[:, None] * leading[None]
    squares = ((edge * divisor) ** 2)[None, None] * pairs
    growth = -slopes @ (inverse * gradient) - edge * pairs @ change
    gram = jnp.einsum("ijd,d,kld->ijkl", slopes, inverse, slopes) / 2
    gram += edge * rule.forgets * jnp.einsum("ijd,d,kld->ijkl", pairs, slope, squares)
    excess = hessian - edge * jnp.eye(unstable)
    x = covariance(growth + excess / (time + rule.lag), gram)
    force = gradient + jnp.einsum("ij,ijd->d", x, slopes) / 2
    energy = rule.forgets * jnp.einsum("ij,ijd->d", x, squares)
    reading = FlowReading(
        params=point.params,
        loss=value,
        ratio=jnp.linalg.eigvalsh(hessian)[-1] / edge,
        predicted_loss=value + jnp.sum(x * hessian) / 2,
        variance=jnp.sum(x * (leading @ leading.T)),
    )
    return _moved(rule, point, inverse, force, drift + energy, time), reading


@functools.partial(jax.jit, static_argnames=("loss", "rule", "steps", "substeps", "unstable"))
def central_flow(
    loss: Loss,
    rule: Rule,
    params: jax.Array,
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    steps: int,
    substeps: int = 2,
    unstable: int = 3,
) -> FlowReading:
    """Integrates a central flow by Euler steps.

    Args:
      loss: function of one vector, three times differentiable; not a convolution, which is slow in
        a loop on a CPU.
      rule: of the optimizer.
      params: where the flow starts, (dimension,), float32.
      moments: see `start_flow`.
      steps: time to go, in steps of the optimizer.
      substeps: Euler steps in each of these, with the same eigenvectors.
      unstable: number of directions that may be at the edge.

    Returns:
      The readings at the times 0, 1, ... steps - 1, with that axis in front.
    """

    def part(point: FlowPoint, _: None) -> tuple[FlowPoint, FlowReading]:
        return flow_step(loss, rule, point, time=1 / substeps, unstable=unstable)

    def one(point: FlowPoint, _: None) -> tuple[FlowPoint, FlowReading]:
        point, readings = lax.scan(part, point, length=substeps)
        return track(loss, rule, point)[1], jax.tree.map(lambda each: each[0], readings)

    tracked = min(unstable + _EXTRA, params.shape[0])
    start = start_flow(loss, rule, params, moments, tracked=tracked)
    readings: FlowReading = lax.scan(one, start, length=steps)[1]
    return readings


@functools.partial(jax.jit, static_argnames=("loss", "rule", "steps"))
def stable_flow(
    loss: Loss,
    rule: Rule,
    params: jax.Array,
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    steps: int,
) -> jax.Array:
    """Integrates the flow without oscillations, for gradient descent the gradient flow.

    The largest eigenvalue decides in each step how many Euler steps keep it stable, twice as many
    as are needed and at most 64.

    Args:
      loss: function of one vector; not a convolution, which is slow in a loop on a CPU.
      rule: of the optimizer.
      params: where the flow starts, (dimension,).
      moments: see `start_flow`.
      steps: time to go, in steps of the optimizer.

    Returns:
      The parameters at the times 0, 1, ... steps - 1, (steps, dimension).
    """

    def one(point: FlowPoint, _: None) -> tuple[FlowPoint, jax.Array]:
        values, point = track(loss, rule, point)
        top = jnp.maximum(values[0], 0)
        speed = jnp.sqrt(top / rule.lag) if rule.lag else top
        number = jnp.clip(jnp.ceil(2 * speed), _FEWEST, _MOST)

        def part(_: int, point: FlowPoint) -> FlowPoint:
            gradient = jax.grad(loss)(point.params)
            drift = rule.forgets * (gradient**2 - point.square)
            return _moved(rule, point, _inverse(rule, point), gradient, drift, 1 / number)

        return lax.fori_loop(0, number.astype(jnp.int32), part, point), point.params

    start = start_flow(loss, rule, params, moments, tracked=min(_EXTRA, params.shape[0]))
    found: jax.Array = lax.scan(one, start, length=steps)[1]
    return found


def _inverse(rule: Rule, point: FlowPoint) -> jax.Array:
    """The reciprocal of the divisor, zero for parameters that never had a gradient."""
    divisor = rule.divisor(point.square, point.number)
    return jnp.where(point.square > 0, 1 / divisor, 0)


def _moved(
    rule: Rule,
    point: FlowPoint,
    inverse: jax.Array,
    force: jax.Array,
    drift: jax.Array,
    time: float | jax.Array,
) -> FlowPoint:
    """The point after an Euler step, the parameters moved by the next first moment."""
    mean = point.mean + time / rule.lag * (force - point.mean) if rule.lag else force
    return point._replace(
        params=point.params - time * inverse * mean,
        mean=mean,
        square=jnp.maximum(point.square + time * drift, 0),
        number=point.number + time,
    )
