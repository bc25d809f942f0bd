"""Random changes of images, the same whenever an example is read again in the same epoch.

* ``randaugment``: `RANDAUGMENT_OPERATIONS` of the operations of Cubuk et al., `RandAugment
  <https://arxiv.org/abs/1909.13719>`_, 2019, one after the other, each at strength 9 of 10, as in
  the paper for ResNet-50 on ImageNet; the operations are Pillow's and work on bytes.
* ``crop``: a random part, as large as the image, of the image with a border of an eighth of its
  size (4 pixels of 32, He et al. 2015, section 4.2).
* ``flip``: left to right, with probability 1/2.
* ``cutout``: a square of half the image's size around a random pixel becomes 0, the mean of a
  standardized image; the square may reach beyond the image (DeVries and Taylor, `Cutout
  <https://arxiv.org/abs/1708.04552>`_, 2017).
* ``mixup``: the mean of two examples and of their labels, with weights from Beta(0.2, 0.2) (Zhang
  et al., `mixup <https://arxiv.org/abs/1710.09412>`_, 2017, for ImageNet). The paper takes the
  partner from the batch; here it is any example of the training split, so that an example does not
  depend on the rest of its batch.

They are applied in this order. The random numbers depend only on the seed, the epoch and the number
of the example, not on its place in a batch or on the number of processes that read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = ("randaugment", "crop", "flip", "cutout", "mixup")
RANDAUGMENT_OPERATIONS = 2
_STRENGTH = 0.9
_MIXUP = 0.2
# Makes these random numbers others than those that order the examples.
_STREAM = 0x6175676D


def parse(names: str) -> tuple[str, ...]:
    """The operations in a list such as ``"crop,flip"``, in the order in which they are applied.

    Args:
      names: names of operations, separated by commas.

    Returns:
      The names of the operations, each once.

    Raises:
      ValueError: a name is unknown.

    Example:
      >>> from experiments.data.augmentation import parse
      >>> parse("flip, crop")
      ('crop', 'flip')
    """
    operations = [name.strip() for name in names.split(",") if name.strip()]
    for name in operations:
        if name not in OPERATIONS:
            raise ValueError(f"unknown augmentation {name!r}; valid: {', '.join(OPERATIONS)}")
    return tuple(name for name in OPERATIONS if name in operations)


class Augmentation:
    """Reads examples and changes them.

    Args:
      examples: the images and their labels, an `experiments.data.Split`.
      names: names of the operations, as `parse` returns them.
      seed: seed of the random numbers, from 0 to 2**31 - 1.
      num_classes: number of classes, which ``mixup`` needs; labels are 0 to `num_classes` - 1.

    Raises:
      ValueError: the examples are not images, an operation is unknown or does not fit them (labels
        of pixels allow only ``crop`` and ``flip``, which move the labels too), the seed is out of
        its range, or a label is not one of the classes.

    Example:
      >>> import numpy as np
      >>> from experiments import data
      >>> from experiments.data.augmentation import Augmentation
      >>> split = data.load_task("digits").train
      >>> augmentation = Augmentation(split, ("crop", "mixup"), seed=0, num_classes=10)
      >>> batch = augmentation(epoch=3, rows=np.array([5, 17]))
      >>> batch["x"].shape, batch["y"].shape
      ((2, 8, 8, 1), (2, 10))
    """

    def __init__(self, examples: Any, names: tuple[str, ...], *, seed: int, num_classes: int):
        if examples.pixels is None:
            raise ValueError(f"augmentation ({', '.join(names)}) is for images")
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"unknown augmentation {name!r}; valid: {', '.join(OPERATIONS)}")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2**31 - 1, got {seed}")
        self._moves_labels = examples.y.ndim > 1
        for name in names:
            if self._moves_labels and name not in ("crop", "flip"):
                raise ValueError(
                    f"augmentation {name} needs one label for each image; with labels of pixels "
                    "crop and flip work"
                )
        if "mixup" in names and num_classes <= examples.y.max():
            raise ValueError(
                f"mixup needs the number of classes, more than the largest label "
                f"{examples.y.max()}; got num_classes={num_classes}"
            )
        height, width, channels = examples.x.shape[1:]
        if "randaugment" in names and channels not in (1, 3):
            raise ValueError(f"randaugment is for images of 1 or 3 channels, these have {channels}")
        self._examples, self._names = examples, names
        self._seed, self._num_classes = seed, num_classes
        self._size = (height, width)
        self._mean, self._std = examples.pixels

    def __call__(self, epoch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads and changes rows; with mixup ``y`` holds shares of classes.

        Args:
          epoch: number of the epoch, from 0.
          rows: numbers of the examples.

        Returns:
          The examples ``x`` and the labels ``y``.
        """
        x, y = np.array(self._examples.x[rows]), np.array(self._examples.y[rows])
        generators = [self._generator(epoch, row) for row in rows.tolist()]
        self._change(x, y, generators)
        if "mixup" in self._names:
            partners = np.array([g.integers(len(self._examples)) for g in generators])
            weights = np.array([g.beta(_MIXUP, _MIXUP) for g in generators], np.float32)
            others, labels = np.array(self._examples.x[partners]), self._examples.y[partners]
            self._change(others, labels, generators)
            x += (1 - weights).reshape(-1, 1, 1, 1) * (others - x)
            shares = np.eye(self._num_classes, dtype=np.float32)
            y = weights[:, None] * shares[y] + (1 - weights[:, None]) * shares[labels]
        return {"x": x, "y": y}

    def _generator(self, epoch: int, row: int) -> np.random.Generator:
        # One stream of numbers for each example, without the cost of a seed sequence.
        bits = np.random.Philox(key=[self._seed, _STREAM], counter=[0, 0, epoch, row])
        return np.random.Generator(bits)

    def _change(self, x: np.ndarray, y: np.ndarray, generators: list[np.random.Generator]) -> None:
        height, width = self._size
        for i, generator in enumerate(generators):
            if "randaugment" in self._names:
                x[i] = self._randaugment(x[i], generator)
            if "crop" in self._names:
                down, right = (
                    int(generator.integers(-size // 8, size // 8 + 1)) for size in self._size
                )
                x[i] = _shift(x[i], down, right, 0)
                if self._moves_labels:
                    y[i] = _shift(y[i], down, right, -1 if y.dtype.kind == "i" else 0)
            if "flip" in self._names and generator.integers(2):
                x[i] = x[i][:, ::-1].copy()
                if self._moves_labels:
                    y[i] = y[i][:, ::-1].copy()
            if "cutout" in self._names:
                row, column = generator.integers(height), generator.integers(width)
                top, left = row - height // 4, column - width // 4
                x[i, max(top, 0) : top + height // 2, max(left, 0) : left + width // 2] = 0

    def _randaugment(self, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        pixels = np.clip(np.rint(x * self._std + self._mean), 0, 255).astype(np.uint8)
        gray = pixels.shape[-1] == 1
        image = Image.fromarray(pixels[..., 0] if gray else pixels)
        for _ in range(RANDAUGMENT_OPERATIONS):
            operation = _RANDAUGMENT[generator.integers(len(_RANDAUGMENT))]
            image = operation(image, _STRENGTH * (1 if generator.integers(2) else -1))
        changed = np.asarray(image, np.float32)
        return ((changed[..., None] if gray else changed) - self._mean) / self._std


def _shift(image: np.ndarray, down: int, right: int, fill: int) -> np.ndarray:
    """The image moved, with `fill` in the space it leaves: a crop of the image with a border."""
    height, width = image.shape[:2]
    moved = np.full_like(image, fill)
    moved[max(down, 0) : height + down, max(right, 0) : width + right] = image[
        max(-down, 0) : height - down, max(-right, 0) : width - right
    ]
    return moved


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Any:
    def apply(image: Image.Image, strength: float) -> Image.Image:
        coefficients = matrix(strength, image)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients)

    return apply


def _enhance(enhancer: Any) -> Any:
    return lambda image, strength: enhancer(image).enhance(1 + 0.9 * strength)


# The paper's operations, with the largest strengths of its TensorFlow code. Operations without a
# direction ignore the sign.
_RANDAUGMENT: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: image.rotate(30 * strength),
    lambda image, strength: ImageOps.solarize(image, 256 - int(256 * abs(strength))),
    lambda image, strength: ImageOps.posterize(image, 8 - int(4 * abs(strength))),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _affine(lambda strength, image: (1, 0.3 * strength, 0, 0, 1, 0)),
    _affine(lambda strength, image: (1, 0, 0, 0.3 * strength, 1, 0)),
    _affine(lambda strength, image: (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    _affine(lambda strength, image: (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
)
