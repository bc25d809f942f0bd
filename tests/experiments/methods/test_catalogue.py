"""The catalogue's optimizers train; what the library promises of its own, the gauntlet tests."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from experiments.methods import METHODS
from tests import methods as gauntlet
from tests.helpers import least_squares

ROOT = Path(__file__).parents[3]
PROBLEM = least_squares()
NUM_STEPS = 60
# Their steps have a bounded length; the estimates are noisy.
MORE_STEPS = {"muon": 240, "lion": 240, "forward_gradient_sgd": 600}
ENOUGH = {"ademamix": 0.1}  # its slow momentum overshoots


@pytest.mark.parametrize("name", METHODS)
def test_the_grid_of_rates_suits_a_convex_problem(name: str) -> None:
    """The lower rates make the loss fall, the best one makes it small; the highest may diverge."""
    method, objective = METHODS[name], PROBLEM.objective()
    steps = MORE_STEPS.get(name, NUM_STEPS)

    def train(rate: Any) -> jax.Array:
        tx = method.build(
            rate,
            total_steps=steps,
            num_classes=PROBLEM.num_directions,
            objective=objective,
        )

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            value, grads = objective.value_and_grad(params)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=objective
            )
            return (optax.apply_updates(params, updates), state), None

        carry = PROBLEM.params, tx.init(PROBLEM.params)
        (params, _), _ = jax.lax.scan(step, carry, length=steps)
        return objective(params) / objective(PROBLEM.params)

    losses = jax.jit(jax.vmap(train))(np.float32(method.learning_rates))
    assert jnp.all(losses[:3] < 1), losses  # no comparison with NaN is true
    # Those with a tracker and sparse ones leave a part of the parameters where it is.
    if method.tracker is None and method.family != "sparse":
        assert jnp.nanmin(losses) < ENOUGH.get(name, 0.01), losses


@pytest.mark.parametrize("name", METHODS)
def test_the_forms_of_the_step_repeat_after_a_period(name: str) -> None:
    method = METHODS[name]
    fresh = dataclasses.replace(method)  # nobody has asked it before
    with jax.transfer_guard("disallow"):  # as in the training loop
        assert fresh.refresh(0) == method.refresh(0)
    forms = [method.refresh(step) for step in range(method.period, 3 * method.period)]
    assert forms[: method.period] == forms[method.period :]
    periodic = name in ("anderson_sgd", "batch_gauss_newton", "galore", "gradsamp")
    nothing = method.tracker is None and not method.needs_objective and not periodic
    assert (method.refresh(0) is None) == nothing


def test_a_run_asks_the_tracker_when_it_is_due() -> None:
    """Of two runs stepped together the one whose subspace moves more decides."""
    method, objective = METHODS["bulk_sgd_adaptive"], PROBLEM.objective()
    tx = method.build(0.01, total_steps=40, num_classes=PROBLEM.num_directions)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params: Any, state: Any, refresh: Any) -> Any:
        def one(params: Any, state: Any) -> Any:
            grads = objective.grad(params)
            updates, state = tx.update(grads, state, params, value_fn=objective, refresh=refresh)
            return optax.apply_updates(params, updates), state

        return jax.vmap(one)(params, state)

    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PROBLEM.params)
    state, refreshed = jax.vmap(tx.init)(params), []
    schedule = method.schedule()
    for i in range(40):
        if i == 20:  # as after a checkpoint
            schedule = method.schedule()
        if refresh := schedule(i, state):
            refreshed.append(i)
        params, state = step(params, state, refresh)
    # The Hessian of least squares rests, so that the periods double; the plan is the most frequent.
    assert refreshed == [0, 5, 15, 35]
    assert [i for i in range(40) if method.refresh(i)] == list(range(0, 40, 5))
    assert "10 Hessian-vector products every 5 to 50 steps" in method.extra_cost()


def test_settings_replace_the_catalogues() -> None:
    run: dict[str, Any] = {"total_steps": 10, "num_classes": 2, "objective": PROBLEM.objective()}
    gradients = jax.tree.map(jnp.ones_like, PROBLEM.params)

    def update(tx: optax.GradientTransformation) -> Any:
        extra = {"value_fn": run["objective"]}
        return tx.update(gradients, tx.init(PROBLEM.params), PROBLEM.params, **extra)[0]

    for name, settings, expected in (
        ("sgd", {"momentum": 0.5, "nesterov": True}, optax.sgd(0.1, 0.5, nesterov=True)),
        ("demon_sgd", {"decay_steps": 3}, oa.demon_sgd(0.1, decay_steps=3)),
        ("hessian_free", {"max_iterations": 1}, oa.hessian_free(0.1, max_iterations=1)),
        (
            "kfac",
            {"kl_clip": 0.01, "damping": 0.3},
            oa.kfac(0.1, run["objective"], kl_clip=0.01, damping=0.3),
        ),
    ):
        updates = update(METHODS[name].build(0.1, **run, **settings))
        jax.tree.map(np.testing.assert_array_equal, updates, update(expected))
        assert set(settings) <= set(METHODS[name].settings)
    with pytest.raises(ValueError, match="adamax has no setting 'rho'; its settings are b1, b2, e"):
        METHODS["adamax"].build(0.1, **run, rho=0.9)


# -- nothing is forgotten in one place -------------------------------------------------------------

# The case of the gauntlet that stands for a method of another name. The schedules are the method:
# one case each shows that momentum SGD, however scheduled, keeps what an optimizer promises.
CASES = {
    "amsbound": "adabound amsbound",
    "cyclical_sgd": "cyclical_schedule",
    "cyclical2_sgd": "cyclical_schedule",
    "exp_range_sgd": "cyclical_schedule",
    "vtpc_sgd": "cyclical_schedule",
    "snapshot_sgd": "cyclical_schedule",
    "bulk_sgd_adaptive": "bulk_sgd",
    "onecycle_sgd": "onecycle",
    "onecycle_cosine_sgd": "onecycle",
    "cosine_momentum_sgd": "onecycle",
    "linear_momentum_sgd": "onecycle",
    "exponential_momentum_sgd": "onecycle",
    "onecycle_momentum_sgd": "onecycle",
    "weight_norm_sgd": "reparametrize weight_norm",
    "weight_norm_adam": "reparametrize weight_norm adam",
    "powerprop_sgd": "reparametrize powerprop",
    "anderson_sgd": "anderson_acceleration",
    "forward_gradient_sgd": "forward_gradient",
    "sampled_products_sgd": "sampled_product_gradients",
    "gnp_sgd": "gnp",
    "sam_sgd": "gnp sharpness",
}


def ready_made() -> set[str]:
    """The library's optimizers: `learning_rate` comes first in what trains by itself."""
    optimizers = {
        name
        for name in oa.__all__
        if inspect.isfunction(function := getattr(oa, name))
        and next(iter(inspect.signature(function).parameters), None) == "learning_rate"
        and "GradientTransformation" in str(inspect.signature(function).return_annotation)
    }
    assert len(optimizers) > 10
    return optimizers - {"scale_by_adabound"}


def test_every_optimizer_of_the_library_is_in_the_catalogue() -> None:
    assert ready_made() <= set(METHODS)


def test_every_method_of_the_library_has_a_case_in_the_gauntlet() -> None:
    cases = {case.name for case in gauntlet.OPTIMIZERS} | set(gauntlet.PER_WORKER)
    ours = {name for name, method in METHODS.items() if method.fidelity != "Optax"}
    same_name = {name.replace(" ", "_") for name in cases}
    assert {CASES.get(name, name) for name in ours - same_name} <= cases
    assert ready_made() <= {name.split()[0] for name in cases}
    assert set(CASES) <= ours - same_name
    # And no case without a method.
    assert cases <= {case for case in cases if case.replace(" ", "_") in ours} | set(CASES.values())


def test_the_table_of_methods_in_the_docs_agrees_with_the_catalogue() -> None:
    text = (ROOT / "docs/how_to_choose.md").read_text(encoding="utf-8")
    table = text.partition("| method | what it does | paper |")[2].partition("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) > 15
    for method in METHODS.values():
        if method.fidelity == "Optax":
            continue
        authors = method.paper.authors.partition(" (")[0]
        assert f"[{authors}]({method.paper.link})" in table, method.name
        for names, _, papers, fidelity, *_ in rows:
            if f"`{method.name}`" in names:
                assert method.paper.link in papers
                assert fidelity.startswith(method.fidelity), method.name
