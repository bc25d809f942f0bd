"""The detector, its loss, and what it finds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from models import detector
from tests.models.test_models import abstract, count, forward

loss_of = jax.jit(detector.detection_loss)


def outputs_of(y, classes=2, cells=2):
    """Outputs that say exactly what is wanted of them."""
    shape = (len(y), cells, cells)
    blank = {"classes": jnp.zeros((*shape, classes + 1)), "distances": jnp.zeros((*shape, 4))}
    aim = jax.jit(detector.targets)(blank, y)
    logits = 50.0 * jax.nn.one_hot(aim.classes, classes + 1)
    return {"classes": logits, "distances": aim.distances}, aim


def test_parameters_and_shapes():
    model = abstract("detector", input_shape=(64, 32, 1), num_classes=10, width=8, depth=1)
    convs = [(1, 8), (8, 16), (16, 32), (32, 32)]
    total = sum((9 * a + 1) * b for a, b in convs) + 33 * 11 + 33 * 4
    assert count(model) == total
    outputs = nnx.eval_shape(
        lambda part, x: part(x), model, jax.ShapeDtypeStruct((3, 64, 32, 1), jnp.float32)
    )
    shapes = {name: output.shape for name, output in outputs.items()}
    assert shapes == {"classes": (3, 8, 4, 11), "distances": (3, 8, 4, 4)}


def test_starts_with_nothing_found():
    model = models.Detector(input_shape=(16, 16, 1), num_classes=3, width=2)
    np.testing.assert_array_equal(model.classes.bias[...], [0, 0, 0, 4])
    found = jax.jit(detector.detections)(forward(model, jnp.zeros((1, 16, 16, 1))))
    assert float(found[..., 5].max()) < 0.1


def test_targets_by_hand():
    """Four cells with middles at 4 and 12: a large box, and a small one in the last cell."""
    y = jnp.array([[[1, 0, 0, 16, 8], [0, 10, 10, 11, 11.5], [-1, -1, -1, -1, -1]]], jnp.float32)
    _, aim = outputs_of(y)
    np.testing.assert_array_equal(aim.classes[0], [[1, 1], [2, 0]])
    np.testing.assert_array_equal(aim.areas[0], [[128, 128], [0, 1.5]])
    np.testing.assert_array_equal(aim.positive[0], [[1, 1], [0, 1]])
    expected = [[[4, 4, 12, 4], [12, 4, 4, 4]], [[0, 0, 0, 0], [2, 2, -1, -0.5]]]
    np.testing.assert_array_equal(8 * aim.distances[0], expected)


def test_the_smaller_one_of_two_boxes_takes_the_cell():
    y = jnp.array([[[0, 0, 0, 16, 16], [1, 2, 2, 6, 6]]], jnp.float32)
    _, aim = outputs_of(y)
    np.testing.assert_array_equal(aim.classes[0], [[1, 0], [0, 0]])
    _, other = outputs_of(y[:, ::-1])
    np.testing.assert_array_equal(other.classes, aim.classes)


def test_loss_by_hand():
    """One positive cell of four, with both halves of smooth L1."""
    y = jnp.array([[[1, 0, 0, 8, 8]]], jnp.float32)
    outputs, _ = outputs_of(y)
    assert float(loss_of(outputs, y)[0]) < 1e-6
    distances = outputs["distances"].at[0, 0, 0].add(jnp.array([0.5, -3.0, 0, 0]))
    wrong = {"classes": jnp.zeros((1, 2, 2, 3)), "distances": distances.at[0, 1, 1].add(9)}
    # Half the square below 1, and the distance less a half above; empty cells have no box.
    expected = 4 * np.log(3) + 0.5 * 0.25 + 2.5
    np.testing.assert_allclose(loss_of(wrong, y), [expected], rtol=1e-6)


def test_loss_is_a_mean_over_pictures():
    """Also where one has no box and the other one two."""
    y = jnp.array([[[0, 0, 0, 8, 8], [1, 8, 0, 16, 8]], [[-1, -1, -1, -1, -1]] * 2], jnp.float32)
    outputs, _ = outputs_of(y)
    noisy = jax.tree.map(lambda a: a + jnp.cos(jnp.arange(a.size)).reshape(a.shape), outputs)
    both = loss_of(noisy, y)
    for i in range(2):
        alone = loss_of(jax.tree.map(lambda a, i=i: a[i : i + 1], noisy), y[i][None])
        np.testing.assert_allclose(alone[0], both[i], rtol=1e-6)
    none = optax.softmax_cross_entropy_with_integer_labels(noisy["classes"][1], jnp.full((2, 2), 2))
    np.testing.assert_allclose(both[1], none.sum(), rtol=1e-6)


def test_share_of_small_objects():
    """A box of 12 x 12 is not small any more; without a box the share is 0 / 0."""
    y = jnp.array([[[0, 0, 0, 4, 4], [1, 6, 6, 16, 20.4]]], jnp.float32)
    _, aim = outputs_of(y)
    losses = jnp.ones((1, 2, 2))
    assert [float(x) for x in detector.small_and_all(losses, aim)] == [1.0, 2.0]
    part, whole = detector.small_and_all(losses, detector.Targets(*map(jnp.zeros_like, aim)))
    assert jnp.isnan(part / whole)


def test_what_is_found():
    y = jnp.array([[[1, 0, 0, 16, 8], [0, 9, 10, 14, 15]]], jnp.float32)
    outputs, _ = outputs_of(y)
    found = np.asarray(jax.jit(detector.detections)(outputs))[0]
    kept = found[found[:, 5] > 0]
    # The large box is seen by two cells, of which one is left.
    np.testing.assert_allclose(kept[np.argsort(kept[:, 0]), :5], y[0, ::-1], atol=1e-5)
    np.testing.assert_allclose(kept[:, 5], 1, atol=1e-5)


def greedy(rows, overlap):
    """Non-maximum suppression, one row after the other."""
    kept = []
    for row in sorted(rows.tolist(), key=lambda row: -row[5]):
        for other in kept:
            across = min(row[3], other[3]) - max(row[1], other[1])
            down = min(row[4], other[4]) - max(row[2], other[2])
            both = max(0, across) * max(0, down)
            areas = [max(0, r[3] - r[1]) * max(0, r[4] - r[2]) for r in (row, other)]
            if row[0] == other[0] and both > overlap * (sum(areas) - both):
                break
        else:
            kept.append(row)
    return kept


def test_suppression_of_duplicates():
    keys = jax.random.split(jax.random.key(0))
    outputs = {
        "classes": 2 * jax.random.normal(keys[0], (2, 4, 4, 3)),
        "distances": 1 + jax.random.uniform(keys[1], (2, 4, 4, 4)),
    }
    everything = np.asarray(detector.detections(outputs, overlap=2.0, threshold=0.0))
    some = np.asarray(detector.detections(outputs, overlap=0.3, threshold=0.2))
    for rows, found in zip(everything, some, strict=True):
        expected = [row for row in greedy(rows, 0.3) if row[5] >= 0.2]
        assert 3 < len(expected) < 14
        np.testing.assert_allclose(found[found[:, 5] > 0], expected, rtol=1e-6)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="multiples of 8"):
        models.create("detector", input_shape=(60, 64, 1), num_classes=2)
    with pytest.raises(ValueError, match="width must be at least 1 and depth 0, got 0 and 2"):
        models.create("detector", input_shape=(64, 64, 1), num_classes=2, width=0)
