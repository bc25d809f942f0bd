"""Model zoo in Flax NNX, one file per architecture.

>>> import jax.numpy as jnp
>>> import models
>>> models.list()[:3]
('mlp', 'cnn', 'resnet20')
>>> model = models.create("mlp", input_shape=(8, 8, 1), num_classes=10, hidden_sizes=(32,))
>>> model(jnp.ones((4, 8, 8, 1))).shape
(4, 10)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx

from models import _common
from models.capsnet import CapsNet
from models.cnn import Cnn
from models.efficientnet import EfficientNet
from models.lstm_lm import LstmLM
from models.mlp import Mlp
from models.mobilenet import MobileNetV2
from models.ncsn import Ncsn
from models.resnet import CifarResNet, ResNet
from models.transformer import Transformer
from models.transformer_lm import TransformerLM
from models.transformer_translator import TransformerTranslator
from models.unet import UNet
from models.vae import Vae
from models.vgg import Vgg
from models.vit import Vit
from models.wide_resnet import WideResNet

__all__ = [
    "CapsNet",
    "CifarResNet",
    "Cnn",
    "EfficientNet",
    "LstmLM",
    "Mlp",
    "MobileNetV2",
    "Ncsn",
    "ResNet",
    "Transformer",
    "TransformerLM",
    "TransformerTranslator",
    "UNet",
    "Vae",
    "Vgg",
    "Vit",
    "WideResNet",
    "create",
    "is_convolutional",
    "list",
]


class _Entry(NamedTuple):
    """What one name stands for."""

    model: type[Any]  # a Flax NNX module
    convolutional: bool = False
    options: Mapping[str, Any] = MappingProxyType({})  # those that make it what the name says


def _efficient(width: float, depth: float) -> dict[str, float]:
    return {"width_multiplier": width, "depth_multiplier": depth}


def _vit(width: int, num_layers: int, num_heads: int) -> dict[str, int]:
    return {
        "embedding_size": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "feedforward_size": 4 * width,
    }


_MODELS: dict[str, _Entry] = {
    "mlp": _Entry(Mlp),
    "cnn": _Entry(Cnn, convolutional=True),
    "resnet20": _Entry(CifarResNet, convolutional=True, options={"depth": 20}),
    "resnet32": _Entry(CifarResNet, convolutional=True, options={"depth": 32}),
    "resnet44": _Entry(CifarResNet, convolutional=True, options={"depth": 44}),
    "resnet56": _Entry(CifarResNet, convolutional=True, options={"depth": 56}),
    "resnet110": _Entry(CifarResNet, convolutional=True, options={"depth": 110}),
    "resnet18": _Entry(ResNet, convolutional=True, options={"depth": 18}),
    "resnet34": _Entry(ResNet, convolutional=True, options={"depth": 34}),
    "resnet50": _Entry(ResNet, convolutional=True, options={"depth": 50}),
    "resnet101": _Entry(ResNet, convolutional=True, options={"depth": 101}),
    "resnet152": _Entry(ResNet, convolutional=True, options={"depth": 152}),
    "wrn_16_8": _Entry(WideResNet, True, {"depth": 16, "widening_factor": 8}),
    "wrn_28_10": _Entry(WideResNet, True, {"depth": 28, "widening_factor": 10}),
    "vgg11": _Entry(Vgg, True, {"depth": 11}),
    "vgg16": _Entry(Vgg, True, {"depth": 16}),
    "vgg11_bn": _Entry(Vgg, True, {"depth": 11, "norm": "batch"}),
    "vgg16_bn": _Entry(Vgg, True, {"depth": 16, "norm": "batch"}),
    "vgg11_cifar": _Entry(Vgg, True, {"depth": 11, "norm": "batch", "hidden_sizes": (512,)}),
    "vgg16_cifar": _Entry(Vgg, True, {"depth": 16, "norm": "batch", "hidden_sizes": (512,)}),
    "mobilenet_v2": _Entry(MobileNetV2, True),
    "efficientnet_b0": _Entry(EfficientNet, True, _efficient(1.0, 1.0)),
    "efficientnet_b1": _Entry(EfficientNet, True, _efficient(1.0, 1.1)),
    "efficientnet_b2": _Entry(EfficientNet, True, _efficient(1.1, 1.2)),
    "efficientnet_b3": _Entry(EfficientNet, True, _efficient(1.2, 1.4)),
    "efficientnet_b4": _Entry(EfficientNet, True, _efficient(1.4, 1.8)),
    "efficientnet_b5": _Entry(EfficientNet, True, _efficient(1.6, 2.2)),
    "efficientnet_b6": _Entry(EfficientNet, True, _efficient(1.8, 2.6)),
    "efficientnet_b7": _Entry(EfficientNet, True, _efficient(2.0, 3.1)),
    "vit_ti": _Entry(Vit, False, _vit(192, 12, 3)),
    "vit_s": _Entry(Vit, False, _vit(384, 12, 6)),
    "vit_b": _Entry(Vit, False, _vit(768, 12, 12)),
    "vit_l": _Entry(Vit, False, _vit(1024, 24, 16)),
    "unet": _Entry(UNet, True),
    "capsnet": _Entry(CapsNet, True),
    "transformer": _Entry(Transformer),
    "transformer_lm": _Entry(TransformerLM),
    "transformer_translator": _Entry(TransformerTranslator),
    "lstm_lm": _Entry(LstmLM),
    "vae": _Entry(Vae),
    "ncsn": _Entry(Ncsn, convolutional=True),
}


def list() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_MODELS)


def create(
    name: str,
    *,
    input_shape: Sequence[int],
    num_classes: int | None = None,
    vocabulary_size: int | None = None,
    weight_norm: bool = False,
    rngs: nnx.Rngs | int = 0,
    **options: Any,
) -> Any:
    """Makes a model by name.

    Args:
        name: One of `list()`.
        input_shape: Shape of one example, (height, width, channels) for images, (length,) for
            token ids, (source_length, target_length) for pairs of sentences.
        num_classes: Number of outputs; `None` for models that do not classify.
        vocabulary_size: Number of different token ids; `None` for models that read none.
        weight_norm: Whether the weights of all linear layers and convolutions are normalized:
            Salimans and Kingma (2016), `w = length * direction / |direction|` for each output unit,
            both trained. The model starts as the same function.
        rngs: Random keys, or a seed.
        **options: Further arguments of that model, such as `hidden_sizes` or `dtype`.

    Returns:
        A Flax NNX module; called with a batch (N, *input_shape) a classifier returns logits
        (N, num_classes), other models what their docstring says.

    Raises:
        ValueError: If the name, an option or the shape is not one that the model knows, or
            `num_classes` or `vocabulary_size` is missing or given to a model without.
    """
    entry = _find(name)
    sizes = {"num_classes": num_classes, "vocabulary_size": vocabulary_size}
    valid = _arguments(entry)
    for size, value in sizes.items():
        if size in valid and value is None:
            raise ValueError(f"model {name!r} needs {size}, {_SIZES[size]}")
        if size not in valid and value is not None:
            with_it = ", ".join(n for n, e in _MODELS.items() if size in _arguments(e))
            raise ValueError(f"model {name!r} has no {size} (given: {value}); with it: {with_it}")
    known = [argument for argument in valid if argument not in ("input_shape", "rngs", *sizes)]
    for key in options:
        if key not in known:
            raise ValueError(f"model {name!r} has no option {key!r}; valid: {', '.join(known)}")
    given = {size: value for size, value in sizes.items() if value is not None}
    model = entry.model(input_shape=input_shape, rngs=rngs, **given, **entry.options, **options)
    if weight_norm:
        _common.normalize_weights(model)
    return model


_SIZES = {
    "num_classes": "the number of outputs",
    "vocabulary_size": "the number of different token ids",
}


def is_convolutional(name: str) -> bool:
    """Whether that model contains convolutions, which XLA runs slowly inside loops on CPU."""
    return _find(name).convolutional


def _find(name: str) -> _Entry:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(_MODELS)}")
    return _MODELS[name]


def _arguments(entry: _Entry) -> tuple[str, ...]:
    """The arguments that a person may give, in the order of the signature."""
    parameters = inspect.signature(entry.model.__init__).parameters
    return tuple(name for name in parameters if name not in ("self", *entry.options))
