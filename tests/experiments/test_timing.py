"""The timer calls everything in turn and puts the right numbers beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import timing


def test_order_alternates_between_rounds() -> None:
    calls: list[str] = []

    def timer(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    seconds = timing.interleave([timer("a"), timer("b"), timer("c")], rounds=2)
    assert calls == ["a", "b", "c", "c", "b", "a"]
    assert seconds.tolist() == [[1, 6], [2, 5], [3, 4]]


def test_each_method_is_compared_with_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"base": iter([1.0, 2.0, 4.0, 2.0]), "first": iter([2.0, 6.0]), "second": iter([8, 16])}
    monkeypatch.setattr(timing.Case, "time", lambda self: next(times[self.name]))
    cases = [
        timing.Case("base", None, lambda step, carry: carry, None, 1),
        timing.Case("first", "base", lambda step, carry: carry, None, 1, target=2.0),
        timing.Case("second", "base", lambda step, carry: carry, None, 1),
    ]
    # base 1, first 2, base 2, second 8; then second 16, base 4, first 6, base 2.
    base, first, second = timing.measure(cases, repeats=2, warm_ups=0)
    assert (base["ratio"], base["milliseconds"][1]) == (None, 2000)
    assert (first["ratio"], first["milliseconds"][1]) == ([2.25, 2.5, 2.75], 4000)
    assert (second["ratio"], second["target"]) == ([4, 4, 4], None)


def test_a_base_alone_is_timed() -> None:
    (row,) = timing.measure([timing.Case("base", None, lambda step, carry: carry, 0, 3)], repeats=2)
    assert (row["name"], row["ratio"]) == ("base", None)
    assert row["milliseconds"][0] >= 0
