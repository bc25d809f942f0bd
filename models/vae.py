"""Variational autoencoder of dense layers, and its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class VaeOutputs(TypedDict):
    """What the model returns for N examples, all at least float32.

    Attributes:
        logits: (N, *input_shape); sigmoid(logits) is the mean of each pixel given the code.
        mean: (N, latent_size), of the code's distribution.
        log_variance: (N, latent_size), of the code's distribution.
    """

    logits: jax.Array
    mean: jax.Array
    log_variance: jax.Array


class Vae(nnx.Module):
    """A Gaussian code of each image and Bernoulli pixels given the code.

    Chen et al. ("Demon", 2019) train one on MNIST with 2 latent dimensions and 3 + 3 dense layers.
    The widths are not given in what we could read; 784-512-256-2 and back is our reading, that of
    widely copied PyTorch code of this very shape. The last of the encoder's three layers is two,
    side by side: one for the mean, one for the logarithm of the variance. That makes 1,068,820
    parameters on (28, 28, 1) images, by the layer list.

    In train mode (the default; `model.train()`, `model.eval()`, `nnx.view`) the code is drawn,
    mean + exp(log_variance / 2) * noise, with noise from the model's random stream "noise", which
    each call moves on. In eval mode the noise is that of one fixed key, so that `negative_elbo` is
    an estimate of the bound, the same in each evaluation. `model.sample` draws new images.

    Layers start like PyTorch's, uniform within ±1/sqrt(fan in).

    Example:
        >>> import jax.numpy as jnp
        >>> model = Vae(input_shape=(4, 4, 1), hidden_sizes=(8,), latent_size=2)
        >>> outputs = model(jnp.ones((3, 4, 4, 1)))
        >>> outputs["logits"].shape, outputs["mean"].shape, outputs["log_variance"].shape
        ((3, 4, 4, 1), (3, 2), (3, 2))

    Args:
        input_shape: Shape of one example, (height, width, channels) or any other.
        hidden_sizes: Widths of the encoder's hidden layers; the decoder has them in reverse.
        latent_size: Dimensions of the code.
        activation: "relu", "tanh" or "gelu", behind hidden layers.
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Kingma and Welling, `Auto-Encoding Variational Bayes <https://arxiv.org/abs/1312.6114>`_,
        2013.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        hidden_sizes: Sequence[int] = (512, 256),
        latent_size: int = 2,
        activation: str = "relu",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        self.activation = _common.activation_function(activation)
        layers = _common.Layers(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        sizes = (math.prod(self.input_shape), *hidden_sizes)
        self.encoder = nnx.List(map(layers.linear, sizes, sizes[1:]))
        self.mean = layers.linear(sizes[-1], latent_size)
        self.log_variance = layers.linear(sizes[-1], latent_size)
        sizes = (latent_size, *reversed(sizes))
        self.decoder = nnx.List(map(layers.linear, sizes, sizes[1:]))
        self.noise = layers.rngs["noise"].fork()
        self.deterministic = False  # switched by `model.train()` and `model.eval()`

    def __call__(self, x: jax.Array) -> VaeOutputs:
        """Codes and reconstructions of a batch of images with values from 0 to 1."""
        _common.check_input(self, x, self.input_shape)
        h = x.reshape(x.shape[0], -1)
        for layer in self.encoder:
            h = self.activation(layer(h))
        mean, log_variance = (_common.as_logits(f(h)) for f in (self.mean, self.log_variance))
        key = jax.random.key(0) if self.deterministic else self.noise()
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        code = mean + jnp.exp(log_variance / 2) * noise
        return {"logits": self.decode(code), "mean": mean, "log_variance": log_variance}

    def sample(self, number: int, *, key: jax.Array) -> jax.Array:
        """New images: the means of the pixels, given codes from the standard normal distribution.

        Args:
            number: How many.
            key: Random key.

        Returns:
            (number, *input_shape), values from 0 to 1.
        """
        latent_size = self.mean.out_features
        return nnx.sigmoid(self.decode(jax.random.normal(key, (number, latent_size))))

    def decode(self, code: jax.Array) -> jax.Array:
        """Logits of the pixels, (N, *input_shape), of codes (N, latent_size)."""
        *hidden, last = self.decoder
        for layer in hidden:
            code = self.activation(layer(code))
        return _common.as_logits(last(code).reshape(-1, *self.input_shape))

    def set_view(self, deterministic: bool | None = None) -> None:
        """Class method used by `nnx.view`.

        Args:
            deterministic: Whether the noise of the codes is that of one fixed key.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def negative_elbo(outputs: VaeOutputs, x: jax.Array) -> jax.Array:
    """The bound that a variational autoencoder minimizes, in nats, one value for each example.

    -log p(x | code), the sum of the pixels' cross-entropies, plus the Kullback-Leibler divergence
    of the code's distribution from the standard normal one, which is (sum over the dimensions)
    (mean² + variance - 1 - log variance) / 2.

    >>> import jax.numpy as jnp
    >>> zeros = jnp.zeros((1, 2))
    >>> outputs = {"logits": jnp.zeros((1, 3)), "mean": zeros + 1.0, "log_variance": zeros}
    >>> negative_elbo(outputs, jnp.ones((1, 3)))  # 3 log 2 + 2 / 2
    Array([3.0794415], dtype=float32)

    Args:
        outputs: What `Vae` returns.
        x: The images, (N, *input_shape), values from 0 to 1; what lies between counts as the
            expectation over binary images.

    Returns:
        (N,), at least float32.

    References:
        Kingma and Welling 2013: equation 10 and appendices B and C.1.
    """
    logits, mean, log_variance = (outputs[k] for k in ("logits", "mean", "log_variance"))
    # log(1 + exp(logits)) - x logits: the cross-entropy, which stays finite.
    pixels = jax.nn.softplus(logits) - x.astype(logits.dtype) * logits
    divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return pixels.reshape(len(x), -1).sum(axis=1) + divergence.sum(axis=1)
