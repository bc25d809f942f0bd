"""What a generative model has learned to draw, as a picture in the run's folder."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from experiments import cli
from experiments.training import cluster
from experiments.training.program import Program
from experiments.training.step import TrainState, averaged

# Images that are drawn, and the least height of one in the picture, in pixels.
NUMBER, HEIGHT = 64, 32


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
