"""Properties that hold for any pytree of parameters."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel.curvature import blocks
from tests.helpers import signature, tree_allclose, tree_equal
from tests.methods import OPTIMIZERS, Case, K

PyTree = Any

# Few shapes and dtypes: every new one compiles a handful of operations.
LEAVES = st.tuples(
    st.sampled_from([(), (1,), (2, 3), (0,), (3, 0, 2)]), st.sampled_from(["float32", "bfloat16"])
).map(lambda spec: jax.ShapeDtypeStruct(*spec))
# The root is no None: to Optax that means that there are no parameters.
TREES = st.recursive(
    LEAVES | st.none(),
    lambda sub: (
        st.lists(sub, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), sub, max_size=3)
        | st.tuples(sub, sub)
    ),
    max_leaves=5,
).filter(lambda tree: tree is not None)
FEW = hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
TINY = hypothesis.settings(FEW, max_examples=4)

# By hand: what the strategy meets only by luck.
EDGES = (
    (),
    [None],
    {"a": None, "b": [], "c": ((), {})},
    jax.ShapeDtypeStruct((), "bfloat16"),
    [jax.ShapeDtypeStruct((0,), "float32")],
    {
        "a": (jax.ShapeDtypeStruct((2, 3), "bfloat16"), None),
        "b": jax.ShapeDtypeStruct((), "float32"),
    },
)


def on_edges(test: Any) -> Any:
    for edge in EDGES:
        test = hypothesis.example(shapes=edge)(test)
    return test


def fill(shapes: PyTree, seed: int) -> PyTree:
    """A tree of normal numbers with these shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def flat(tree: PyTree) -> np.ndarray:
    """The tree as one float64 vector."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def quadratic(params: PyTree) -> jax.Array:
    """0.5 sum_i c_i p_i ** 2, with distinct curvatures c over the whole tree."""
    total, offset = jnp.zeros(()), 0
    for leaf in jax.tree.leaves(params):
        curvature = 1.0 / (1 + offset + np.arange(leaf.size, dtype=np.float32))
        total += 0.5 * jnp.sum(curvature * jnp.ravel(leaf.astype(jnp.float32)) ** 2)
        offset += leaf.size
    return total


# K-FAC knows one network's parameters; sampled products need a network.
ANY_TREE = [c for c in OPTIMIZERS if not c.factors and c.name != "sampled_product_gradients"]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name.replace(" ", "-")) for c in ANY_TREE])
@on_edges
@hypothesis.given(shapes=TREES)
@FEW
def test_updates_look_like_the_gradients(case: Case, shapes: PyTree) -> None:
    """Structure, shapes and dtypes of the updates; the state keeps its own."""
    tx = case.build(0.1)
    # With fewer parameters than directions there is nothing to train, which `init` refuses.
    size = blocks.dimension(shapes)
    hypothesis.assume(not case.basis or size > K or not size)
    matrices = [leaf for leaf in jax.tree.leaves(shapes) if len(leaf.shape) > 1 and leaf.size]
    if case.matrices and not matrices and jax.tree.leaves(shapes):
        with pytest.raises(ValueError, match="nothing to project"):
            jax.eval_shape(tx.init, shapes)
        return
    state = jax.eval_shape(tx.init, shapes)

    def update(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        value, grads = jax.value_and_grad(quadratic)(params)
        objective = oa.Objective(lambda p: jnp.stack([quadratic(p)] * 2), lambda out: out[0])
        return tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)

    updates, new_state = jax.eval_shape(update, shapes, state)
    assert jax.tree.structure(updates) == jax.tree.structure(shapes)
    for actual, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(shapes), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert signature(new_state) == signature(state)


@functools.partial(jax.jit, static_argnames=("k",))
def split(params: PyTree, update: PyTree, k: int) -> tuple[Any, ...]:
    """Dominant and bulk part of an update, projected once and twice, and chi_k."""

    def project(transform: Any, vector: PyTree, state: PyTree, refresh: Any) -> Any:
        return transform.update(vector, state, params, value_fn=quadratic, refresh=refresh)

    tx = oa.project_to_dominant(k)
    start = oa.interpolate_subspaces(k, 1.0, 1.0).init(params)  # it may be all bulk or dominant
    dominant, state = project(tx, update, start, "cold")
    bulk, _ = project(oa.project_to_bulk(k), update, state, False)
    again, _ = project(tx, dominant, state, False)
    gone, after = project(tx, bulk, state, False)
    return dominant, bulk, again, gone, state, after


@pytest.mark.parametrize("k", [0, 2])
@on_edges
@hypothesis.given(shapes=TREES)
@TINY
def test_projections(shapes: PyTree, k: int) -> None:
    params, update = fill(shapes, 0), fill(shapes, 1)
    dominant, bulk, again, gone, state, after = split(params, update, k)
    vector = flat(update)
    # Everything is computed in float32 and rounded to the leaf's dtype at the end.
    narrow = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(shapes))
    atol = (2**-7 if narrow else 1e-5) * np.linalg.norm(vector)
    np.testing.assert_allclose(flat(dominant) + flat(bulk), vector, atol=atol)
    np.testing.assert_allclose(flat(again), flat(dominant), atol=atol)
    np.testing.assert_allclose(flat(gone), 0, atol=atol)
    assert abs(flat(dominant) @ flat(bulk)) <= atol * max(1, np.linalg.norm(vector))
    # The curvatures fall, so the leading directions are the first two entries.
    expected = np.where(np.arange(vector.size) < k, vector, 0)
    np.testing.assert_allclose(flat(dominant), expected, atol=2 * atol + 1e-4 * vector.size)
    assert 0 <= state.alignment <= 1
    assert 0 <= after.alignment <= 1
    if vector.size:
        chi = np.linalg.norm(flat(dominant)) / np.linalg.norm(vector)
        np.testing.assert_allclose(state.alignment, chi, atol=2**-6 if narrow else 1e-5)
    gram = blocks.inner(state.space.basis, state.space.basis)
    np.testing.assert_allclose(gram, np.eye(*gram.shape), atol=1e-5)


@pytest.mark.parametrize("sampler", [oa.bernoulli_per_element, oa.bernoulli_per_tensor])
@pytest.mark.parametrize("rescale", [False, True])
@on_edges
@hypothesis.given(shapes=TREES)
@TINY
def test_sampling_zeroes_or_keeps(shapes: PyTree, sampler: Any, rescale: bool) -> None:
    grads = fill(shapes, 0)
    tx = oa.sample_gradients(0.5, sampler=sampler, rescale=rescale)
    sampled, state = tx.update(grads, tx.init(grads))
    assert signature(sampled) == signature(grads)
    kept, whole = flat(sampled), flat(grads) * (2 if rescale else 1)
    assert np.all((kept == 0) | (kept == whole))
    same, _ = tx.update(grads, tx.init(grads))
    tree_equal(same, sampled)
    if len(kept) > 20 and sampler is oa.bernoulli_per_element:
        assert not np.array_equal(flat(tx.update(grads, state)[0]), kept)


@on_edges
@hypothesis.given(shapes=TREES)
@TINY
def test_rate_one_keeps_everything(shapes: PyTree) -> None:
    grads = fill(shapes, 0)
    for sampler in (oa.bernoulli_per_element, oa.bernoulli_per_tensor):
        tx = oa.sample_gradients(1.0, sampler=sampler, rescale=True)
        tree_equal(tx.update(grads, tx.init(grads))[0], grads)


@on_edges
@hypothesis.given(shapes=TREES)
@TINY
def test_a_mask_of_everything_is_no_mask(shapes: PyTree) -> None:
    params, update = fill(shapes, 0), fill(shapes, 1)

    def project(mask: Any) -> PyTree:
        tx = oa.interpolate_subspaces(2, 0.5, 1.0, mask=mask)
        state = tx.init(params)
        return jax.jit(lambda u, s, p: tx.update(u, s, p, value_fn=quadratic, refresh="cold")[0])(
            update, state, params
        )

    tree_equal(project(lambda tree: jax.tree.map(lambda _: True, tree)), project(None))


CURVED = [oa.project_to_bulk(1), oa.bulk_sgd(0.1, 1)]


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
@pytest.mark.parametrize("tx", CURVED)
def test_curvature_refuses_other_numbers(tx: Any, dtype: str) -> None:
    params = {"w": jnp.ones(2), "layers": [{"steps": jnp.ones(2, dtype)}]}
    message = rf"real floating-point .* \['layers'\]\[0\]\['steps'\] has dtype {dtype}.*`mask=`"
    with pytest.raises(TypeError, match=message):
        tx.init(params)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_curvature_with_other_numbers_masked_out(dtype: str) -> None:
    """As the message promises."""
    params = {"w": jnp.arange(1.0, 4.0), "other": jnp.ones(2, dtype)}
    tx = oa.project_to_bulk(1, mask={"w": True, "other": False})
    update = {"w": jnp.ones(3), "other": jnp.full(2, 2, dtype)}
    updates, _ = jax.jit(
        lambda u, s, p: tx.update(
            u, s, p, value_fn=lambda p: quadratic({"w": p["w"]}), refresh="cold"
        )
    )(update, tx.init(params), params)
    tree_allclose(updates["w"], jnp.array([0.0, 1.0, 1.0]), atol=1e-5)
    tree_equal(updates["other"], update["other"])


def test_demon_adam_takes_complex_gradients_as_adam_does() -> None:
    """With a momentum of 0 both are RMSProp: the second moment is that of the modulus."""
    grads = {"w": jnp.array([1.0 + 2.0j, -1.0j, 3.0])}
    ours = oa.scale_by_demon_adam(0.0, decay_steps=10, form="ema")
    theirs = optax.scale_by_adam(b1=0.0)
    tree_allclose(
        ours.update(grads, ours.init(grads))[0], theirs.update(grads, theirs.init(grads))[0]
    )
