"""What the gradient of a fixed point costs beside a hand-written loop, in time and in memory.

The networks are those blocks of the model zoo whose fixed point is wanted. Their gradients are
those of a linear function of the fixed point, with respect to the parameters of the block.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree

import models
import optax_accel as oa
from experiments import hlo
from experiments.timing import Case

PyTree = Any
STEPS, BACKWARD_STEPS = 40, 20  # the default of `deq`, and MDEQ-tiny's for the linear system
FEW_STEPS = 10  # with which the memory of STEPS is compared
PAIRS, RIDGE = 6, 1e-4  # of Anderson's method, as in `oa.equilibrium.anderson`
TIME_TARGET = 1.15  # over the hand-written loop
PHANTOM_TARGET = 0.6  # of one phantom step over the implicit gradient
MEMORY_TARGET = 1.1  # over the gradient of one block
GROWTH_TARGET = 1.02  # of the memory with STEPS over that with FEW_STEPS


class Block(NamedTuple):
    """A function whose fixed point is wanted.

    Attributes:
      f: maps state, parameters and input to the next state.
      state: where the solver starts.
      params: the parameters.
      x: what is injected.
      loop: the form of the solvers' loops in which the block runs fast on this machine.
    """

    f: Callable[[PyTree, PyTree, PyTree], PyTree]
    state: PyTree
    params: PyTree
    x: PyTree
    loop: Literal["while", "unrolled"]

    @property
    def arguments(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """What the gradients take: parameters, state, input, and the weights of the loss."""
        weights = jax.tree.map(
            lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), self.state
        )
        return self.params, self.state, self.x, weights


def mdeq(batch_size: int = 4, size: int = 16, **options: Any) -> Block:
    """The block of MDEQ-tiny, which has convolutions.

    Args:
      batch_size: number of images.
      size: their height and width.
      **options: of `models.Mdeq`, to make it smaller.

    Returns:
      The block, with random features injected and no dropout.
    """
    model = models.Mdeq(input_shape=(size, size, 3), num_classes=10, **options)
    width = model.conv2.out_features
    masks = (jnp.ones((batch_size, 1, 1, width)),) * 2
    x = jax.random.normal(jax.random.key(0), (batch_size, size, size, width))
    half = (batch_size, size // 2, size // 2, width)
    # XLA runs convolutions in loops slowly on a CPU (jax#12868).
    loop: Literal["while", "unrolled"]
    loop = "unrolled" if jax.default_backend() == "cpu" else "while"
    return _block(model.cell, (jnp.zeros_like(x), jnp.zeros(half)), (x, masks), loop)


def transformer(batch_size: int = 16, length: int = 64, width: int = 64) -> Block:
    """The two layers of a Transformer, `models.EquilibriumLM`.

    Args:
      batch_size: number of sequences.
      length: of these.
      width: of the embeddings.

    Returns:
      The block, with random features injected and no dropout.
    """
    model = models.EquilibriumLM(
        input_shape=(length,), vocabulary_size=2, embedding_size=width, num_layers=2
    )
    key = jax.random.key(0)
    injected = (jax.random.normal(key, (batch_size, length, 3 * width)),) * 2
    masks = ((jnp.ones((batch_size, 1, width)),) * 2,) * 2
    state = jnp.zeros((batch_size, length, width))
    return _block(model.cell, state, (injected, masks), "while")


def _block(cell: nnx.Module, state: PyTree, x: PyTree, loop: Literal["while", "unrolled"]) -> Block:
    graphdef, params = nnx.split(cell)

    def f(z: PyTree, params: PyTree, x: PyTree) -> PyTree:
        return nnx.merge(graphdef, params)(z, x)

    return Block(f, state, nnx.as_pure(params), x, loop)


NETWORKS: Mapping[str, Callable[[], Block]] = MappingProxyType(
    {"Transformer": transformer, "MDEQ-tiny": mdeq}
)


# -- gradients -------------------------------------------------------------------------------------


def layer(block: Block, gradient: Any, solver: Any, backward_solver: Any = None) -> Any:
    """The gradient by `oa.deq`.

    Args:
      block: the block.
      gradient: the argument of `oa.deq`.
      solver: likewise.
      backward_solver: likewise; None for the forward solver's.

    Returns:
      A function of `Block.arguments`.
    """

    def loss(params: PyTree, state: PyTree, x: PyTree, weights: PyTree) -> jax.Array:
        z, _ = oa.deq(
            block.f,
            state,
            params,
            x,
            solver=solver,
            gradient=gradient,
            backward_solver=backward_solver or solver,
        )
        return _inner(z, weights)

    return jax.grad(loss)


def by_hand(block: Block, steps: int, backward_steps: int) -> Any:
    """The implicit gradient as one would write it for one model: two loops of Anderson's method.

    It looks at no residual, keeps no best iterate and stops no example on its own.

    Args:
      block: the block.
      steps: evaluations of the block.
      backward_steps: products with its transposed Jacobian.

    Returns:
      A function of `Block.arguments`.
    """
    solve = functools.partial(_anderson_by_hand, unrolled=block.loop == "unrolled")

    def gradient(params: PyTree, state: PyTree, x: PyTree, weights: PyTree) -> PyTree:
        z = solve(lambda z: block.f(z, params, x), state, steps)
        _, pull = jax.vjp(lambda z, params: block.f(z, params, x), z, params)
        cotangent = solve(
            lambda u: jax.tree.map(jnp.add, pull(u)[0], weights),
            jax.tree.map(jnp.zeros_like, weights),
            backward_steps,
        )
        return pull(cotangent)[1]

    return gradient


def _anderson_by_hand(g: Any, start: PyTree, steps: int, *, unrolled: bool) -> PyTree:
    first, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], start))
    flat = jax.vmap(lambda z: ravel_pytree(z)[0])
    states = jax.vmap(unravel)
    z = flat(start)
    empty = jnp.zeros((len(z), PAIRS, len(first)))

    def body(k: Any, carry: Any) -> Any:
        z, inputs, images = carry
        inputs = inputs.at[:, k % PAIRS].set(z)
        images = images.at[:, k % PAIRS].set(flat(g(states(z))))
        residuals = images - inputs
        there = (jnp.arange(PAIRS) <= k).astype(z.dtype)
        gram = jnp.einsum("bmd,bnd,m,n->bmn", residuals, residuals, there, there)
        system = jnp.zeros((len(z), PAIRS + 1, PAIRS + 1)).at[:, 0, 1:].set(there)
        system = (
            system.at[:, 1:, 0].set(there).at[:, 1:, 1:].set(gram + RIDGE * jnp.eye(PAIRS)[None])
        )
        side = jnp.zeros((len(z), PAIRS + 1, 1)).at[:, 0].set(1)
        weights = jnp.linalg.solve(system, side)[:, 1:, 0]
        return jnp.einsum("bm,bmd->bd", weights, images), inputs, images

    carry = (z, empty, empty)
    if unrolled:
        for k in range(steps):
            carry = body(k, carry)
    else:
        carry = lax.fori_loop(0, steps, body, carry)
    return states(carry[0])


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    products = jax.tree.map(jnp.vdot, a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


# -- what they cost --------------------------------------------------------------------------------


def time_cases(block: Block, steps: int, backward_steps: int) -> tuple[list[Case], list[Case]]:
    """Cases that count the CPU time of a gradient.

    Tolerances are 0, so that all of them evaluate the block equally often.

    Args:
      block: the block.
      steps: of the forward solver.
      backward_steps: of the solver of the linear system.

    Returns:
      The hand-written loop and the implicit gradient beside it; the latter and the phantom gradient
      of one step beside that.
    """
    forward, backward = (
        oa.equilibrium.anderson(n, 0.0, memory=PAIRS, ridge=RIDGE, loop=block.loop)
        for n in (steps, backward_steps)
    )
    arguments = block.arguments

    def case(name: str, base: str | None, function: Any, target: float | None) -> Case:
        return Case(
            name=name,
            base=base,
            call=lambda step, carry: function(*arguments),
            carry=None,
            period=1,
            target=target,
            clock=time.process_time,
        )

    hand = jax.jit(by_hand(block, steps, backward_steps))
    implicit = jax.jit(layer(block, "implicit", forward, backward))
    phantom = jax.jit(layer(block, oa.equilibrium.phantom(), forward, backward))
    return (
        [case("by hand", None, hand, None), case("implicit", "by hand", implicit, TIME_TARGET)],
        [
            case("implicit", None, implicit, None),
            case("phantom, 1 step", "implicit", phantom, PHANTOM_TARGET),
        ],
    )


def memory_rows(block: Block, steps: int, few_steps: int) -> list[dict[str, Any]]:
    """Memory that the compiler plans for the intermediate results of gradients, all in loops.

    The loop of the linear system keeps what one pass through the block has to remember, and needs
    in each step what going back through it takes. A block in `jax.checkpoint` is evaluated again in
    each step instead, as the gradient of one block does it once.

    Args:
      block: the block.
      steps: of the solvers, forward and backward.
      few_steps: the same, with which the former is compared.

    Returns:
      A row per gradient: ``name``; ``bytes`` with few and with many steps, equal for one block;
      ``over_block`` and ``growth``, ratios of the bytes with many steps to those of the gradient of
      one block and to those with few; their targets ``over_block_target`` and ``growth_target``,
      None where there is none.
    """
    arguments = block.arguments

    def temporary(function: Any) -> int:
        return hlo.memory(jax.jit(function).lower(*arguments).compile()).temp

    def one_block(params: PyTree, state: PyTree, x: PyTree, weights: PyTree) -> PyTree:
        def loss(state: PyTree, params: PyTree) -> jax.Array:
            return _inner(block.f(state, params, x), weights)

        return jax.grad(loss, (0, 1))(state, params)

    def row(name: str, sizes: list[int], *targets: float | None) -> dict[str, Any]:
        return {
            "name": name,
            "bytes": sizes,
            "over_block": sizes[-1] / alone,
            "growth": sizes[-1] / sizes[0],
            "over_block_target": targets[0] if targets else None,
            "growth_target": targets[1] if targets else None,
        }

    def growing(name: str, make: Any, *targets: float | None) -> dict[str, Any]:
        return row(name, [temporary(make(solver)) for solver in solvers], *targets)

    alone = temporary(one_block)
    solvers = [oa.equilibrium.fixed_point(n, 0.0) for n in (few_steps, steps)]
    again = block._replace(f=jax.checkpoint(block.f))
    targets = (MEMORY_TARGET, GROWTH_TARGET)
    return [
        row("one block", [alone, alone]),
        growing("implicit", functools.partial(layer, block, "implicit"), *targets),
        growing("implicit, jax.checkpoint", functools.partial(layer, again, "implicit"), *targets),
        growing("unrolled", functools.partial(layer, block, "unrolled")),
    ]
