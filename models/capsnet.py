"""Capsule network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class CapsNetOutputs(TypedDict):
    """What the model returns for N images whose classes it is given.

    Attributes:
        lengths: (N, num_classes), the outputs without labels.
        images: (N, *input_shape), the images rebuilt from the capsules of the given classes.
        inputs: (N, *input_shape), the images themselves.
    """

    lengths: jax.Array
    images: jax.Array
    inputs: jax.Array


class CapsNet(nnx.Module):
    r"""The network of Sabour et al. (2017), figures 1 and 2.

    A 9x9 convolution with relu, a second one of stride 2 whose outputs are capsules (vectors of 8
    numbers, squashed to a length below 1), and one capsule of 16 numbers for each class, computed
    from all others by routing: with the predictions :math:`\hat u_{j|i} = W_{ij} u_i` of capsule i
    for class j,

    .. math::
      c_{ij} = \mathrm{softmax}_j(b_{ij}), \quad
      v_j = \mathrm{squash}\Big(\sum_i c_{ij} \hat u_{j|i}\Big), \quad
      b_{ij} \leftarrow b_{ij} + \hat u_{j|i} \cdot v_j ,

    three times from b = 0 (procedure 1). A class counts as present if its capsule is long. A
    decoder of three linear layers rebuilds the image from the capsule of one class. On (28, 28, 1)
    images with 10 classes there are 8,215,568 parameters: 20,992 + 5,308,672 of the convolutions,
    1,474,560 of the routed capsules, 1,411,344 of the decoder (computed from the layers; the paper
    rounds to 8.2 million, and to 6.8 million without the decoder).

    The outputs are lengths in [0, 1), made for `margin_loss`. Softmax cross-entropy reads logits,
    and lengths differ by less than 1, so that even a perfect answer among 10 classes would have
    the probability 0.23: for it set `length_scale` to 10 or more. `model(x, labels)` also rebuilds
    the images, for `margin_loss` plus `reconstruction_loss`, the paper's total loss (section 4.1).
    Without labels the decoder takes no part; leave it out by `reconstruction=False`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def lengths(x):
        ...     return CapsNet(input_shape=(28, 28, 1), num_classes=10)(x)
        >>> jax.eval_shape(lengths, jnp.ones((2, 28, 28, 1))).shape  # without computing anything
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example; height and width at least
            2 `kernel_size` - 1: 17 by default.
        num_classes: Number of outputs.
        channels: Channels of the first convolution.
        capsule_types: Types of capsules of the second convolution, at each of its pixels.
        capsule_size: Numbers in each of these capsules.
        class_capsule_size: Numbers in the capsule of a class.
        kernel_size: Pixels on each side of the convolutions' kernels.
        num_iterations: Times that routing is done; at least 1, which weighs all classes equally.
        reconstruction: Whether there is a decoder.
        hidden_sizes: Widths of the hidden layers of the decoder.
        length_scale: Factor of the outputs.
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Sabour et al, `Dynamic Routing Between Capsules <https://arxiv.org/abs/1710.09829>`_, 2017.
        The paper names no start; ours: He's normal distribution in front of relu, LeCun's for the
        second convolution, standard deviation 0.1 for the W, with which the lengths start from
        about a half, and uniform within ±1/sqrt(fan in) in the decoder. Gradients pass through all
        iterations.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        channels: int = 256,
        capsule_types: int = 32,
        capsule_size: int = 8,
        class_capsule_size: int = 16,
        kernel_size: int = 9,
        num_iterations: int = 3,
        reconstruction: bool = True,
        hidden_sizes: Sequence[int] = (512, 1024),
        length_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("CapsNet", self.input_shape, multiple_of=1)
        height, width = ((n - 2 * kernel_size + 1) // 2 + 1 for n in self.input_shape[:2])
        if height < 1 or width < 1:
            raise ValueError(
                f"CapsNet needs a height and a width of at least 2 kernel_size - 1 = "
                f"{2 * kernel_size - 1}, got input_shape {self.input_shape}"
            )
        layers = _common.Layers(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv = layers.conv(self.input_shape[2], channels, kernel_size, padding="VALID")
        self.capsules = layers.conv(
            channels,
            capsule_types * capsule_size,
            kernel_size,
            strides=2,
            padding="VALID",
            kernel_init=nnx.initializers.lecun_normal(),
        )
        num_capsules = height * width * capsule_types
        shape = (num_capsules, capsule_size, num_classes, class_capsule_size)
        weights = nnx.initializers.normal(0.1)(layers.rngs.params(), shape, param_dtype)
        self.weights = nnx.Param(weights)
        sizes = (num_classes * class_capsule_size, *hidden_sizes, math.prod(self.input_shape))
        self.decoder = (
            nnx.List(layers.linear(*pair) for pair in itertools.pairwise(sizes))
            if reconstruction
            else None
        )
        self.num_iterations = num_iterations
        self.length_scale = length_scale

    def __call__(self, x: jax.Array, labels: jax.Array | None = None) -> jax.Array | CapsNetOutputs:
        """Lengths of shape (N, num_classes), at least float32, of a batch of images.

        Args:
            x: The images, (N, *input_shape).
            labels: Their classes, integers of shape (N,); with them also rebuilds the images.
        """
        capsules = self.class_capsules(x)
        outputs = self.length_scale * lengths(capsules)
        if labels is None:
            return outputs
        return {"lengths": outputs, "images": self.reconstruct(capsules, labels), "inputs": x}

    @property
    def reconstructs(self) -> bool:
        """Whether the model can be called with labels."""
        return self.decoder is not None

    def class_capsules(self, x: jax.Array) -> jax.Array:
        """The capsules of all classes, (N, num_classes, class_capsule_size)."""
        _common.check_input(self, x, self.input_shape)
        x = self.capsules(nnx.relu(self.conv(x)))
        weights = self.weights[...].astype(x.dtype)
        capsules = squash(x.reshape(x.shape[0], *weights.shape[:2]))
        predictions = jnp.einsum("nic,icjd->nijd", capsules, weights)
        return route(predictions, self.num_iterations)[0]

    def reconstruct(self, capsules: jax.Array, labels: jax.Array) -> jax.Array:
        """Images of shape (N, *input_shape) in [0, 1], from the capsules of the given classes.

        Args:
            capsules: What `class_capsules` gives.
            labels: The classes, integers of shape (N,): the true ones in training.
        """
        if self.decoder is None:
            raise ValueError("this CapsNet has no decoder: it was made with reconstruction=False")
        chosen = jax.nn.one_hot(labels, capsules.shape[1], dtype=capsules.dtype)
        x = (capsules * chosen[:, :, None]).reshape(capsules.shape[0], -1)
        *hidden, last = self.decoder
        for layer in hidden:
            x = nnx.relu(layer(x))
        return _common.as_logits(nnx.sigmoid(last(x)).reshape(-1, *self.input_shape))


def squash(capsules: jax.Array) -> jax.Array:
    """Vectors (the last axis) of the same direction and of length |s|² / (1 + |s|²): equation 1."""
    squares = jnp.sum(capsules**2, axis=-1, keepdims=True)
    return capsules * lengths(capsules)[..., None].astype(capsules.dtype) / (1 + squares)


def lengths(capsules: jax.Array) -> jax.Array:
    """Lengths of vectors (the last axis), at least float32, differentiable at 0."""
    return jnp.sqrt(jnp.sum(_common.as_logits(capsules) ** 2, axis=-1) + 1e-12)


def route(predictions: jax.Array, num_iterations: int) -> tuple[jax.Array, jax.Array]:
    """Routing by agreement, procedure 1 of the paper.

    Args:
        predictions: (N, capsules, classes, size): what each capsule predicts for each class.
        num_iterations: At least 1.

    Returns:
        The capsules of the classes (N, classes, size), and the last routing coefficients
        (N, capsules, classes), which sum to 1 over the classes.
    """
    logits = jnp.zeros(predictions.shape[:3], predictions.dtype)
    for _ in range(num_iterations - 1):
        capsules, _ = _weigh(logits, predictions)
        logits = logits + jnp.einsum("nijd,njd->nij", predictions, capsules)
    return _weigh(logits, predictions)


def _weigh(logits: jax.Array, predictions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Capsules of the classes as weighted sums, and the weights."""
    coefficients = jax.nn.softmax(logits)
    return squash(jnp.einsum("nij,nijd->njd", coefficients, predictions)), coefficients


def margin_loss(
    lengths: jax.Array,
    labels: jax.Array,
    *,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> jax.Array:
    """The margin loss of the paper (section 3, equation 4), for each example.

    The authors' code has half of it, which weighs its reconstruction loss twice as much.

    Args:
        lengths: Outputs of `CapsNet` with `length_scale` 1, (N, num_classes).
        labels: The classes, integers of shape (N,).
        present: The length that the capsule of the true class should have at least, m+; default:
            the paper's, as for the next two.
        absent: The length that the others should have at most, m-.
        absent_weight: Factor of the loss of the others, lambda.

    Returns:
        (N,): sums over the classes.

    Example:
        >>> import jax.numpy as jnp
        >>> margin_loss(jnp.array([[0.9, 0.3], [0.4, 0.1]]), jnp.array([0, 0])).round(4).tolist()
        [0.019999999552965164, 0.25]
    """
    true = jax.nn.one_hot(labels, lengths.shape[-1], dtype=lengths.dtype)
    too_short = nnx.relu(present - lengths) ** 2
    too_long = nnx.relu(lengths - absent) ** 2
    return jnp.sum(true * too_short + absent_weight * (1 - true) * too_long, axis=-1)


def reconstruction_loss(images: jax.Array, inputs: jax.Array, weight: float = 0.0005) -> jax.Array:
    """The sum of squared differences of all pixels, times `weight` (section 4.1), for each example.

    Args:
        images: Outputs of `CapsNet.reconstruct`, (N, height, width, channels).
        inputs: The original images, in [0, 1].
        weight: Factor; default: the paper's.

    Returns:
        (N,).
    """
    return weight * jnp.sum((images - inputs) ** 2, axis=tuple(range(1, images.ndim)))
