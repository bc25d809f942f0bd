"""Block algebra on pytrees against plain matrices."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel.curvature import blocks

RNG = np.random.default_rng(1)
TREE = {"a": RNG.normal(size=(5, 3, 4)), "b": [RNG.normal(size=(5,)), RNG.normal(size=(5, 7))]}


def as_matrix(block):
    leaves = jax.tree.leaves(block)
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


@pytest.fixture
def block(x64):
    return jax.tree.map(jnp.asarray, TREE)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_inner_and_combine(block, num_devices, monkeypatch):
    # With one device, the axes of a leaf are merged first.
    monkeypatch.setattr(jax, "device_count", lambda: num_devices)
    matrix = as_matrix(block)
    np.testing.assert_allclose(blocks.inner(block, block), matrix @ matrix.T, rtol=1e-13)
    coefficients = jnp.asarray(RNG.normal(size=(2, 5)))
    combined = blocks.combine(coefficients, block)
    np.testing.assert_allclose(as_matrix(combined), coefficients @ matrix, rtol=1e-12)
    one = blocks.combine(coefficients[0], block)
    np.testing.assert_allclose(
        as_matrix(blocks.as_block(one))[0], coefficients[0] @ matrix, rtol=1e-12
    )


def test_dimension_identity_and_rows(block):
    like = jax.tree.map(lambda x: x[0], block)
    assert blocks.dimension(like) == 20
    np.testing.assert_array_equal(as_matrix(blocks.identity(like)), np.eye(20))
    np.testing.assert_array_equal(as_matrix(blocks.rows(block, 1, 3)), as_matrix(block)[1:3])
    assert blocks.dimension({}) == 0


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_orthonormalize_keeps_the_span_and_the_order(x64, condition):
    factor, _ = np.linalg.qr(RNG.normal(size=(20, 5)))
    rows = (factor * np.geomspace(1, 1 / condition, 5)).T
    rows = rows + rows[0]  # nearly parallel, in the worst case
    got = as_matrix(blocks.orthonormalize(jnp.asarray(rows)))
    # Two rounds of CholeskyQR are orthogonal to rounding up to condition eps**-0.5 = 7e7.
    np.testing.assert_allclose(got @ got.T, np.eye(5), atol=1e-14 if condition < 1e7 else 1e-2)
    want, _ = np.linalg.qr(rows.T)
    np.testing.assert_allclose(np.abs(got[0] @ want[:, 0]), 1, rtol=1e-12)
    projected = got @ want @ want.T
    np.testing.assert_allclose(projected, got, atol=1e-6)


def test_orthonormalize_leaves_zero_rows(x64):
    got = np.asarray(blocks.orthonormalize(jnp.array([[0.0, 0.0], [3.0, 4.0]])))
    np.testing.assert_allclose(got, [[0, 0], [0.6, 0.8]], atol=1e-14)


def test_orthonormalize_with_a_rotation_and_known_inner_products(block):
    rotation = jnp.asarray(RNG.normal(size=(3, 5)))
    want = as_matrix(blocks.orthonormalize(blocks.combine(rotation, block)))
    gram = blocks.inner(block, block)
    for known in (None, gram):
        got = as_matrix(blocks.orthonormalize(block, rotation=rotation, gram=known))
        np.testing.assert_allclose(got, want, atol=1e-12)
    # Its own inner products are what counts: with wrong ones the rows are not orthonormal.
    wrong = as_matrix(blocks.orthonormalize(block, gram=jnp.eye(5)))
    assert np.abs(wrong @ wrong.T - np.eye(5)).max() > 0.1


def test_one_round_is_enough_for_rows_that_are_nearly_orthogonal(x64):
    factor, _ = np.linalg.qr(RNG.normal(size=(2000, 5)))
    rows = jnp.asarray((factor * np.geomspace(1, 1e3, 5)).T + 1e-3 * RNG.normal(size=(5, 2000)))
    got = as_matrix({"a": blocks.orthonormalize(rows)})
    np.testing.assert_allclose(got @ got.T, np.eye(5), atol=1e-14)


def test_random_basis_and_zeros():
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32), TREE)
    basis = blocks.random_basis(jax.random.key(0), like, 4)
    assert jax.tree.map(jnp.shape, basis) == jax.tree.map(lambda x: (4, *x.shape), like)
    np.testing.assert_allclose(as_matrix(basis) @ as_matrix(basis).T, np.eye(4), atol=1e-6)
    np.testing.assert_array_equal(as_matrix(blocks.zeros(2, like)), np.zeros((2, 20)))


@pytest.mark.parametrize("merge", [False, True])
def test_packing_keeps_the_numbers(block, merge):
    packing = blocks.Packing(jax.tree.map(lambda x: x[0], block), merge=merge)
    packed = packing.pack(block, axis=1)
    assert len(packed) == (1 if merge else 3)
    chex.assert_trees_all_equal(packing.unpack(packed, axis=1), block)
    np.testing.assert_allclose(blocks.inner(packed, packed), blocks.inner(block, block), rtol=1e-12)
    row = jax.tree.map(lambda x: x[1], block)
    chex.assert_trees_all_equal(packing.unpack(packing.pack(row)), row)
    random = packing.random_block(jax.random.key(0), row, 2, 3)
    expected = blocks.random_block(jax.random.key(0), row, 2, 3)
    chex.assert_trees_all_equal(packing.unpack(random, axis=1), expected)


def test_small_arrays_are_packed_alone():
    vector = {"a": jnp.ones(2), "b": jnp.ones((2, 3)), "c": jnp.zeros(2), "d": jnp.ones(4)}
    for merge, shapes in ((False, [(2, 2), (2, 3), (4,)]), (True, [(8,), (2, 3)])):
        packed = blocks.Packing(vector, largest=4, merge=merge).pack(vector)
        assert [x.shape for x in packed] == shapes


def test_sharded_blocks_are_not_gathered():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    for spec in (jax.P("d", None), jax.P(None, "d")):
        sharding = jax.NamedSharding(mesh, spec)
        like = {"w": jax.device_put(jnp.ones((16, 24)), sharding)}
        block = jax.device_put(
            blocks.random_basis(jax.random.key(0), like, 3),
            jax.NamedSharding(mesh, jax.P(None, *spec)),
        )
        assert blocks.zeros(3, like)["w"].sharding == block["w"].sharding
        assert blocks.place({"w": jnp.zeros((16, 24))}, like)["w"].sharding == sharding
        compiled = jax.jit(blocks.orthonormalize).lower(block).compile()
        text = compiled.as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text
        assert "all-to-all" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_combinations_are_summed_in_float32(dtype):
    # 1 + 4096 * 2^-12 is 2, but in bfloat16 every summand is lost beside the one before.
    block = {"x": jnp.concatenate([jnp.ones((1, 3)), jnp.full((4096, 3), 2.0**-12)]).astype(dtype)}
    got = blocks.combine(jnp.ones(4097), block)["x"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), 2)
    # Nor are coefficients rounded to the block's dtype.
    pair = {"x": jnp.ones((2, 1), dtype)}
    np.testing.assert_array_equal(
        blocks.combine(jnp.array([1 + 2.0**-12, -1]), pair)["x"].astype(jnp.float32), 2.0**-12
    )


def test_blocks_of_different_dtypes(x64):
    half = {"x": jnp.full((1, 300), 1.0, jnp.bfloat16)}
    full = {"x": jnp.full((2, 300), 1 + 2.0**-12, jnp.float32)}
    gram = blocks.inner(half, full)
    assert gram.dtype == jnp.float32
    np.testing.assert_allclose(gram, 300 * (1 + 2.0**-12) * np.ones((1, 2)), rtol=1e-6)


def test_float32_blocks_of_bfloat16_accumulate_in_float32():
    block = {"x": jnp.full((1, 4096), 1.0, jnp.bfloat16)}
    gram = blocks.inner(block, block)
    assert gram.dtype == jnp.float32
    assert gram[0, 0] == 4096
