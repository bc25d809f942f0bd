"""Batches that come ahead of their use are the same batches."""

from __future__ import annotations

import itertools
import threading
import time

import grain
import jax
import numpy as np
import pytest

from experiments import data


def put_on(sharding):
    return lambda batch: jax.device_put(batch, sharding)


def pipelines():
    split = data.load_task("digits").validation
    batches = data.batches(split, batch_size=100, seed=3)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    yield "host", lambda: iter(batches)
    yield "device", lambda: data.prefetch_to_device(iter(batches), size=3)
    yield "mesh", lambda: data.prefetch_to_device(iter(batches), put_on(sharding))


@pytest.mark.parametrize("which", ["host", "device", "mesh"])
def test_a_restored_iterator_continues_where_it_was_saved(which):
    make = dict(pipelines())[which]
    iterator = make()
    for _ in range(4):  # into the second epoch of three batches
        next(iterator)
    state = iterator.get_state()
    following = [next(iterator) for _ in range(4)]
    again = make()
    for target in (again, iterator):  # a fresh one, and one that has gone on
        target.set_state(state)
        for batch in following:
            jax.tree.map(np.testing.assert_array_equal, next(target), batch)


def test_prefetching_changes_nothing_but_the_place():
    split = data.load_task("digits").validation
    dataset = data.batches(split, batch_size=100, seed=3, num_epochs=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    fetched = list(data.prefetch_to_device(iter(dataset), put_on(sharding), size=4))
    assert len(fetched) == 6
    for on_device, on_host in zip(fetched, dataset, strict=True):
        assert {leaf.sharding for leaf in on_device.values()} == {sharding}
        jax.tree.map(np.testing.assert_array_equal, on_device, on_host)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def count_to(n, pulled):
    for i in range(n):
        pulled.append(i)
        yield np.full(2, i)


def test_prefetching_works_on_any_iterator_and_stays_ahead_by_its_size():
    pulled = []
    with data.prefetch_to_device(count_to(9, pulled), size=3) as iterator:
        assert pulled == []
        assert next(iterator)[0] == 0
        # Three wait, one is being made; and no more, however long one waits.
        until(lambda: len(pulled) == 5)
        time.sleep(0.05)
        assert pulled == [0, 1, 2, 3, 4]
        assert [int(batch[0]) for batch in iterator] == [1, 2, 3, 4, 5, 6, 7, 8]
        with pytest.raises(StopIteration):
            next(iterator)


def test_without_prefetching_a_batch_is_made_when_it_is_asked_for():
    pulled = []
    iterator = data.prefetch_to_device(count_to(5, pulled), size=0)
    for i in range(5):
        assert int(next(iterator)[0]) == i
        assert pulled == list(range(i + 1))


def test_the_next_batch_is_made_while_the_last_one_is_used():
    used, made = threading.Event(), threading.Event()

    def source():
        yield np.zeros(1)
        assert used.wait(20)  # would never come if the consumer had to wait for this batch
        made.set()
        yield np.ones(1)

    with data.prefetch_to_device(source(), size=1) as iterator:
        next(iterator)
        used.set()
        assert made.wait(20)
        assert next(iterator)[0] == 1


def test_what_goes_wrong_in_the_background_is_raised_in_its_place():
    class Source:
        def __init__(self):
            self.position = 0

        def __next__(self):
            self.position += 1
            if self.position == 3:
                raise data.DataError("picture 3 is damaged")
            return np.full(1, self.position)

        def get_state(self):
            return {"position": self.position}

        def set_state(self, state):
            self.position = state["position"]

    with data.prefetch_to_device(Source(), size=4) as iterator:
        assert [int(next(iterator)[0]) for _ in range(2)] == [1, 2]
        with pytest.raises(data.DataError, match="picture 3 is damaged"):
            next(iterator)
        assert iterator.get_state() == {"position": 2}
        iterator.set_state({"position": 3})  # behind it, all is well
        assert int(next(iterator)[0]) == 4


def test_closing_ends_the_background_work():
    pulled = []
    before = threading.active_count()
    iterator = data.prefetch_to_device(count_to(1000, pulled), size=2)
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before
    # Also when it was never asked for anything, and twice.
    unused = data.prefetch_to_device(count_to(3, []))
    unused.close()
    unused.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_and_augmentation_keep_batches_and_positions(workers):
    split = data.load_task("digits").validation
    arguments = {"batch_size": 40, "seed": 3, "augment": ("crop", "flip", "mixup")}
    expected = list(
        itertools.islice(data.batches(split, **arguments, num_classes=10), 30)
    )  # nine an epoch
    assert not (expected[0]["x"] == expected[9]["x"]).all()

    def make():
        dataset = data.batches(split, **arguments, num_classes=10, workers=workers)
        return data.prefetch_to_device(iter(dataset))

    with make() as iterator:
        for batch in expected[:13]:
            jax.tree.map(np.testing.assert_array_equal, next(iterator), batch)
        state = iterator.get_state()
    with make() as iterator:
        iterator.set_state(state)
        for batch in expected[13:]:
            jax.tree.map(np.testing.assert_array_equal, next(iterator), batch)
    # The parts of two processes are the whole batch, whoever reads.
    shards = [grain.sharding.ShardOptions(i, 2) for i in range(2)]
    parts = [
        data.batches(split, **arguments, num_classes=10, workers=workers, shard=shard)
        for shard in shards
    ]
    for batch, *pieces in itertools.islice(zip(expected, *parts, strict=False), 12):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)
