"""Small training problems as plain values: an objective, a start and data.

    digits_mlp              scikit-learn digits, tanh network with two hidden layers
    mnist_autoencoder       784-1000-500-250-30-250-500-1000-784 (at small scale a quarter of the
                            widths except for the code), tanh, linear code, cross-entropy on
                            sigmoid outputs, summed over the pixels
    cifar10_5k_cnn          two convolutions and a linear layer
    shakespeare_transformer next characters, a causal pre-norm Transformer
    shakespeare_scanned     the same network, the parameters of its layers stacked for `lax.scan`

References:
  Hinton, Salakhutdinov, `Reducing the dimensionality of data with neural networks
  <https://doi.org/10.1126/science.1127647>`_, 2006: the autoencoder, there with logistic units;
  the classic problem of Martens (2010) and of Martens and Grosse (2015), who use tanh as we do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import models
import optax_accel as oa
from experiments import data
from experiments.data.readers import files
from experiments.training import losses, networks

PyTree = Any
# Examples of the Transformer's test split; more would only take time.
TEST_WINDOWS = 500


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its data and its loss.

    Attributes:
      objective: the training loss; takes ``x``, ``y`` and, of a network that has other variables
        than parameters, ``rest`` by name.
      params: initial parameters.
      train: inputs and labels ``(x, y)`` to train on.
      test: inputs and labels ``(x, y)`` to report.
      batch_size: examples per batch.
      steps: number of steps of a run.
      likelihood: the distribution whose parameters the outputs are, for K-FAC.
      unit: size of the loss, which the rates of SGD are relative to.
      rest: the network's other variables at the start.
    """

    objective: oa.Objective
    params: PyTree
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    batch_size: int
    steps: int
    likelihood: Any
    unit: float = 1.0
    rest: PyTree = ()

    @functools.cached_property
    def evaluated(self) -> oa.Objective:
        """The loss with the network's other variables as they are at the start."""
        return self.objective.given(rest=self.rest)

    def __post_init__(self) -> None:
        if (number := len(self.train[1])) < self.batch_size:
            raise data.DataError(
                f"{number} training examples, expected at least a batch of {self.batch_size}"
            )


def _on_device(split: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    x, y = split
    return jnp.asarray(x), jnp.asarray(y)


def _classifier(
    task: data.Task,
    model: str,
    examples: int,
    batch_size: int,
    epochs: int,
    seed: int,
    **kwargs: Any,
) -> Problem:
    network = models.create(
        model, input_shape=task.input_shape, num_classes=task.num_classes, rngs=seed, **kwargs
    )
    graphdef, params, rest = networks.split(network)
    train = _on_device((task.train.x[:examples], task.train.y[:examples]))
    return Problem(
        objective=networks.objective(graphdef),
        params=params,
        rest=rest,
        train=train,
        test=_on_device((task.test.x, task.test.y)),
        batch_size=batch_size,
        steps=epochs * (len(train[1]) // batch_size),
        likelihood="categorical",
    )


def _digits_mlp(full: bool, data_dir: Path | None, seed: int) -> Problem:
    width, epochs = (200, 100) if full else (100, 40)
    task = data.load_task("digits")
    return _classifier(task, "mlp", 1077, 128, epochs, seed, hidden_sizes=(width, width))


def _cifar10_5k_cnn(full: bool, data_dir: Path | None, seed: int) -> Problem:
    task = data.load_task("cifar10_5k", data_dir=data_dir)
    if full:
        return _classifier(task, "cnn", 5000, 250, 40, seed)
    return _classifier(task, "cnn", 1000, 100, 6, seed, channels=(16, 16))


def init_linear(key: jax.Array, n_in: int, n_out: int) -> PyTree:
    """Normal weights that keep the scale of their inputs, and no bias."""
    w = jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in)
    return {"w": w, "b": jnp.zeros(n_out)}


def _linear(layer: PyTree, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def autoencoder_outputs(params: Sequence[PyTree], x: jax.Array) -> jax.Array:
    """Logits of the pixels; the code, in the middle, and the outputs are linear."""
    for i, layer in enumerate(params):
        x = _linear(layer, x)
        if i + 1 not in (len(params) // 2, len(params)):
            x = jnp.tanh(x)
    return x


def pixel_loss(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid outputs, summed over the pixels, the mean over the examples."""
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(outputs, y), axis=-1))


def _mnist_autoencoder(full: bool, data_dir: Path | None, seed: int) -> Problem:
    task = data.load_task("mnist", data_dir=data_dir)
    examples, batch_size = (len(task.train), 1000) if full else (5000, 250)
    encoder = (784, 1000, 500, 250, 30) if full else (784, 250, 125, 62, 30)
    widths = (*encoder, *encoder[-2::-1])
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    train, test = (
        jnp.asarray(split.x.reshape(len(split), -1)[:examples]) for split in (task.train, task.test)
    )
    return Problem(
        objective=oa.Objective(autoencoder_outputs, pixel_loss),
        params=[
            init_linear(key, *sizes)
            for key, *sizes in zip(keys, widths[:-1], widths[1:], strict=True)
        ],
        train=(train, train),
        test=(test, test),
        batch_size=batch_size,
        steps=20 * (examples // batch_size),
        likelihood="bernoulli",
        unit=100.0,
    )


def transformer_outputs(params: PyTree, x: jax.Array, *, num_heads: int) -> jax.Array:
    """Logits of the next character at each position, (batch, length, characters)."""
    length, width = params["positions"].shape
    h = params["embedding"][x] + params["positions"][None]
    past = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def block(h: jax.Array, layer: PyTree) -> tuple[jax.Array, None]:
        q, k, v = (
            _linear(layer[name], _normalized(layer["norm1"], h)).reshape(
                len(x), length, num_heads, width // num_heads
            )
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=past)
        h = h + _linear(layer["out"], attended.reshape(len(x), length, width))
        h = h + _linear(
            layer["down"], jax.nn.gelu(_linear(layer["up"], _normalized(layer["norm2"], h)))
        )
        return h, None

    if "stacked" in params:
        h, _ = lax.scan(block, h, params["stacked"])
    else:
        for layer in params["layers"]:
            h, _ = block(h, layer)
    return _linear(params["head"], _normalized(params["norm"], h))


def _normalized(norm: PyTree, x: jax.Array) -> jax.Array:
    scale, bias = (norm[name][None, None] for name in ("scale", "bias"))
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * scale + bias


def _transformer_init(key: jax.Array, vocabulary: int, length: int, width: int, layers: int) -> Any:
    keys = iter(jax.random.split(key, 6 * layers + 3))

    def norm() -> PyTree:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def linear(n_in: int = width, n_out: int = width) -> PyTree:
        return init_linear(next(keys), n_in, n_out)

    def layer() -> PyTree:
        attention = {name: linear() for name in ("query", "key", "value", "out")}
        feed_forward = {"up": linear(width, 4 * width), "down": linear(4 * width, width)}
        return {**attention, **feed_forward, "norm1": norm(), "norm2": norm()}

    return {
        "embedding": jax.random.normal(next(keys), (vocabulary, width)),
        "positions": 0.1 * jax.random.normal(next(keys), (length, width)),
        "layers": [layer() for _ in range(layers)],
        "norm": norm(),
        "head": linear(width, vocabulary),
    }


def stacked(params: PyTree) -> PyTree:
    """Parameters of the Transformer with one array for all layers, for `lax.scan`."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {"stacked": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def _shakespeare_transformer(full: bool, data_dir: Path | None, seed: int) -> Problem:
    length, width, layers, examples, batch_size = (
        (128, 128, 4, None, 128) if full else (32, 48, 2, 3000, 50)
    )
    folder = data.data_folder("shakespeare", data_dir)
    (path,) = files.find(folder, [["tinyshakespeare.txt"]], "Tiny Shakespeare")
    text = np.frombuffer(files.read_bytes(path, "text, gzipped or not"), np.uint8)
    characters, ids = np.unique(text, return_inverse=True)
    windows = len(ids) // (length + 1)
    if windows < 10:
        raise data.DataError(
            f"{path}: {len(ids)} characters, expected at least {10 * (length + 1)}, 10 windows"
        )
    rows = ids[: windows * (length + 1)].reshape(windows, length + 1).astype(np.int32)
    held_out = windows // 10
    train, test = (
        _on_device((part[:, :-1], part[:, 1:]))
        for part in (rows[:-held_out][:examples], rows[-held_out:][:TEST_WINDOWS])
    )
    return Problem(
        objective=oa.Objective(
            functools.partial(transformer_outputs, num_heads=4),
            lambda outputs, y: losses.find_loss("cross_entropy")(outputs, y),
        ),
        params=_transformer_init(jax.random.key(seed), len(characters), length, width, layers),
        train=train,
        test=test,
        batch_size=batch_size,
        steps=(4 if full else 2) * (len(train[1]) // batch_size),
        likelihood="categorical",
    )


def _shakespeare_scanned(full: bool, data_dir: Path | None, seed: int) -> Problem:
    problem = _shakespeare_transformer(full, data_dir, seed)
    return dataclasses.replace(problem, params=stacked(problem.params))


PROBLEMS: dict[str, Callable[[bool, Path | None, int], Problem]] = {
    "digits_mlp": _digits_mlp,
    "mnist_autoencoder": _mnist_autoencoder,
    "cifar10_5k_cnn": _cifar10_5k_cnn,
    "shakespeare_transformer": _shakespeare_transformer,
    "shakespeare_scanned": _shakespeare_scanned,
}
SCALES = ("small", "full")
