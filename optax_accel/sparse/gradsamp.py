r"""GradSamp: epochs whose parameters are sampled from how the last epoch moved them, not trained.

At the start of a sampled epoch the parameters move once, by a sample of the increment
:math:`\Delta` that the last epoch made; for the rest of it they stand still:

.. math::
  \Delta = \theta_{e-1} - \theta_{e-2}, \qquad
  \theta_e = \theta_{e-1} + \mu + \text{scale} \cdot s \odot \xi, \qquad \xi \sim N(0, I) .

``statistics`` says what :math:`\mu` and :math:`s` are: mean and (population) standard deviation of
:math:`\Delta` in each ``"tensor"`` or in the whole ``"model"``, or of each ``"element"``
:math:`\mu = \Delta` and :math:`s = |\Delta|`.

Revanth, Channappayya and Mohan, `Minimizing energy costs in deep learning model training
<https://arxiv.org/abs/2406.07332>`_, 2024.  Our reading, of the abstract: at epochs chosen
periodically or at random training is skipped, and the parameters of the previous epoch get
element-wise Gaussian noise, whose parameters are estimated from the difference between those of the
two previous epochs.  The three estimators, the number of epochs before the first sampled one, and
that the optimizer, its schedules and the statistics of batch normalization stand still meanwhile
are ours.  With the statistics of a tensor the sample does not know where :math:`\Delta` pointed, so
that it is close to isotropic noise: compare it with skipping epochs and doing nothing.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._arguments import (
    HOLD_FIXED,
    as_arrays,
    check_choice,
    check_count,
    check_inner,
    check_number,
    check_real_leaves,
    is_placeholder,
    static_integer,
)
from optax_accel._mesh_axes import filled_like, with_auto_axes
from optax_accel._numerics import zeros
from optax_accel._random import as_key, hash_bits, hash_normal
from optax_accel.refresh import SampledEpochs, announce_sampled_epochs, of_sampling

Statistics: TypeAlias = Literal["tensor", "model", "element"]
Probability: TypeAlias = float  # under another name, so that it counts as static: the host reads it
_STATISTICS = ("tensor", "model", "element")
_PERIOD = 3


class GradSampState(NamedTuple):
    """State of :func:`gradsamp`.

    Attributes:
      count: number of updates, those of sampled epochs included; int32 scalar.
      epoch_sampled: whether the last update belonged to a sampled epoch; boolean scalar.
      epoch_start: the parameters at the start of the current epoch, before they were sampled; like
        the parameters, zeros before the first update.
      inner_state: state of the inner transformation, which sampled epochs leave as it is.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    epoch_sampled: jax.Array
    epoch_start: chex.ArrayTree
    inner_state: chex.ArrayTree


def gradsamp(
    inner: optax.GradientTransformation,
    steps_per_epoch: int,
    *,
    period: int | None = None,
    start: int = 5,
    probability: Probability | None = None,
    statistics: Statistics = "tensor",
    scale: float = 1.0,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, and at some epochs returns a sampled update in place of its updates.

    ``update`` is called for every step of all epochs.  The first step of a sampled epoch moves the
    parameters by a sample, its other steps by nothing, and the optimizer's state does not change.

    With the static argument ``refresh`` of ``update`` the training loop says which steps these are:
    ``"sample"`` for those of sampled epochs, as :func:`~optax_accel.refresh_at` gives it.  The
    compiled step then has no use for the gradient, so that XLA removes the computation of it, as
    long as nothing else needs it, such as an element in front of this one that keeps a state, or a
    loop that returns the loss.  Without ``refresh`` the same is decided in the graph, where the
    gradient is computed and thrown away.  Wrap the whole optimizer, weight decay included:
    elements of a chain around this one go on with their own work in sampled epochs.

    Args:
      inner: the optimizer that trains.
      steps_per_epoch: number of updates in an epoch, at least 1.
      period: after the first epochs the last one of every ``period`` epochs is sampled, at least 2;
        ``None`` (default) is 3, or no period where ``probability`` is given.
      start: number of epochs before the rule applies, at least 1; 5 by default.
      probability: instead of a period, the probability in [0, 1] with which an epoch after a
        trained one is sampled; ``None`` (default) for a period. Two epochs in a row are never
        sampled.
      statistics: of what mean and standard deviation are taken: of the last epoch's increment of
        each ``"tensor"`` (default) or of the whole ``"model"``; ``"element"`` takes the increment
        itself for the mean and its absolute value for the standard deviation.
      scale: factor of the noise, at least 0; 1 by default. With 0 the sample is the mean.
      key: PRNG key or integer seed of the noise, and of the epochs with ``probability``.

    Returns:
      A transformation with state :class:`GradSampState`. Its ``update`` needs ``params``.

    Raises:
      ValueError: an argument outside its range, or both ``period`` and ``probability``; in
        ``update``: missing ``params``, or a wrong ``refresh``.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.gradsamp(optax.sgd(0.1), steps_per_epoch=2, period=2, start=1)
      >>> @functools.partial(jax.jit, static_argnames="refresh")
      ... def train_step(params, state, refresh):
      ...     gradient = jax.grad(lambda p: 0.5 * p**2)(params)  # absent where it samples
      ...     updates, state = tx.update(gradient, state, params, refresh=refresh)
      ...     return optax.apply_updates(params, updates), state
      >>> params, forms, path = jnp.array(1.0), [], []
      >>> state = tx.init(params)
      >>> for step in range(6):
      ...     forms.append(oa.refresh_at(step, tx))
      ...     params, state = train_step(params, state, forms[-1])
      ...     path.append(round(float(params), 4))
      >>> forms
      [False, False, False, False, 'sample', 'sample']
      >>> path  # a single number has the standard deviation 0
      [0.9, 0.81, 0.729, 0.6561, 0.5022, 0.5022]

    References:
      Revanth et al., `Minimizing energy costs <https://arxiv.org/abs/2406.07332>`_, 2024, abstract.
    """
    check_inner(inner)
    check_count("steps_per_epoch", steps_per_epoch, 1)
    rule = _Rule(period, start, probability, key)
    check_choice("statistics", statistics, _STATISTICS)
    check_number("scale", scale, 0)
    base = optax.with_extra_args_support(inner)

    def init_fn(params: chex.ArrayTree) -> GradSampState:
        if not is_placeholder(params):
            check_real_leaves(params, "gradsamp", HOLD_FIXED)
        announce_sampled_epochs(lambda: rule.on_the_host(steps_per_epoch))
        return GradSampState(
            count=jnp.zeros((), jnp.int32),
            epoch_sampled=jnp.zeros((), bool),
            epoch_start=jax.tree.map(
                lambda leaf: filled_like(zeros(leaf.shape, leaf.dtype), leaf), as_arrays(params)
            ),
            inner_state=base.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: GradSampState,
        params: chex.ArrayTree | None = None,
        *,
        refresh: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, GradSampState]:
        sampled = of_sampling(refresh)
        if params is None:
            raise ValueError("gradsamp needs the parameters: tx.update(grads, state, params).")
        params = as_arrays(params)
        if refresh is not None:
            extra_args["refresh"] = refresh
        first = state.count % steps_per_epoch == 0
        epoch = state.count // steps_per_epoch

        def train() -> tuple[chex.ArrayTree, chex.ArrayTree]:
            return base.update(updates, state.inner_state, params, **extra_args)

        def sample(like: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
            # Before the end of the first epoch there is no increment: it counts as 0.
            previous = _where(epoch > 0, state.epoch_start, params)

            def increment() -> chex.ArrayTree:
                moved = _increment(rule.key, epoch, params, previous, statistics, scale)
                return jax.tree.map(lambda x, y: x.astype(y.dtype), moved, like)

            def nothing() -> chex.ArrayTree:
                return jax.tree.map(lambda x, y: jnp.zeros_like(x, y.dtype), params, like)

            return lax.cond(first, increment, nothing), state.inner_state

        if sampled is None:
            last = state.epoch_sampled
            due = jnp.where(first, rule.allows(epoch) & ~last, last)
            like = jax.eval_shape(train)[0]
            new_updates, inner_state = lax.cond(due, lambda: sample(like), train)
        else:
            due = jnp.full((), sampled)
            new_updates, inner_state = sample(updates) if sampled else train()
        return new_updates, GradSampState(
            count=optax.safe_increment(state.count),
            epoch_sampled=due,
            epoch_start=jax.tree.map(
                functools.partial(jnp.where, first), params, state.epoch_start
            ),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sample_epoch(
    key: chex.PRNGKey | int,
    params: chex.ArrayTree,
    previous: chex.ArrayTree,
    *,
    statistics: Statistics = "tensor",
    scale: float = 1.0,
) -> chex.ArrayTree:
    r"""Samples the parameters that another epoch might lead to, from how the last one moved them.

    For a loop of one's own over epochs, which skips the training of some (:func:`skip_epoch`);
    :func:`gradsamp` does both inside of an optimizer.

    Args:
      key: PRNG key or integer seed of the noise; a new one at each epoch, such as
        ``jax.random.fold_in(key, epoch)``, or the noise repeats.
      params: the parameters at the end of the last epoch, real floating-point arrays.
      previous: the parameters at its start, of the same structure and shapes.
      statistics: of what mean and standard deviation of the increment :math:`\Delta` are taken: of
        each ``"tensor"`` (default) or of the whole ``"model"``; ``"element"`` takes :math:`\Delta`
        for the mean and :math:`|\Delta|` for the standard deviation.
      scale: factor of the noise, at least 0; 1 by default. With 0 the sample is the mean:
        ``"element"`` then repeats the increment.

    Returns:
      Parameters like ``params``.

    Raises:
      ValueError: ``statistics`` or ``scale`` outside their range, or ``previous`` does not fit.
      TypeError: parameters that are not real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> start, end = jnp.zeros(3), jnp.array([0.5, 0.0, -1.0])
      >>> [round(float(x), 4) for x in oa.sample_epoch(0, end, start, scale=0.0)]
      [0.3333, -0.1667, -1.1667]
      >>> [float(x) for x in oa.sample_epoch(0, end, start, statistics="element", scale=0.0)]
      [1.0, 0.0, -2.0]
    """
    check_choice("statistics", statistics, _STATISTICS)
    check_number("scale", scale, 0)
    for tree in (params, previous):
        check_real_leaves(tree, "sample_epoch", "leave it out")
    params, previous = as_arrays(params), as_arrays(previous)
    if (shapes := jax.tree.map(jnp.shape, params)) != jax.tree.map(jnp.shape, previous):
        raise ValueError(
            f"`previous` must have the structure and the shapes of `params`, {shapes}, got "
            f"{jax.tree.map(jnp.shape, previous)}."
        )
    epoch = jnp.zeros((), jnp.int32)
    moved = _increment(as_key(key), epoch, params, previous, statistics, scale)
    return jax.tree.map(lambda x, y: (_wide(x) + y).astype(x.dtype), params, moved)


def _increment(
    key: jax.Array,
    epoch: jax.Array,
    params: chex.ArrayTree,
    previous: chex.ArrayTree,
    statistics: Statistics,
    scale: chex.Numeric,
) -> chex.ArrayTree:
    """A sample of how an epoch moves the parameters, in float32 at least."""

    def sampled(epoch: jax.Array, scale: Any, params: Any, previous: Any) -> chex.ArrayTree:
        moved = jax.tree.map(lambda x, y: _wide(x) - _wide(y), params, previous)
        leaves, structure = jax.tree.flatten(moved)
        first, samples = 0, []
        of_model = _moments(leaves) if statistics == "model" else None
        for increment in leaves:
            if statistics == "element":
                mean, deviation = increment, jnp.abs(increment)
            else:
                mean, deviation = of_model or _moments([increment])
                mean, deviation = (x.astype(increment.dtype) for x in (mean, deviation))
            noise = hash_normal(key, increment.shape, increment.dtype, epoch, first % 2**32)
            samples.append(mean + scale.astype(increment.dtype) * deviation * noise)
            first += increment.size
        return jax.tree.unflatten(structure, samples)

    scale = jnp.asarray(scale, jnp.result_type(float))
    return with_auto_axes(sampled, epoch, scale, params, previous, out_like=params)


def _moments(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean and population standard deviation over all entries; 0 where there are none."""
    size = max(sum(array.size for array in arrays), 1)
    zero = jnp.zeros((), jnp.float32)
    mean = sum((jnp.sum(array) for array in arrays), start=zero) / size
    squares = (jnp.sum(jnp.square(array - mean.astype(array.dtype))) for array in arrays)
    return mean, jnp.sqrt(sum(squares, start=zero) / size)


def _where(condition: jax.Array, tree: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(functools.partial(jnp.where, condition), tree, other)


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


# -- which epochs ----------------------------------------------------------------------------------


def skip_epoch(
    epoch: int,
    *,
    period: int | None = None,
    start: int = 5,
    probability: Probability | None = None,
    key: chex.PRNGKey | int = 0,
) -> bool:
    """Whether the training of an epoch is skipped: the rule of :func:`gradsamp`.

    Args:
      epoch: zero-based number of the epoch, a Python integer.
      period: after the first epochs the last one of every ``period`` epochs is skipped, at least 2;
        ``None`` (default) is 3, or no period where ``probability`` is given.
      start: number of epochs before the rule applies, at least 1; 5 by default.
      probability: instead of a period, the probability in [0, 1] with which an epoch after a
        trained one is skipped; ``None`` (default) for a period.
      key: PRNG key or integer seed of the choice with ``probability``.

    Returns:
      Whether it is skipped; never two epochs in a row.

    Raises:
      ValueError: an argument outside its range, or both ``period`` and ``probability``.

    Example:
      >>> import optax_accel as oa
      >>> [epoch for epoch in range(16) if oa.skip_epoch(epoch)]
      [7, 10, 13]
      >>> [epoch for epoch in range(16) if oa.skip_epoch(epoch, start=1, probability=0.5)]
      [2, 5, 9, 13, 15]
    """
    epoch = static_integer("epoch", epoch, 0)
    return _Rule(period, start, probability, key).on_the_host(1).is_sampled(epoch)


class _Rule:
    """Which epochs are sampled, in the graph and on the host."""

    def __init__(self, period: Any, start: Any, probability: Any, key: chex.PRNGKey | int):
        if period is not None and probability is not None:
            raise ValueError(
                f"epochs are sampled either every `period`, got {period!r}, or with a "
                f"`probability`, got {probability!r}: leave one out."
            )
        check_count("start", start, 1)
        if probability is None:
            period = _PERIOD if period is None else period
            check_count("period", period, 2)
        else:
            check_number("probability", probability, 0, 1)
        self._period, self._start, self._probability = period, start, probability
        self.key = as_key(key)

    def allows(self, epoch: Any) -> Any:
        """Whether an epoch is sampled if the one before it is not; of one epoch."""
        elapsed = epoch - self._start
        if self._probability is None:
            return (elapsed >= 0) & (elapsed % self._period == self._period - 1)
        # Behind the numbers of the epoch's noise.
        bits = hash_bits(self.key, (), epoch, np.uint32(2**32 - 1)) >> 8
        return (elapsed >= 0) & (bits.astype(jnp.float32) < self._probability * 2**24)

    def on_the_host(self, steps_per_epoch: Any) -> SampledEpochs:
        """The rule for a loop on the host, which asks for one epoch after the other."""
        steps = static_integer("steps_per_epoch", steps_per_epoch, 1)
        start = static_integer("start", self._start, 1)
        known = [False] * start

        def is_sampled(epoch: int) -> bool:
            while len(known) <= epoch:  # several at once, as each call of JAX takes a while
                with jax.transfer_guard("allow"), jax.ensure_compile_time_eval():
                    allowed = jax.vmap(self.allows)(len(known) + np.arange(64, dtype=np.int32))
                for one in np.asarray(allowed).tolist():
                    known.append(one and not known[-1])
            return known[epoch]

        return SampledEpochs(steps, is_sampled)
