"""The task `moving_digits_flow`: digits that move over a texture, and how every pixel moves.

The digits are MNIST's where its files are at hand, otherwise those of scikit-learn, scaled up. A
picture shows one of them, bright, in front of a texture. From one picture to the next the digit and
the texture move by at most 4 pixels each, whole or not: the flow is the digit's displacement where
the digit is, and the texture's elsewhere. All is drawn by a seed: equal arguments make equal
pictures.
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
MOST = 4.0  # pixels that digit and ground move at most
FRAMES = 8  # pictures of a sequence
# Examples of the splits for training, validation and test; each draws its digits from its own.
PAIRS = (4_000, 500, 500)
_SPRITE = 28  # pixels of the side of a digit's picture
_OUTSIDE = 6.0  # how far a digit's picture may stick out, which has a border of about four pixels
_INSIDE = 0.5  # the share of the digit's own brightness from which on a pixel is the digit's
_DARKEST_DIGIT, _BRIGHTEST_GROUND = 0.7, 0.6  # of 1


class Sequences(NamedTuple):
    """Pictures in which one digit moves over a ground that moves as well.

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
    return as_split(sequences(sprites, number, seed=seed, frames=2))


def as_split(drawn: Sequences) -> Split:
    """The first two pictures of each sequence, and the flow between them.

    Args:
      drawn: sequences of two pictures or more.

    Returns:
      A split of pairs.
    """
    x = np.concatenate([drawn.frames[:, 0], drawn.frames[:, 1]], axis=-1)
    return Split(x, drawn.flows[:, 0])


def sequences(sprites: np.ndarray, number: int, *, seed: int, frames: int = FRAMES) -> Sequences:
    """Sequences of pictures: a digit moves evenly, and turns back at the edges, over its ground.

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
    positions = _reflected(_displacements(rng, number), frames, rng)
    drift = _displacements(rng, number)
    cover = place(chosen, positions)
    bright = 1 - (1 - _DARKEST_DIGIT) * _textures(rng, number, _SPRITE)
    digits = place(chosen * bright, positions)
    pictures = digits + (1 - cover) * _BRIGHTEST_GROUND * _ground(rng, drift, frames)
    inside = cover > _INSIDE
    moves = np.diff(positions, axis=1)[:, :, None, None]
    flows = np.where(inside[:, :-1, ..., None], moves, drift[:, None, None, None])[..., ::-1]
    return Sequences(pictures[..., None].astype(np.float32), flows.astype(np.float32), inside)


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


def _displacements(rng: np.random.Generator, number: int) -> np.ndarray:
    """Down and right, (number, 2), evenly over the disk of the longest one."""
    length = MOST * np.sqrt(rng.uniform(size=number))
    angle = rng.uniform(0, 2 * np.pi, number)
    return np.stack([length * np.sin(angle), length * np.cos(angle)], axis=-1)


def _ground(rng: np.random.Generator, drift: np.ndarray, frames: int) -> np.ndarray:
    """Textures (N, frames, 32, 32) that move by `drift` from frame to frame."""
    margin = int(np.ceil(MOST * (frames - 1)))
    texture = _textures(rng, len(drift), SIZE + 2 * margin + 1)
    start = margin + np.zeros((len(drift), frames, 2))
    return place(texture, -start + np.arange(frames)[:, None] * drift[:, None])


def _textures(rng: np.random.Generator, number: int, side: int) -> np.ndarray:
    """Smooth random pictures (number, side, side) from 0 to 1, of spots of two sizes."""
    total = np.zeros((number, side, side), np.float32)
    for size in (6, 12):
        weights = _hats(np.arange(side) / size, side // size + 2).astype(np.float32)
        grid = rng.uniform(0, 0.5, (number, *[weights.shape[1]] * 2)).astype(np.float32)
        total += weights @ grid @ weights.T
    return total
