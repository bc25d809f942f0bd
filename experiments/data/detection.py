"""The task `digits_detection`: find the digits in a picture, and say which they are.

Pictures of 64 x 64 pixels with one to four digits, whose longer side has 7 to 28 pixels, at random
places, none of which covers more than a fifth of another one. The digits are those of MNIST-5k
where a folder is given, otherwise the embedded ones of scikit-learn. Which digits, sizes and places
is drawn with a fixed seed, and the digits of the three splits are different ones.

The labels of a picture are rows (class, left, top, right, bottom) in pixels, float32, where right
and bottom are the first pixels outside; a row of -1 is no box.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data import images
from experiments.data.tasks import Split, Task, make_task

NAME = "digits_detection"
SIDE = 64
MOST_DIGITS = 4
SIZES = (7, 28)  # of the longer side
MOST_OVERLAP = 0.2  # area of the intersection over that of the smaller box
# Pictures of the training, the validation and the test split.
PICTURES = (2_000, 500, 500)
_TRIES = 50  # to find room for a digit, which is left out then


def load_digits_detection(folder: Path | None, pictures: tuple[int, int, int] = PICTURES) -> Task:
    """The task `digits_detection`.

    Args:
      folder: folder with MNIST's files; ``None`` takes the digits of scikit-learn.
      pictures: number of pictures of each split.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged.
    """
    task = images.load_digits() if folder is None else images.load_mnist("mnist5k", folder, None)
    splits = [
        draw_pictures(split, number, seed=seed)
        for seed, (split, number) in enumerate(
            zip((task.train, task.validation, task.test), pictures, strict=True)
        )
    ]
    return make_task(NAME, splits, num_classes=task.num_classes)


def draw_pictures(digits: Split, number: int, *, seed: int) -> Split:
    """Pictures with digits at random places.

    Args:
      digits: images of single digits between 0 and 1, (N, height, width, 1), and their classes.
      number: how many pictures.
      seed: seed of the drawing.

    Returns:
      The pictures (number, 64, 64, 1), float32 between 0 and 1, and their boxes (number, 4, 5).
    """
    rng = np.random.default_rng(seed)
    x = np.zeros((number, SIDE, SIDE, 1), np.float32)
    y = np.full((number, MOST_DIGITS, 5), -1, np.float32)
    for picture, boxes in zip(x, y, strict=True):
        for row in range(rng.integers(1, MOST_DIGITS, endpoint=True)):
            digit = rng.integers(len(digits))
            scaled = _scaled(
                _cropped(digits.x[digit, ..., 0]), int(rng.integers(*SIZES, endpoint=True))
            )
            height, width = scaled.shape
            for _ in range(_TRIES):
                top, left = rng.integers(SIDE - height + 1), rng.integers(SIDE - width + 1)
                box = np.array([left, top, left + width, top + height], np.float32)
                if _overlap(box, boxes[boxes[:, 0] >= 0, 1:]) <= MOST_OVERLAP:
                    place = picture[top : top + height, left : left + width, 0]
                    np.maximum(place, scaled, out=place)
                    boxes[row] = [digits.y[digit], *box]
                    break
    return Split(x, y, (0.0, 255.0))


def _cropped(image: np.ndarray) -> np.ndarray:
    """The part of an image that is not empty."""
    rows, columns = np.nonzero(image.max(axis=1))[0], np.nonzero(image.max(axis=0))[0]
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _scaled(image: np.ndarray, longer: int) -> np.ndarray:
    """The image with this longer side."""
    height, width = (max(1, round(side * longer / max(image.shape))) for side in image.shape)
    picture = Image.fromarray(image.astype(np.float32))
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return np.clip(scaled, 0, 1)


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The largest share of the smaller one of two boxes that is inside the other one."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    inside = np.prod(np.maximum(sides, 0), axis=1)
    smaller = np.minimum(areas, np.prod(box[2:] - box[:2]))
    return float(np.max(inside / smaller, initial=0.0))


def stitch(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Makes one picture of every four: each at half its size, in a quarter of the new one.

    A picture is halved by the nearest pixel, as in the authors' code (Chen et al., 2020, section
    3.1): every second row and column. The four that follow each other become the upper left, the
    upper right, the lower left and the lower right quarter; coordinates of boxes are halved, which
    is exact, and moved along.

    Example:
      >>> y = np.full((4, 1, 5), [3, 4, 8, 20, 28], np.float32)
      >>> pictures, boxes = stitch(np.ones((4, 32, 32, 1), np.float32), y)
      >>> pictures.shape, boxes[0, 1].tolist()
      ((1, 32, 32, 1), [3.0, 18.0, 4.0, 26.0, 14.0])

    Args:
      x: pictures, (4 n, height, width, channels), with even height and width.
      y: their boxes, (4 n, boxes, 5), floating point: class, left, top, right, bottom; rows of
        class -1 are none. A box that reaches out of its picture reaches into the next quarter.

    Returns:
      Pictures (n, height, width, channels) and boxes (n, 4 boxes, 5).

    Raises:
      ValueError: the number of pictures is no multiple of 4, a side is odd or 0, or the boxes have
        another shape or are whole numbers, whose halves may not be.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 4 or any(side % 2 or not side for side in x.shape[1:3]):
        raise ValueError(
            "stitch takes pictures (number, height, width, channels) of even height and width, "
            f"got {x.shape}; pad them"
        )
    if not np.issubdtype(y.dtype, np.floating):
        raise ValueError(
            "stitch halves the coordinates of boxes, which have to be floating point, got "
            f"{y.dtype}; use y.astype(np.float32)"
        )
    if len(x) % 4 or not len(x):
        raise ValueError(f"stitch makes one picture of every four, got {len(x)}; give 4, 8, ...")
    if y.ndim != 3 or len(y) != len(x) or y.shape[2] != 5:
        raise ValueError(
            f"stitch takes boxes of shape ({len(x)}, boxes, 5): class, left, top, right, bottom; "
            f"got {y.shape}"
        )
    number, height, width, channels = len(x) // 4, *x.shape[1:]
    quarters = x[:, ::2, ::2].reshape(number, 2, 2, height // 2, width // 2, channels)
    pictures = quarters.transpose(0, 1, 3, 2, 4, 5).reshape(number, height, width, channels)
    boxes = y.reshape(number, 4, -1, 5)
    across, down = width // 2, height // 2
    corners = np.array([[0, 0], [across, 0], [0, down], [across, down]], y.dtype)
    moved = boxes[..., 1:] / 2 + np.tile(corners, 2)[:, np.newaxis]
    is_box = boxes[..., :1] >= 0
    halved = np.where(is_box, np.concatenate([boxes[..., :1], moved], axis=-1), boxes)
    return pictures, halved.reshape(number, -1, 5).astype(y.dtype)
