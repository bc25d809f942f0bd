"""Held-out examples, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import datasets
from sklearn.model_selection import train_test_split

from experiments.data.drawing import hold_out
from experiments.data.images import read_digits

RNG = np.random.default_rng(0)
CLASSES = {
    "unequal": RNG.choice([0, 3, 7], size=200, p=[0.1, 0.2, 0.7]),
    "equal, so that remainders tie": np.tile(np.arange(7), 11),
    "texts": RNG.choice(np.array(["b", "a"]), size=31),
    "none": None,
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_rows_are_those_of_scikit_learn(name: str) -> None:
    classes = CLASSES[name]
    count = 50 if classes is None else len(classes)
    for size, seed in ((7, 0), (8, 1), (count // 3, 2), (count - 7, 3)):
        expected = train_test_split(
            np.arange(count), test_size=size, stratify=classes, random_state=seed
        )
        rows = hold_out(count, size, classes=classes, seed=seed)
        for some, others in zip(rows, expected, strict=True):
            np.testing.assert_array_equal(some, others)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has only 1 example"):
        hold_out(3, 2, classes=np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="each of 2 classes"):
        hold_out(4, 1, classes=np.array([0, 0, 1, 1]))


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = datasets.load_digits()
    images, labels = read_digits()
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.target)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.testing.assert_array_equal(read_digits()[0], images)
