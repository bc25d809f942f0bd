"""The study of the edge of stability: its readings, its windows, and what it makes of a run."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments.reporting.referee.edge_of_stability import ADAM, GD, STUDY
from experiments.training.studies import edge_of_stability as edge
from experiments.training.studies.central_flow import FlowReading


def test_study_is_fair_and_has_every_claim_in_some_scale() -> None:
    STUDY.check()
    small = STUDY.scales["small"].settings
    judged = [claim.name for claim in STUDY.claims if STUDY.takes_part(claim, small)]
    # Flows only of the perceptron, whose long run is gradient descent's alone; RMSprop and Bulk-SGD
    # not of the language model.
    assert len(judged) == 20 + 7 + 11 + 8
    for scale in STUDY.scales.values():
        for setting in scale.settings:
            assert setting.options["every"] % 2 == 1  # reads both sides of an oscillation


def test_readings_are_the_leading_eigenvalues() -> None:
    """Against the dense Hessian, plain and preconditioned as Adam's state says."""
    (setting,) = STUDY.scales["smoke"].settings
    runner = edge.Runner(setting.options, None, Path())
    options = {each.name: dict(each.options) for each in setting.contestants}
    course = edge._Program(runner, options[ADAM] | {"flow": True}, 0.003).train(0)
    assert course.iterates is not None
    flat, unravel = ravel_pytree(runner.network(0)[1])
    np.testing.assert_array_equal(course.iterates[0], flat)

    hessian = np.asarray(jax.hessian(lambda w: runner.objective(unravel(w)))(course.iterates[15]))
    top = np.linalg.eigvalsh(hessian)[-1]
    np.testing.assert_allclose(course.readings.sharpness[3], top, rtol=0.02)
    # Moments of the first 16 gradients, as Kingma and Ba write them.
    slope = jax.jit(jax.grad(lambda w: runner.objective(unravel(w))))
    mean, square = np.zeros_like(flat), np.zeros_like(flat)
    for w in course.iterates[:16]:
        gradient = np.asarray(slope(w))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
    divisor = (1 - 0.9**16) * (np.sqrt(square / (1 - 0.99**16)) + 1e-8)
    step = course.iterates[16] - course.iterates[15]
    np.testing.assert_allclose(step, -0.003 * mean / divisor, rtol=2e-2, atol=1e-6)
    root = np.sqrt(divisor)
    effective = np.linalg.eigvalsh(hessian / root / root[:, None])[-1]
    np.testing.assert_allclose(course.readings.effective[3], effective, rtol=0.05)
    np.testing.assert_allclose(course.readings.bend[3], step @ hessian @ step, rtol=1e-3)
    np.testing.assert_allclose(course.slopes[15], slope(course.iterates[15]) @ step, rtol=1e-3)


def test_window_at_the_edge() -> None:
    assert edge.edge_of(np.array([0.5, 0.9, 1.0, 0.8, 1.2])) == 2
    assert edge.edge_of(np.full(8, 0.5)) == 6


def test_scores_of_a_course() -> None:
    """At the edge from the third of ten readings on; the loss rises at every second step."""
    steps, every = 30, 3
    losses = np.where(np.arange(steps) % 2, 1.5, 1.0) * 0.9 ** np.arange(steps)
    ratios = np.array([0.5, 0.8, 1.0, 1.1, 1.1, 1.0, 1.0, 1.2, 1.0, 1.0])
    readings = edge.Reading(ratios * 20, ratios * 20, np.full(10, 0.2))
    course = edge.Course(losses, np.full(steps, -0.1), readings, None)
    scores = edge.scores_of(course, ratios, 0.1, every)
    assert scores["start"] == 0.5
    assert scores["hover"] == 1.0
    assert scores["raw"] == 1.0
    assert scores["balance"] == pytest.approx(1.0)
    assert scores["short"] == pytest.approx(12 / 23)
    assert scores["growth"] == pytest.approx(1.0)
    assert scores["long"] == pytest.approx(np.mean(losses[-2:]) / np.mean(losses[6:8]))
    assert scores["progress"] == pytest.approx(np.log10(np.mean(losses[-3:]) / losses[0]))
    never = edge.scores_of(course, ratios / 2, 0.1, every)
    assert np.isnan(never["start"])
    assert never["hover"] == 0.5


def test_flows_against_an_oscillation_around_them() -> None:
    """Iterates w = (t / 100, +-0.5): the right flow has distance 0 and variance 0.25."""
    steps = np.arange(200.0)
    path = np.stack([steps / 100, np.zeros(200)], axis=-1)
    iterates = path + np.stack([np.zeros(200), 0.5 * (-1.0) ** steps], axis=-1)
    losses, inner = 2 + (-1.0) ** steps[1:-1], path[1:-1]
    flow = FlowReading(inner, losses, losses, np.full(198, 2.2), np.full(198, 0.2))  # type: ignore[arg-type]
    stable = inner + np.array([0, 0.5])
    scores = edge.flow_scores(iterates, losses, flow, stable, losses, first=7, edge=60)
    assert scores["flow_distance"] == pytest.approx(0, abs=1e-9)
    assert scores["flow_loss"] == pytest.approx(0.1)
    assert scores["flow_variance"] == pytest.approx(0.8)
    np.testing.assert_allclose(scores["distance from the stable flow"], 0.5)
    assert scores["steps of flows"][0] == pytest.approx(27 + 1, abs=1)


def test_rules_of_the_flows_step_as_the_optimizers() -> None:
    """One step of Optax is the gradient, or its mean, over the rule's divisor."""
    start, gradient = jnp.zeros(3), jnp.array([1.0, -2.0, 0.5])
    for name, options in (
        ("sgd", {}),
        ("rmsprop", {"decay": 0.99}),
        ("adam", {"b1": 0.9, "b2": 0.99}),
    ):
        rule = edge.rule_of({"optimizer": name, **options}, 0.1)
        tx = edge.OPTIMIZERS[name](0.1, **options)
        updates, state = tx.update(gradient, tx.init(start), start)
        mean, square, count = edge.moments_of(state) or (gradient, gradient, jnp.zeros(()))
        mean = mean if rule.lag else gradient
        np.testing.assert_allclose(updates, -mean / rule.divisor(square, count), rtol=1e-5)
        threshold = edge.PRECONDITIONERS.get(name, edge.curvature.sgd_preconditioner)(**options)
        np.testing.assert_allclose(rule.threshold / 0.1, threshold.threshold(0.1), rtol=1e-6)


def test_thinned_curves_keep_their_mean() -> None:
    found = edge.thinned(np.arange(600.0))
    assert len(found) == edge._POINTS
    assert np.mean(found) == pytest.approx(299.5)
    assert edge.thinned(np.arange(3.0)) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("who", [GD, ADAM])
def test_a_run_has_its_flows(who: str) -> None:
    (setting,) = STUDY.scales["smoke"].settings
    runner = edge.Runner(dict(setting.options) | {"steps": 12}, None, Path())
    options = next(each.options for each in setting.contestants if each.name == who)
    (scores,) = runner.run(options, [(0.01, 1)])
    assert scores["flow_distance"] > 0
    assert len(scores["loss, predicted"]) == 1  # shorter than a moving average
    assert scores["loss"] == scores["validation"]
