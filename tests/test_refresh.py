"""One vocabulary for steps driven from the host, whatever stands in the chain."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel.refresh import of_damping, of_eigenspace, of_factors
from tests.helpers import least_squares, tree_allclose, tree_equal

PROBLEM = least_squares()
TRACKER = oa.BlockTracker(refresh_every=2)
KFAC: dict[str, Any] = {"damping": 0.1, "factors_every": 2, "inverses_every": 4}


def both() -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        oa.scale_by_kfac(PROBLEM.objective(), **KFAC),
        oa.project_to_bulk(2, tracker=TRACKER, start_step=1),
        optax.scale_by_learning_rate(0.1),
    )


@pytest.mark.parametrize(
    ("refresh", "eigenspace", "factors", "damping"),
    [
        (None, None, None, None),
        (False, False, False, False),
        (True, True, "inverses", True),
        ("cold", "cold", "inverses", True),
        ("warm", "warm", "inverses", True),
        ("factors", False, "factors", False),
        ("inverses", True, "inverses", True),
        (oa.Refresh(), False, False, False),
        (oa.Refresh("cold", factors=True), "cold", "factors", False),
        (oa.Refresh(True, inverses=True), True, "inverses", False),
        (oa.Refresh(None, factors=None, damping=None), None, None, None),
        (oa.Refresh(damping=True), False, False, True),
    ],
)
def test_each_takes_what_concerns_it(
    refresh: Any, eigenspace: Any, factors: Any, damping: Any
) -> None:
    assert of_eigenspace(refresh) is eigenspace
    assert of_factors(refresh) is factors or of_factors(refresh) == factors
    assert of_damping(refresh) is damping
    hash(refresh)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (jnp.array(True), TypeError, "static Python value, got .*static_argnames"),
        (np.array(1), TypeError, r"static Python value, got array\(1\)"),
        (np.bool_(True), TypeError, r"got np\.True_: give bool\(\.\.\.\)"),
        (oa.Refresh(jnp.array(True)), TypeError, "got an object of type Refresh"),
        ("hot", ValueError, "'cold', 'warm', 'factors', 'inverses'.*got 'hot'"),
        (1, ValueError, "got 1"),
        (oa.Refresh("factors"), ValueError, r"got Refresh\(eigenspace='factors'"),
        ({"eigenspace": True}, ValueError, "got {'eigenspace'"),
    ],
)
def test_other_values_are_refused(wrong: Any, error: Any, message: str) -> None:
    for meaning in (of_eigenspace, of_factors):
        with pytest.raises(error, match=message):
            meaning(wrong)


def test_a_chain_of_both_is_driven_from_the_host() -> None:
    """The same as in the graph, in a handful of compiled forms."""
    tx = both()

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params: Any, state: Any, refresh: Any) -> Any:
        objective = PROBLEM.objective()
        updates, state = tx.update(
            objective.grad(params), state, params, value_fn=objective, refresh=refresh
        )
        return optax.apply_updates(params, updates), state

    driven = decided = (PROBLEM.params, tx.init(PROBLEM.params))
    forms = []
    for i in range(9):
        forms.append(oa.refresh_at(i, tx))
        driven, decided = step(*driven, forms[-1]), step(*decided, None)
        tree_allclose(driven[0], decided[0], rtol=1e-4)
    assert forms[:5] == [
        oa.Refresh(False, factors=True, inverses=True),
        oa.Refresh("cold"),
        oa.Refresh(False, factors=True),
        oa.Refresh("warm"),
        oa.Refresh(False, factors=True, inverses=True),
    ]
    assert len(set(forms)) == 4
    tree_equal(driven[1][0].factor_weight, decided[1][0].factor_weight)


BULK = oa.project_to_bulk(1, tracker=oa.BlockTracker(refresh_every=3), start_step=1)
MASK = {"a": True, "b": False}
WRAPPED = {
    "chain": optax.chain(optax.adam(0.1), BULK),
    "named chain": optax.named_chain(("first", optax.adam(0.1)), ("last", BULK)),
    "nested chain": optax.chain(optax.chain(BULK), optax.trace(0.9)),
    "masked": optax.masked(BULK, MASK),
    "partition": optax.partition(
        {"x": BULK, "y": optax.sgd(0.1)}, lambda params: {"a": "x", "b": "y"}
    ),
    "multi steps": optax.MultiSteps(BULK, 2),
    "multi steps as a transformation": optax.MultiSteps(BULK, 2).gradient_transformation(),
    "own mask": oa.bulk_sgd(
        0.1, 1, tracker=oa.BlockTracker(refresh_every=3), start_step=1, mask=MASK
    ),
    "injected": optax.inject_hyperparams(oa.bulk_sgd)(
        learning_rate=0.1, num_directions=1, tracker=oa.BlockTracker(refresh_every=3), start_step=1
    ),
    "extra arguments": optax.with_extra_args_support(BULK),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
def test_periods_are_found_in_any_wrapper(tx: Any) -> None:
    assert [oa.refresh_at(i, tx) for i in range(6)] == [False, "cold", False, False, "warm", False]
    assert oa.refresh_at(3, tx, cold_start=False) == "warm"


def test_periods_are_found_in_a_loop_that_forbids_transfers() -> None:
    tx = optax.chain(oa.extrap_sgd(0.1), both())
    with jax.transfer_guard("disallow"):
        assert oa.refresh_at(1, tx) == oa.Refresh("cold", factors=False)


def test_one_kind_has_plain_words_and_none_has_none() -> None:
    kfac = optax.chain(optax.clip(1.0), oa.scale_by_kfac(PROBLEM.objective(), **KFAC))
    assert [oa.refresh_at(i, kfac) for i in range(5)] == [
        *("inverses", False, "factors", False, "inverses")
    ]
    assert oa.refresh_at(0, optax.adam(0.1)) is None
    assert [oa.refresh_at(i, 2) for i in range(3)] == ["cold", False, "warm"]
    assert oa.refresh_at(20) == oa.refresh_at(20, refresh_every=20) == "warm"
    assert [oa.refresh_at(i, refresh_every=5, start_step=3) for i in (2, 3, 8)] == [
        *(False, "cold", "warm")
    ]


def test_what_one_value_cannot_say_is_refused() -> None:
    two = optax.chain(oa.project_to_bulk(1), BULK)
    with pytest.raises(ValueError, match=r"different periods: EigenspacePeriods.*equal periods"):
        oa.refresh_at(0, two)
    oa.refresh_at(0, optax.chain(BULK, BULK))
    with pytest.raises(ValueError, match="either the optimizer or `refresh_every`"):
        oa.refresh_at(0, BULK, refresh_every=3)
    picky = optax.GradientTransformation(lambda params: params["w"], lambda u, s, p=None: (u, s))
    with pytest.raises(ValueError, match=r"does not accept the placeholder.*refresh_every=\.\.\."):
        oa.refresh_at(0, picky)
    with pytest.raises(ValueError, match="`refresh_every` must be at least 1, got 0"):
        oa.refresh_at(0, 0)


@pytest.mark.parametrize("step", [-1, 2.5, "3", None])
def test_a_step_that_is_no_count_is_an_error(step: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`step` must be"):
        oa.refresh_at(step)


def test_the_period_is_given_once_and_the_start_is_a_step() -> None:
    with pytest.raises(ValueError, match=r"given twice to refresh_at, as 5 and .* 7"):
        oa.refresh_at(7, 5, refresh_every=7)
    with pytest.raises(ValueError, match=r"`start_step` must be at least 0, got -2"):
        oa.refresh_at(3, start_step=-2)


def test_low_rank_bases_need_no_program_of_their_own_for_the_first_step():
    bases = oa.galore(0.1, 2, refresh_every=2)
    assert [oa.refresh_at(i, bases) for i in range(4)] == ["warm", False, "warm", False]
    assert oa.refresh_at(1, bases, cold_start=False) is False
    tracker = oa.BlockTracker(refresh_every=2)
    both = optax.chain(bases, oa.project_to_bulk(1, tracker=tracker))
    assert [oa.refresh_at(i, both) for i in range(3)] == ["cold", False, "warm"]
