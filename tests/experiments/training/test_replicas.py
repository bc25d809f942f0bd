"""How many runs are trained together, and workers within a run."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import methods
from experiments.training import replicas
from experiments.training.studies import comparison


def test_memory_limits_how_many_train_together() -> None:
    plan = comparison.plan("digits", ["sgd", "adam"], seeds=3, steps=2)
    method = methods.METHODS["adam"]
    trainer = replicas.Trainer(plan)
    parameters, state = trainer.state_bytes(method)
    assert state == pytest.approx(2 * parameters, rel=0.01)
    assert trainer.chunk_size(method, 15) == 15
    trainer.memory = 6 * trainer.replica_bytes(method)
    assert trainer.chunk_size(method, 15) == 5  # three equal chunks, none above six
    trainer.memory = 1
    assert trainer.chunk_size(method, 15) == 1


def test_memory_counts_activations() -> None:
    def trainer(**sizes: int) -> replicas.Trainer:
        steps = (methods.METHODS["bulk_sgd"].refresh_every or 0) + 1  # with a warm refresh
        plan = comparison.plan("digits", ["sgd", "bulk_sgd"], seeds=1, steps=steps, **sizes)
        return replicas.Trainer(plan)

    small, large = trainer(batch_size=100), trainer(batch_size=200)
    # At least the 64 hidden values and 64 pixels of each of the 100 examples more, 4 bytes each.
    more = large.activation_bytes(200) - small.activation_bytes(100)
    assert 100 * 128 * 4 <= more <= 100 * 1024 * 4
    sgd, bulk_sgd = small.plan.methods
    assert large.replica_bytes(sgd) - small.replica_bytes(sgd) == more
    # Ten tangents beside the values, of a curvature batch of 200 or 400.
    more = large.replica_bytes(bulk_sgd) - small.replica_bytes(bulk_sgd)
    assert more == 11 * (large.activation_bytes(400) - small.activation_bytes(200))


def test_workers_share_the_batch() -> None:
    """They step together until the switch, then apart; what is evaluated is their mean."""
    plan = comparison.plan("digits", ["nesterov_sgd"], seeds=1, steps=32, eval_every=16)
    (base,) = plan.methods
    local = methods.METHODS["post_local_sgd"]  # local in the second half, two steps at a time
    trainer = replicas.Trainer(dataclasses.replace(plan, methods=[base, local], workers=4))
    assert trainer.replica_bytes(local) > 2 * trainer.replica_bytes(base)
    runs = [(0.1, 0), (0.03, 0)]
    together, apart = (trainer.train(m, runs) for m in (base, local))
    alone = trainer.train(local, runs[:1])
    for ours, other in zip(apart[:4], together, strict=False):  # up to the 16th step
        assert ours["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    assert abs(apart[4]["test_loss"] / together[4]["test_loss"] - 1) > 1e-4
    assert apart[4]["validation_accuracy"] > 0.5
    for ours, other in zip(alone, apart[::2], strict=True):
        assert ours["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)


def test_runs_are_also_scored_at_equal_gradients() -> None:
    """A method with two gradients a step after half of the steps of the others."""
    plan = comparison.plan("digits", ["sgd", "sam_sgd"], seeds=1, steps=7, eval_every=2)
    trainer = replicas.Trainer(dataclasses.replace(plan, equal_gradients=True))
    plain, sam = plan.methods
    assert (trainer.equal_step(plain), trainer.equal_step(sam)) == (7, 2)
    scored = [r["step"] for r in trainer.train(sam, [(0.1, 0)]) if "test_accuracy" in r]
    assert scored == [2, 7]


def test_schedule_free_runs_are_scored_at_their_averages() -> None:
    """Two runs together as each alone; not at the parameters, where gradients are taken."""
    plan = comparison.plan("digits", ["schedule_free_sgd"], seeds=2, steps=3, batch_size=64)
    (method,) = plan.methods
    trainer = replicas.Trainer(plan)
    pair = trainer.start(method, [(3.0, 0), (3.0, 1)])
    alone = trainer.start(method, [(3.0, 1)])
    for step in range(3):
        pair.advance(step)
        alone.advance(step)
    losses = trainer.evaluate(pair, "validation")["validation_loss"]
    (loss,) = trainer.evaluate(alone, "validation")["validation_loss"]
    assert losses[1] == pytest.approx(loss, rel=1e-4)
    alone.state = alone.state._replace(opt_state=())  # without its average
    (elsewhere,) = trainer.evaluate(alone, "validation")["validation_loss"]
    assert elsewhere != pytest.approx(loss, rel=1e-3)
