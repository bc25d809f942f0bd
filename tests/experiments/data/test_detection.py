"""Pictures with digits, and stitched ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.data import detection, images


@pytest.fixture(scope="module")
def drawn() -> data.Split:
    return detection.draw_pictures(images.load_digits().train, 40, seed=1)


def overlaps(boxes):
    """Of all pairs of boxes, counted pixel by pixel, over the smaller one's pixels."""
    masks = []
    for left, top, right, bottom in boxes.astype(int):
        mask = np.zeros((64, 64), bool)
        mask[top:bottom, left:right] = True
        masks.append(mask)
    return [(a & b).sum() / min(a.sum(), b.sum()) for i, a in enumerate(masks) for b in masks[:i]]


def test_pictures(drawn):
    assert drawn.x.shape == (40, 64, 64, 1)
    assert drawn.x.dtype == drawn.y.dtype == np.float32
    assert drawn.x.min() == 0 < 0.9 < drawn.x.max() <= 1
    real = drawn.y[..., 0] >= 0
    assert set(real.sum(axis=1)) == {1, 2, 3, 4}
    assert (drawn.y[~real] == -1).all()
    boxes = drawn.y[real]
    sides = boxes[:, 3:] - boxes[:, 1:3]
    longer = sides.max(axis=1)
    assert longer.min() >= 7
    assert longer.max() <= 28
    assert boxes[:, 1:].min() >= 0
    assert boxes[:, 1:].max() <= 64
    assert set(boxes[:, 0]) == set(range(10))
    assert max(max(overlaps(y[y[:, 0] >= 0, 1:]), default=0) for y in drawn.y) <= 0.2


def test_boxes_are_tight_around_what_is_drawn(drawn):
    for x, y in zip(drawn.x[..., 0], drawn.y, strict=True):
        inside = np.zeros((64, 64), bool)
        for _, left, top, right, bottom in y[y[:, 0] >= 0].astype(int):
            inside[top:bottom, left:right] = True
            part = x[top:bottom, left:right]
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert edge.max() > 0
        assert (x[~inside] == 0).all()


def test_same_seed_same_pictures():
    digits = images.load_digits().test
    one, same, other = (detection.draw_pictures(digits, 3, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.x, same.x)
    np.testing.assert_array_equal(one.y, same.y)
    assert (one.x != other.x).any()


def test_task_of_both_sources(
    tmp_path: Path, mnist: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection.load_digits_detection, "__defaults__", ((4, 3, 2),))
    monkeypatch.delenv("OPTAX_ACCEL_DATA", raising=False)
    task = data.load_task("digits_detection")
    assert [len(task.train), len(task.validation), len(task.test)] == [4, 3, 2]
    assert task.describe().endswith("(64, 64, 1) of float32, boxes of 10 classes")
    np.savez(tmp_path / "mnist.npz", **mnist)
    other = data.load_task("digits_detection", data_dir=tmp_path)
    assert (other.train.x != task.train.x).any()
    with pytest.raises(data.DataError, match="reads a folder with MNIST's files, not hf:mnist"):
        data.load_task("digits_detection", data_dir="hf:mnist")


def test_golden_quarters():
    y = np.full((4, 1, 5), [7, 4, 8, 20, 28], np.float32)
    pictures, boxes = detection.stitch(np.zeros((4, 32, 32, 1), np.float32), y)
    assert pictures.shape == (1, 32, 32, 1)
    expected = [(2, 4, 10, 14), (18, 4, 26, 14), (2, 20, 10, 30), (18, 20, 26, 30)]
    np.testing.assert_array_equal(boxes, [[(7, *box) for box in expected]])


def test_four_equal_pictures_make_a_tiling():
    x = np.random.default_rng(0).random((1, 6, 8, 2)).astype(np.float32)
    pictures, _ = detection.stitch(np.repeat(x, 4, axis=0), np.full((4, 1, 5), -1, np.float32))
    np.testing.assert_array_equal(pictures[0], np.tile(x[0, ::2, ::2], (2, 2, 1)))


def test_stitched_boxes(drawn):
    pictures, boxes = detection.stitch(drawn.x, drawn.y)
    assert (pictures.shape, boxes.shape) == ((10, 64, 64, 1), (10, 16, 5))
    assert boxes.dtype == np.float32
    before, after = drawn.y.reshape(10, 16, 5), boxes
    real = before[..., 0] >= 0
    np.testing.assert_array_equal(after[..., 0], before[..., 0])
    np.testing.assert_array_equal(after[~real], -1)

    def areas(y):
        return (y[real][:, 3] - y[real][:, 1]) * (y[real][:, 4] - y[real][:, 2])

    np.testing.assert_array_equal(areas(after), areas(before) / 4)
    for quarter in range(4):
        rows = after[:, 4 * quarter : 4 * quarter + 4]
        across, down = divmod(quarter, 2)[::-1]
        rows = rows[rows[..., 0] >= 0][:, 1:]
        for low, high, place in ((0, 2, across), (1, 3, down)):
            assert rows[:, low].min() >= 32 * place
            assert rows[:, high].max() <= 32 * (place + 1)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((4, 5, 4, 1), (4, 1, 5), "of even height and width, got .4, 5, 4, 1.; pad them"),
        ((3, 4, 4, 1), (3, 1, 5), "one picture of every four, got 3; give 4, 8"),
        ((0, 4, 4, 1), (0, 1, 5), "one picture of every four, got 0"),
        ((4, 4, 4, 1), (4, 1, 4), r"boxes of shape \(4, boxes, 5\).*got \(4, 1, 4\)"),
        ((4, 4, 4, 1), (3, 1, 5), r"boxes of shape \(4, boxes, 5\).*got \(3, 1, 5\)"),
    ],
)
def test_what_cannot_be_stitched(x, y, message):
    with pytest.raises(ValueError, match=message):
        detection.stitch(np.zeros(x, np.float32), np.zeros(y, np.float32))


def test_boxes_of_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"have to be floating point, got int32; use y.astype"):
        detection.stitch(np.zeros((4, 4, 4, 1)), np.zeros((4, 1, 5), np.int32))
