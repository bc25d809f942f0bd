"""The task `moving_digits_flow`: digits that move over a texture, and how every pixel moves.

The digits are MNIST's where its files are at hand, otherwise those of scikit-learn, scaled up. A
picture shows one of them, bright, in front of a texture that stands still. From one picture to the
next the digit moves by at most 4 pixels, whole or not; the flow is that displacement where the
digit is, and 0 elsewhere. All is drawn by a seed: equal arguments make equal pictures.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import images
from experiments.data.drawing import hold_out
from experiments.data.tasks import Split, Task, make_task

SIZE = 32  # pixels of a picture's side
MOST = 4.0  # pixels that a digit moves at most
FRAMES = 8  # pictures of a sequence
# Examples of the splits for training, validation and test; each draws its digits from its own.
PAIRS = (4_000, 500, 500)
_SPRITE = 28  # pixels of the side of a digit's picture
_OUTSIDE = 6.0  # how far a digit's picture may stick out, which has a border of about four pixels
_INSIDE = 0.5  # the share of the digit's own brightness from which on a pixel is the digit's
# The background stays below the digits, whose brightness is at least 0.8.
_DARKEST_DIGIT, _BRIGHTEST_GROUND = 0.8, 0.6


class Sequences(NamedTuple):
    """Pictures in which one digit moves.

    Attributes:
      frames: (N, frames, 32, 32, 1), float32 from 0 to 1.
      flows: from each frame to the next, right and down in pixels, (N, frames - 1, 32, 32, 2).
      inside: whether a pixel is the digit's, (N, frames, 32, 32).
    """

    frames: np.ndarray
    flows: np.ndarray
    inside: np.ndarray


def load_moving_digits(folder: Path | None, hub: str | None = None) -> Task:
    """The task `moving_digits_flow`.

    Args:
      folder: folder with MNIST's files; `None` takes the digits of scikit-learn.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      The task: pairs of pictures (N, 32, 32, 2), flows (N, 32, 32, 2).

    Raises:
      DataError: a file is missing or damaged, or there are too few rows.
    """
    numbered = enumerate(zip(read_sprites(folder, hub), PAIRS, strict=True))
    splits = [pairs(sprites, number, seed=seed) for seed, (sprites, number) in numbered]
    task = make_task("moving_digits_flow", splits, num_classes=0)
    source = "scikit-learn" if folder is None else "MNIST"
    return dataclasses.replace(task, notes=(f"the digits are those of {source}",))


def read_sprites(
    folder: Path | None, hub: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of digits for training, validation and test.

    Args:
      folder: folder with MNIST's files, of which the first 5,000 digits are trained on; `None`
        takes the digits of scikit-learn.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      Arrays (digits, 28, 28) from 0 to 1.

    Raises:
      DataError: a file is missing or damaged, or there are too few rows.
    """
    if folder is not None:
        task = images.load_mnist("mnist5k", folder, hub)
        train, validation, test = (s.x[..., 0] for s in (task.train, task.validation, task.test))
        return train, validation, test
    pixels, classes = images.read_digits()
    border = 2
    side = pixels.shape[-1]
    # Pixel i of the large picture lies at i of `at` in the small one.
    at = (np.arange(_SPRITE - 2 * border) + 0.5) * side / (_SPRITE - 2 * border) - 0.5
    grow = _hats(at, side)
    large = grow @ (pixels / 16.0) @ grow.T
    large = np.pad(large, ((0, 0), (border, border), (border, border))).astype(np.float32)
    rest, test = hold_out(len(classes), 360, classes=classes)
    train, validation = (rest[rows] for rows in hold_out(len(rest), 360, classes=classes[rest]))
    return large[train], large[validation], large[test]


def pairs(sprites: np.ndarray, number: int, *, seed: int) -> Split:
    """Pairs of pictures and the flow from the first one to the second one.

    >>> sprites = np.ones((3, 28, 28), np.float32)
    >>> split = pairs(sprites, 5, seed=0)
    >>> split.x.shape, split.y.shape, bool(np.abs(split.y).max() <= MOST)
    ((5, 32, 32, 2), (5, 32, 32, 2), True)

    Args:
      sprites: pictures of digits, (digits, 28, 28).
      number: how many pairs.
      seed: of all that is drawn.

    Returns:
      A split.
    """
    drawn = sequences(sprites, number, seed=seed, frames=2)
    x = np.concatenate([drawn.frames[:, 0], drawn.frames[:, 1]], axis=-1)
    return Split(x, drawn.flows[:, 0])


def sequences(sprites: np.ndarray, number: int, *, seed: int, frames: int = FRAMES) -> Sequences:
    """Sequences of pictures, in each of which a digit moves evenly and turns back at the edges.

    Args:
      sprites: pictures of digits, (digits, 28, 28).
      number: how many sequences.
      seed: of all that is drawn.
      frames: pictures of each sequence, at least 2.

    Returns:
      The sequences.

    Raises:
      ValueError: there are fewer than 2 frames.
    """
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    rng = np.random.default_rng(seed)
    chosen = sprites[rng.integers(len(sprites), size=number)]
    length = MOST * np.sqrt(rng.uniform(size=number))  # even over the disk
    angle = rng.uniform(0, 2 * np.pi, number)
    steps = np.stack([length * np.sin(angle), length * np.cos(angle)], axis=-1)
    positions = _reflected(steps, frames, rng)
    brightness = rng.uniform(_DARKEST_DIGIT, 1.0, (number, 1, 1, 1)).astype(np.float32)
    ground = _textures(rng, number)[:, None]
    cover = place(chosen, positions)
    moves = np.diff(positions, axis=1)[..., ::-1]  # right, then down
    inside = cover > _INSIDE
    flows = np.where(inside[:, :-1, ..., None], moves[:, :, None, None], 0.0).astype(np.float32)
    pictures = cover * brightness + (1 - cover) * ground
    return Sequences(pictures[..., None].astype(np.float32), flows, inside)


def place(sprites: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Pictures of sprites at places, between pixels by linear interpolation.

    Args:
      sprites: (N, 28, 28).
      positions: rows and columns of their upper left corners, (N, frames, 2).

    Returns:
      (N, frames, 32, 32), float32.
    """
    pixels = np.arange(SIZE)
    rows, columns = (
        _hats(pixels - positions[..., axis, None], sprites.shape[1 + axis]).astype(np.float32)
        for axis in (0, 1)
    )
    return np.matmul(np.matmul(rows, sprites[:, None]), columns.swapaxes(-1, -2))


def _hats(at: np.ndarray, size: int) -> np.ndarray:
    """Weights (..., size) that interpolate linearly between points 0 to size - 1; 0 outside."""
    return np.maximum(0, 1 - np.abs(at[..., None] - np.arange(size)))


def _reflected(steps: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Positions (N, frames, 2): a drawn place, then steps that turn back at the edges."""
    low, high = -_OUTSIDE, SIZE - _SPRITE + _OUTSIDE
    position = rng.uniform(low, high, steps.shape)
    path = [position]
    for _ in range(frames - 1):
        beyond = (position + steps < low) | (position + steps > high)
        steps = np.where(beyond, -steps, steps)
        position = position + steps
        path.append(position)
    return np.stack(path, axis=1)


def _textures(rng: np.random.Generator, number: int) -> np.ndarray:
    """Smooth random pictures (number, 32, 32), of two sizes of spots."""
    total = np.zeros((number, SIZE, SIZE), np.float32)
    for spots in (9, 17):
        weights = _hats(np.linspace(0, spots - 1, SIZE), spots).astype(np.float32)
        grid = rng.uniform(0, _BRIGHTEST_GROUND / 2, (number, spots, spots)).astype(np.float32)
        total += weights @ grid @ weights.T
    return total
