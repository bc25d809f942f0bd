"""Multiscale deep equilibrium model that classifies images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common, _equilibrium
from optax_accel.equilibrium import FixedPointReport

States = tuple[jax.Array, jax.Array]


class Mdeq(nnx.Module):
    """Stem, two resolutions that are a fixed point together, and a head of both (MDEQ).

    The default is the authors' tiny model for CIFAR-10. With images of (32, 32, 3) and 10 classes
    it has 158,890 parameters, the number in their code (the paper says 170 thousand). The stem's
    features are injected into the full resolution; the second one has half the height and width.
    The block, whose fixed point z = f(z, x) is found from z = 0, is for each resolution

        h = conv3x3(relu(norm(conv3x3(z))))        width -> 5 width -> width
        h = norm(h * mask + injection) + z
        h = norm(relu(h))

    with one mask of dropout for all iterations; then each resolution adds what the other one sends
    it (down: a convolution of stride 2; up: a 1x1 convolution, nearest neighbors; both with a norm)
    and ends with norm(conv1x1(relu(h))). Norms are group normalizations. The convolutions of the
    blocks and the last ones are weight-normalized.

    It starts as the authors' code does: convolutions normal with deviation 0.01, but weight-
    normalized ones like PyTorch's, uniform within ±1/sqrt(fan in), since that code draws the former
    into what it computes anew from length and direction in each pass.

    Its authors train it by Adam, rate 0.001 falling as a cosine, weight decay 2.5e-6, batches of 64
    per device, 50 epochs, of which the first 3,000 steps differentiate through 10 plain iterations.
    That is a model with `solver="fixed_point", max_steps=10, gradient="unrolled"`, of the same
    parameters.

    Example:
        Sizes without computing anything:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> x = jnp.ones((2, 16, 16, 3))
        >>> sizes = {"input_shape": (16, 16, 3), "num_classes": 10, "loop": "while"}
        >>> nnx.eval_shape(lambda: Mdeq(**sizes)(x)).shape
        (2, 10)

    Args:
        input_shape: (height, width, channels), height and width multiples of 4.
        num_classes: Number of outputs.
        width: Channels of both resolutions, a multiple of `num_groups`.
        num_groups: Groups of the normalizations, even; the last ones have half as many.
        expansion: Channels inside of a block, as a multiple of `width`.
        head_channels: Channels inside of the head's bottleneck blocks; they end with four times as
            many.
        final_channels: Channels in front of the classifier.
        dropout_rate: Share of the channels of an image that are dropped in train mode.
        solver: "anderson", "broyden" or "fixed_point", in both directions.
        max_steps: The most steps of the solver.
        backward_steps: The same for the linear system of the implicit gradient.
        tolerance: Residual, relative to the norm of f(z), below which an image has converged.
        memory: Pairs that Anderson (default: 6) or Broyden (default: all) keeps. With a number here
            memory does not depend on the number of steps.
        gradient: "implicit", "phantom" or "unrolled", see `optax_accel.deq`.
        phantom_steps: Steps of the phantom gradient.
        damping: Share of the block in each of these.
        loop: "while", "unrolled" or None: "unrolled" on a CPU, where XLA runs convolutions in a
            loop slowly, otherwise "while".
        axis_name: Replica axis whose batches are normalized together, in stem and head.
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Bai, Koltun, Kolter, `Multiscale deep equilibrium models
        <https://arxiv.org/abs/2006.08656>`_, NeurIPS 2020; the configuration `cls_mdeq_TINY` of
        their code.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 24,
        num_groups: int = 8,
        expansion: int = 5,
        head_channels: Sequence[int] = (8, 16),
        final_channels: int = 200,
        dropout_rate: float = 0.25,
        solver: str = "broyden",
        max_steps: int = 18,
        backward_steps: int = 20,
        tolerance: float = 1e-3,
        memory: int | None = None,
        gradient: str = "implicit",
        phantom_steps: int = 1,
        damping: float = 1.0,
        loop: str | None = None,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("Mdeq", self.input_shape, multiple_of=4)
        if num_groups < 2 or num_groups % 2 or width % num_groups:
            raise ValueError(
                f"num_groups must be even and divide width, got {num_groups} and {width}"
            )
        if len(head_channels) != 2:
            raise ValueError(
                "head_channels must be two numbers, one of each resolution, got "
                f"{tuple(head_channels)}"
            )
        self.options = _equilibrium.Options(
            solver=solver,
            max_steps=max_steps,
            backward_steps=backward_steps,
            tolerance=tolerance,
            memory=memory,
            gradient=gradient,
            phantom_steps=phantom_steps,
            damping=damping,
            loop=loop,
        )
        layers = _common.Layers(
            norm="batch",
            axis_name=axis_name,
            conv_init=nnx.initializers.normal(0.01),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.conv1 = layers.conv(self.input_shape[-1], width)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(width, width)
        self.norm2 = layers.norm(width)
        self.dropout = layers.dropout(dropout_rate)
        self.cell = _Cell(layers, width, num_groups, expansion)
        self.head = _Head(layers, width, tuple(head_channels), final_channels)
        self.linear = layers.linear(final_channels, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        states, _ = self.equilibrium(x)
        return _common.as_logits(self.linear(self.head(states).mean(axis=(1, 2))))

    def equilibrium(self, x: jax.Array) -> tuple[States, FixedPointReport]:
        """The fixed point and what the solver says of it.

        Args:
            x: A batch of images.

        Returns:
            The states (N, height, width, channels) and (N, height / 2, width / 2, channels), and
            the report of `optax_accel.deq`.
        """
        _common.check_input(self, x, self.input_shape)
        h = nnx.relu(self.norm1(self.conv1(x)))
        h = nnx.relu(self.norm2(self.conv2(h)))
        n, height, width, channels = h.shape
        full = jnp.zeros((n, height, width, channels), h.dtype)
        half = jnp.zeros((n, height // 2, width // 2, channels), h.dtype)
        masks = tuple(self.dropout(jnp.ones((n, 1, 1, channels), h.dtype)) for _ in range(2))
        found, report = self.options.solve(self.cell, (full, half), (h, masks))
        return found, report


class _Cell(nnx.Module):
    """The block whose fixed point is wanted: two residual blocks, then an exchange."""

    def __init__(self, layers: _common.Layers, width: int, num_groups: int, expansion: int):
        self.blocks = nnx.List(_Block(layers, width, num_groups, expansion) for _ in range(2))
        self.down = layers.conv(width, width, strides=2)
        self.down_norm = _group_norm(layers, width, num_groups)
        self.up = layers.conv(width, width, 1)
        self.up_norm = _group_norm(layers, width, num_groups)
        self.last = nnx.List(_normalized_conv(layers, width, width, 1) for _ in range(2))
        self.last_norms = nnx.List(
            _group_norm(layers, width, num_groups // 2, affine=False) for _ in range(2)
        )

    def __call__(self, z: States, x: tuple[jax.Array, tuple[jax.Array, jax.Array]]) -> States:
        injection, masks = x
        full = self.blocks[0](z[0], masks[0], injection)
        half = self.blocks[1](z[1], masks[1], None)
        fused = (
            full + _twice_as_large(self.up_norm(self.up(half))),
            half + self.down_norm(self.down(full)),
        )
        a, b = (
            norm(conv(nnx.relu(h)))
            for conv, norm, h in zip(self.last, self.last_norms, fused, strict=True)
        )
        return a, b


class _Block(nnx.Module):
    """A residual block of one resolution, into which something may be injected."""

    def __init__(self, layers: _common.Layers, width: int, num_groups: int, expansion: int):
        self.conv1 = _normalized_conv(layers, width, expansion * width, 3)
        self.norm1 = _group_norm(layers, expansion * width, num_groups)
        self.conv2 = _normalized_conv(layers, expansion * width, width, 3)
        self.norm2 = _group_norm(layers, width, num_groups)
        self.norm3 = _group_norm(layers, width, num_groups)

    def __call__(self, z: jax.Array, mask: jax.Array, injection: jax.Array | None) -> jax.Array:
        h = self.conv2(nnx.relu(self.norm1(self.conv1(z)))) * mask
        h = self.norm2(h if injection is None else h + injection) + z
        return self.norm3(nnx.relu(h))


class _Head(nnx.Module):
    """Both resolutions as one picture of features: bottleneck blocks, a step down, a 1x1 layer."""

    def __init__(self, layers: _common.Layers, width: int, channels: tuple[int, ...], final: int):
        first, second = channels
        normal = nnx.initializers.normal(0.01)
        biased: dict[str, Any] = {"use_bias": True, "bias_init": normal}
        self.full = _Bottleneck(layers, width, first)
        self.half = _Bottleneck(layers, width, second)
        self.down = layers.conv(4 * first, 4 * second, strides=2, **biased)
        self.down_norm = layers.norm(4 * second)
        self.last = layers.conv(4 * second, final, 1, **biased)
        self.last_norm = layers.norm(final)

    def __call__(self, states: States) -> jax.Array:
        h = self.half(states[1]) + nnx.relu(self.down_norm(self.down(self.full(states[0]))))
        return nnx.relu(self.last_norm(self.last(h)))


class _Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 to four times the channels, plus a 1x1 shortcut.

    Its inner normalizations have no scale and shift, as in the authors' code.
    """

    def __init__(self, layers: _common.Layers, fan_in: int, channels: int):
        self.conv1 = layers.conv(fan_in, channels, 1)
        self.norm1 = _without_scale(layers.norm(channels))
        self.conv2 = layers.conv(channels, channels)
        self.norm2 = _without_scale(layers.norm(channels))
        self.conv3 = layers.conv(channels, 4 * channels, 1)
        self.norm3 = _without_scale(layers.norm(4 * channels))
        self.shortcut = layers.conv(fan_in, 4 * channels, 1)
        self.shortcut_norm = layers.norm(4 * channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm1(self.conv1(x)))
        h = nnx.relu(self.norm2(self.conv2(h)))
        return nnx.relu(self.norm3(self.conv3(h)) + self.shortcut_norm(self.shortcut(x)))


def _normalized_conv(
    layers: _common.Layers, fan_in: int, fan_out: int, size: int
) -> _common.WeightNormalized:
    init = _common.uniform_fan_in(fan_in * size * size)
    return _common.WeightNormalized(layers.conv(fan_in, fan_out, size, kernel_init=init))


def _group_norm(
    layers: _common.Layers, width: int, num_groups: int, *, affine: bool = True
) -> nnx.GroupNorm:
    options: dict[str, Any] = {"epsilon": 1e-5, "use_bias": affine, "use_scale": affine}
    return nnx.GroupNorm(width, num_groups, **options, **layers.types, rngs=layers.rngs)


def _without_scale(norm: Any) -> Any:
    norm.scale = norm.bias = None
    norm.use_scale = norm.use_bias = False
    return norm


def _twice_as_large(x: jax.Array) -> jax.Array:
    """Each pixel four times."""
    n, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, channels))
    return x.reshape(n, 2 * height, 2 * width, channels)
