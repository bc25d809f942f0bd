"""Taps: how a network says which of its activations are perturbed, and what its losses are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._mesh_axes import filled_like
from optax_accel.objective import Objective


class Taps:
    r"""Where a network's activations are perturbed, and what its losses are.

    A network takes an argument ``tap``, with ``Taps()`` as its default, and calls it where a
    direction may be added, usually on the outputs of each layer in front of the nonlinearity. Its
    loss is returned through :meth:`mean`. In training and evaluation without forward gradients both
    do nothing beyond what they are named for; :func:`forward_gradient` passes taps of its own.

    Between taps the derivative is exact and local, across taps it is estimated: the parameters of a
    layer in front of a tap get :math:`x^\top \hat g_z`, through whatever lies between the layer and
    its tap (a normalization, say), and parameters behind the last tap, such as those of a
    classifier whose logits are not tapped, get their exact gradient. A tap on a weight itself
    perturbs that weight. Call taps outside of loops (``lax.scan``) and of functions with a ``jit``
    of their own, whose values cannot leave them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> def loss_fn(params, x, y, tap=oa.Taps()):
      ...     z = tap(x @ params["w1"])  # a direction for every example
      ...     logits = tap(jnp.tanh(z) @ params["w2"])
      ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      ...     return tap.mean(losses)  # a loss for every example
      >>> params = {"w1": jnp.ones((4, 3)), "w2": jnp.ones((3, 2))}
      >>> x, y = jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)
      >>> round(float(loss_fn(params, x, y)), 4)
      0.6931
      >>> tx = oa.forward_gradient(optax.sgd(0.1), perturb="activations")
      >>> @jax.jit
      ... def step(params, state):  # the first argument of update, the gradient, is not used
      ...     updates, state = tx.update(params, state, params, value_fn=loss_fn, x=x, y=y)
      ...     return optax.apply_updates(params, updates), state
      >>> params, state = step(params, tx.init(params))
    """

    def __call__(
        self,
        x: jax.Array,
        *,
        loss: str = "loss",
        axes: tuple[int, ...] = (0,),
        active: jax.Array | None = None,
    ) -> jax.Array:
        """Marks an activation as one that may be perturbed.

        Args:
          x: the activation, real floating point, of any shape, such as (examples, units).
          loss: name of the loss that depends on it, given to :meth:`mean` under that name. With
            several local losses, each between gradients that are stopped, this keeps the noise of
            the others out.
          axes: the axes of that loss which ``x`` has too, as its first axes and in this order: each
            entry along them depends on nothing but its own loss. The derivatives of the loss are
            summed over its other axes. ``(0,)`` (default): ``x`` has the examples first; ``()``:
            ``x`` has none of them, as a weight.
          active: booleans like ``x``, False where the loss does not depend on it because the
            nonlinearity behind is flat there, such as ``x > 0`` in front of a ReLU. No direction
            is drawn there, which leaves out its noise. ``None`` (default): all are active.

        Returns:
          ``x`` unchanged in value.
        """
        del loss, axes, active
        return x

    def mean(self, losses: jax.Array, *, loss: str = "loss", copies: bool = False) -> jax.Array:
        """The mean of the losses of single examples, or of parts of them.

        Args:
          losses: real floating point; the first axis is that of the examples, further axes may be
            those of patches, tokens or groups of channels.
          loss: name of the loss, to which taps refer.
          copies: whether all entries of an example are copies of one loss that differ in their
            derivatives only, each with a part of it (as in the replicated loss of
            ``models.local_mixer``). The mean then has the value of one copy, and the sum of the
            derivatives over an example, averaged over the examples. False (default): a plain mean.

        Returns:
          A scalar.
        """
        del loss
        return _mean_of_copies(losses) if copies else jnp.mean(losses)


@jax.custom_jvp
def _mean_of_copies(losses: jax.Array) -> jax.Array:
    return jnp.mean(losses)


@_mean_of_copies.defjvp
def _mean_of_copies_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (losses,), (moved,) = primals, tangents
    return jnp.mean(losses), jnp.sum(moved) / losses.shape[0]


class Tapped(NamedTuple):
    """What a tap was called with."""

    loss: str
    axes: tuple[int, ...]
    array: jax.Array


class Perturbing(Taps):
    """Moves every activation along its direction; keeps the directions and the losses.

    Args:
      draw: the direction of the tap of that number, for an array like the given one.
      move: ``move(x, direction)``, which adds a multiple of it.
    """

    def __init__(
        self,
        draw: Callable[[int, jax.Array, tuple[int, ...]], jax.Array],
        move: Callable[[jax.Array, jax.Array], jax.Array],
    ):
        self._draw, self._move = draw, move
        self.tapped: list[Tapped] = []
        self.losses: dict[str, jax.Array] = {}

    def __call__(
        self,
        x: jax.Array,
        *,
        loss: str = "loss",
        axes: tuple[int, ...] = (0,),
        active: jax.Array | None = None,
    ) -> jax.Array:
        """The activation, moved along its direction."""
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"forward_gradient perturbs real floating-point activations, but tap number "
                f"{len(self.tapped)} was given an array of dtype {x.dtype}."
            )
        direction = filled_like(self._draw(len(self.tapped), x, axes).astype(x.dtype), x)
        if active is not None:
            direction = jnp.where(active, direction, jnp.zeros_like(direction))
        self.tapped.append(Tapped(loss, tuple(axes), direction))
        return self._move(x, direction)

    def mean(self, losses: jax.Array, *, loss: str = "loss", copies: bool = False) -> jax.Array:
        """The mean; keeps the losses."""
        losses = jnp.asarray(losses)
        if loss in self.losses:
            raise ValueError(
                f"tap.mean was called twice for the loss {loss!r}: give each its own name, as in "
                "tap.mean(losses, loss='auxiliary'), and the taps in front of it the same name."
            )
        if losses.ndim == 0:
            raise ValueError(
                f"tap.mean needs the losses of single examples, but the loss {loss!r} is a scalar: "
                "leave the mean over the examples to tap.mean."
            )
        # As their mean depends on them; the derivative is not that of the value if they are copies.
        self.losses[loss] = losses / (losses.shape[0] if copies else losses.size)
        return super().mean(losses, loss=loss, copies=copies)


class Cutting(Taps):
    """Keeps the activations and ends every derivative there.

    Args:
      offsets: a number for each loss that a tap names, added to its mean: the derivative with
        respect to it is how much the mean counts in the objective.
    """

    def __init__(self, offsets: dict[str, jax.Array]):
        self._offsets = offsets
        self.arrays: list[jax.Array] = []

    def __call__(self, x: jax.Array, **_: Any) -> jax.Array:
        """The activation, without derivative."""
        self.arrays.append(x)
        return lax.stop_gradient(x)

    def mean(self, losses: jax.Array, *, loss: str = "loss", copies: bool = False) -> jax.Array:
        """The mean plus the number for that loss."""
        value = super().mean(losses, loss=loss, copies=copies)
        return value + self._offsets.get(loss, jnp.zeros(())).astype(value.dtype)


_WITH_TAPS = (
    "Call it where the activations are, and return the loss through it: "
    "def loss_fn(params, x, y, tap=optax_accel.Taps()): z = tap(x @ params['w']); ...; "
    "return tap.mean(losses), with a loss for each example."
)


def check_taps(value_fn: Any) -> None:
    """Raises if the loss has no taps, before it is evaluated."""
    if value_fn is None or not callable(value_fn):
        return  # `as_objective` says so
    objective = value_fn if isinstance(value_fn, Objective) else Objective.from_value_fn(value_fn)
    if objective.is_accumulated:
        raise ValueError(
            "forward_gradient(perturb='activations') cannot tap the activations of micro-batches, "
            "which are seen in a loop: give it the objective of the whole batch, or perturb the "
            "weights."
        )
    names, _, variadic = objective.arguments
    if "tap" not in names and not variadic:
        raise ValueError(
            "forward_gradient(perturb='activations') needs a loss with an argument `tap`, got one "
            f"that takes {', '.join(names) or 'the parameters alone'}. {_WITH_TAPS}"
        )


def check_tapped(taps: Perturbing) -> None:
    """Raises if the taps and the losses of a network do not fit together."""
    if not taps.tapped or not taps.losses:
        never = "`tap`" if not taps.tapped else "`tap.mean`"
        raise ValueError(
            f"forward_gradient(perturb='activations'): the loss never called {never}. {_WITH_TAPS}"
        )
    for number, (loss, axes, direction) in enumerate(taps.tapped):
        if loss not in taps.losses:
            raise ValueError(
                f"tap number {number}, of shape {direction.shape}, names the loss {loss!r}, but "
                f"tap.mean was called for {', '.join(map(repr, taps.losses))}."
            )
        shape = taps.losses[loss].shape
        known = all(-1 < axis < len(shape) for axis in axes) and len(set(axes)) == len(axes)
        if not known or tuple(shape[a] for a in axes) != direction.shape[: len(axes)]:
            raise ValueError(
                f"tap number {number}, of shape {direction.shape}, must begin with the axes "
                f"{axes} of the loss {loss!r}, of shape {shape}: `axes` names those that both "
                "have, in the order in which the activation has them; () if it has none."
            )
