"""The work behind the panels of the subspace study."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import UsageError
from experiments.runs.units import Store
from experiments.training.step import TrainState
from experiments.training.studies import subspace_panels
from experiments.training.studies.subspace_runs import Run, Study, alignment, update_products


def test_ablations_change_one_thing_at_a_time(study: Study) -> None:
    runs = list(subspace_panels.ablations(study.plan, 0))
    center = {
        method: subspace_panels.sgd(study.plan, 0, subspace_panels.ABLATION_RATE, **changes)
        for method, changes in (
            ("sgd", {}),
            ("bulk", subspace_panels.projected(study.plan, (0.0, 1.0))),
        )
    }
    for ablation, value, method, changed in runs:
        field = "directions" if ablation == "k" else ablation
        assert getattr(changed, field) == value
        assert (
            dataclasses.replace(changed, **{field: getattr(center[method], field)})
            == (center[method])
        )
    for method, expected in center.items():
        assert expected in [changed for _, _, name, changed in runs if name == method]


def test_update_products_are_those_of_the_formula() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(7, 3)))[0].T.astype(np.float32)
    gradient, before, after = random.normal(size=(3, 7)).astype(np.float32)
    inside = basis.T @ (basis @ gradient)
    outside, update = gradient - inside, after - before
    expected = [-update @ inside, inside @ inside, -update @ outside, outside @ outside]
    tree = [
        jax.tree.map(jnp.asarray, {"a": x[..., :4], "b": x[..., 4:]})
        for x in (basis, gradient, before, after)
    ]
    np.testing.assert_allclose(update_products(*tree), expected, rtol=1e-5)
    chi = alignment(*tree[:2])
    np.testing.assert_allclose(chi, np.linalg.norm(inside) / np.linalg.norm(gradient), rtol=1e-5)
    assert float(alignment(tree[0], jax.tree.map(jnp.zeros_like, tree[1]))) == 0


def test_sgd_that_diverges_is_an_error(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = dataclasses.replace(study.plan, learning_rate=1e30, switch_step=1)
    monkeypatch.setattr(study, "plan", hot)
    with pytest.raises(UsageError, match=r"SGD diverges at learning rate 1e\+30"):
        subspace_panels.follow_sgd(study, Store(tmp_path), 0)


def test_sgd_is_left_where_the_gradient_is_aligned(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace_panels, "SWITCH_ALIGNMENT", 0.1)
    store = Store(tmp_path)
    rows = subspace_panels.follow_sgd(study, store, 0)
    (check,) = (row for row in rows if "tracked_chi" in row)  # the first one was enough
    assert check["step"] == 10
    assert check["tracked_average"] == check["tracked_chi"] > 0.1
    assert all(row["switch_step"] == 10 and row["aligned"] for row in rows)
    assert rows[-1]["step"] == 10 + study.plan.scale.steps
    kept = subspace_panels.snapshots(study, store, 0)
    assert list(kept) == [10, 30]
    for step, params in kept.items():
        state = TrainState(jnp.array(step), params, study.start(0)[1], ())
        (row,) = (row for row in rows if row["step"] == step)
        assert study.evaluate(state)["train_loss"] == row["train_loss"]


def test_diverging_branch_ends_early(study: Study) -> None:
    run = subspace_panels.sgd(study.plan, 0, 1e30)
    rows = subspace_panels.train_branch(study, run, study.start(0)[0], 0, 20)
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[0]["train_loss"] > 0
    assert rows[1]["train_loss"] is None


def test_effective_rate_of_full_batch_descent_is_the_rate(study: Study) -> None:
    descent = Run(0, 0.05, batch_size=len(study.plan.task.train))
    rows = subspace_panels.effective_rates(study, descent)
    assert [row["step"] for row in rows] == [0, 20]
    for row in rows:
        assert row["dominant"] == pytest.approx(0.05, rel=1e-3)
        assert row["bulk"] == pytest.approx(0.05, rel=1e-3)
