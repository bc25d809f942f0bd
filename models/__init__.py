"""Model zoo in Flax NNX, one file per architecture.

>>> import jax.numpy as jnp
>>> import models
>>> models.list()
('mlp', 'cnn', 'resnet20', 'transformer')
>>> model = models.create("mlp", input_shape=(8, 8, 1), num_classes=10, hidden_sizes=(32,))
>>> model(jnp.ones((4, 8, 8, 1))).shape
(4, 10)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from flax import nnx

from models.cnn import Cnn
from models.mlp import Mlp
from models.resnet import ResNet20
from models.transformer import Transformer

__all__ = ["Cnn", "Mlp", "ResNet20", "Transformer", "create", "is_convolutional", "list"]

Model = Mlp | Cnn | ResNet20 | Transformer

_MODELS: dict[str, type[Model]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet20": ResNet20,
    "transformer": Transformer,
}


def list() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_MODELS)


def create(
    name: str,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    vocabulary_size: int | None = None,
    rngs: nnx.Rngs | int = 0,
    **options: Any,
) -> Model:
    """Makes a model by name.

    Args:
        name: One of `list()`.
        input_shape: Shape of one example, (height, width, channels) for images, (length,) for
            token ids.
        num_classes: Number of outputs.
        vocabulary_size: Number of different token ids; `None` for images.
        rngs: Random keys, or a seed.
        **options: Further arguments of that model, such as `hidden_sizes` or `dtype`.

    Returns:
        A Flax NNX module; called with a batch (N, *input_shape) it returns logits (N, num_classes).

    Raises:
        ValueError: If the name, an option or the shape is not one that the model knows, or
            `vocabulary_size` is given to a model for images or missing for one of token ids.
    """
    model = _find(name)
    if model is Transformer and vocabulary_size is None:
        others = ", ".join(other for other in _MODELS if other != name)
        raise ValueError(
            f"model {name!r} reads token ids and needs vocabulary_size, the number of different "
            f"ones; models for images: {others}"
        )
    if model is not Transformer and vocabulary_size is not None:
        raise ValueError(
            f"model {name!r} does not read token ids (vocabulary_size {vocabulary_size}); "
            "the model that does: transformer"
        )
    shared = {"self", "input_shape", "num_classes", "vocabulary_size", "rngs"}
    parameters = inspect.signature(model.__init__).parameters
    valid = [key for key in parameters if key not in shared]
    for key in options:
        if key not in valid:
            raise ValueError(f"model {name!r} has no option {key!r}; valid: {', '.join(valid)}")
    if vocabulary_size is not None:
        options["vocabulary_size"] = vocabulary_size
    return model(input_shape=input_shape, num_classes=num_classes, rngs=rngs, **options)


def is_convolutional(name: str) -> bool:
    """Whether that model contains convolutions, which XLA runs slowly inside loops on CPU."""
    return _find(name) in (Cnn, ResNet20)


def _find(name: str) -> type[Model]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(_MODELS)}")
    return _MODELS[name]
