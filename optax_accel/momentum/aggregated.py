r"""AggMo: the mean of several momentum buffers with different decays.

.. math::
  v_i \leftarrow \beta_i v_i + g, \qquad
  \theta \leftarrow \theta - \frac{\eta}{K} \sum_{i=1}^{K} v_i .

The buffer with the largest decay speeds up directions of low curvature; the others damp the
oscillations that it would cause alone.

Lucas, Sun, Zemel, Grosse, `Aggregated momentum: stability through passive damping
<https://arxiv.org/abs/1804.00325>`_, ICLR 2019.  Faithful: the rule and the defaults of the
authors' code (``AtheMathmo/AggMo``), in which buffers of equal decay share one array: here each has
its own.  Ours: schedules for the decays, and the argument ``factors`` for the rates of single
buffers, with which the paper reads Nesterov's momentum as an AggMo.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import (
    check_dtype,
    check_floating_leaves,
    check_integer,
    check_learning_rate,
    check_number,
    value_of,
    with_checked_init,
)


def aggmo_betas(num_buffers: int = 3, base: float = 0.1) -> tuple[float, ...]:
    """The decays ``1 - base ** i`` for ``i`` from 0 to ``num_buffers - 1``.

    Args:
      num_buffers: K, the number of buffers, at least 1; 3 in the paper.
      base: in (0, 1]; 0.1 in the paper.

    Returns:
      The decays, the first of which is 0.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import optax_accel as oa
      >>> oa.aggmo_betas()
      (0.0, 0.9, 0.99)

    References:
      Lucas et al., `Aggregated momentum <https://arxiv.org/abs/1804.00325>`_.
    """
    check_integer("num_buffers", num_buffers, 1)
    check_number("base", base, 0, 1, open_low=True)
    return tuple(1 - base**i for i in range(num_buffers))


class ScaleByAggMoState(NamedTuple):
    """State of :func:`scale_by_aggmo`.

    Attributes:
      count: number of updates made; int32 scalar.
      buffers: one momentum buffer for each decay, each like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    buffers: tuple[chex.ArrayTree, ...]


def scale_by_aggmo(
    betas: Sequence[optax.ScalarOrSchedule] = (0.0, 0.9, 0.99),
    *,
    factors: Sequence[float] | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The mean of momentum buffers with the decays ``betas``.

    One decay makes it ``optax.trace``.  It keeps as many copies of the parameters as there are
    decays, three by default, where SGD with momentum keeps one.

    Args:
      betas: the decays, each in [0, 1), a float or a schedule; at least one.
      factors: for each buffer the number that it is multiplied with before the mean; ``None``
        (default) means 1 for all, as in the paper's experiments. ``(2, 2 * beta)`` for the decays
        ``(0, beta)`` make it Nesterov's momentum.
      accumulator_dtype: dtype of the buffers; ``None`` (default) is that of the parameters.

    Returns:
      A transformation with state :class:`ScaleByAggMoState`.

    Raises:
      ValueError: an argument outside its range, no decay, or another number of factors.
      TypeError: ``betas`` or ``factors`` are no sequence; in ``init``: parameters that are not
        floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_aggmo(), optax.scale_by_learning_rate(0.1))
      >>> param = jnp.array(1.0)
      >>> updates, state = tx.update(param, tx.init(param), param)
      >>> len(state[0].buffers)
      3

    References:
      Lucas et al., `Aggregated momentum <https://arxiv.org/abs/1804.00325>`_.
    """
    betas = _as_tuple("betas", betas)
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, 0, 1, open_high=True, allow_schedule=True)
    weights = (1.0,) * len(betas) if factors is None else _as_tuple("factors", factors)
    if len(weights) != len(betas):
        raise ValueError(
            f"`factors` must be as many as `betas`, got {len(weights)} for {len(betas)} decays."
        )
    for i, factor in enumerate(weights):
        check_number(f"factors[{i}]", factor)
    check_dtype("accumulator_dtype", accumulator_dtype)

    def init_fn(params: chex.ArrayTree) -> ScaleByAggMoState:
        check_floating_leaves(params, "scale_by_aggmo")
        zeros = functools.partial(optax.tree.zeros_like, params, dtype=accumulator_dtype)
        return ScaleByAggMoState(jnp.zeros((), jnp.int32), tuple(zeros() for _ in betas))

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByAggMoState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByAggMoState]:
        del params, extra_args
        buffers = tuple(
            optax.tree.add_scale(updates, value_of(beta, state.count), buffer)
            for beta, buffer in zip(betas, state.buffers, strict=True)
        )

        def mean(g: jax.Array, *values: jax.Array) -> jax.Array:
            parts = [w * v if w != 1 else v for w, v in zip(weights, values, strict=True)]
            return (functools.reduce(jnp.add, parts) / len(betas)).astype(g.dtype)

        new_updates = jax.tree.map(mean, updates, *buffers)
        return new_updates, ScaleByAggMoState(
            optax.safe_increment(state.count), optax.tree.cast_like(buffers, state.buffers)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def aggmo(
    learning_rate: optax.ScalarOrSchedule,
    betas: Sequence[optax.ScalarOrSchedule] = (0.0, 0.9, 0.99),
    *,
    factors: Sequence[float] | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with aggregated momentum.

    Args:
      learning_rate: float or schedule, at least 0; the same as that of SGD with momentum at first.
      betas: the decays, each in [0, 1), a float or a schedule; at least one. Each costs a copy of
        the parameters.
      factors: for each buffer the number that it is multiplied with before the mean; ``None``
        (default) means 1 for all.
      accumulator_dtype: dtype of the buffers; ``None`` (default) is that of the parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range, no decay, or another number of factors.
      TypeError: ``betas`` or ``factors`` are no sequence; in ``init``: parameters that are not
        floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.aggmo(learning_rate=0.1)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.grad(loss)(param), state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> round(float(param), 5)
      0.34293

    References:
      Lucas et al., `Aggregated momentum <https://arxiv.org/abs/1804.00325>`_.
    """
    check_learning_rate(learning_rate)
    return with_checked_init(
        optax.chain(
            scale_by_aggmo(betas, factors=factors, accumulator_dtype=accumulator_dtype),
            optax.scale_by_learning_rate(learning_rate),
        ),
        functools.partial(check_floating_leaves, method="aggmo"),
    )


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(
            f"`{name}` must be a sequence of numbers, one for each buffer, such as (0.0, 0.9); got "
            f"{values!r}."
        )
    if not values:
        raise ValueError(f"`{name}` must have at least one entry, got none.")
    return tuple(values)
