"""Data that follow the loss: the kind of the next batch depends on the loss of the one before.

Dynamic scale training (Chen et al., `Dynamic Scale Training for Object Detection
<https://arxiv.org/abs/2004.12432>`_, 2020, section 3, and the authors' code) looks at the share of
the loss that comes from small objects. Where it is below a threshold, the next batch is made of
stitched pictures, in which objects are half as large; otherwise it is a regular one. The general
form here: where the share of the loss that comes from some group is low, the next batch is of the
kind that has more of that group.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.data.batches import batches
from experiments.data.detection import stitch
from experiments.data.prefetch import DevicePrefetcher, prefetch_to_device
from experiments.data.tasks import Split

if TYPE_CHECKING:  # see `batches`
    import grain

# The authors' threshold (their configuration files; Chen et al., 2020, section 4.3).
THRESHOLD = 0.1
KINDS = ("regular", "stitched")
# Pictures of the data set that go into one picture of a stitched batch.
PER_STITCHED = 4
# Makes the order of the pictures to stitch another one than that of regular batches.
_STREAM = 0x73746974


class BatchChooser:
    """Chooses the kind of the next batch by the share of the loss that comes from a group.

    A share below the threshold asks for more of the group; a share that is equal or higher, or not
    finite, such as the 0 / 0 of a batch without any object, does not. As in the authors' code the
    share is that of one batch, also if that one was of the second kind, and is not smoothed.

    Example:
      >>> chooser = BatchChooser(threshold=0.1)
      >>> [chooser.choose(share) for share in (0.05, 0.2, 0.1, 0.0999)]
      ['stitched', 'regular', 'regular', 'stitched']
      >>> chooser.counts
      {'regular': 2, 'stitched': 2}

    Args:
      threshold: the share below which a batch of the second kind follows; at least 0. With 0 none
        ever does, above 1 all are of the second kind.
      kinds: the names of the usual kind and of the one with more of the group.

    Attributes:
      share: the last share that `choose` was given; at the start 0, which is below any threshold
        but 0, so that a run begins with the second kind.
      counts: how often each kind was chosen.

    Raises:
      ValueError: the threshold is no number or negative, or the kinds are not two names.
    """

    def __init__(self, threshold: float = THRESHOLD, kinds: tuple[str, str] = KINDS):
        is_number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
        if not (is_number and threshold >= 0):
            raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}")
        names = tuple(kinds) if isinstance(kinds, tuple | list) else ()
        if len(names) != 2 or names[0] == names[1] or not all(isinstance(n, str) for n in names):
            raise ValueError(f"kinds must be two different names, got {kinds!r}")
        self.threshold, self.kinds = threshold, names
        self.share = 0.0
        self.counts = dict.fromkeys(kinds, 0)

    def choose(self, share: float) -> str:
        """The kind of the next batch.

        Args:
          share: the group's loss over all of the loss, of the batch before.

        Returns:
          One of ``kinds``.

        Raises:
          ValueError: the share is not one number.
        """
        self.share = _scalar(share)
        more = math.isfinite(self.share) and self.share < self.threshold
        kind = self.kinds[more]
        self.counts[kind] += 1
        return kind

    def get_state(self) -> dict[str, Any]:
        """The last share, ``None`` where it is not finite, and the counts, for a checkpoint."""
        share = self.share if math.isfinite(self.share) else None
        return {"share": share, "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` returned.

        Args:
          state: of a chooser with the same kinds.

        Raises:
          ValueError: the kinds are others.
        """
        if state["counts"].keys() != {*self.kinds}:
            raise ValueError(
                f"the state is of the kinds {', '.join(state['counts'])}, this chooser's are "
                f"{', '.join(self.kinds)}; make it with the same ones"
            )
        self.share = math.nan if state["share"] is None else float(state["share"])
        self.counts = {kind: state["counts"][kind] for kind in self.kinds}


class FollowingBatches(Iterator[Any]):
    """Batches of two kinds, each from an iterator of its own, as a chooser chooses.

    `tell` has to be called between two batches: the choice of step t needs the share of step t - 1.
    Each kind goes on where it stopped, whatever came from the other one in between.

    Example:
      >>> sources = {"regular": iter("abc"), "stitched": iter("xyz")}
      >>> followed = FollowingBatches(sources, BatchChooser())
      >>> seen = [next(followed)]
      >>> for share in (0.3, 0.2, 0.01):
      ...     followed.tell(share)
      ...     seen.append(next(followed))
      >>> seen
      ['x', 'a', 'b', 'y']

    Args:
      sources: an iterator for each of the chooser's kinds; to save positions, with ``get_state``
        and ``set_state``.
      chooser: what chooses.

    Attributes:
      kind: the kind of the last batch; ``None`` before the first one.

    Raises:
      TypeError: the chooser is none, or the sources are not a mapping to iterators.
      ValueError: the sources are of other kinds than the chooser's.
    """

    def __init__(self, sources: Mapping[str, Any], chooser: BatchChooser):
        if not isinstance(chooser, BatchChooser):
            raise TypeError(f"chooser must be a BatchChooser, got {chooser!r}")
        if not isinstance(sources, Mapping):
            raise TypeError(
                "sources must be a dictionary from each kind to an iterator of batches, got "
                f"{type(sources).__name__}"
            )
        if sources.keys() != {*chooser.kinds}:
            raise ValueError(
                f"sources are of {', '.join(map(str, sources))}, the chooser's kinds are "
                f"{', '.join(chooser.kinds)}; give one for each kind"
            )
        for kind, source in sources.items():
            if not isinstance(source, Iterator):
                raise TypeError(
                    f"the source of {kind} must be an iterator, such as iter(batches), got "
                    f"{type(source).__name__}"
                )
        self._sources, self._chooser = dict(sources), chooser
        self._share: Any = chooser.share  # maybe on its way from the device
        self._is_told = True
        self.kind: str | None = None

    def __enter__(self) -> FollowingBatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __next__(self) -> Any:
        if not self._is_told:
            raise RuntimeError(
                "the share of the last batch decides on the next one: call tell(share) before "
                "asking for another batch"
            )
        self.kind = self._chooser.choose(self._told())
        batch = next(self._sources[self.kind])
        self._is_told = False
        return batch

    def tell(self, share: Any) -> None:
        """Takes the share of the last batch; it is waited for when the next batch is asked for.

        Args:
          share: a scalar, which may lie on a device and, of several processes, is the same in all.

        Raises:
          ValueError: the share is not one number.
        """
        if np.shape(share) != ():
            raise ValueError(
                f"tell takes the share of the whole batch, one number, got shape {np.shape(share)}"
            )
        self._share, self._is_told = share, True

    def get_state(self) -> dict[str, Any]:
        """The positions of both kinds and the share that decides on the next batch."""
        chooser = self._chooser.get_state()
        share = self._told()
        chooser["share"] = share if math.isfinite(share) else None
        sources = {kind: source.get_state() for kind, source in self._sources.items()}
        return {"chooser": chooser, "sources": sources}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a position that `get_state` returned."""
        self._chooser.set_state(state["chooser"])
        self._share, self._is_told = self._chooser.share, True
        for kind, source in self._sources.items():
            source.set_state(state["sources"][kind])

    def close(self) -> None:
        """Ends the background work of all sources; none can be used afterwards."""
        for source in self._sources.values():
            if hasattr(source, "close"):
                source.close()

    def _told(self) -> float:
        self._share = _scalar(jax.device_get(self._share))
        return self._share


def _scalar(share: Any) -> float:
    """The share as a number."""
    try:
        return float(share)
    except (TypeError, ValueError):
        raise ValueError(
            f"a share is the loss of the group over all of the loss, one number, got {share!r}"
        ) from None


def following_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    chooser: BatchChooser | None = None,
    shard: grain.sharding.ShardOptions | None = None,
    workers: int = 0,
    put: Callable[[Any], Any] = jax.device_put,
    prefetch: int = 2,
) -> FollowingBatches:
    """Regular and stitched batches of pictures with boxes, as `FollowingBatches`.

    Both kinds have the same shapes, so that one compiled step takes both: the boxes of a regular
    batch are padded to as many as a stitched picture has room for.

    Args:
      split: pictures and boxes, as `detection.stitch` takes them.
      batch_size: pictures per batch, over all processes; a stitched batch takes four times as many
        from the data set.
      seed: seed of the orders, from 0 to 2**31 - 1; those of the two kinds are unrelated.
      chooser: what chooses, between `KINDS`; ``None``: a `BatchChooser` with its defaults.
      shard: the process whose part of each batch is read; `None` reads whole batches.
      workers: number of threads that read batches of each kind ahead, see `batches`.
      put: places a batch, see `prefetch_to_device`.
      prefetch: number of batches of each kind that wait on the device.

    Returns:
      The batches, of `{"x", "y"}`.

    Raises:
      ValueError: a number is out of its range, or there are fewer pictures than a stitched batch
        takes.
    """
    if PER_STITCHED * batch_size > len(split):
        raise ValueError(
            f"a stitched batch of {batch_size} takes {PER_STITCHED * batch_size} pictures, there "
            f"are {len(split)}; use a batch size of at most {len(split) // PER_STITCHED}"
        )
    other = int(np.random.SeedSequence((seed, _STREAM)).generate_state(1)[0] >> 1)
    plain = batches(split, batch_size=batch_size, seed=seed, shard=shard, workers=workers)
    many = batches(
        split, batch_size=PER_STITCHED * batch_size, seed=other, shard=shard, workers=workers
    )
    datasets = {"regular": plain.map(_with_room), "stitched": many.map(_stitched)}
    sources: dict[str, DevicePrefetcher] = {
        kind: prefetch_to_device(iter(dataset), put, prefetch) for kind, dataset in datasets.items()
    }
    return FollowingBatches(sources, chooser or BatchChooser())


def _with_room(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with empty rows after the boxes of each picture."""
    y = batch["y"]
    empty = np.full((len(y), (PER_STITCHED - 1) * y.shape[1], y.shape[2]), -1, y.dtype)
    return {"x": batch["x"], "y": np.concatenate([y, empty], axis=1)}


def _stitched(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, y = stitch(batch["x"], batch["y"])
    return {"x": x, "y": y}
