"""Hyperparameters that change during training, for any Optax factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import check_factory, shown


class WithSchedulesState(NamedTuple):
    """State of :func:`with_schedules`.

    Attributes:
      count: number of updates made; int32 scalar.
      scheduled: the scheduled arguments by name, with their values in the last update (before the
        first update, in that one); e.g. ``optax.tree.get(state, "momentum")``.
      inner_state: state of the transformation that the factory builds.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    scheduled: dict[str, jax.Array]
    inner_state: chex.ArrayTree


def with_schedules(
    factory: Callable[..., optax.GradientTransformation], **schedules: optax.Schedule
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Gives any Optax factory schedules for arguments that take none, such as momentum.

    A momentum schedule for any chain is one line::

      with_schedules(optax.sgd, momentum=demon_schedule(0.9, 1000))(learning_rate=0.1)
      with_schedules(optax.adamw, b1=optax.cosine_decay_schedule(0.9, 1000))(learning_rate=1e-3)
      with_schedules(optax.sgd, momentum=optax.linear_schedule(0.9, 0.0, 1000))(0.1, nesterov=True)

    Unlike ``optax.inject_hyperparams`` it changes only the named arguments: the others stay Python
    values (integers do not become arrays), and mixed-precision trees keep their dtypes while the
    scheduled value stays in float32.

    Adam-like factories correct the bias of their first moment with the *current* decay rate,
    ``1 - b1_t ** t``, which is exact for a constant rate only;
    :func:`~optax_accel.scale_by_demon_adam` carries the exact normalizer.

    Args:
      factory: function that returns an ``optax.GradientTransformation``.
      **schedules: for each scheduled argument a function of the zero-based count of updates.

    Returns:
      A function of the factory's remaining arguments that returns the transformation, with state
      :class:`WithSchedulesState`.

    Raises:
      ValueError: no schedule was given, or the factory has no argument of that name.
      TypeError: a schedule is not callable, or a scheduled argument is also given as a value.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.with_schedules(optax.sgd, momentum=optax.linear_schedule(0.9, 0.0, 2))(1.0)
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     update, state = tx.update(jnp.array(1.0), state, params)
      ...     print(round(float(state.scheduled["momentum"]), 2), round(float(update), 2))
      0.9 -1.0
      0.45 -1.45
      0.0 -1.0
    """
    check_factory(factory)
    if not schedules:
        raise ValueError("with_schedules: give at least one schedule, e.g. momentum=schedule.")
    parameters = inspect.signature(factory).parameters
    variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    label = getattr(factory, "__name__", repr(factory))
    for name, schedule in schedules.items():
        if name not in parameters and not variadic:
            raise ValueError(
                f"with_schedules: {label} has no argument {name!r}; it takes "
                f"{', '.join(parameters)}."
            )
        if not callable(schedule):
            raise TypeError(
                f"with_schedules: `{name}` must be a schedule (a function of the step count), got "
                f"{shown(schedule)}; give constants to the returned function."
            )

    def build(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        again = sorted(set(schedules) & set(kwargs))
        if again:
            raise TypeError(f"with_schedules: {again[0]!r} is scheduled and was given again.")

        def values_at(count: jax.Array) -> dict[str, jax.Array]:
            # With a strong dtype: a weak one is lost in a checkpoint, and a weak float32 times
            # bfloat16 is bfloat16.
            values = {name: jnp.asarray(schedule(count)) for name, schedule in schedules.items()}
            return {name: value.astype(value.dtype) for name, value in values.items()}

        def inner(values: dict[str, jax.Array]) -> optax.GradientTransformationExtraArgs:
            return optax.with_extra_args_support(factory(*args, **kwargs, **values))

        def init_fn(params: chex.ArrayTree) -> WithSchedulesState:
            count = jnp.zeros((), jnp.int32)
            values = values_at(count)
            return WithSchedulesState(count, values, inner(values).init(params))

        def update_fn(
            updates: chex.ArrayTree,
            state: WithSchedulesState,
            params: chex.ArrayTree | None = None,
            **extra_args: Any,
        ) -> tuple[chex.ArrayTree, WithSchedulesState]:
            values = values_at(state.count)
            new_updates, inner_state = inner(values).update(
                updates, state.inner_state, params, **extra_args
            )
            # A float32 momentum times bfloat16 gradients is float32: cast back to what came in.
            new_updates = optax.tree.cast_like(new_updates, updates)
            inner_state = jax.tree.map(_cast_like, inner_state, state.inner_state)
            count = optax.safe_increment(state.count)
            return new_updates, WithSchedulesState(count, values, inner_state)

        # Fail on bad arguments here, not at the first init.
        inner(values_at(jnp.zeros((), jnp.int32)))
        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return build


def _cast_like(new: Any, old: Any) -> Any:
    dtype = jnp.result_type(old)
    # The PRNG keys of samplers cannot be cast.
    return jnp.asarray(new).astype(dtype) if jnp.issubdtype(dtype, jnp.number) else new


def static_arguments(factory: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a factory's arguments that must stay Python values.

    An argument is a hyperparameter that may become an array if its annotation says ``float`` or
    ``ScalarOrSchedule``; all others (counts, flags, keys, functions, masks) are static.

    Args:
      factory: a function of this package that returns a transformation.

    Returns:
      The names of its static arguments.

    Example:
      >>> import optax_accel as oa
      >>> oa.static_arguments(oa.demon_schedule)
      ('decay_steps', 'delay_steps')
    """
    check_factory(factory)
    return tuple(
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if not any(word in str(parameter.annotation) for word in ("float", "ScalarOrSchedule"))
    )


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation], **kwargs: Any
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """``optax.inject_hyperparams`` that knows which arguments of our methods are static.

    Optax's function works with the numbers of our methods, but it turns all of them into arrays,
    counts and seeds too, and takes every callable for a schedule: samplers, masks, dtypes,
    objectives.  This one leaves all arguments unchanged that are not hyperparameters
    (:func:`static_arguments`).

    Args:
      factory: a function of this package that returns a transformation.
      **kwargs: further arguments of ``optax.inject_hyperparams``, e.g. ``hyperparam_dtype``.

    Returns:
      A function of the factory's arguments that returns the transformation, with the state of
      ``optax.inject_hyperparams``. It raises ``TypeError`` for arguments that the factory does not
      take.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> tx = oa.inject_hyperparams(oa.demon_sgd)(learning_rate=0.1, decay_steps=100)
      >>> state = tx.init(jnp.zeros(3))
      >>> sorted(state.hyperparams)
      ['learning_rate', 'momentum']
    """
    injected = optax.inject_hyperparams(factory, static_args=static_arguments(factory), **kwargs)
    signature = inspect.signature(factory)

    def build(*args: Any, **hyperparams: Any) -> optax.GradientTransformationExtraArgs:
        try:
            signature.bind(*args, **hyperparams)
        except TypeError as error:
            raise TypeError(
                f"inject_hyperparams({getattr(factory, '__name__', 'factory')}): {error}; it takes "
                f"{', '.join(signature.parameters)}."
            ) from None
        return injected(*args, **hyperparams)

    return build
