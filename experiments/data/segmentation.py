"""The task `segmentation`: membranes of cells in the electron microscope, ISBI 2012.

The pictures and labels are those of `isbi_em.npz` (`x`, `y`: 1 cell, 0 membrane), or of the folders
`membrane/train/image` and `membrane/train/label`. They are cut into squares of 128 pixels, and the
pictures are standardized as a whole.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np

from experiments.data.images import standardized
from experiments.data.readers.arrays import read_npz
from experiments.data.readers.files import DataError, check_size, exists
from experiments.data.readers.pictures import list_images, read_gray
from experiments.data.tasks import Split, Task, make_task

_CROP = 128


def load_membranes(folder: Path) -> Task:
    """The task `segmentation`.

    Args:
      folder: folder with the files.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged, or there are fewer than 10 pictures.
    """
    path, x, y = _read(folder)
    if x.dtype != np.uint8 or x.ndim != 3 or min(x.shape[1:]) < _CROP or y.shape != x.shape:
        raise DataError(
            f"{path}: pictures are {x.dtype} of shape {x.shape}, labels of shape {y.shape}, "
            f"expected both (N, height, width), pictures uint8 of at least {_CROP} pixels a side"
        )
    if len(x) < 10:
        raise DataError(f"{path}: {len(x)} pictures, expected at least 10")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > 1:
        raise DataError(f"{path}: labels are {y.dtype} up to {y.max()}, expected 0 and 1")
    # The pictures are slices of one block, in which neighbors are alike, so the held-out ones are
    # those at its end.
    tenth = len(x) // 10
    bounds = (slice(-2 * tenth), slice(-2 * tenth, -tenth), slice(-tenth, None))
    mean, std = np.float32(x[bounds[0]].mean()), np.float32(x[bounds[0]].std() or 1)
    splits = [Split(_crops(x[b])[..., np.newaxis], _crops(y[b]).astype(np.int32)) for b in bounds]
    return make_task(
        "segmentation", [standardized(split, mean, std) for split in splits], num_classes=2
    )


def _read(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Where the data lie, the pictures and the labels."""
    npz, place = folder / "isbi_em.npz", folder / "membrane" / "train"
    if exists(npz):
        arrays = read_npz(npz, ("x", "y"))
        return npz, arrays["x"], arrays["y"]
    if not (os.path.isdir(place / "image") and os.path.isdir(place / "label")):
        raise DataError(
            f"{folder}: no ISBI membranes here, expected {npz.name} or pictures in "
            "membrane/train/image and membrane/train/label"
        )
    files = [list_images(place / kind) for kind in ("image", "label")]
    if [path.name for path in files[0]] != [path.name for path in files[1]] or not files[0]:
        raise DataError(f"{place}: expected pictures of the same names in image and label")
    size = None
    pictures = []
    for file in itertools.chain(*files):
        pictures.append(read_gray(file, size))
        size = pictures[0].shape
        check_size(place, sum(picture.size for picture in pictures))
    x, y = np.split(np.stack(pictures), 2)
    return place, x, (y > 127).astype(np.uint8)


def _crops(pictures: np.ndarray) -> np.ndarray:
    """Squares side by side; what is left over on the right and at the bottom is dropped."""
    rows, columns = (size // _CROP for size in pictures.shape[1:])
    grid = pictures[:, : rows * _CROP, : columns * _CROP]
    grid = grid.reshape(len(grid), rows, _CROP, columns, _CROP).swapaxes(2, 3)
    return grid.reshape(-1, _CROP, _CROP)
