"""Mixing matrices as rounds of permutations, each of which is one ``lax.ppermute``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Round:
    """One ``ppermute``: each worker sends to at most one other and receives from at most one.

    Attributes:
      pairs: pairs of sender and receiver.
      weights: the factor of what each worker receives, ``(num_workers,)``; 0 for workers that
        receive nothing.
    """

    pairs: tuple[tuple[int, int], ...]
    weights: np.ndarray


def decompose(matrix: np.ndarray) -> tuple[Round, ...]:
    """The off-diagonal entries as the smallest number of rounds of partial permutations.

    Senders and receivers are the two sides of a bipartite graph; an edge coloring with as many
    colors as the largest degree exists (König, 1916) and is found edge by edge, exchanging two
    colors along an alternating path where no color is free at both ends.
    """
    n = len(matrix)
    receivers, senders = np.nonzero((matrix > 0) & ~np.eye(n, dtype=bool))
    # By offset: circulant matrices become shifts, which suit rings and tori of devices.
    order = np.lexsort((receivers, (senders - receivers) % n))
    edges = [(int(senders[k]), int(receivers[k])) for k in order]
    degrees = np.bincount(receivers, minlength=n), np.bincount(senders, minlength=n)
    colors = range(int(max(degrees[0].max(), degrees[1].max())))
    partner: tuple[dict[tuple[int, int], int], ...] = ({}, {})  # of (sender | receiver, color)
    for edge in edges:
        free = [
            [c for c in colors if (worker, c) not in partner[side]]
            for side, worker in enumerate(edge)
        ]
        common = [c for c in free[0] if c in free[1]]
        if common:
            color = common[0]
        else:
            color = free[0][0]
            _exchange(partner, edge[1], color, free[1][0])
        partner[0][edge[0], color] = edge[1]
        partner[1][edge[1], color] = edge[0]
    rounds = []
    for color in colors:
        pairs = sorted((worker, other) for (worker, c), other in partner[0].items() if c == color)
        weights = np.zeros(n)
        for sender, receiver in pairs:
            weights[receiver] = matrix[receiver, sender]
        rounds.append(Round(tuple(pairs), weights))
    return tuple(rounds)


def _exchange(
    partner: tuple[dict[tuple[int, int], int], ...], receiver: int, color: int, other: int
) -> None:
    """Exchanges two colors along their alternating path that starts at a receiver."""
    path, worker, side, wanted = [], receiver, 1, color
    while (worker, wanted) in partner[side]:
        next_worker = partner[side].pop((worker, wanted))
        del partner[1 - side][next_worker, wanted]
        path.append((side, worker, next_worker, other if wanted == color else color))
        worker, side, wanted = next_worker, 1 - side, other if wanted == color else color
    for side, worker, next_worker, new in path:
        partner[side][worker, new] = next_worker
        partner[1 - side][next_worker, new] = worker


def completed(pairs: Sequence[tuple[int, int]], num_workers: int) -> list[tuple[int, int]]:
    """A full permutation: workers without a partner get one and ignore what they receive."""
    workers = range(num_workers)
    senders, receivers = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    idle = zip(
        (i for i in workers if i not in senders),
        (i for i in workers if i not in receivers),
        strict=True,
    )
    return [*pairs, *idle]
