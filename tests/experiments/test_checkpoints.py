"""Checkpoints: what goes in comes out, bit by bit, and nothing else is accepted."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.checkpoints import CheckpointError, Checkpoints


class Inner(NamedTuple):
    count: jax.Array
    key: jax.Array
    nothing: None
    empty: jax.Array


def make_state():
    params = nnx.State({"a": {"kernel": jnp.arange(6.0).reshape(2, 3) / 7}, "b": jnp.float32(0.1)})
    inner = Inner(jnp.int32(3), jax.random.key(1), None, jnp.zeros((2, 0), jnp.bfloat16))
    moments = optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.identity())
    return {"params": params, "opt": (moments.init(params), (), inner), "list": [jnp.uint8(9)]}


def same_bits(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_exact_whatever_the_structure(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, data={"next_index": 7})
    # Another process has only shapes to restore into.
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(jax.eval_shape(make_state))
    assert restored.step == 7
    assert restored.data == {"next_index": 7}
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    jax.tree.map(same_bits, restored.state, state)


def test_restores_into_the_shardings_of_the_target(tmp_path):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    state = {"w": jnp.arange(3.0), "empty": jnp.zeros((0,))}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        restored = checkpoints.restore(target).state
    for name, leaf in restored.items():
        assert leaf.sharding == replicated
        same_bits(leaf, state[name])


def test_keeps_the_latest_and_never_saves_a_step_twice(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.float32(step)})
        checkpoints.save(3, {"w": jnp.float32(-1)})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
        assert float(checkpoints.restore({"w": jnp.float32(0)}).state["w"]) == 3


def test_remains_of_a_killed_save_are_ignored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.float32(1)})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, {"w": jnp.float32(2)})
        assert checkpoints.restore({"w": jnp.float32(0)}).step == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"w": jnp.zeros(4)}, r"step 5 .*: w is float32\[3\] there and float32\[4\] here"),
        ({"w": jnp.zeros(3, jnp.bfloat16)}, r"w is float32\[3\] there and bfloat16\[3\] here"),
        ({"w": jnp.zeros(3), "v": jnp.zeros(1)}, r"v is missing there and float32\[1\] here"),
        ({}, r"w is float32\[3\] there and missing here"),
    ],
)
def test_other_structure_is_refused_by_name(tmp_path, target, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"w": jnp.zeros(3)})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(target)


def test_nothing_to_restore(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint"),
    ):
        checkpoints.restore({})


def test_ambiguous_paths_are_refused(tmp_path):
    state = {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="same path"):
        checkpoints.save(0, state)
