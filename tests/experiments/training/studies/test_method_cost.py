"""Each method is timed beside its base, in the forms of its step that matter."""

from __future__ import annotations

from experiments import timing
from experiments.methods import METHODS
from experiments.training.studies import method_cost


def test_curvature_methods_only_project_in_the_update() -> None:
    sgd, bulk = method_cost.update_cases("sgd", [METHODS["sgd"], METHODS["bulk_sgd"]], 1000)
    assert (sgd.base, bulk.base) == (None, "sgd")
    rows = timing.measure([sgd, bulk], repeats=1)
    assert [row["target"] for row in rows] == [None, None]


def test_forms_of_natural_gradients_are_cases_of_their_own() -> None:
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


def test_targets_are_of_what_is_timed() -> None:
    timed = {name for method in METHODS.values() for name in method.time_targets}
    assert timed == {"update", "step", "cycle", "between"}
