"""LocalMixer, whose parts have losses of their own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models import _common
from optax_accel import Taps

Locality = Literal["global", "block", "patch", "group"]
Perturb = Literal["activations", "weights"]


class LocalMixer(nnx.Module):
    """LocalMixer of Ren et al. (2023), whose blocks, patches and groups learn by themselves.

    The image is cut into patches. The first block mixes channels only, by two linear layers; every
    further block mixes patches by one linear layer, then channels by two, and adds its input. The
    second of the channel layers has groups that do not see each other. Layers stand between layer
    normalizations without scale and shift. A classifier reads the mean over the patches of the last
    block; in `loss` every block has a linear classifier, which `__call__` does not use.

    S, M and L are those of the paper: 271,892 parameters on (28, 28, 1) images with 10 classes,
    918,770 on (32, 32, 3) with 10 and 17,335,796 on (224, 224, 3) with 100. Images should have mean
    0 and variance 1 in each channel.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> model = LocalMixer(
        ...     input_shape=(8, 8, 1), num_classes=3, num_patches=2, channels=8, num_blocks=2
        ... )
        >>> model(jnp.ones((5, 8, 8, 1))).shape
        (5, 3)
        >>> round(float(model.loss(jnp.ones((5, 8, 8, 1)), jnp.zeros(5, int))), 1) > 0
        True

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of
            `num_patches`.
        num_classes: Number of outputs.
        num_patches: Patches on each side of the image: 1, 8 and 32 in S, M and L.
        channels: Width of a patch: 256, 512 and 2,048.
        num_groups: Groups of channels with losses of their own, of which `channels` is a multiple:
            1, 16 and 64.
        num_blocks: Number of blocks: 1, 4 and 4.
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Ren, Kornblith, Liao, Hinton, `Scaling forward gradient with local losses
        <https://arxiv.org/abs/2210.03310>`_, ICLR 2023, section 5 and appendix; the sizes follow
        from the authors' `code
        <https://github.com/google-research/google-research/tree/master/local_forward_gradient>`_,
        as do weights that start normal with standard deviation min(2 / sqrt(fan in), 0.1) and a
        classifier of zeros. Ours: biases are added once; that code adds those of images' layers
        twice and differentiates them once.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        num_patches: int = 4,
        channels: int = 128,
        num_groups: int = 1,
        num_blocks: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        for name, value in (("num_patches", num_patches), ("num_blocks", num_blocks)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_groups < 1 or channels % num_groups:
            raise ValueError(
                f"channels must be a multiple of num_groups, got {channels} and {num_groups}"
            )
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("LocalMixer", self.input_shape, multiple_of=num_patches)
        height, width, colors = self.input_shape
        self.num_patches, self.num_groups = num_patches, num_groups
        inputs = height * width * colors // num_patches**2
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.blocks = nnx.List(
            _Block(
                channels if b else inputs,
                num_patches**2 if b else None,
                channels,
                num_groups,
                num_classes,
                options,
            )
            for b in range(num_blocks)
        )
        zeros = nnx.initializers.zeros_init()
        self.linear = nnx.Linear(channels, num_classes, kernel_init=zeros, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        return self._logits(self._features(x, "global", Taps())[-1])

    def loss(
        self,
        x: jax.Array,
        labels: jax.Array,
        *,
        locality: Locality = "group",
        perturb: Perturb = "activations",
        tap: Taps | None = None,
    ) -> jax.Array:
        """The sum of the cross entropies of all classifiers, mean over the examples.

        With local losses nothing is back-propagated from one block to another, and none of the
        blocks learns from the classifier of the network. The authors multiply the gradient of that
        classifier, `linear`, by 0.1.

        Args:
            x: Batch of images.
            labels: Classes, integers of shape (N,).
            locality: Which parts have losses of their own. "global": only the whole network.
                "block": each block. "patch": each patch of a block, by the replicated loss. "group"
                (default): each group of channels of a patch. The last three have the same gradient,
                and forward gradients with less and less variance.
            perturb: Where the taps are: on "activations" (default), behind the normalization of
                each layer, or on "weights", of which those of grouped layers see the losses of
                their own group and the others those of all groups, which the normalization
                behind them makes dependent (ours: the authors keep those groups apart, too).
            tap: Taps of `optax_accel.forward_gradient`; None (default) perturbs nothing.

        Returns:
            A scalar.
        """
        _common.check_input(self, x, self.input_shape)
        for name, value, allowed in (
            ("locality", locality, get_args(Locality)),
            ("perturb", perturb, get_args(Perturb)),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(allowed)}")
        tap, model, activations = tap or Taps(), self, tap or Taps()
        if perturb == "weights":
            model, activations = self._with_tapped_weights(locality, tap), Taps()
        features = model._features(x, locality, activations)
        last = features[-1]
        losses = optax.softmax_cross_entropy_with_integer_labels
        if locality == "global":
            return tap.mean(losses(model._logits(last), labels), loss="network")
        total = tap.mean(losses(model._logits(lax.stop_gradient(last)), labels), loss="network")
        for b, (block, h) in enumerate(zip(model.blocks, features, strict=True)):
            total += tap.mean(block.losses(h, labels, locality), loss=f"block {b}", copies=True)
        return total

    def _features(self, x: jax.Array, locality: str, tap: Taps) -> list[jax.Array]:
        """The outputs of all blocks, (N, patches, groups, channels of a group)."""
        x, features = _cut(x, self.num_patches), []
        for b, block in enumerate(self.blocks):
            loss = "network" if locality == "global" else f"block {b}"
            x = block(x, locality, lambda z, loss=loss, **kwargs: tap(z, loss=loss, **kwargs))
            features.append(x)
            if locality != "global":
                x = lax.stop_gradient(x)
            x = x.reshape(*x.shape[:2], -1)
        return features

    def _logits(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], -1).mean(axis=1)
        return _common.as_logits(self.linear(_normalized(x)))

    def _with_tapped_weights(self, locality: str, tap: Taps) -> LocalMixer:
        """The same network with a tap on each weight and bias of the layers inside the blocks."""
        graphdef, params = nnx.split(self)

        def tapped(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
            keys = [getattr(key, "key", None) for key in path]
            name = keys[2] if len(keys) > 2 else None
            if name not in ("patches", "mixed", "grouped"):
                return w
            # The normalization behind the other layers sees all groups.
            own = locality == "group" and name == "grouped"
            loss = "network" if locality == "global" else f"block {keys[1]}"
            return tap(w, loss=loss, axes=(2,) if own else ())

        params = jax.tree_util.tree_map_with_path(tapped, params)
        return nnx.merge(graphdef, params)


class _Block(nnx.Module):
    """One block.

    Args:
        inputs: Channels of the input.
        num_patches: Patches that it mixes; None: it mixes none, and adds no input.
        channels: Channels of the output.
        num_groups: Groups of these.
        num_classes: Outputs of its classifier.
        options: Types and random keys.
    """

    def __init__(
        self,
        inputs: int,
        num_patches: int | None,
        channels: int,
        num_groups: int,
        num_classes: int,
        options: dict[str, Any],
    ):
        def linear(fan_in: int, fan_out: int) -> nnx.Linear:
            return nnx.Linear(fan_in, fan_out, kernel_init=_start(fan_in), **options)

        self.num_groups = num_groups
        self.patches = None if num_patches is None else linear(num_patches, num_patches)
        self.mixed = linear(inputs, channels)
        size = channels // num_groups
        self.grouped = _GroupedLinear(num_groups, size, size, **options)
        self.head = _GroupedLinear(1, channels, num_classes, **options)

    def __call__(self, x: jax.Array, locality: str, tap: Callable[..., jax.Array]) -> jax.Array:
        """(N, patches, groups, channels of a group) of (N, patches, channels)."""
        axes = {"patch": (0, 1), "group": (0, 1, 2)}.get(locality, (0,))
        h = x
        if self.patches is not None:
            h = self.patches(_normalized(h).swapaxes(1, 2)).swapaxes(1, 2)
            h = _normalized(h)
            h = jax.nn.relu(tap(h, axes=axes[:2], active=h > 0))  # it sees all groups
        h = self._in_groups(_normalized(self.mixed(_normalized(h))))
        h = jax.nn.relu(tap(h, axes=axes, active=h > 0))
        h = _normalized(self.grouped(_normalized(h)))
        if self.patches is None:
            return jax.nn.relu(tap(h, axes=axes, active=h > 0))
        x = self._in_groups(x)
        return jax.nn.relu(tap(h, axes=axes, active=h + x > 0) + x)

    def losses(self, h: jax.Array, labels: jax.Array, locality: str) -> jax.Array:
        """The losses of its classifier: copies for each example, patch and group that has one."""
        n, patches, *_ = h.shape
        h = _normalized(h)
        if locality == "block":
            h = h.mean(axis=1).reshape(n, 1, 1, -1)
        elif locality == "patch":
            h = h.reshape(n, patches, 1, -1)
        kernel, bias = self.head.kernel[...][0], self.head.bias[...][0]
        return replicated_cross_entropy(_common.as_logits(h), kernel, bias, labels)

    def _in_groups(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_groups, -1)


class _GroupedLinear(nnx.Module):
    """A linear layer of its own for each group: (..., groups, inputs) to (..., groups, outputs)."""

    def __init__(
        self,
        num_groups: int,
        fan_in: int,
        fan_out: int,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (num_groups, fan_in, fan_out)
        self.kernel = nnx.Param(_start(fan_in)(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_groups, fan_out), param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
        return jnp.einsum("npgc,gcd->npgd", x, kernel) + bias[None, None]


def replicated_cross_entropy(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array
) -> jax.Array:
    """The cross entropy of a linear classifier of mean patches, once for each patch and group.

    All copies have the same value. The derivative of a copy with respect to `x` is that with
    respect to its own patch and group, so that the derivatives of all copies sum to that of the
    loss (Ren et al., 2023, section 4.3 and algorithm 1); those of kernel and bias are divided
    equally among the copies. In forward mode no copy is computed more than once.

    Args:
        x: Outputs of a block, (N, patches, groups, channels of a group).
        kernel: (channels of all groups, classes).
        bias: (classes,).
        labels: Classes, integers of shape (N,).

    Returns:
        Losses, (N, patches, groups).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((1, 2, 2, 3)), jnp.ones((6, 4))
        >>> losses = replicated_cross_entropy(x, kernel, jnp.zeros(4), jnp.zeros(1, int))
        >>> losses.shape, round(float(losses[0, 0, 0]), 4)  # the logarithm of 4
        ((1, 2, 2), 1.3863)
    """
    targets = jax.nn.one_hot(labels, kernel.shape[1], dtype=x.dtype)
    return _replicated(x, kernel.astype(x.dtype), bias.astype(x.dtype), targets)


@jax.custom_jvp
def _replicated(x: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array) -> jax.Array:
    n, patches, groups, _ = x.shape
    losses = optax.softmax_cross_entropy(_of_means(x, kernel, bias), targets)
    return jnp.broadcast_to(losses[:, None, None], (n, patches, groups))


@_replicated.defjvp
def _replicated_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, kernel, bias, targets = primals
    x_dot, kernel_dot, bias_dot, _ = tangents
    _, patches, groups, size = x.shape
    slope = jax.nn.softmax(_of_means(x, kernel, bias)) - targets
    back = jnp.einsum("gcd,nd->ngc", kernel.reshape(groups, size, -1), slope) / patches
    own = jnp.einsum("npgc,ngc->npg", x_dot, back)
    of_head = jnp.sum(_of_means(x, kernel_dot, bias_dot) * slope, axis=-1) / (patches * groups)
    return _replicated(*primals), own + of_head[:, None, None]


def _of_means(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return x.mean(axis=1).reshape(x.shape[0], -1) @ kernel + bias[None]


def _start(fan_in: int) -> nnx.initializers.Initializer:
    return nnx.initializers.normal(min(2 / math.sqrt(fan_in), 0.1))


def _normalized(x: jax.Array) -> jax.Array:
    """Layer normalization over the last axis without scale and shift, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # In this form, without axes of 1, XLA sees that a forward gradient's two passes share it.
    spread = functools.partial(
        lax.broadcast_in_dim, shape=x.shape, broadcast_dimensions=range(x.ndim - 1)
    )
    centered = wide - spread(wide.mean(axis=-1))
    variance = jnp.mean(centered**2, axis=-1)
    return (centered * spread(lax.rsqrt(variance + 1e-5))).astype(x.dtype)


def _cut(x: jax.Array, num_patches: int) -> jax.Array:
    """(N, patches, pixels of a patch times channels) of images."""
    n, height, width, channels = x.shape
    x = x.reshape(
        n, num_patches, height // num_patches, num_patches, width // num_patches, channels
    )
    return x.swapaxes(2, 3).reshape(n, num_patches**2, -1)
