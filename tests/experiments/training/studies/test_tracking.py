"""How trackers are compared with exact eigenpairs, on a matrix whose eigenvectors are the axes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.reporting import trackers as report
from experiments.training.studies.hessians import Reference
from experiments.training.studies.tracking import Checkpoint
from optax_accel.curvature import Eigenspace

SPECTRUM = np.array([4.0, 3.0, 1.0, 0.5], np.float32)


def checkpoint() -> Checkpoint:
    reference = Reference(SPECTRUM[:3], np.eye(4, 3, dtype=np.float32), 1, 1.0)
    gradients = {"full": np.array([3.0, 4, 0, 0]), "batch": np.array([0.0, 0, 3, 4])}
    return Checkpoint(lambda vector: SPECTRUM * vector, {"algebraic": reference}, gradients)


def space(values: list[float], residuals: list[float] | None) -> Eigenspace:
    yes, none = jnp.ones((), bool), jnp.zeros((), jnp.int32)
    norms = None if residuals is None else jnp.array(residuals)
    return Eigenspace(jnp.eye(3, 4), jnp.array(values), yes, yes, none, None, norms)


def test_a_threshold_leaves_out_directions_of_both() -> None:
    errors = checkpoint().errors(space([4.0, 3.0, 1.0], [0.2, 0.4, 9.0]), "algebraic", 2.0)
    assert (errors["directions"], errors["exact directions"]) == (2, 2)
    assert errors["cos2"] == pytest.approx(1)
    assert errors["residual held"] == pytest.approx(0.1)
    assert errors["residual"] == errors["chi full"] == errors["eigenvalues"] == 0
    assert checkpoint().alignments("algebraic", 2.0) == {"full": 1, "batch": 0}
    assert checkpoint().alignments("algebraic", 0.0)["batch"] == pytest.approx(0.6)


def test_a_direction_that_is_missed_costs_its_share() -> None:
    """The second eigenvalue is taken for one below the threshold."""
    errors = checkpoint().errors(space([4.4, 1.9, 1.0], None), "algebraic", 2.0)
    assert (errors["directions"], errors["exact directions"]) == (1, 2)
    assert errors["cos2"] == pytest.approx(0.5)
    assert errors["chi full"] == pytest.approx(1 - 0.6)
    assert errors["eigenvalues"] == errors["residual"] == pytest.approx(0.1)
    assert errors["residual held"] is None


def test_nothing_above_a_threshold_is_no_error() -> None:
    errors = checkpoint().errors(space([4.0, 3.0, 1.0], None), "algebraic", 5.0)
    assert (errors["directions"], errors["exact directions"], errors["cos2"]) == (0, 0, 1)
    assert errors["chi full"] == errors["eigenvalues"] == errors["residual"] == 0


def test_a_table_shows_what_the_state_holds_beside_what_is_true() -> None:
    rows: list[dict[str, Any]] = []
    for held in ([0.4, 0.0, 0.0], None):
        used = checkpoint().errors(space([4.4, 3.0, 1.0], held), "algebraic", 2.0)
        name = "without" if held is None else "with"
        rows.append({"tracker": name} | used | {f"before {key}": used[key] for key in used})
    summary = {name: report.summarize(rows, name) for name in ("with", "without")}
    shown = dict.fromkeys(summary, ("subset", 20, 1))
    view = report.summary_table(shown, summary, [])
    cells = {column.header: list(column.cells) for column in view.columns}
    assert cells["residual"] == ["0.100 / 0.100", "– / 0.100"]
    assert cells["directions"] == ["2.0 / 2.0"] * 2
