"""Each method is timed beside its base, in the forms of its step that matter."""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from experiments import timing
from experiments.methods import METHODS
from experiments.training.studies import method_cost


def test_curvature_methods_only_project_in_the_update() -> None:
    sgd, bulk = method_cost.update_cases("sgd", [METHODS["sgd"], METHODS["bulk_sgd"]], 1000)
    assert (sgd.base, bulk.base) == (None, "sgd")
    rows = timing.measure([sgd, bulk], repeats=1)
    assert [row["target"] for row in rows] == [None, None]


def test_forms_of_natural_gradients_are_cases_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kfac_jax", None)  # as if it were not installed
    group = [METHODS[name] for name in ("sgd", "kfac", "hessian_free")]
    cases = method_cost.natural_cases("sgd", group)
    named = [(case.name, case.base, case.period, case.target) for case in cases]
    assert named == [
        ("sgd", None, 1, None),
        ("kfac", "sgd", 10, 5.0),
        ("kfac, between", "sgd", 1, 2.0),
    ]
    assert cases[2].time() > 0
    assert cases[2].step == 1
    assert method_cost.natural_cases("sgd", [METHODS["sgd"], METHODS["demon_sgd"]]) == []
    names = [case.name for case in method_cost.compile_cases("sgd", group)]
    assert names == ["sgd", "kfac, inverses", "kfac, factors", "kfac, between", "hessian_free"]


def test_kfac_jax_stands_beside_kfac(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same loss, batch and settings, and with parameters of its own to donate."""
    registered: list[Any] = []
    made: list[Any] = []

    class Optimizer:
        """Takes the steps of gradient descent."""

        def __init__(self, value_and_grad_func: Any, **settings: Any):
            self.value_and_grad, self.settings = value_and_grad_func, settings
            made.append(self)

        def init(self, params: Any, key: Any, batch: Any) -> int:
            return 0

        def step(self, params: Any, state: int, key: Any, *, batch: Any, **rates: Any) -> Any:
            self.rates = rates
            value, grads = self.value_and_grad(params, batch)
            new = jax.tree.map(lambda p, g: p - rates["learning_rate"] * g, params, grads)
            return new, state + 1, {"loss": value}

    package = types.SimpleNamespace(
        Optimizer=Optimizer,
        register_softmax_cross_entropy_loss=lambda logits, labels: registered.append(
            (logits.shape, labels.shape)
        ),
    )
    monkeypatch.setitem(sys.modules, "kfac_jax", package)
    network = method_cost.Network(4)
    case = method_cost._kfac_jax_case(network, "sgd", METHODS["kfac"])
    assert case is not None
    (optimizer,) = made
    params, state = case.call(0, case.carry)
    assert (case.name, case.base, case.period, state) == ("kfac-jax", "sgd", 10, 1)
    assert registered == [((4, 10), (4,))]
    assert optimizer.settings["inverse_update_period"] == METHODS["kfac"].period
    grads = network.objective.grad(network.params, rest=network.rest, **network.batch)
    rate = optimizer.rates["learning_rate"]
    want = jax.tree.map(lambda p, g: p - rate * g, network.params, grads)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    owned = {id(leaf) for leaf in jax.tree.leaves(network.params)}
    assert not any(id(leaf) in owned for leaf in jax.tree.leaves(case.carry[0]))


def test_targets_are_of_what_is_timed() -> None:
    timed = {name for method in METHODS.values() for name in method.time_targets}
    assert timed == {"update", "step", "cycle", "between"}
