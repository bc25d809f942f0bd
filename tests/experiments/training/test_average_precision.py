"""Average precision against a slow count of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.training.average_precision import (
    average_precision,
    intersection_over_union,
    precisions,
)


def share(a, b):
    """Intersection over union of two boxes, by hand."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = across * down
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def size(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def brute_force(detections, boxes, low, high):
    """Another program: for every score a threshold, for every threshold all over again."""
    of_classes = []
    for label in sorted({row[0] for true in boxes for row in true if row[0] >= 0}):
        decided = []  # (score, right), of detections that count
        number = 0
        for found, true in zip(detections.tolist(), boxes.tolist(), strict=True):
            true = [row[1:] for row in true if row[0] == label]
            number += sum(low <= size(box) < high for box in true)
            taken = set()
            of_class = [row for row in found if row[0] == label and row[5] > 0]
            for row in sorted(of_class, key=lambda row: -row[5]):
                box, best = row[1:5], None
                for wanted in (True, False):
                    for i, other in enumerate(true):
                        counts = low <= size(other) < high
                        if i in taken or counts != wanted or share(box, other) < 0.5:
                            continue
                        if best is None or share(box, other) > share(box, true[best]):
                            best = i
                    if best is not None:
                        break
                if best is None:
                    if low <= size(box) < high:
                        decided.append((row[5], False))
                else:
                    taken.add(best)
                    if low <= size(true[best]) < high:
                        decided.append((row[5], True))
        if not number:
            continue
        points = []
        for threshold in {score for score, _ in decided}:
            shown = [right for score, right in decided if score >= threshold]
            points.append((sum(shown) / number, sum(shown) / len(shown)))
        values = [
            max((p for recall, p in points if recall >= r / 100 - 1e-12), default=0.0)
            for r in range(101)
        ]
        of_classes.append(sum(values) / 101)
    return sum(of_classes) / len(of_classes)


def scene(rng, pictures=12, objects=5, guesses=9):
    """Boxes and detections, some of them near a box, with scores that all differ."""
    corners = rng.integers(0, 40, (pictures, objects, 2)).astype(float)
    sides = rng.integers(5, 24, (pictures, objects, 2))
    labels = rng.integers(-1, 3, (pictures, objects, 1))
    boxes = np.concatenate([labels, corners, corners + sides], axis=-1)
    boxes[labels[..., 0] < 0] = -1
    near = boxes[:, rng.integers(0, objects, guesses)]
    moved = near[..., 1:] + rng.normal(0, 1.5, (pictures, guesses, 4))
    moved[..., 2:] = np.maximum(moved[..., 2:], moved[..., :2] + 1)
    labels = np.where(rng.random((pictures, guesses)) < 0.8, near[..., 0], rng.integers(0, 3))
    scores = rng.permutation(pictures * guesses).reshape(pictures, guesses) / (pictures * guesses)
    return np.concatenate([labels[..., None], moved, scores[..., None]], axis=-1), boxes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("areas", [(0.0, math.inf), (0.0, 144.0), (144.0, math.inf)])
def test_against_brute_force(seed, areas):
    detections, boxes = scene(np.random.default_rng(seed))
    expected = brute_force(detections, boxes, *areas)
    assert 0.05 < expected < 0.95
    assert average_precision(detections, boxes, areas=areas) == pytest.approx(expected, abs=1e-12)


BOX = [[[0, 0, 0, 10, 10]]]


def test_perfect_and_hopeless():
    perfect = [[[0, 0, 0, 10, 10, 0.3], [1, 0, 0, 10, 10, 0.9]]]
    assert average_precision(np.array(perfect), np.array(BOX)) == 1
    other = [[[0, 20, 0, 30, 10, 0.3]]]
    assert average_precision(np.array(other), np.array(BOX)) == 0
    assert average_precision(np.zeros((1, 0, 6)), np.array(BOX)) == 0
    assert math.isnan(average_precision(np.array(perfect), np.full((1, 2, 5), -1.0)))


def test_a_second_detection_of_a_box_is_wrong():
    twice = np.array([[[0, 0, 0, 10, 10, 0.3], [0, 0, 1, 10, 10, 0.9]]])
    assert average_precision(twice, np.array(BOX)) == 1  # the wrong one comes after the right one
    boxes = np.array([[[0, 0, 0, 10, 10], [0, 20, 0, 30, 10]]])
    third = np.array([[[0, 0, 0, 10, 10, 0.3], [0, 0, 1, 10, 10, 0.9], [0, 20, 0, 30, 10, 0.1]]])
    # 51 recalls at precision 1, 50 at 2/3.
    assert average_precision(third, boxes) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_large_boxes_do_not_count_among_small_ones():
    boxes = np.array([[[0, 0, 0, 10, 10], [0, 20, 20, 50, 50]]])
    found = np.array([[[0, 0, 0, 10, 10, 0.3], [0, 20, 20, 50, 50, 0.9], [0, 0, 30, 20, 50, 0.8]]])
    assert precisions(found, boxes)["average_precision_small"] == 1
    assert precisions(found, boxes)["average_precision"] < 1


def test_overlap_of_boxes_without_area():
    flat, box = np.array([[1.0, 1, 1, 5]]), np.array([[0.0, 0, 4, 4]])
    assert intersection_over_union(flat, flat) == 0
    assert intersection_over_union(box, np.array([[0.0, 2, 4, 6]])) == pytest.approx(8 / 24)
