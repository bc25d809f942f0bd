"""Membranes cut into squares, from files that the tests write and from real ones."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from experiments import data
from tests.experiments.data.files import assert_fails, membranes


def test_segmentation_crops_pictures_and_labels_alike(tmp_path):
    content = membranes()
    np.savez(tmp_path / "isbi_em.npz", **content)
    task = data.load_task("segmentation", data_dir=tmp_path)
    # Two crops of each picture; eight pictures, one, one.
    assert [len(s) for s in (task.train, task.validation, task.test)] == [16, 2, 2]
    assert (task.input_shape, task.num_classes) == ((128, 128, 1), 2)
    for split in (task.train, task.validation, task.test):
        np.testing.assert_array_equal(split.x[..., 0] > 0, split.y == 1)
    np.testing.assert_array_equal(task.train.y[1], content["y"][0, :128, 128:256])
    np.testing.assert_array_equal(task.test.y[0], content["y"][9, :128, :128])
    np.testing.assert_allclose([task.train.x.mean(), task.train.x.std()], [0, 1], atol=0.01)
    # The same pictures as files: numbered, with labels of 0 and 255.
    folder = tmp_path / "folder"
    for name, pictures in (("image", content["x"]), ("label", 255 * content["y"])):
        (folder / "membrane/train" / name).mkdir(parents=True)
        for i, picture in enumerate(pictures, start=1):
            Image.fromarray(picture).save(folder / "membrane/train" / name / f"{i}.png")
    files = data.load_task("segmentation", data_dir=folder)
    np.testing.assert_array_equal(files.train.x, task.train.x)
    np.testing.assert_array_equal(files.test.y, task.test.y)
    (folder / "membrane/train/label/7.png").unlink()
    assert_fails("pictures of the same names in image and label", "segmentation", data_dir=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "no array y; expected x, y"),
        ({"x": np.zeros((10, 130, 260), np.float32)}, "pictures are float32"),
        ({"x": np.zeros((10, 64, 64), np.uint8)}, r"labels of shape \(10, 130, 260\)"),
        ({"y": np.full((10, 130, 260), 2)}, "up to 2, expected 0 and 1"),
        (membranes(rows=9), "9 pictures, expected at least 10"),
        (membranes(rows=0), "0 pictures, expected at least 10"),
        ({"y": np.full((10, 130, 260), np.nan)}, "labels are float64 up to nan, expected 0 and 1"),
    ],
)
def test_wrong_membranes(tmp_path, change, message):
    content = membranes() | change
    np.savez(tmp_path / "isbi_em.npz", **{k: a for k, a in content.items() if a is not None})
    assert_fails(message, "segmentation", data_dir=tmp_path)


def test_real_membranes(data_dir):
    task = data.load_task("segmentation", data_dir=data_dir)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [384, 48, 48]
    assert 0.75 < task.train.y.mean() < 0.81  # cells
