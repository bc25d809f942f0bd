"""What fine-tuning trains and what is measured of it, worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training.studies import fine_tuning
from experiments.training.studies.fine_tuning import HEAD, share_inside, transformation


@pytest.fixture(scope="module")
def trained():
    """What two steps change, by what a contestant trains."""
    rng = np.random.default_rng(0)
    layer = {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)}
    params = {"trunk": layer, HEAD: {"kernel": rng.normal(size=(5, 2)), "bias": np.zeros(2)}}
    params = jax.tree.map(jnp.float32, params)

    def changes(options):
        def run(params):
            tx = transformation(options, 0.1, 10, jax.random.key(1))
            state, moved = tx.init(params), params
            for _ in range(2):
                gradients = jax.tree.map(lambda w: w + 1, moved)
                updates, state = tx.update(gradients, state, moved)
                moved = optax.apply_updates(moved, updates)
            return jax.tree.map(jnp.subtract, moved, params)

        return jax.tree.map(np.asarray, jax.jit(run)(params))

    choices = (
        {"trains": "head"},
        {"trains": "lora", "rank": 2},
        {"trains": "random", "share": 0.2},
    )
    return {options["trains"]: changes(options) for options in choices}


def test_the_last_layer_alone(trained):
    changed = trained["head"]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(changed["trunk"]))
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(changed[HEAD]))


def test_adapters_change_a_matrix_by_one_of_their_rank(trained):
    changed = trained["lora"]
    assert np.linalg.matrix_rank(changed["trunk"]["kernel"], tol=1e-5) == 2
    assert (changed["trunk"]["bias"] == 0).all()
    assert (changed[HEAD]["kernel"] != 0).all()


def test_sparse_entries_of_the_trunk_and_all_of_the_last_layer(trained):
    changed = trained["random"]
    assert (changed["trunk"]["kernel"] != 0).sum() == 7  # floor(0.2 * 30) + 1
    assert (changed["trunk"]["bias"] != 0).sum() == 2
    assert (changed[HEAD]["kernel"] != 0).all()


def test_adapters_start_from_the_matrix_itself():
    w = jnp.arange(6.0).reshape(3, 2)
    maps = fine_tuning.lora(1, jax.random.key(0))
    coordinates = maps.inverse(w)
    np.testing.assert_array_equal(maps.forward(coordinates), w)
    assert {name: leaf.shape for name, leaf in coordinates.items()} == {
        "frozen": (3, 2),
        "a": (3, 1),
        "b": (1, 2),
    }


def test_share_of_the_squared_gradient():
    gradients = {"trunk": {"a": np.array([[3.0, 0.0], [1.0, 1.0]]), "b": np.array([1.0, 2.0])}}
    indices = {"trunk": {"a": np.array([0, 3]), "b": np.array([1])}}
    # 9 + 1 + 4 of 9 + 1 + 1 + 1 + 4; the new layer does not count.
    found = share_inside(gradients | {HEAD: np.array([100.0])}, indices)
    assert float(found) == pytest.approx(14 / 16)
