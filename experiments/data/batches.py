"""Batches of examples, in random order or as they come, as Grain pipelines.

Their iterators save and restore their position (`get_state`, `set_state`) and so can be
checkpointed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data import augmentation
from experiments.data.tasks import Split

# Grain is imported where it is used: that takes half a second, which no `--help` should wait for.
if TYPE_CHECKING:
    import grain

MOST_AHEAD = 1000  # the most threads that read, and batches that wait


def index_batches(
    n: int,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.DatasetIterator[np.ndarray]:
    """Random batches of indices, for data that already lie on the device.

    Each epoch is a new random order of all `n` indices, cut into batches; the remainder is dropped.

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
      seed: seed of the order, at least 0; any two seeds give unrelated orders.
      num_epochs: number of passes, at least 1; `None` never ends.
      shard: the process whose part of each batch is read, such as
        `grain.sharding.ShardByJaxProcess()`; `None` reads whole batches.

    Returns:
      A checkpointable iterator of int32 arrays of shape (batch_size,), or of one shard's part.

    Raises:
      ValueError: a number is out of its range, or the processes cannot share a batch evenly.
    """
    return iter(_dataset(lambda _, rows: rows, n, batch_size, seed, num_epochs, shard))


def index_steps(n: int, *, batch_size: int, seed: int, steps: int) -> np.ndarray:
    """The first batches of `index_batches`, for a whole training.

    Example:
      >>> from experiments.data import index_steps
      >>> index_steps(10, batch_size=4, seed=0, steps=3).shape
      (3, 4)

    Args:
      n: number of examples.
      batch_size: examples per batch, at most `n`.
      seed: seed of the order, at least 0.
      steps: number of batches, at least 1.

    Returns:
      Indices, int32, (steps, batch_size).

    Raises:
      ValueError: a number is out of its range.
    """
    rows = index_batches(n, batch_size=batch_size, seed=seed)
    return np.stack([np.asarray(next(rows), np.int32) for _ in range(steps)])


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

    Several processes can share the work: with `shard=grain.sharding.ShardByJaxProcess()` process i
    of n reads the i-th of n equal parts of each batch. The parts in order are the batch of a single
    process. The position counts whole batches, so that one saved by n processes serves
    any other number of them; it does not depend on workers or augmentation either.

    Example:
      >>> from experiments.data import batches, load_task
      >>> iterator = iter(batches(load_task("digits").train, batch_size=32, seed=0))
      >>> batch = next(iterator)
      >>> batch["x"].shape, batch["y"].shape
      ((32, 8, 8, 1), (32,))

    Args:
      split: the examples.
      batch_size: examples per batch, over all processes; at most the number of examples.
      seed: seed of the order and of the augmentation, from 0 to 2**31 - 1; any two seeds give
        unrelated orders.
      num_epochs: number of passes, at least 1; `None` never ends.
      shard: the process whose part of each batch is read; `None` reads whole batches.
      augment: names of the operations of `augmentation.OPERATIONS` to apply.
      num_classes: number of classes, which the operation `mixup` needs.
      workers: number of threads, up to 1000, that read and augment batches ahead, two batches
        each; with 0 the calling thread reads each batch when it is needed.

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
    """All examples once, in the order of the split; the last batch may be smaller.

    Args:
      split: the examples.
      batch_size: examples per batch, at least 1.
      workers: number of threads, up to 1000, that read batches ahead, two each; with 0 the calling
        thread reads each batch when it is needed.

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
    import grain

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
    """The results of `read` for the epoch and the rows of each batch."""
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} examples, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None, got {num_epochs}")
    import grain

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
    import grain

    # Without workers the calling thread reads: that is faster than a thread's handing over.
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
