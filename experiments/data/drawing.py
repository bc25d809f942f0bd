"""Draws held-out examples: the rows that scikit-learn draws, without the seconds of its import."""

from __future__ import annotations

import numpy as np


def hold_out(
    count: int, size: int, *, classes: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws examples at random, of every class the same share.

    These are the rows of `sklearn.model_selection.train_test_split(numpy.arange(count),
    test_size=size, stratify=classes, random_state=seed)`, whose documentation describes the
    algorithm under `StratifiedShuffleSplit` and `ShuffleSplit`.

    Example:
      >>> left, drawn = hold_out(6, 2, classes=np.array([0, 0, 0, 1, 1, 1]))
      >>> len(left), sorted((drawn >= 3).tolist())
      (4, [False, True])

    Args:
      count: number of examples.
      size: how many of them are drawn.
      classes: the class of each example; ``None`` draws without regard to classes.
      seed: seed of the drawing.

    Returns:
      The numbers of the examples that are left, and of those that are drawn, in random order.

    Raises:
      ValueError: a class has a single example, or there are more classes than examples to draw or
        to leave.
    """
    rng = np.random.RandomState(seed)
    if classes is None:
        order = rng.permutation(count)
        return order[size:], order[:size]
    names, numbers, counts = np.unique(classes, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise ValueError(f"class {names[counts.argmin()]} has only 1 example, expected 2 or more")
    if len(names) > min(size, count - size):
        raise ValueError(
            f"{size} drawn and {count - size} left of {count} examples cannot have some of each of "
            f"{len(names)} classes"
        )
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])
    shares_left = _shares(counts, count - size, rng)
    shares_drawn = _shares(counts - shares_left, size, rng)
    left: list[int] = []
    drawn: list[int] = []
    for rows, kept, taken in zip(members, shares_left, shares_drawn, strict=True):
        shuffled = rows[rng.permutation(len(rows))]
        left.extend(shuffled[:kept])
        drawn.extend(shuffled[kept : kept + taken])
    return rng.permutation(left), rng.permutation(drawn)


def _shares(counts: np.ndarray, draws: int, rng: np.random.RandomState) -> np.ndarray:
    """How many of a number of draws fall to each class; ties of remainders are broken at random."""
    exact = counts / counts.sum() * draws
    shares = np.floor(exact)
    remainders, missing = exact - shares, int(draws - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        (tied,) = np.where(remainders == remainder)
        chosen = rng.choice(tied, size=min(len(tied), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    return shares.astype(int)
