"""Augmentation: what each operation does, and that the example alone decides what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import data
from experiments.data import augmentation
from experiments.data.augmentation import Augmentation

ROWS = np.arange(40)


@pytest.fixture(scope="module")
def split():
    """Bytes standardized by a mean and deviation of each channel; two channels tell where."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 16, 16, 3)).astype(np.float32)
    pixels[..., 0], pixels[..., 1] = np.meshgrid(10 * np.arange(16), 10 * np.arange(16))
    mean, std = np.array([100, 90, 80], np.float32), np.array([50, 40, 30], np.float32)
    y = rng.integers(0, 5, 60).astype(np.int32)
    return data.Split((pixels - mean) / std, y, (mean, std))


def augment(split, *names, seed=0, epoch=0, rows=ROWS):
    return Augmentation(split, names, seed=seed, num_classes=5)(epoch, rows)


def test_what_is_drawn_depends_on_seed_epoch_and_example_only(split):
    names = augmentation.OPERATIONS
    whole = augment(split, *names)
    again = augment(split, *names, rows=ROWS[::-3])
    for name in ("x", "y"):
        np.testing.assert_array_equal(again[name], whole[name][::-3])
    assert whole["x"].dtype == whole["y"].dtype == np.float32
    for other in (augment(split, *names, epoch=1), augment(split, *names, seed=1)):
        changed = (other["x"] != whole["x"]).reshape(40, -1).any(axis=1)
        assert changed.mean() > 0.9
    # The examples themselves are left alone.
    before = split.x.copy()
    augment(split, *names)
    np.testing.assert_array_equal(split.x, before)


def test_crops_are_shifts_of_up_to_an_eighth(split):
    batch = augment(split, "crop")
    np.testing.assert_array_equal(batch["y"], split.y[ROWS])
    shifts = set()
    for image, row in zip(batch["x"], ROWS, strict=True):
        matches = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                bordered = np.pad(split.x[row], ((2, 2), (2, 2), (0, 0)))
                part = bordered[2 - down : 18 - down, 2 - right : 18 - right]
                if (part == image).all():
                    matches.append((down, right))
        assert len(matches) == 1
        shifts |= {*matches}
    assert len(shifts) > 12  # of 25


def test_flips_half_of_the_images(split):
    x = augment(split, "flip")["x"]
    flipped = (x == split.x[ROWS][:, :, ::-1]).all(axis=(1, 2, 3))
    same = (x == split.x[ROWS]).all(axis=(1, 2, 3))
    assert (flipped ^ same).all()
    assert 10 < flipped.sum() < 30


def test_cutout_takes_one_square(split):
    x = augment(split, "cutout")["x"]
    sizes = set()
    for image, original in zip(x, split.x[ROWS], strict=True):
        rows, columns = np.nonzero((image != original).any(axis=-1))
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        assert (image[top:bottom, left:right] == 0).all()
        assert (bottom - top) <= 8
        assert (right - left) <= 8
        # Smaller only at the border.
        assert bottom - top == 8 or top == 0 or bottom == 16
        assert right - left == 8 or left == 0 or right == 16
        sizes.add((bottom - top, right - left))
    assert (8, 8) in sizes
    assert len(sizes) > 5


def test_mixup_mixes_images_and_labels_alike(split):
    # Images of one value, which is their label.
    x = np.broadcast_to(split.y[:, None, None, None], split.x.shape).astype(np.float32)
    batch = augment(data.Split(x, split.y, split.pixels), "mixup")
    y = batch["y"]
    assert y.shape == (40, 5)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
    assert ((y > 0).sum(axis=1) <= 2).all()
    expected = (y @ np.arange(5))[:, None, None, None]
    np.testing.assert_allclose(batch["x"], np.broadcast_to(expected, batch["x"].shape), atol=1e-5)
    mixed = (y.max(axis=1) < 0.999) & (y.max(axis=1) > 0)
    assert 10 < mixed.sum() < 40


def test_randaugment_gives_bytes_again(split):
    batch = augment(split, "randaugment", rows=np.arange(60))
    mean, std = split.pixels
    pixels = batch["x"] * std + mean
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-3)
    assert pixels.min() > -0.01
    assert pixels.max() < 255.01
    changed = (np.abs(pixels - (split.x * std + mean)) > 0.5).reshape(60, -1).any(axis=1)
    assert changed.mean() > 0.7
    # Gray images too; all operations run.
    gray = data.Split(split.x[..., :1], split.y, (mean[0], std[0]))
    for epoch in range(4):
        assert augment(gray, "randaugment", epoch=epoch)["x"].shape == (40, 16, 16, 1)


@pytest.mark.parametrize("operation", augmentation._RANDAUGMENT)
@pytest.mark.parametrize("strength", [0.9, -0.9])
def test_every_operation_of_randaugment_keeps_the_form(operation, strength):
    rng = np.random.default_rng(0)
    for shape in ((8, 12), (8, 12, 3)):
        image = augmentation.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        changed = operation(image, strength)
        assert (changed.size, changed.mode) == (image.size, image.mode)


def test_labels_of_pixels_move_with_the_image(split):
    labels = (split.x[..., 2] > 0).astype(np.int32)
    whole = data.Split(split.x, labels, split.pixels)
    batch = augment(whole, "crop", "flip")
    counted = batch["y"] != data.IGNORED
    # What came in from outside counts nothing; there the image is 0.
    np.testing.assert_array_equal(batch["y"][counted], (batch["x"][..., 2] > 0)[counted])
    assert (batch["x"][~counted] == 0).all()
    assert 0 < (~counted).mean() < 0.25


def test_a_reconstruction_follows_its_image(split):
    batch = augment(data.Split(split.x, split.x, split.pixels), "crop", "flip")
    np.testing.assert_array_equal(batch["x"], batch["y"])


def test_what_does_not_fit_is_told(split):
    tokens = data.Split(np.zeros((9, 4), np.int32), np.zeros(9, np.int32))
    with pytest.raises(ValueError, match=r"augmentation \(crop\) is for images"):
        augment(tokens, "crop")
    pixels = data.Split(split.x, np.zeros(split.x.shape[:-1], np.int32), split.pixels)
    with pytest.raises(ValueError, match="cutout needs one label for each image"):
        augment(pixels, "crop", "cutout")
    double = data.Split(split.x[..., :2], split.y, (0.0, 1.0))
    with pytest.raises(ValueError, match="1 or 3 channels, these have 2"):
        augment(double, "randaugment")
    with pytest.raises(ValueError, match="unknown augmentation 'rotate'; valid: randaugment, crop"):
        augmentation.parse("crop,rotate")
    assert augmentation.parse("") == ()
