"""Units of work and snapshots on disk, and rows as CSV."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.cli import UsageError
from experiments.runs.records import to_csv
from experiments.runs.units import Store, Unit

UNIT = Unit("switch", {"method": "sgd", "alpha": None, "seed": 0}, lambda: [{"step": 1}])


def test_a_unit_is_unfinished_until_it_is_saved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load(UNIT) is None
    store.save(UNIT, UNIT.work())
    assert store.path(UNIT) == tmp_path / "units" / "switch" / "sgd-0.json"
    (row,) = store.load(UNIT) or []
    assert list(row.items()) == [("method", "sgd"), ("alpha", None), ("seed", 0), ("step", 1)]


def test_snapshots_keep_their_order_and_structure(tmp_path: Path) -> None:
    store = Store(tmp_path)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2)}
    store.save_snapshots("seed0", {20: params, 10: jax.tree.map(jnp.negative, params)})
    loaded = store.snapshots("seed0", params, UNIT)
    assert list(loaded) == [20, 10]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == -b).all(), loaded[10], loaded[20]))
    with pytest.raises(UsageError, match=r"seed0\.npz is missing or damaged .*sgd-0\.json"):
        store.snapshots("seed0", {"w": params["w"]}, UNIT)
    with pytest.raises(UsageError, match=r"seed1\.npz is missing"):
        store.snapshots("seed1", params, UNIT)


def test_csv_refuses_a_value_without_a_column() -> None:
    assert to_csv([], ["step", "loss"]) == "step,loss\n"
    assert to_csv([{"loss": 0.1}], ["step", "loss"], header=False) == ",0.1\n"
    with pytest.raises(ValueError, match="rate"):
        to_csv([{"step": 1, "rate": 2}], ["step"])
