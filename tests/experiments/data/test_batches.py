"""Batches: their order, their positions and their parts."""

from __future__ import annotations

import itertools

import grain
import numpy as np
import pytest

from experiments import data


def take(iterator, count):
    return [np.asarray(batch) for batch in itertools.islice(iterator, count)]


def test_every_epoch_is_a_new_order_of_all_indices():
    batches = take(data.index_batches(13, batch_size=4, seed=0), 9)
    np.testing.assert_array_equal(data.index_steps(13, batch_size=4, seed=0, steps=9), batches)
    assert {batch.dtype for batch in batches} == {np.dtype("int32")}
    epochs = [np.concatenate(batches[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 12  # the remainder of one is dropped
        assert epoch.min() >= 0
        assert epoch.max() < 13
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()


def test_the_seed_decides_the_order_and_neighbors_share_none():
    def epochs(seed):
        return {tuple(b) for b in take(data.index_batches(50, batch_size=50, seed=seed), 10)}

    assert epochs(0) == epochs(0)
    assert len(epochs(0) | epochs(1) | epochs(2)) == 30


def test_number_of_epochs():
    assert len(list(data.index_batches(13, batch_size=4, seed=0, num_epochs=2))) == 6


def test_all_positions_are_equally_likely():
    orders = np.stack(take(data.index_batches(5, batch_size=5, seed=1), 2_000))
    counts = np.stack([np.bincount(column, minlength=5) for column in orders.T])
    # Binomial, mean 400 and standard deviation 18: five of them are never left by chance.
    assert abs(counts - 400).max() < 90


@pytest.mark.parametrize("batch_size", [0, -1, 14])
def test_impossible_batch_size(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and the 13 examples, got {batch_size}"):
        data.index_batches(13, batch_size=batch_size, seed=0)


def test_impossible_numbers():
    split = data.load_task("digits").validation
    for options, message in (
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, or None, got 0"),
        ({"workers": -1}, "workers must be between 0 and 1000, got -1"),
        ({"workers": 10**9}, "workers must be between 0 and 1000"),
        ({"augment": ("mixup",)}, "mixup needs the number of classes, more than .* label 9; got"),
        ({"augment": ("blur",)}, "unknown augmentation 'blur'; valid: randaugment, crop"),
        ({"augment": ("flip",), "seed": 2**31}, "seed must be between 0 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            data.batches(split, **{"batch_size": 8, "seed": 0} | options)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.in_order(split, 0)
    for size in (-1, 10**9):
        with pytest.raises(ValueError, match=f"size must be between 0 and 1000, got {size}"):
            data.prefetch_to_device(iter([]), size=size)


def test_batches_hold_the_examples_of_the_indices():
    split = data.load_task("digits").train
    indices = data.index_batches(len(split), batch_size=64, seed=3)
    batches = data.batches(split, batch_size=64, seed=3)
    for index, batch in itertools.islice(zip(indices, batches, strict=False), 20):
        np.testing.assert_array_equal(batch["x"], split.x[index])
        np.testing.assert_array_equal(batch["y"], split.y[index])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_parts_of_all_processes_are_the_whole_batch(count):
    split = data.load_task("digits").train
    arguments = {"batch_size": 64, "seed": 3, "num_epochs": 2}
    whole = list(data.batches(split, **arguments))
    shards = [grain.sharding.ShardOptions(i, count) for i in range(count)]
    parts = [list(data.batches(split, **arguments, shard=shard)) for shard in shards]
    assert [len(part) for part in parts] == [len(whole)] * count
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert [len(piece["y"]) for piece in pieces] == [64 // count] * count
        for name in ("x", "y"):
            joined = np.concatenate([piece[name] for piece in pieces])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_position_saved_by_some_processes_serves_any_other_number():
    def iterators(count):
        shards = [grain.sharding.ShardOptions(i, count) for i in range(count)]
        return [data.index_batches(50, batch_size=8, seed=0, shard=shard) for shard in shards]

    expected = take(data.index_batches(50, batch_size=8, seed=0), 20)
    batches = []
    state = None
    for count in (1, 2, 4, 1):  # five batches each, over the end of an epoch of six
        processes = iterators(count)
        for process in processes:
            if state is not None:
                process.set_state(state)
        batches += [np.concatenate([next(p) for p in processes]) for _ in range(5)]
        states = [process.get_state() for process in processes]
        assert all(other == states[0] for other in states)
        state = states[-1]
    np.testing.assert_array_equal(batches, expected)


def test_a_batch_that_does_not_split_over_the_processes():
    shard = grain.sharding.ShardOptions(0, 3)
    with pytest.raises(ValueError, match="batch_size 8 does not split evenly over 3 processes"):
        data.index_batches(50, batch_size=8, seed=0, shard=shard)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_examples_in_order(workers):
    split = data.load_task("digits").validation
    found = list(data.in_order(split, 100, workers))
    assert [len(batch["y"]) for batch in found] == [100, 100, 100, 60]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in found]), split.x)
    np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in found]), split.y)
