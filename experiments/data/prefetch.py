"""Moves batches to the device in the background, ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.data.batches import MOST_AHEAD


def prefetch_to_device(
    iterator: Iterator[Any], put: Callable[[Any], Any] = jax.device_put, size: int = 2
) -> DevicePrefetcher:
    """Reads batches and moves them to the device in the background, ahead of their use.

    A thread of Grain's (`grain.experimental.ThreadPrefetchDatasetIterator`) works while the device
    computes, so that reading, augmentation and the transfer overlap with the steps. Pinned memory
    is left to JAX's runtime.

    Example:
      >>> from experiments.data import batches, load_task, prefetch_to_device
      >>> iterator = iter(batches(load_task("digits").train, batch_size=32, seed=0))
      >>> with prefetch_to_device(iterator) as prefetched:
      ...     batch = next(prefetched)
      >>> type(batch["x"]).__name__, batch["x"].shape
      ('ArrayImpl', (32, 8, 8, 1))

    Args:
      iterator: an iterator of pytrees of arrays; only the position of a Grain iterator can be
        saved.
      put: a function that places a batch, such as `Parallel.put_batch`, which makes global arrays
        of the parts of all processes; by default it moves the batch to the default device.
      size: number of batches, up to 1000, that wait on the device besides the one being made; with
        0 each batch is made when it is needed.

    Returns:
      An iterator of the same batches on the device. Its `get_state` and `set_state` count the
      batches it returned, not those that wait. An error in the background is raised in place of the
      batch that it concerns. `close`, or leaving its `with` block, ends the thread.

    Raises:
      ValueError: `size` is out of its range.
    """
    if not 0 <= size <= MOST_AHEAD:
        raise ValueError(f"size must be between 0 and {MOST_AHEAD}, got {size}")
    return DevicePrefetcher(iterator, put, size)


class DevicePrefetcher(Iterator[Any]):
    """The iterator that `prefetch_to_device` returns."""

    def __init__(self, iterator: Any, put: Callable[[Any], Any], size: int):
        self._placed = _Placed(iterator, put)
        import grain  # see `batches`

        # Older versions of Grain refuse a buffer of size 0.
        self._batches: Any = (
            grain.experimental.ThreadPrefetchDatasetIterator(self._placed, size)
            if size
            else self._placed
        )

    def __enter__(self) -> DevicePrefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> Any:
        """The position after the last batch that was returned."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Continues at a position that `get_state` returned."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Ends the background work; the iterator cannot be used afterwards."""
        self._batches.close()
        self._placed.close()


class _Placed(Iterator[Any]):
    """The batches of an iterator, placed."""

    def __init__(self, iterator: Any, put: Callable[[Any], Any]):
        self._iterator, self._put = iterator, put

    def __next__(self) -> Any:
        return self._put(next(self._iterator))

    def get_state(self) -> Any:
        return self._iterator.get_state() if hasattr(self._iterator, "get_state") else {}

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        if hasattr(self._iterator, "close"):
            self._iterator.close()
