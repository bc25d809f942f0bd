"""Model zoo in Flax NNX, one file per architecture.

>>> import jax.numpy as jnp
>>> import models
>>> models.list()[:3]
('mlp', 'cnn', 'resnet20')
>>> model = models.create("mlp", input_shape=(8, 8, 1), num_classes=10, hidden_sizes=(32,))
>>> model(jnp.ones((4, 8, 8, 1))).shape
(4, 10)
"""

from models._registry import create, describe, draws_images, is_convolutional, list
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

__all__ = [
    "CapsNet",
    "CifarResNet",
    "Cnn",
    "DeqFlow",
    "Detector",
    "EfficientNet",
    "EquilibriumLM",
    "LocalMixer",
    "LstmLM",
    "Mdeq",
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
    "describe",
    "draws_images",
    "is_convolutional",
    "list",
]
