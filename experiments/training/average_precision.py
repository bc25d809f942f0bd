"""Average precision of detections, by COCO's rules, at one overlap."""

from __future__ import annotations

import math

import numpy as np

from models.detector import SMALL_AREA

OVERLAP = 0.5  # intersection over union of a detection that counts
# Recalls at which the precision is read: COCO's.
RECALLS = np.linspace(0, 1, 101)


def average_precision(
    detections: np.ndarray,
    boxes: np.ndarray,
    *,
    areas: tuple[float, float] = (0.0, math.inf),
    overlap: float = OVERLAP,
) -> float:
    """The mean over the classes of the area below the curve of precision against recall.

    As in COCO's evaluation: detections of a class are taken in the order of their scores; each is
    matched with the box of that class in its picture that overlaps it most, is not matched yet and
    reaches `overlap`. Boxes whose area is out of `areas` are ignored: a detection takes one of them
    only where no other is left, and then counts as neither right nor wrong; so does an unmatched
    detection whose own area is out of range. The precision at a recall is the highest one at that
    recall or a higher one, and is read at 101 recalls. Classes without a box do not count.

    Example:
      >>> boxes = np.array([[[0, 0, 0, 10, 10], [0, 20, 20, 30, 30]]], np.float32)
      >>> found = np.array([[[0, 0, 0, 10, 10, 0.9], [0, 40, 40, 50, 50, 0.8]]], np.float32)
      >>> round(average_precision(found, boxes), 4)  # 51 of 101 recalls, at precision 1
      0.505

    Args:
      detections: rows (pictures, any number, 6): class, left, top, right, bottom, score; a score of
        0 is none.
      boxes: rows (pictures, any number, 5): class, left, top, right, bottom; class -1 is none.
      areas: the boxes that count: area at least the first number and below the second.
      overlap: the least intersection over union of a match.

    Returns:
      The average precision, between 0 and 1; NaN without boxes.
    """
    classes = np.unique(boxes[..., 0])
    of_classes = [
        _of_class(detections, boxes, label, areas, overlap) for label in classes[classes >= 0]
    ]
    finite = [value for value in of_classes if not math.isnan(value)]
    return float(np.mean(finite)) if finite else math.nan


def precisions(detections: np.ndarray, boxes: np.ndarray) -> dict[str, float]:
    """``average_precision`` and ``average_precision_small``, that of small boxes.

    Args:
      detections: as `average_precision` takes them.
      boxes: likewise.

    Returns:
      Both, by name.
    """
    return {
        "average_precision": average_precision(detections, boxes),
        "average_precision_small": average_precision(detections, boxes, areas=(0, SMALL_AREA)),
    }


def _of_class(
    detections: np.ndarray,
    boxes: np.ndarray,
    label: float,
    areas: tuple[float, float],
    overlap: float,
) -> float:
    scores: list[float] = []
    right: list[bool] = []
    total = 0
    for found, true in zip(detections, boxes, strict=True):
        found = found[(found[:, 0] == label) & (found[:, 5] > 0)]
        found = found[np.argsort(-found[:, 5], kind="stable")]
        true = true[true[:, 0] == label]
        counts = _in_range(true[:, 1:5], areas)
        true = true[np.argsort(~counts, kind="stable")]  # those that count come first
        counts = np.sort(counts)[::-1]
        total += int(counts.sum())
        matched = _match(found[:, 1:5], true[:, 1:5], counts, overlap)
        kept = _in_range(found[:, 1:5], areas)
        hit = matched >= 0
        kept[hit] = counts[matched[hit]]
        scores += found[kept, 5].tolist()
        right += hit[kept].tolist()
    if not total:
        return math.nan
    order = np.argsort(-np.asarray(scores), kind="stable")
    hits = np.cumsum(np.asarray(right, bool)[order])
    recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS, side="left")
    return float(np.mean(np.append(highest, 0.0)[np.minimum(places, len(highest))]))


def _match(found: np.ndarray, true: np.ndarray, counts: np.ndarray, overlap: float) -> np.ndarray:
    """The number of the box of each detection, -1 for none."""
    overlaps = intersection_over_union(found, true)
    free = np.ones(len(true), bool)
    matched = np.full(len(found), -1)
    for i, row in enumerate(overlaps):
        for candidates in (free & counts, free & ~counts):
            reached = np.where(candidates & (row >= overlap), row, -1.0)
            if reached.size and reached.max() >= 0:
                matched[i] = reached.argmax()
                free[matched[i]] = False
                break
    return matched


def _in_range(boxes: np.ndarray, areas: tuple[float, float]) -> np.ndarray:
    size = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    inside: np.ndarray = (areas[0] <= size) & (size < areas[1])
    return inside


def intersection_over_union(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of all pairs.

    Args:
      boxes: left, top, right, bottom, (n, 4).
      others: likewise, (m, 4).

    Returns:
      An array (n, m); 0 where both have no area.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=2)
    area, other = (np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), axis=1) for b in (boxes, others))
    either = area[:, None] + other[None] - both
    shares: np.ndarray = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return shares
