"""A refresh of K-FAC and EKFAC: what a batch tells of the curvature, and the averages of it."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._numerics import total
from optax_accel.natural_gradient import factors as stats
from optax_accel.natural_gradient.estimators import output_gradients
from optax_accel.natural_gradient.factors import Kronecker
from optax_accel.natural_gradient.inverses import (
    change_basis,
    damped_inverse,
    eigendecomposition,
    share,
    split_damping,
    traces,
)
from optax_accel.natural_gradient.layers import Block, Network
from optax_accel.natural_gradient.options import Kind, Options
from optax_accel.natural_gradient.state import ScaleByKFACState, corrected
from optax_accel.objective import Objective


class Batch(NamedTuple):
    """What one batch tells of the curvature.

    Attributes:
      objective: of the batch.
      blocks: of the network.
      num_examples: of this replica.
      values: activations, by number.
      gradients: at the layers' outputs, by number, with a leading axis of samples.
      generic: of the generic blocks' parameters, by index, with a leading axis of samples.
      weights: of examples (and positions), 1 on average over all replicas.
    """

    objective: Objective
    blocks: tuple[Block, ...]
    num_examples: int
    values: Any
    gradients: Any
    generic: Any
    weights: jax.Array

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What is not known before the step."""
        return self.values, self.gradients, self.generic, self.weights

    def with_arrays(self, arrays: tuple[Any, ...]) -> Batch:
        """The same batch with other arrays."""
        return Batch(self.objective, self.blocks, self.num_examples, *arrays)


def update_curvature(
    options: Options,
    state: ScaleByKFACState,
    batch: Batch,
    damping: Any,
    invert: bool | jax.Array,
) -> ScaleByKFACState:
    """The state after a batch.

    Args:
      options: of the transformation.
      state: before the batch.
      batch: what it tells.
      damping: of this step.
      invert: whether inverses are refreshed, too.
    """

    def inverted(state: ScaleByKFACState) -> ScaleByKFACState:
        return _invert(state, batch, damping, options.kind)

    new = _average_factors(state, batch, options.decay)
    if invert is True:
        new = inverted(new)
    elif invert is not False:
        new = lax.cond(invert, inverted, lambda state: state, new)
    return _average_moments(state, new, batch, options.decay) if options.kind == "ekfac" else new


# -- a batch --------------------------------------------------------------------------------------


def measure(
    options: Options,
    state: ScaleByKFACState,
    objective: Objective,
    params: chex.ArrayTree,
    blocks: tuple[Block, ...],
) -> Batch:
    """Evaluates the network on a batch, and gradients at its layers for a vector of each output.

    Args:
      options: of the transformation.
      state: whose key and count give the random vectors.
      objective: of the parameters alone.
      params: the parameters.
      blocks: those of the network that the transformation was built with.

    Raises:
      ValueError: the network is another one.
    """
    params = objective.vary(params)
    network = options.find(objective, params)
    _check_same(options.method, blocks, network)
    n = network.num_examples
    outputs, pullback, values = network.capture(jax.tree.leaves(params), objective.vary)
    samples, weights = output_gradients(
        objective,
        outputs,
        options.estimator,
        options.likelihood,
        state.rng_key,
        state.count,
        n,
    )
    weights = weights / objective.mean_of_replicas(jnp.mean(weights))
    # Pulled back as large as the gradient of the mean loss: a rule of the user's that is not linear
    # (clipping) then does what it does there.
    samples = jax.tree.map(lambda s: s / n, samples)
    if jax.tree.leaves(samples)[0].shape[0] == 1:
        pulled = pullback(jax.tree.map(lambda s: s[0], samples))
        pulled = jax.tree.map(lambda g: g[None], pulled)
    else:
        pulled = jax.vmap(pullback)(samples)
    gradients, generic = jax.tree.map(lambda g: n * g, pulled)
    return Batch(objective, network.blocks, n, values, gradients, generic, weights)


def _check_same(method: str, blocks: tuple[Block, ...], network: Network) -> None:
    for expected, actual in itertools.zip_longest(blocks, network.blocks):
        if expected is None or actual is None or expected.signature != actual.signature:
            raise ValueError(
                f"{method}: this step's network is not the one it was built with. Expected "
                f"{expected and expected.signature}, found {actual and actual.signature}. If they "
                "are the same, build with an example batch of the usual size."
            )


# -- averages -------------------------------------------------------------------------------------


def _average_factors(state: ScaleByKFACState, batch: Batch, decay: Any) -> ScaleByKFACState:
    """Moving averages of the factors, unless the batch gives numbers that are not finite."""
    means = _mean_factors(state, batch)
    # A matrix of sums of products with entries that are not finite has such a diagonal.
    leaves = [
        leaf if isinstance(m, Kronecker) and not block.stacked else leaf.ravel()
        for block, m in zip(batch.blocks, means, strict=True)
        for leaf in jax.tree.leaves(m)
    ]
    finite = jnp.isfinite(jnp.sum(traces(leaves)))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        kept = jnp.asarray(decay, old.dtype)
        return lax.select(finite, kept * old + (1 - kept) * new.astype(old.dtype), old)

    factors = jax.tree.map(average, state.factors, tuple(means))
    weight = average(state.factor_weight, jnp.ones_like(state.factor_weight))
    return state._replace(
        accepted=finite, rejected=state.rejected + ~finite, factors=factors, factor_weight=weight
    )


def _mean_factors(state: ScaleByKFACState, batch: Batch) -> list[Any]:
    """What the averages in ``state.factors`` are of: means over the batch of all replicas."""
    n, axis = batch.num_examples, batch.objective.axis_name
    means: list[Any] = []
    for block, old in zip(batch.blocks, state.factors, strict=True):
        dtype = jax.tree.leaves(old)[0].dtype
        if block.kronecker:
            shapes = Kronecker(*(side.shape for side in old))
            tied = block.kind == "tied"
            statistics: Any = stats.tied_statistics if tied else stats.kronecker_statistics
            means.append(
                statistics(block, batch.values, batch.gradients, batch.weights, shapes, dtype)
            )
        elif block.kind == "generic":
            means.append(batch.generic[block.leaves[0]].astype(dtype) / n)
        else:
            means.append(stats.diagonal_statistics(block, batch.values, batch.gradients, n, dtype))
    means = batch.objective.mean_of_replicas(means)
    means = [
        stats.nearest_kronecker(mean) if block.kind == "tied" else mean
        for block, mean in zip(batch.blocks, means, strict=True)
    ]
    # The squared mean gradient of n independent examples, times n.
    total = n * (1 if axis is None else lax.axis_size(axis))
    return [
        total * jnp.sum(mean**2, axis=0) if block.kind == "generic" else mean
        for block, mean in zip(batch.blocks, means, strict=True)
    ]


def _invert(state: ScaleByKFACState, batch: Batch, damping: Any, kind: Kind) -> ScaleByKFACState:
    """New inverses or eigendecompositions; old ones stay where they are not finite.

    Before the first batch is accepted there is nothing to invert.
    """
    chosen = [i for i, block in enumerate(batch.blocks) if block.kronecker]
    factors = [factor for i in chosen for factor in state.factors[i]]
    scale = corrected(jnp.ones_like(state.factor_weight), state.factor_weight)
    arguments: list[tuple[jax.Array, ...]] = [
        (scale.astype(factor.dtype) * factor,) for factor in factors
    ]
    both = [batch.blocks[i].stacked for i in chosen for _ in range(2)]
    function: Any = eigendecomposition
    if kind == "factored":
        function = damped_inverse
        strengths = _split_damping(factors, damping, both)
        arguments = [(*args, s) for args, s in zip(arguments, strengths, strict=True)]
    results = share(function, arguments, batch.objective.axis_name, batch.objective.vary, both)
    inverses, moments = list(state.inverses), list(state.moments)
    failed = jnp.zeros((), jnp.int32)
    usable = state.factor_weight > 0
    for i, inputs, outputs in zip(chosen, results[::2], results[1::2], strict=True):
        accept = _accept if not batch.blocks[i].stacked else jax.vmap(_accept, in_axes=(None, 0, 0))
        old = state.inverses[i]
        new, is_refused = accept(usable, Kronecker(inputs, outputs), old)
        failed += jnp.sum(is_refused, dtype=jnp.int32)
        if kind == "ekfac":
            moments[i] = stats.on_slices(batch.blocks[i])(change_basis)(moments[i], old, new)
        inverses[i] = new
    return state._replace(
        accepted=state.accepted & (failed == 0),
        rejected_inverses=state.rejected_inverses + failed,
        inverses=tuple(inverses),
        moments=tuple(moments),
    )


def _split_damping(factors: list[jax.Array], damping: Any, stacked: list[bool]) -> list[jax.Array]:
    """Damping of each factor, and of each slice of a stack, with a pi of its own."""
    single = [f for f, is_stack in zip(factors, stacked, strict=True) if not is_stack]
    of_single = iter(split_damping(single, damping))
    strengths: list[jax.Array] = []
    for a, b, is_stack in zip(factors[::2], factors[1::2], stacked[::2], strict=True):
        if is_stack:
            strengths += jax.vmap(lambda *pair: split_damping(pair, damping))(a, b)
        else:
            strengths += [next(of_single), next(of_single)]
    return strengths


def _accept(usable: jax.Array, new: Kronecker, old: Kronecker) -> tuple[Kronecker, jax.Array]:
    """New inverses of one matrix if they are finite, else the old ones; and whether they failed."""
    # A decomposition that fails is NaN everywhere; diagonal factors cannot fail.
    finite = jnp.isfinite(sum(leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(new)))
    return _choose(finite & usable, new, old), ~finite & usable


def _average_moments(
    before: ScaleByKFACState, state: ScaleByKFACState, batch: Batch, decay: Any
) -> ScaleByKFACState:
    """The moving average of EKFAC's second moments.

    Args:
      before: the state before the batch, which stays if the batch's moments are not finite.
      state: with the factors and the basis to which the batch has led.
      batch: the batch.
      decay: of the average.
    """
    new = tuple(
        None
        if old is None
        else (stats.tied_eigen_statistics if block.kind == "tied" else stats.eigen_statistics)(
            block,
            batch.values,
            batch.gradients,
            batch.num_examples,
            basis,
            old.dtype,
            batch.objective.vary,
        )
        for block, basis, old in zip(batch.blocks, state.inverses, state.moments, strict=True)
    )
    means = batch.objective.mean_of_replicas(new)
    finite = jnp.isfinite(total([jnp.sum(mean) for mean in jax.tree.leaves(means)]))
    usable = state.rejected == before.rejected

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        kept = jnp.asarray(decay, old.dtype)
        return jnp.where(usable, kept * old + (1 - kept) * new, old)

    def estimates(state: ScaleByKFACState) -> chex.ArrayTree:
        return state.factor_weight, state.factors, state.inverses, state.moments

    state = state._replace(moments=jax.tree.map(average, state.moments, means))
    refused = usable & ~finite
    weight, factors, inverses, moments = _choose(refused, estimates(before), estimates(state))
    return state._replace(
        accepted=state.accepted & ~refused,
        rejected=state.rejected + refused,
        factor_weight=weight,
        factors=factors,
        inverses=inverses,
        moments=moments,
    )


def _choose(condition: jax.Array, one: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda a, b: lax.select(condition, a, b), one, other)
