"""The models by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx

from models import _common
from models.capsnet import CapsNet
from models.cnn import Cnn
from models.deq_flow import DeqFlow
from models.detector import Detector
from models.efficientnet import EfficientNet
from models.equilibrium_lm import EquilibriumLM
from models.local_mixer import LocalMixer
from models.lstm_lm import LstmLM
from models.mdeq import Mdeq
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


class Entry(NamedTuple):
    """The model behind a name.

    Attributes:
        model: A class of Flax NNX modules.
        convolutional: Whether it contains convolutions.
        options: The arguments that the name fixes.
    """

    model: type[Any]
    convolutional: bool = False
    options: Mapping[str, Any] = MappingProxyType({})


def _efficient(width: float, depth: float) -> dict[str, float]:
    return {"width_multiplier": width, "depth_multiplier": depth}


def _vit(width: int, num_layers: int, num_heads: int) -> dict[str, int]:
    return {
        "embedding_size": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "feedforward_size": 4 * width,
    }


def _mixer(num_patches: int, channels: int, num_groups: int, num_blocks: int) -> dict[str, int]:
    return {
        "num_patches": num_patches,
        "channels": channels,
        "num_groups": num_groups,
        "num_blocks": num_blocks,
    }


MODELS: dict[str, Entry] = {
    "mlp": Entry(Mlp),
    "cnn": Entry(Cnn, convolutional=True),
    "resnet20": Entry(CifarResNet, convolutional=True, options={"depth": 20}),
    "resnet32": Entry(CifarResNet, convolutional=True, options={"depth": 32}),
    "resnet44": Entry(CifarResNet, convolutional=True, options={"depth": 44}),
    "resnet56": Entry(CifarResNet, convolutional=True, options={"depth": 56}),
    "resnet110": Entry(CifarResNet, convolutional=True, options={"depth": 110}),
    "resnet18": Entry(ResNet, convolutional=True, options={"depth": 18}),
    "resnet34": Entry(ResNet, convolutional=True, options={"depth": 34}),
    "resnet50": Entry(ResNet, convolutional=True, options={"depth": 50}),
    "resnet101": Entry(ResNet, convolutional=True, options={"depth": 101}),
    "resnet152": Entry(ResNet, convolutional=True, options={"depth": 152}),
    "wrn_16_8": Entry(WideResNet, True, {"depth": 16, "widening_factor": 8}),
    "wrn_28_10": Entry(WideResNet, True, {"depth": 28, "widening_factor": 10}),
    "vgg11": Entry(Vgg, True, {"depth": 11}),
    "vgg16": Entry(Vgg, True, {"depth": 16}),
    "vgg11_bn": Entry(Vgg, True, {"depth": 11, "norm": "batch"}),
    "vgg16_bn": Entry(Vgg, True, {"depth": 16, "norm": "batch"}),
    "vgg11_cifar": Entry(Vgg, True, {"depth": 11, "norm": "batch", "hidden_sizes": (512,)}),
    "vgg16_cifar": Entry(Vgg, True, {"depth": 16, "norm": "batch", "hidden_sizes": (512,)}),
    "mobilenet_v2": Entry(MobileNetV2, True),
    "efficientnet_b0": Entry(EfficientNet, True, _efficient(1.0, 1.0)),
    "efficientnet_b1": Entry(EfficientNet, True, _efficient(1.0, 1.1)),
    "efficientnet_b2": Entry(EfficientNet, True, _efficient(1.1, 1.2)),
    "efficientnet_b3": Entry(EfficientNet, True, _efficient(1.2, 1.4)),
    "efficientnet_b4": Entry(EfficientNet, True, _efficient(1.4, 1.8)),
    "efficientnet_b5": Entry(EfficientNet, True, _efficient(1.6, 2.2)),
    "efficientnet_b6": Entry(EfficientNet, True, _efficient(1.8, 2.6)),
    "efficientnet_b7": Entry(EfficientNet, True, _efficient(2.0, 3.1)),
    "vit_ti": Entry(Vit, False, _vit(192, 12, 3)),
    "vit_s": Entry(Vit, False, _vit(384, 12, 6)),
    "vit_b": Entry(Vit, False, _vit(768, 12, 12)),
    "vit_l": Entry(Vit, False, _vit(1024, 24, 16)),
    "local_mixer_s": Entry(LocalMixer, False, _mixer(1, 256, 1, 1)),
    "local_mixer_m": Entry(LocalMixer, False, _mixer(8, 512, 16, 4)),
    "local_mixer_l": Entry(LocalMixer, False, _mixer(32, 2048, 64, 4)),
    "unet": Entry(UNet, True),
    "deq_flow": Entry(DeqFlow, convolutional=True),
    "detector": Entry(Detector, True),
    "capsnet": Entry(CapsNet, True),
    "mdeq_tiny": Entry(Mdeq, True),
    "transformer": Entry(Transformer),
    "transformer_lm": Entry(TransformerLM),
    "transformer_translator": Entry(TransformerTranslator),
    "lstm_lm": Entry(LstmLM),
    "equilibrium_lm": Entry(EquilibriumLM),
    "vae": Entry(Vae),
    "ncsn": Entry(Ncsn, convolutional=True),
}


def list() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(MODELS)


def describe(trained_by: Mapping[str, str] = MappingProxyType({})) -> str:
    """All models as text for the terminal.

    Args:
        trained_by: What to say, by name, on how to train a model.

    Returns:
        Two lines for each name: what the model is, and the options that `create` takes for it;
        and a third one for names in `trained_by`.
    """
    lines = []
    for name, entry in MODELS.items():
        summary = inspect.cleandoc(entry.model.__doc__ or "").partition("\n")[0]
        fixed = ", ".join(f"{key} {value}" for key, value in entry.options.items())
        lines += [
            f"  {name}: {summary.rstrip('.')}" + (f" ({fixed})" if fixed else ""),
            f"      options: {', '.join(_options(entry))}",
        ]
        if name in trained_by:
            lines.append(f"      trained by: {trained_by[name]}")
    return "\n".join(lines)


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
        weight_norm: Whether the weights of all linear layers and convolutions are normalized
            (Salimans and Kingma 2016): `w = length * direction / |direction|` for each output unit,
            with both trained. At the start the model computes the same function as without.
        rngs: Random keys, or a seed.
        **options: Further arguments of that model, such as `hidden_sizes` or `dtype`.

    Returns:
        A Flax NNX module; a classifier maps a batch (N, *input_shape) to logits (N, num_classes),
        and the docstrings of the other models describe their outputs.

    Raises:
        ValueError: If the name is unknown, the model does not accept an option or the shape, or
            `num_classes` or `vocabulary_size` is missing or not an argument of the model.
    """
    entry = _find(name)
    sizes = {"num_classes": num_classes, "vocabulary_size": vocabulary_size}
    valid = _arguments(entry)
    for size, value in sizes.items():
        if size in valid and value is None:
            raise ValueError(f"model {name!r} needs {size}, {_SIZES[size]}")
        if size not in valid and value is not None:
            with_it = ", ".join(n for n, e in MODELS.items() if size in _arguments(e))
            raise ValueError(
                f"model {name!r} has no {size}, got {value}; models that have it: {with_it}"
            )
    known = _options(entry)
    for key in options:
        if key not in known:
            raise ValueError(f"model {name!r} has no option {key!r}; valid: {', '.join(known)}")
    sizes = {size: value for size, value in sizes.items() if value is not None}
    model = entry.model(input_shape=input_shape, rngs=rngs, **sizes, **entry.options, **options)
    if weight_norm:
        _common.normalize_weights(model)
    return model


_SIZES = {
    "num_classes": "the number of outputs",
    "vocabulary_size": "the number of different token ids",
}


def is_convolutional(name: str) -> bool:
    """Whether a model contains convolutions, which XLA runs slowly inside loops on a CPU.

    Args:
        name: One of `list()`.

    Returns:
        True for convolutional networks.
    """
    return _find(name).convolutional


def draws_images(name: str) -> bool:
    """Whether a model draws new images, by a method `sample(number, key=...)`.

    Args:
        name: One of `list()`.

    Returns:
        True for generative models.
    """
    return hasattr(_find(name).model, "sample")


def _find(name: str) -> Entry:
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(MODELS)}")
    return MODELS[name]


def _arguments(entry: Entry) -> tuple[str, ...]:
    """The arguments that the name does not fix, in the order of the signature."""
    parameters = inspect.signature(entry.model.__init__).parameters
    return tuple(name for name in parameters if name not in ("self", *entry.options))


def _options(entry: Entry) -> Sequence[str]:
    """The arguments that are left to whoever calls `create`."""
    made_by_us = ("input_shape", "rngs", *_SIZES)
    return [argument for argument in _arguments(entry) if argument not in made_by_us]
