"""GaLore: golden values, the authors' trajectory, Optax's, layouts, refreshes, memory, errors."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers as Axes

import optax_accel as oa
from optax_accel.low_rank import _eight_bits, _subspaces
from tests.helpers import tree_allclose, tree_equal

RNG = np.random.default_rng(0)


def updates_for(tx, gradients, params=None):
    """The updates for a sequence of gradients, and the last state."""
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    step, state, result = jax.jit(tx.update), tx.init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        result.append(updates)
    return result, state


def test_golden(x64):
    gradient = jnp.array([[3.0, 0], [0, 1], [4, 0]])
    (updates,), _ = updates_for(oa.galore(0.01, 1), [gradient])
    expected = [[-0.0024999736, 0], [0, 0], [-0.0024999802, 0]]
    np.testing.assert_allclose(updates, expected, rtol=1e-7, atol=1e-15)


def authors_rule(weights, gradients, rank, every, rate, scale, decay):
    """The rule of the module's docstring in NumPy; signs of singular vectors as ours."""
    b1, b2, eps, old = 0.9, 0.999, 1e-6, None
    first = second = 0.0
    for step, gradient in enumerate(gradients):
        tall = gradient.shape[0] >= gradient.shape[1]
        if step % every == 0:
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            basis = right[:rank].T if tall else left[:, :rank]
            if old is not None:
                basis = basis * np.where((basis * old).sum(0) < 0, -1, 1)
            old = basis
        reduced = gradient @ basis if tall else basis.T @ gradient
        first = b1 * first + (1 - b1) * reduced
        second = b2 * second + (1 - b2) * reduced**2
        normalized = first / (np.sqrt(second) + eps)
        back = normalized @ basis.T if tall else basis @ normalized
        correction = math.sqrt(1 - b2 ** (step + 1)) / (1 - b1 ** (step + 1))
        weights = weights - rate * correction * scale * back
        weights = weights - rate * decay * weights
    return weights


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("method", ["svd", "range_finder"])
def test_trajectory_of_the_authors(x64, shape, method):
    """Over three refreshes; the range finder is exact on matrices that it sees whole."""
    weights, gradients = RNG.normal(size=shape), RNG.normal(size=(20, *shape))
    tx = oa.galore(0.01, 3, refresh_every=6, weight_decay=0.1, method=method)
    updates, _ = updates_for(tx, list(gradients), jnp.asarray(weights))
    expected = authors_rule(weights, gradients, 3, 6, 0.01, 0.25, 0.1)
    np.testing.assert_allclose(weights + sum(updates), expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_optax_projects_the_longer_side(x64, shape):
    """Until the first refresh, where signs begin to matter; its singular vectors are of float32."""
    gradients = list(RNG.normal(size=(6, *shape)))
    theirs, _ = updates_for(optax.contrib.scale_by_galore(2), gradients)
    build = functools.partial(oa.scale_by_galore, 2, optax.scale_by_adam(), scale=1.0)
    tree_allclose(updates_for(build(projection="long"), gradients)[0], theirs, rtol=1e-4)
    assert np.abs(updates_for(build(), gradients)[0][-1] - theirs[-1]).max() > 0.1


def test_full_rank_is_the_inner_transformation(x64):
    """With plain SGD inside, whose state does not belong to a basis."""
    gradients = [{"w": RNG.normal(size=(4, 3)), "b": RNG.normal(size=3)} for _ in range(9)]
    inner = optax.scale(-0.1)
    expected, _ = updates_for(inner, gradients)
    for method in ("svd", "range_finder"):
        tx = oa.scale_by_galore(3, inner, scale=1.0, refresh_every=4, method=method)
        tree_allclose(updates_for(tx, gradients)[0], expected, rtol=1e-9)


KERNEL = (3, 2, 4, 6)
LAYOUTS = {
    "convolution": (KERNEL, None, KERNEL, lambda g: g.reshape(24, 6)),
    "query": ((6, 2, 4), Axes(0, (1, 2)), (6, 2, 4), lambda g: g.reshape(6, 8)),
    "output": ((2, 4, 6), Axes((0, 1), 2), (2, 4, 6), lambda g: g.reshape(8, 6)),
    "mixed axes": (
        (5, 3, 4),
        Axes(1, (2, 0)),
        (5, 3, 4),
        lambda g: g.transpose(1, 2, 0).reshape(3, 20),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_axes_form_matrices(x64, name):
    shape, numbers, _, matrix = LAYOUTS[name]
    gradients = list(RNG.normal(size=(4, *shape)))
    build = functools.partial(oa.galore, 0.1, 2, refresh_every=3)
    alike, state = updates_for(build(dimension_numbers=numbers), gradients)
    plain, _ = updates_for(build(), [matrix(g) for g in gradients])
    for ours, theirs in zip(alike, plain, strict=True):
        np.testing.assert_allclose(matrix(ours), theirs, rtol=1e-9, atol=1e-12)
    reduced = optax.tree.get(state, "mu")
    assert len(reduced.shape) == len(shape)
    assert reduced.size < math.prod(shape)


def test_stacked_layers_have_a_basis_each(x64):
    gradients = list(RNG.normal(size=(5, 3, 6, 4)))
    numbers = Axes(1, 2)
    for method in ("svd", "range_finder"):
        build = functools.partial(oa.galore, 0.1, 2, refresh_every=2, method=method)
        stacked, _ = updates_for(build(dimension_numbers=numbers), gradients)
        for layer in range(3):
            alone, _ = updates_for(build(), [g[layer] for g in gradients])
            tree_allclose([u[layer] for u in stacked], alone, rtol=1e-6)


def test_range_finder_captures_the_norm():
    """Within one per cent of the best, for a spectrum that decays slowly, cold and warm."""
    left, right = (np.linalg.qr(RNG.normal(size=(n, 60)))[0] for n in (90, 60))
    matrix = jnp.float32(left * np.arange(1, 61) ** -0.5 @ right.T)
    best = jnp.linalg.norm(jnp.linalg.svd(matrix)[1][:8])
    random = _subspaces.random_columns(jax.random.key(0), [(60, 18), (20, 20)])
    start = _subspaces.start_columns(random, jnp.zeros((60, 8)), 18, jnp.array(True))
    basis, squares = _subspaces.range_finder(matrix.T, 8, start)
    assert jnp.linalg.norm(matrix @ basis) > 0.99 * best
    np.testing.assert_allclose(basis.T @ basis, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(matrix @ basis, axis=0) ** 2, squares[:8], rtol=1e-3)


def bases(tx, gradients, refresh=None):
    step, state, result = jax.jit(tx.update, static_argnames="refresh"), tx.init(gradients[0]), []
    for i, gradient in enumerate(gradients):
        _, state = step(gradient, state, refresh=None if refresh is None else refresh(i))
        result.append(jax.tree.leaves(state.low_rank_basis))
    return result


@pytest.mark.parametrize("stagger", [0, 2])
def test_refreshes_in_the_graph_and_from_the_host(stagger):
    tx = oa.scale_by_galore(1, refresh_every=6, stagger=stagger, method="range_finder")
    gradients = [[jnp.float32(RNG.normal(size=(4, 3))) for _ in range(3)] for _ in range(13)]
    inside = bases(tx, gradients)
    changed = [
        [i for i in range(1, 13) if not np.array_equal(inside[i][leaf], inside[i - 1][leaf])]
        for leaf in range(3)
    ]
    assert changed == ([[6, 12]] * 3 if not stagger else [[6, 12], [2, 8], [4, 10]])
    outside = bases(tx, gradients, functools.partial(oa.refresh_at, tx=tx))
    tree_allclose(outside, inside, rtol=1e-6)
    assert not any(leaf.any() for leaf in bases(tx, gradients[:1], lambda _: False)[0])


def test_gradients_that_are_not_finite_leave_the_basis_alone():
    tx = oa.scale_by_galore(1, refresh_every=1)
    gradient = jnp.float32(RNG.normal(size=(4, 3)))
    before, after = bases(tx, [gradient, gradient.at[0, 0].set(np.nan)])
    tree_equal(after, before)


@pytest.mark.parametrize("stagger", [0, 3])
def test_a_first_gradient_that_is_not_finite_is_made_up_for(stagger):
    tx = oa.scale_by_galore(1, optax.identity(), refresh_every=9, stagger=stagger)
    gradient = jnp.float32(RNG.normal(size=(4, 3)))
    first, second = bases(tx, [gradient * np.nan, gradient])
    assert not first[0].any()
    assert second[0].any()


def test_what_is_not_finite_can_be_seen():
    for tx in (oa.galore(0.1, 1), oa.adarankgrad(0.1, 1), oa.sift(0.1, 0.5)):
        gradient = jnp.float32(RNG.normal(size=(4, 3)))
        updates, _ = updates_for(tx, [gradient, gradient, gradient * np.nan, gradient])
        assert jnp.isnan(updates[-1]).any()


def test_divided_parameters_on_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",))
    params = jax.device_put(jnp.ones((16, 8)), jax.NamedSharding(mesh, jax.P("data")))
    for tx in (oa.galore(0.1, 1), oa.adarankgrad(0.1, 1), oa.sift(0.1, 0.5)):
        with pytest.raises(ValueError, match=r"axis_types=.*Auto"):
            tx.init(params)


def test_memory_on_a_language_model():
    """The GPT of 0.8 million parameters: width 128, 4 blocks, vocabulary 65."""
    blocks = {"qkv": (128, 384), "out": (128, 128), "up": (128, 512), "down": (512, 128)}
    shapes = {f"{name}{i}": shape for i in range(4) for name, shape in blocks.items()}
    shapes |= {"tokens": (65, 128), "positions": (64, 128), "head": (128, 65)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def size(tx):
        return sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params))
        )

    assert size(oa.galore(0.01, 32)) < 0.35 * size(optax.adam(0.01))


def test_states_are_sharded_as_the_parameters():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in": jax.P("data", None), "out": jax.P(None, "data")}
    params = {
        name: jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }
    state = oa.state_shardings(oa.galore(0.1, 2), params)
    # The rows are projected: moments of (2, 24), bases of (16, 2).
    moments, basis = (optax.tree.get(state, name) for name in ("mu", "low_rank_basis"))
    assert moments["in"].spec == basis["out"].spec == jax.P()
    assert moments["out"].spec == jax.P(None, "data")
    assert basis["in"].spec == jax.P("data", None)


@pytest.mark.parametrize(
    ("kwargs", "params", "message"),
    [
        ({"rank": 0}, None, "`rank` must be at least 1, got 0"),
        ({"rank": 5}, {"w": (4, 3), "v": (2, 9)}, "the rank is 5, but .* largest matrix is 3"),
        ({"rank": 1}, {"b": (3,), "s": ()}, "no parameter has two axes or more"),
        ({"rank": 1, "method": "qr"}, None, "`method` must be one of"),
        ({"rank": 1, "projection": "left"}, None, "`projection` must be one of"),
        ({"rank": 1, "refresh_every": 7, "stagger": 2}, None, "must be a multiple of `stagger`, 2"),
        ({"rank": 4, "dimension_numbers": {"w": Axes()}}, {"w": (9, 3)}, "must be at most 3 for"),
        ({"rank": 1, "dimension_numbers": Axes(0, 2)}, {"w": (9, 3)}, "names an axis that"),
        ({"rank": 1, "dimension_numbers": Axes(0, 0)}, {"w": (9, 3)}, "and none twice"),
        ({"rank": 1, "dimension_numbers": {"v": Axes()}}, {"w": (9, 3)}, "a tree like the param"),
        (
            {"rank": 1, "dimension_numbers": {"w": 1}},
            {"w": (9, 3)},
            "GaLoreDimensionNumbers or None",
        ),
        ({"rank": 1, "weight_decay": -1.0}, None, "`weight_decay` must lie in"),
    ],
)
def test_wrong_values(kwargs, params, message):
    with pytest.raises(ValueError, match=message):
        oa.galore(0.1, **kwargs).init(
            jax.tree.map(jnp.zeros, params, is_leaf=lambda x: isinstance(x, tuple))
        )


def test_eight_bits_are_unbiased_and_close():
    """A code is within a step of 12 % of its entry, and right on average over the draws."""
    rng = np.random.default_rng(8)
    moment = rng.uniform(0.1, 1, 3_000) * rng.choice([-1, 1], 3_000) * np.geomspace(1e-3, 1, 3_000)
    # Entries that are a code's own value, where a step up or down would not be seen as noise.
    moment[::3] = 2.0 ** -(rng.integers(0, 60, 1_000) / 6)
    moment = jnp.asarray(moment, jnp.float32)

    def round_trip(seed, moment, dtype):
        bits = jax.random.bits(jax.random.key(seed), moment.shape)
        return _eight_bits.decoded(*_eight_bits.encoded(moment, dtype, bits))

    run = jax.jit(jax.vmap(round_trip, (0, None, None)), static_argnums=2)
    for dtype, values in ((jnp.int8, moment), (jnp.uint8, moment**2)):
        found = np.asarray(run(jnp.arange(400), values, dtype))
        np.testing.assert_allclose(found, np.broadcast_to(values, found.shape), rtol=0.123)
        # Four standard errors of a draw between neighbors, which are 12 % apart.
        np.testing.assert_allclose(found.mean(0), values, rtol=4 * 0.061 / 400**0.5)
    codes, scales = _eight_bits.encoded(
        jnp.array([0.0, jnp.nan]), jnp.int8, jnp.zeros(2, jnp.uint32)
    )
    assert bool(jnp.isnan(_eight_bits.decoded(codes, scales)).all())


def test_moments_in_eight_bits():
    """A quarter of the bytes, and after 40 steps the loss of whole moments to a tenth."""
    target = jnp.asarray(RNG.standard_normal((48, 40)), jnp.float32)
    loss = lambda p: 0.5 * jnp.mean((p["w"] - target) ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
    start = {"w": jnp.zeros((48, 40)), "b": jnp.ones(7)}

    def trained(**options):
        tx = oa.galore(0.1, 16, scale=1.0, refresh_every=10, **options)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=40)[0])()

    whole, whole_state = trained()
    params, state = trained(eight_bits=True)
    assert abs(loss(params) - loss(whole)) < 0.1 * loss(whole) < 0.05 * loss(start)
    (adam,), (codes,) = (
        [x for x in jax.tree.leaves(s, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
        for s in (whole_state, state)
    )
    assert {x.dtype.name for x in jax.tree.leaves((codes.mu, codes.nu))} == {"int8", "uint8"}
    sizes = [sum(x.nbytes for x in jax.tree.leaves(s)) for s in (codes, adam)]
    assert sizes[0] < 0.27 * sizes[1]


def test_eight_bits_and_a_dtype_exclude_each_other():
    with pytest.raises(ValueError, match=r"`mu_dtype` .* and `eight_bits` both choose"):
        oa.galore(0.1, 1, mu_dtype=jnp.bfloat16, eight_bits=True)
