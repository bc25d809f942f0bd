"""What the options of a run come to."""

from __future__ import annotations

import jax
import pytest

from experiments import data
from experiments.training.options import Options
from experiments.training.plan import resolve


@pytest.mark.parametrize(
    ("epochs", "eval_every", "lines"), [(10, None, 10), (50, None, 17), (50, 17, 48)]
)
def test_many_validations_are_not_all_printed(
    epochs: int, eval_every: int | None, lines: int
) -> None:
    options = Options(epochs=epochs, eval_every=eval_every)
    plan = resolve(options, data.load_task("digits"), jax.devices()[:1])
    validated = [s for s in range(1, plan.steps + 1) if plan.is_due(s, plan.eval_every)]
    shown = [step for step in validated if plan.is_shown(step)]
    assert len(shown) == lines
    assert shown[-1] == plan.steps
