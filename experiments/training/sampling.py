"""What a model draws, or finds in pictures, as a picture in the run's folder."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw

from experiments import cli
from experiments.training import cluster
from experiments.training.program import Program
from experiments.training.step import TrainState, averaged

# Images that are drawn, and the least height of one in the picture, in pixels.
NUMBER, HEIGHT = 64, 32
# Pictures whose boxes are drawn, how much they are enlarged, and the least score of a box.
PICTURES, ENLARGED, LEAST_SCORE = 16, 3, 0.3
TRUE, FOUND = (70, 170, 90), (240, 140, 40)


def write_samples(program: Program, state: TrainState, path: Path) -> None:
    """Draws images from the model of a state, and writes them as one PNG file.

    Of several processes all have to call it; the first one draws and writes.

    Args:
      program: the program of a run whose model `draws_images`.
      state: a placed state; of moving averages or several workers it is their mean that draws.
      path: the file.
    """
    runner = program.runner
    state = averaged(runner.consensus(state))
    whole = jax.jit(lambda tree: tree, out_shardings=runner.replicated)
    params, rest = jax.tree.map(
        lambda leaf: leaf.addressable_data(0), whole((state.params, state.rest))
    )
    if cluster.is_main():
        model = nnx.merge(program.graphdef, params, rest, copy=True)
        model.eval()
        images = model.sample(NUMBER, key=jax.random.key(program.plan.options.seed))
        cli.write_atomic(path, picture(np.asarray(images)))


def write_detections(program: Program, state: TrainState, path: Path) -> None:
    """Draws what a detector finds in the first pictures of the test split, as one PNG file.

    Of several processes all have to call it; the first one writes.

    Args:
      program: the program of a run that trains a detector.
      state: a placed state; of moving averages or several workers it is their mean that looks.
      path: the file.
    """
    runner = program.runner
    state = averaged(runner.consensus(state))
    split = program.plan.task.test[:PICTURES]
    placed = runner.put_whole({"x": split.x, "y": split.y})
    scores = jax.device_get(program.compiled_scores(state.params, state.rest, placed))
    if cluster.is_main():
        drawn = [
            with_boxes(*each) for each in zip(split.x, split.y, scores["detections"], strict=True)
        ]
        cli.write_atomic(path, picture(np.stack(drawn)))


def with_boxes(image: np.ndarray, boxes: np.ndarray, found: np.ndarray) -> np.ndarray:
    """An enlarged picture with its boxes in green, and the ones found in orange with their class.

    Args:
      image: (height, width, 1 or 3), values between 0 and 1.
      boxes: rows of class, left, top, right, bottom; class -1 is none.
      found: rows of class, left, top, right, bottom, score.

    Returns:
      A picture of three channels, values between 0 and 1.
    """
    pixels = np.rint(255 * np.clip(np.broadcast_to(image, (*image.shape[:2], 3)), 0, 1))
    drawn = Image.fromarray(
        pixels.astype(np.uint8).repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    )
    pen = ImageDraw.Draw(drawn)
    for _, *corners in boxes[boxes[:, 0] >= 0]:
        pen.rectangle([ENLARGED * float(c) for c in corners], outline=TRUE)
    for label, *corners, _ in found[found[:, 5] >= LEAST_SCORE]:
        left, top, right, bottom = (ENLARGED * float(c) for c in corners)
        pen.rectangle([left, top, max(left, right), max(top, bottom)], outline=FOUND, width=2)
        pen.text((left + 3, top), f"{label:.0f}", fill=FOUND)
    return np.asarray(drawn, np.float32) / 255


def picture(images: np.ndarray[Any, Any]) -> bytes:
    """Images side by side in a square, as a PNG file.

    >>> image = Image.open(io.BytesIO(picture(np.zeros((4, 8, 8, 1)))))
    >>> image.size, image.mode
    ((70, 70), 'L')

    Args:
      images: (N, height, width, channels) with 1 or 3 channels; values outside of 0 to 1 are
        clipped.

    Returns:
      The content of the file.
    """
    number, height, _, _ = images.shape
    factor = -(-HEIGHT // height)
    pixels = np.rint(255 * np.clip(np.nan_to_num(images), 0, 1)).astype(np.uint8)
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    # Gray lines of two pixels around each.
    tiles = np.pad(pixels, ((0, 0), (2, 0), (2, 0), (0, 0)), constant_values=128)
    columns = math.ceil(math.sqrt(number))
    tiles = np.pad(tiles, ((0, -number % columns), (0, 0), (0, 0), (0, 0)), constant_values=128)
    rows = tiles.reshape(-1, columns, *tiles.shape[1:])
    grid = rows.transpose(0, 2, 1, 3, 4).reshape(
        len(rows) * tiles.shape[1], columns * tiles.shape[2], tiles.shape[3]
    )
    whole = np.pad(grid, ((0, 2), (0, 2), (0, 0)), constant_values=128)
    file = io.BytesIO()
    Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole).save(file, "PNG")
    return file.getvalue()
