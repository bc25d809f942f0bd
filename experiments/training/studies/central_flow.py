r"""The central flow of gradient descent: a differential equation for its time-averaged course.

At the edge of stability gradient descent oscillates along the Hessian's leading eigenvectors
:math:`u_1, \dots, u_k`, with a covariance :math:`\Sigma` that grows where the loss still sharpens
and shrinks where it flattens. Averaged over the oscillations the iterates :math:`\bar w` follow

.. math::
  \frac{dw}{dt} = -\eta \Big(\nabla L(w) + \tfrac12 \nabla_w \langle \Sigma, \nabla^2 L(w) \rangle
  \Big), \qquad \Sigma = \sum_{ij} X_{ij}\, u_i u_j^\top,

time counted in steps, where the covariance is the one that keeps all eigenvalues at or below
:math:`2 / \eta` with no more effort than needed (Cohen et al., 2025, section 3). With
:math:`G_{ij} = \nabla_w (u_i^\top \nabla^2 L\, u_j)` the curvature on the span of the eigenvectors
changes at the rate :math:`\eta (A - B X)`, :math:`A_{ij} = -\langle G_{ij}, \nabla L \rangle` and
:math:`(B X)_{ij} = \frac12 \sum_{kl} \langle G_{ij}, G_{kl} \rangle X_{kl}`. The paper asks for the
positive semidefinite :math:`X` whose rate has no positive part on the directions at the edge, and
vanishes where :math:`X` acts. For one direction this is the gradient projected onto the surface of
constant sharpness :math:`S`: :math:`X = \max(0, -\langle \nabla S, \nabla L \rangle) /
(\frac12 |\nabla S|^2)`.

Our reading: which directions are at the edge is decided by the step itself. Over a time
:math:`\delta` the curvature minus :math:`2 / \eta`, :math:`K`, becomes
:math:`K + \delta \eta (A - B X)`, and this has to be negative semidefinite, with complementarity.
That is a small quadratic program, :math:`\min_{X \succeq 0} \frac12 \langle X, B X \rangle -
\langle X, A + K / (\delta \eta) \rangle`, which accelerated projected gradients solve; directions
that stay below the edge get nothing, and rounding does not accumulate.

Gradient descent's time-averaged loss is then :math:`L(\bar w) + \frac12 \langle \Sigma, \nabla^2 L
\rangle`, to second order.

References:
  Cohen, Damian, Talwalkar, Kolter, Lee, `Understanding optimization in deep learning with central
  flows <https://arxiv.org/abs/2410.24206>`_, ICLR 2025.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel import curvature
from optax_accel.curvature import blocks

Loss = Callable[[jax.Array], jax.Array]
_ITERATIONS = 200  # of the quadratic program, whose unknown is a matrix of a few rows


class FlowPoint(NamedTuple):
    """A point of the central flow.

    Attributes:
      params: the parameters as one vector, (dimension,), float32.
      basis: the leading eigenvectors, and some more that follow them, (tracked, dimension).
      shift: what the tracking adds to the spectrum so that its top leads.
    """

    params: jax.Array
    basis: jax.Array
    shift: jax.Array


class FlowReading(NamedTuple):
    """What is read at a point of the central flow.

    Attributes:
      params: the parameters, (dimension,).
      loss: the loss there.
      sharpness: the largest eigenvalue of the Hessian there.
      predicted_loss: the time-averaged loss of gradient descent.
      variance: the trace of the covariance, the mean squared length of the oscillation.
    """

    params: jax.Array
    loss: jax.Array
    sharpness: jax.Array
    predicted_loss: jax.Array
    variance: jax.Array


def covariance(growth: jax.Array, gram: jax.Array) -> jax.Array:
    r"""The smallest covariance that stops all growth of curvature.

    Solves :math:`\min_{X \succeq 0} \frac12 \langle X, B X \rangle - \langle X, A \rangle` by
    projected gradients with momentum (FISTA), whose step is the reciprocal of the trace of B.

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

    def body(_: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x, ahead, weight = carry
        slope = (matrix @ ahead.reshape(-1)).reshape(k, k) - growth
        new = project(ahead - step * slope)
        next_weight = (1 + jnp.sqrt(1 + 4 * weight**2)) / 2
        moved = new + (weight - 1) / next_weight * (new - x)
        # Momentum that points uphill is dropped (O'Donoghue, Candes, 2015, section 3.2).
        uphill = jnp.sum((ahead - new) * (new - x)) > 0
        return new, jnp.where(uphill, new, moved), jnp.where(uphill, 1.0, next_weight)

    zero = jnp.zeros_like(growth)
    start = (zero, zero, jnp.ones((), growth.dtype))
    found: jax.Array = lax.fori_loop(0, _ITERATIONS, body, start)[0]
    return found


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


def track(loss: Loss, params: jax.Array, basis: jax.Array, shift: jax.Array) -> tuple[
    jax.Array, jax.Array, jax.Array
]:  # fmt: skip
    """One warm-started sweep of block iteration.

    Args:
      loss: function of one vector.
      params: the vector at which the Hessian is taken, (dimension,).
      basis: orthonormal directions, (tracked, dimension).
      shift: what to add to the spectrum so that its top leads.

    Returns:
      Eigenvalues of the Hessian in the basis, from the largest on; the next basis; the next shift.
    """
    _, product = jax.linearize(jax.grad(loss), params)
    values, basis, smallest = curvature.subspace_sweep(jax.vmap(product), basis, shift=shift)
    return values, basis, jnp.maximum(0.9 * shift, -smallest)


def start_flow(
    loss: Loss, params: jax.Array, *, tracked: int, key: jax.Array, sweeps: int = 40
) -> FlowPoint:
    """The first point of a flow, with its leading eigenvectors.

    Args:
      loss: function of one vector.
      params: where the flow starts, (dimension,).
      tracked: number of tracked directions; a few more than may reach the edge.
      key: of the random directions with which the block iteration starts.
      sweeps: number of its sweeps.

    Returns:
      The point.
    """
    basis = blocks.orthonormalize(jax.random.normal(key, (tracked, params.shape[0])))

    def sweep(
        carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        found = track(loss, params, *carry)
        return (found[1], found[2]), None

    (basis, shift), _ = lax.scan(sweep, (basis, jnp.zeros(())), length=sweeps)
    return FlowPoint(params, basis, shift)


def flow_step(
    loss: Loss, point: FlowPoint, learning_rate: jax.Array, *, time: float, unstable: int
) -> tuple[FlowPoint, FlowReading]:
    """An Euler step of the central flow.

    Args:
      loss: function of one vector.
      point: where the flow is.
      learning_rate: that of gradient descent, a scalar.
      time: how far to go, in steps of gradient descent.
      unstable: number of directions that may be at the edge, at most those tracked.

    Returns:
      The next point, and what is read at this one.
    """
    params = point.params
    _, basis, shift = track(loss, params, point.basis, point.shift)
    value, gradient = jax.value_and_grad(loss)(params)
    leading = basis[:unstable]
    _, product = jax.linearize(jax.grad(loss), params)
    # The basis has been rotated and multiplied once since: its own products say what it holds.
    hessian = leading @ jax.vmap(product)(leading).T
    hessian = (hessian + hessian.T) / 2
    slopes = curvature_slopes(loss, params, leading)
    excess = hessian - 2 / learning_rate * jnp.eye(unstable)
    growth = -slopes @ gradient + excess / (time * learning_rate)
    gram = jnp.einsum("ijd,kld->ijkl", slopes, slopes) / 2
    x = covariance(growth, gram)
    velocity = gradient + jnp.einsum("ij,ijd->d", x, slopes) / 2
    reading = FlowReading(
        params=params,
        loss=value,
        sharpness=jnp.linalg.eigvalsh(hessian)[-1],
        predicted_loss=value + jnp.sum(x * hessian) / 2,
        variance=jnp.trace(x),
    )
    return FlowPoint(params - time * learning_rate * velocity, basis, shift), reading


@functools.partial(jax.jit, static_argnames=("loss", "steps", "substeps", "tracked", "unstable"))
def central_flow(
    loss: Loss,
    params: jax.Array,
    learning_rate: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    substeps: int = 2,
    tracked: int = 6,
    unstable: int = 3,
) -> FlowReading:
    """Integrates the central flow of gradient descent by Euler steps.

    Args:
      loss: function of one vector, three times differentiable; not a convolution, which is slow in
        a loop on a CPU.
      params: where it starts, (dimension,), float32.
      learning_rate: that of gradient descent, a scalar.
      key: of the random directions from which the eigenvectors are found.
      steps: time to go, in steps of gradient descent.
      substeps: Euler steps in each of these.
      tracked: number of tracked directions.
      unstable: number of them that may be at the edge.

    Returns:
      The readings at the times 0, 1, ... steps - 1, with that axis in front.
    """

    def one(point: FlowPoint, _: None) -> tuple[FlowPoint, FlowReading]:
        first = None
        for _part in range(substeps):
            point, reading = flow_step(
                loss, point, learning_rate, time=1 / substeps, unstable=unstable
            )
            first = first or reading
        assert first is not None
        return point, first

    start = start_flow(loss, params, tracked=tracked, key=key)
    readings: FlowReading = lax.scan(one, start, length=steps)[1]
    return readings


@functools.partial(jax.jit, static_argnames=("loss", "steps", "substeps"))
def gradient_flow(
    loss: Loss, params: jax.Array, learning_rate: jax.Array, *, steps: int, substeps: int = 8
) -> jax.Array:
    """Integrates the gradient flow, time counted in steps of gradient descent.

    Args:
      loss: function of one vector; not a convolution, which is slow in a loop on a CPU.
      params: where it starts, (dimension,).
      learning_rate: that of gradient descent, a scalar.
      steps: time to go.
      substeps: Euler steps in each step; they are stable up to a sharpness of
        ``2 * substeps / learning_rate``.

    Returns:
      The parameters at the times 0, 1, ... steps - 1, (steps, dimension).
    """

    def one(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        before = params
        for _part in range(substeps):
            params = params - learning_rate / substeps * jax.grad(loss)(params)
        return params, before

    found: jax.Array = lax.scan(one, params, length=steps)[1]
    return found
