"""Batches whose kind follows the loss."""

from __future__ import annotations

import json
import math

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.detection import stitch
from experiments.data.following import BatchChooser, FollowingBatches, following_batches
from experiments.data.tasks import Split


def test_choices_of_the_authors_rule():
    chooser = BatchChooser(threshold=0.1)
    assert chooser.share == 0.0
    assert chooser.choose(chooser.share) == "stitched"  # the first step
    chosen = [chooser.choose(share) for share in (0.05, 0.2, 0.1, 0.0999)]
    assert chosen == ["stitched", "regular", "regular", "stitched"]
    assert chooser.counts == {"regular": 2, "stitched": 3}


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf])
def test_a_share_that_is_not_finite_asks_for_a_regular_batch(share):
    assert BatchChooser(threshold=2.0).choose(share) == "regular"


def test_thresholds_at_the_ends():
    never, always = BatchChooser(threshold=0.0), BatchChooser(threshold=1.5)
    shares = (0.0, 0.3, 1.0)
    assert [never.choose(share) for share in shares] == ["regular"] * 3
    assert [always.choose(share) for share in shares] == ["stitched"] * 3


def test_a_chooser_goes_on_from_its_state():
    chooser = BatchChooser(kinds=("few", "many"))
    chooser.choose(0.05)
    chooser.choose(math.nan)
    other = BatchChooser(kinds=("few", "many"))
    other.set_state(chooser.get_state())
    assert math.isnan(other.share)
    assert other.counts == {"few": 1, "many": 1}
    with pytest.raises(ValueError, match="the state is of the kinds few, many, this chooser's"):
        BatchChooser().set_state(chooser.get_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, "threshold must be a number of at least 0, got -0.1"),
        ({"threshold": math.nan}, "threshold must be a number of at least 0, got nan"),
        ({"threshold": True}, "threshold must be a number of at least 0, got True"),
        ({"threshold": "a"}, "threshold must be a number of at least 0, got 'a'"),
        ({"kinds": ("one", "one")}, "kinds must be two different names"),
        ({"kinds": "ab"}, "kinds must be two different names, got 'ab'"),
        ({"kinds": (1, 2)}, "kinds must be two different names"),
        ({"kinds": None}, "kinds must be two different names, got None"),
    ],
)
def test_wrong_choosers(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchChooser(**arguments)


@pytest.mark.parametrize("share", ["a", None, [0.1, 0.2], np.zeros(2)])
def test_a_share_is_one_number(share):
    with pytest.raises(ValueError, match="one number"):
        BatchChooser().choose(share)


def test_the_share_of_a_batch_is_one_number():
    batches = FollowingBatches({"regular": iter("a"), "stitched": iter("b")}, BatchChooser())
    next(batches)
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\)"):
        batches.tell(jnp.zeros(2))


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ({"a": iter("a")}, ValueError, "sources are of a, the chooser's kinds are regular, st"),
        ([iter("a")], TypeError, "a dictionary from each kind to an iterator of batches, got list"),
        ({"regular": "a", "stitched": "b"}, TypeError, "source of regular must be an iterator"),
    ],
)
def test_wrong_sources(sources, error, message):
    with pytest.raises(error, match=message):
        FollowingBatches(sources, BatchChooser())
    with pytest.raises(TypeError, match="chooser must be a BatchChooser, got None"):
        FollowingBatches(sources, None)


def test_a_batch_whose_share_was_not_told_is_not_passed_over():
    batches = FollowingBatches({"regular": iter("ab"), "stitched": iter("cd")}, BatchChooser())
    assert next(batches) == "c"
    with pytest.raises(RuntimeError, match=r"call tell\(share\) before asking for another batch"):
        next(batches)
    batches.tell(0.5)
    assert next(batches) == "a"


def test_the_order_of_the_kinds_in_a_saved_state_does_not_matter():
    chooser = BatchChooser(kinds=("usual", "more"))
    chooser.choose(0.05)
    saved = json.loads(json.dumps(chooser.get_state(), sort_keys=True))
    chooser.set_state(saved)
    assert list(chooser.counts.items()) == [("usual", 0), ("more", 1)]


def pictures(number: int = 24) -> Split:
    """Pictures of one number each, which their boxes have as their class, too."""
    x = np.broadcast_to(np.arange(number, dtype=np.float32)[:, None, None, None], (number, 4, 4, 1))
    y = np.full((number, 1, 5), [0, 1, 1, 3, 3], np.float32)
    y[:, 0, 0] = np.arange(number)
    return Split(x, y)


def open_batches(**options):
    return following_batches(pictures(), batch_size=2, seed=3, **options)


def play(batches, shares):
    seen = []
    for share in shares:
        batches.tell(jnp.float32(share))
        batch = next(batches)
        seen.append((batches.kind, np.asarray(batch["x"]).tolist(), np.asarray(batch["y"])))
    return seen


def test_both_kinds_have_equal_shapes_and_independent_orders():
    shares = [0.5, 0.0, 0.5, 0.5, 0.0]
    with open_batches() as batches:
        seen = play(batches, shares)
    assert [kind for kind, *_ in seen] == [
        *("regular", "stitched", "regular", "regular", "stitched")
    ]
    assert {(np.shape(x), y.shape) for _, x, y in seen} == {((2, 4, 4, 1), (2, 4, 5))}
    # Regular batches go on as if there were no others, and so do stitched ones.
    for kind, share in (("regular", 0.5), ("stitched", 0.0)):
        with open_batches() as alone:
            expected = play(alone, [share] * 3)
        of_kind = [each for each in seen if each[0] == kind]
        for got, wanted in zip(of_kind, expected, strict=False):
            assert got[1] == wanted[1]
            np.testing.assert_array_equal(got[2], wanted[2])
    for kind, x, y in seen:
        classes = y[..., 0]
        if kind == "regular":
            assert (classes[:, 1:] == -1).all()  # room that a stitched batch needs
        else:  # each quarter shows the picture of its box
            np.testing.assert_array_equal(np.array(x)[:, ::2, ::2, 0].reshape(2, 4), classes)


def test_position_has_the_share_that_decides_on_the_next_batch():
    with open_batches() as batches:
        play(batches, [0.5, 0.0, 0.5])
        batches.tell(0.0)
        state = batches.get_state()
        assert state["chooser"] == {"share": 0.0, "counts": {"regular": 2, "stitched": 1}}
        expected = [next(batches)["y"], *(y for *_, y in play(batches, [0.5, 0.0]))]
    with open_batches(prefetch=0) as again:
        again.set_state(state)
        got = [next(again)["y"], *(y for *_, y in play(again, [0.5, 0.0]))]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_share_that_is_not_finite_in_a_position():
    with open_batches() as batches:
        batches.tell(jnp.nan)
        state = batches.get_state()
    assert state["chooser"]["share"] is None
    with open_batches() as again:
        again.set_state(state)
        next(again)
        assert again.kind == "regular"


def test_parts_of_processes_are_the_batch_of_one():
    for share in (0.5, 0.0):
        with open_batches() as batches:
            ((_, _, whole),) = play(batches, [share])
        parts = []
        for i in range(2):
            with open_batches(shard=grain.sharding.ShardOptions(i, 2)) as part:
                parts.append(play(part, [share])[0][2])
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_too_few_pictures():
    with pytest.raises(ValueError, match="takes 28 pictures, there are 24; use a batch size of at"):
        following_batches(pictures(), batch_size=7, seed=0)


def test_stitching_a_batch_is_that_of_stitch():
    with open_batches() as batches:
        ((_, x, y),) = play(batches, [0.0])
    numbers = y[..., 0].ravel().astype(int)
    expected = stitch(pictures().x[numbers], pictures().y[numbers])
    np.testing.assert_array_equal(x, expected[0])
    np.testing.assert_array_equal(y, expected[1])
