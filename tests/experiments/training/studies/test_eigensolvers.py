"""Settings are searched for by accuracy and cost; chunks of a Hessian make the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.training.studies import eigensolvers
from experiments.training.studies.eigensolvers import Search, Skipped, Tool
from experiments.training.studies.hessians import ChunkedHessian, trained_hessian
from optax_accel.curvature import blocks


def diagonal_search(budget_seconds: float, diagonal: jax.Array) -> Search:
    linear = jax.tree_util.Partial(jnp.multiply, diagonal)
    start = blocks.random(jax.random.key(0), diagonal)
    hessian = ChunkedHessian(diagonal, [linear], start, jnp.eye(4, 40), linear, 1)
    exact = np.sort(diagonal)[::-1][:2].astype(np.float64)
    return Search(hessian, exact, [start], 1.0, 1e-4, budget_seconds)


def test_slow_tools_are_predicted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    search = diagonal_search(10, jnp.linspace(0, 1, 40) ** 4)
    assert search.over_budget("x", 9) is None
    for tool in (search.matfree(20), search.lobpcg(20)):
        assert isinstance(tool, Skipped)
        assert tool.note.startswith("over 10 s")
    monkeypatch.setattr(eigensolvers.importlib.util, "find_spec", lambda name: None)
    missing = search.matfree(20)
    assert isinstance(missing, Skipped)
    assert "pip install matfree" in missing.note


def test_the_first_accurate_setting_is_taken() -> None:
    search = diagonal_search(10, jnp.linspace(0, 1, 40) ** 4)
    good = np.array(search.exact)
    tools = [
        Tool("wrong", "", lambda start: (good * 1.01, 1)),
        Tool("broken", "", lambda start: (good * np.nan, 2)),
        Tool("enough", "", lambda start: (good * (1 + 1e-5), 20)),
        Tool("dear", "", lambda start: (good, 30)),
    ]
    best = search.cheapest(tools)
    assert best is not None
    assert (best.name, best.search_products) == ("enough", 20)
    assert search.cheapest(tools[:2]) is None


def test_chunks_and_blocks_agree_with_the_whole() -> None:
    digits = data.load_task("digits")
    whole, parts = (
        trained_hessian(digits, k=2, steps=5, examples=120, chunk=chunk) for chunk in (1000, 40)
    )
    assert (len(whole.linears), len(parts.linears)) == (1, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        whole.product(whole.gradient),
        parts.product(whole.gradient),
    )
    images = parts.products(parts.earlier)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5),
        images,
        parts.product(jax.tree.map(lambda leaf: leaf[1], parts.earlier)),
    )
