"""Boxes as a person sees them."""

from __future__ import annotations

import numpy as np

from experiments.training.sampling import ENLARGED, FOUND, TRUE, with_boxes


def test_boxes_are_drawn_where_they_are():
    boxes = np.array([[3, 2, 2, 6, 6], [-1, -1, -1, -1, -1]], np.float32)
    found = np.array([[3, 10, 2, 14, 6, 0.9], [4, 2, 10, 6, 14, 0.1]], np.float32)
    drawn = np.rint(255 * with_boxes(np.zeros((16, 16, 1), np.float32), boxes, found))
    assert drawn.shape == (16 * ENLARGED, 16 * ENLARGED, 3)
    for color, (left, right) in ((TRUE, (2, 6)), (FOUND, (10, 14))):
        rows, columns = np.nonzero((drawn == color).all(axis=-1))
        assert (rows.min(), rows.max()) == (2 * ENLARGED, 6 * ENLARGED)
        assert (columns.min(), columns.max()) == (left * ENLARGED, right * ENLARGED)
    assert (drawn[10 * ENLARGED :] == 0).all()  # a low score
