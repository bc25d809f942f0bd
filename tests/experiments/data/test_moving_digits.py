"""Digits that move: that the flow says where every pixel of the digit went."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import ndimage

from experiments import data
from experiments.data import moving_digits
from tests.experiments.data.files import arrays, assert_fails


@pytest.fixture(scope="module")
def sprites():
    return moving_digits.read_sprites(None)


def warped(second, flow):
    """The second picture at where the flow of each pixel points."""
    down, right = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    at = (down + flow[..., 1], right + flow[..., 0])
    return ndimage.map_coordinates(second, at, order=1, mode="nearest")


def test_the_flow_warps_the_second_picture_onto_the_first(sprites):
    drawn = moving_digits.sequences(sprites[0], 40, seed=3, frames=2)
    after, before = {"digit": [], "ground": []}, {"digit": [], "ground": []}
    for frames, flows, inside in zip(drawn.frames[..., 0], drawn.flows, drawn.inside, strict=True):
        moved, still = (
            np.abs(each - frames[0]) for each in (warped(*frames[1:], *flows), frames[1])
        )
        # Away from the edges of the digit, where the ground shines through, from what the digit
        # covers or uncovers, and from the edges of the picture.
        both = ndimage.binary_dilation(inside[0] | inside[1], iterations=6)
        for name, part in (
            ("digit", ndimage.binary_erosion(inside[0], iterations=2)),
            ("ground", ~both),
        ):
            part[:4] = part[-4:] = part[:, :4] = part[:, -4:] = False
            after[name].extend(moved[part])
            before[name].extend(still[part])
    for name in after:
        assert len(after[name]) > 500
        # Interpolating twice blurs the textures a little.
        assert np.mean(after[name]) < 0.3 * np.mean(before[name])


def test_whole_displacements_are_exact():
    sprite = np.zeros((1, 28, 28), np.float32)
    sprite[0, 5:20, 8:16] = np.random.default_rng(0).random((15, 8))
    pictures = moving_digits.place(sprite, np.array([[[2.0, 1.0], [-1.0, 4.0]]]))[0]
    np.testing.assert_array_equal(pictures[0, 7:22, 9:17], sprite[0, 5:20, 8:16])
    np.testing.assert_array_equal(pictures[1, 4:19, 12:20], sprite[0, 5:20, 8:16])
    assert pictures.sum() == pytest.approx(2 * sprite.sum(), rel=1e-5)
    between = moving_digits.place(sprite, np.array([[[2.5, 1.0]]]))[0, 0]
    np.testing.assert_allclose(
        between[8:22, 9:17], (sprite[0, 5:19, 8:16] + sprite[0, 6:20, 8:16]) / 2, atol=1e-6
    )


def test_sequences_move_evenly(sprites):
    drawn = moving_digits.sequences(sprites[1], 40, seed=0)
    assert drawn.frames.shape == (40, 8, 32, 32, 1)
    assert drawn.flows.shape == (40, 7, 32, 32, 2)
    assert drawn.frames.dtype == drawn.flows.dtype == np.float32
    assert drawn.frames.min() >= 0
    assert drawn.frames.max() <= 1
    lengths = np.linalg.norm(drawn.flows, axis=-1)
    assert 3.8 < lengths.max() <= moving_digits.MOST + 1e-5
    for flows, speeds, inside in zip(drawn.flows, lengths, drawn.inside[:, :-1], strict=True):
        # The ground has one displacement, the digit one length: it turns back at the edges.
        assert np.ptp(flows[~inside], axis=0).max() < 1e-5
        assert np.ptp(speeds[inside]) < 1e-5
    assert 0.05 < drawn.inside.mean() < 0.4


def test_the_seed_decides(sprites):
    one, same, other = (moving_digits.pairs(sprites[0], 4, seed=seed) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, (one.x, one.y), (same.x, same.y))
    assert (one.x != other.x).any()
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        moving_digits.sequences(sprites[0], 4, seed=0, frames=1)


def test_the_task_takes_mnist_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(moving_digits, "PAIRS", (6, 3, 2))
    monkeypatch.delenv("OPTAX_ACCEL_DATA", raising=False)
    plain = data.load_task("moving_digits_flow")
    assert [len(getattr(plain, split)) for split in data.tasks.SPLITS] == [6, 3, 2]
    assert plain.input_shape == (32, 32, 2)
    assert plain.describe().endswith("the digits are those of scikit-learn")
    assert plain.checksums == data.load_task("moving_digits_flow").checksums
    # A folder without MNIST: an error where a person names it, and the usual one is left alone.
    assert_fails("no MNIST here, expected mnist.npz", "moving_digits_flow", data_dir=tmp_path)
    monkeypatch.setenv("OPTAX_ACCEL_DATA", str(tmp_path))
    assert data.load_task("moving_digits_flow").checksums == plain.checksums
    np.savez(tmp_path / "mnist.npz", **arrays((28, 28), rows=10_000))
    task = data.load_task("moving_digits_flow")
    assert "the digits are those of MNIST" in task.describe()
    assert task.checksums["train"] != plain.checksums["train"]


def test_the_digits_of_the_splits_are_different_ones(sprites):
    assert [len(digits) for digits in sprites] == [1_077, 360, 360]
    rows = np.concatenate(sprites).reshape(1_797, -1)
    assert len(np.unique(rows, axis=0)) == 1_797
