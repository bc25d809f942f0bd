"""Model zoo in Flax NNX, one file per architecture.

>>> import jax.numpy as jnp
>>> import models
>>> models.list()
('mlp', 'cnn', 'resnet20')
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

__all__ = ["Cnn", "Mlp", "ResNet20", "create", "is_convolutional", "list"]

_MODELS: dict[str, type[Mlp] | type[Cnn] | type[ResNet20]] = {
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet20": ResNet20,
}


def list() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_MODELS)


def create(
    name: str,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    rngs: nnx.Rngs | int = 0,
    **options: Any,
) -> Mlp | Cnn | ResNet20:
    """Makes a model by name.

    Args:
        name: One of `list()`.
        input_shape: Shape of one example, (height, width, channels) for images.
        num_classes: Number of outputs.
        rngs: Random keys, or a seed.
        **options: Further arguments of that model, such as `hidden_sizes` or `dtype`.

    Returns:
        A Flax NNX module; called with a batch (N, *input_shape) it returns logits (N, num_classes).

    Raises:
        ValueError: If the name, an option or the shape is not one that the model knows.
    """
    model = _find(name)
    shared = {"self", "input_shape", "num_classes", "rngs"}
    valid = [key for key in inspect.signature(model.__init__).parameters if key not in shared]
    for key in options:
        if key not in valid:
            raise ValueError(f"model {name!r} has no option {key!r}; valid: {', '.join(valid)}")
    return model(input_shape=input_shape, num_classes=num_classes, rngs=rngs, **options)


def is_convolutional(name: str) -> bool:
    """Whether that model contains convolutions, which XLA runs slowly inside loops on CPU."""
    return _find(name) is not Mlp


def _find(name: str) -> type[Mlp] | type[Cnn] | type[ResNet20]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(_MODELS)}")
    return _MODELS[name]
