"""Batches of examples, in random or in their own order, as Grain pipelines.

Their iterators save and restore their position (`get_state`, `set_state`) and so can be
checkpointed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from experiments.data import augmentation
from experiments.data.tasks import Split

MOST_AHEAD = 1000  # threads that read, batches that wait


def index_batches(
    n: int,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.DatasetIterator[np.ndarray]:
    """Random batches of indices, for data that already lie on the device.

    Each epoch is a new random order of all `n` indices, cut into batches; what is left over is
    dropped.

    Example:
      >>> from experiments.data import index_batches
      >>> iterator = index_batches(10, batch_size=4, seed=0)
      >>> next(iterator).shape
      (4,)
      >>> state = iterator.get_state()
      >>> batch = next(iterator)
      >>> iterator.set_state(state)
      >>> bool((next(iterator) == batch).all())
      True

    Args:
      n: number of examples.
      batch_size: examples per batch, at most `n`.
      seed: decides the order, at least 0; any two seeds give unrelated ones.
      num_epochs: number of passes, at least 1; `None` never ends.
      shard: gives one process its part of each batch, see `batches`; default: whole batches.

    Returns:
      A checkpointable iterator of int32 arrays of shape (batch_size,), or of one shard's part.

    Raises:
      ValueError: a number is out of its range, or the processes cannot share a batch evenly.
    """
    return iter(_dataset(lambda _, rows: rows, n, batch_size, seed, num_epochs, shard))


def batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard: grain.sharding.ShardOptions | None = None,
    augment: Sequence[str] = (),
    num_classes: int = 0,
    workers: int = 0,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Random batches of examples, in the order that `index_batches` gives.

    Several processes share the work: with `shard=grain.sharding.ShardByJaxProcess()` process i of
    n reads the i-th of n equal parts of each batch. The parts, one after the other, are the batch
    of a single process, and the position counts whole batches: saved by n processes, it serves any
    other number. Neither do workers or augmentation change it.

    Example:
      >>> from experiments.data import batches, load_task
      >>> iterator = iter(batches(load_task("digits").train, batch_size=32, seed=0))
      >>> batch = next(iterator)
      >>> batch["x"].shape, batch["y"].shape
      ((32, 8, 8, 1), (32,))

    Args:
      split: the examples.
      batch_size: examples per batch, over all processes; at most the number of examples.
      seed: decides the order, and what is augmented, from 0 to 2**31 - 1; any two seeds give
        unrelated ones.
      num_epochs: number of passes, at least 1; `None` never ends.
      shard: the part of each batch to read; default: all of it.
      augment: names of `augmentation.OPERATIONS`.
      num_classes: number of classes, for `mixup`.
      workers: number of threads that read and augment batches ahead, two for each, up to 1000; 0:
        the thread that asks for a batch does.

    Returns:
      A Grain data set of `{"x", "y"}`; its iterators are checkpointable.

    Raises:
      ValueError: a number is out of its range, the processes cannot share a batch evenly, or the
        augmentation does not fit the examples.
    """

    def plain(_: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": split.x[rows], "y": split.y[rows]}

    read = (
        augmentation.Augmentation(split, tuple(augment), seed=seed, num_classes=num_classes)
        if augment
        else plain
    )
    return _dataset(read, len(split), batch_size, seed, num_epochs, shard, workers)


def in_order(
    split: Split, batch_size: int, workers: int = 0
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """All examples once, in their order; the last batch may be smaller.

    Args:
      split: the examples.
      batch_size: examples per batch, at least 1.
      workers: number of threads that read batches ahead, as in `batches`, up to 1000; 0: the
        thread that asks for a batch does.

    Returns:
      A Grain data set of `{"x", "y"}`.

    Raises:
      ValueError: a number is out of its range.
    """

    def read(number: int) -> dict[str, np.ndarray]:
        rows = slice(number * batch_size, (number + 1) * batch_size)
        return {"x": split.x[rows], "y": split.y[rows]}

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    numbers = grain.MapDataset.range(math.ceil(len(split) / batch_size))
    return numbers.map(read).to_iter_dataset(_read_options(workers))


def _dataset(
    read: Callable[[int, np.ndarray], Any],
    n: int,
    batch_size: int,
    seed: int,
    num_epochs: int | None,
    shard: grain.sharding.ShardOptions | None,
    workers: int = 0,
) -> grain.IterDataset[Any]:
    """What `read` makes of an epoch and the rows of each batch."""
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} examples, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None, got {num_epochs}")
    shard = shard or grain.sharding.NoSharding()
    size, rest = divmod(batch_size, shard.shard_count)
    if rest:
        raise ValueError(
            f"batch_size {batch_size} does not split evenly over {shard.shard_count} processes; "
            f"use a multiple of {shard.shard_count}"
        )
    parts = n // batch_size * shard.shard_count  # of an epoch's batches

    # Grain's own `shuffle` and `batch` cost 13 microseconds per example on one core, more than a
    # small model's training step, and start epoch e of seed s + 1 in the order of epoch e + 1 of
    # seed s. One permutation per epoch costs 10 microseconds per batch, and seeds are unrelated.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(n).astype(np.int32)

    def part(index: int, _: int) -> Any:
        epoch, position = divmod(index, parts)
        return read(epoch, order(epoch)[position * size : (position + 1) * size])

    dataset = grain.MapDataset.range(parts).repeat(num_epochs).map_with_index(part)
    return dataset[shard.shard_index :: shard.shard_count].to_iter_dataset(_read_options(workers))


def _read_options(workers: int) -> grain.ReadOptions:
    if not 0 <= workers <= MOST_AHEAD:
        raise ValueError(f"workers must be between 0 and {MOST_AHEAD}, got {workers}")
    # Without workers in the calling thread: a batch is ready sooner than a thread hands it over.
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
