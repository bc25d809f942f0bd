"""Subspace projections: golden values, limit cases, refreshing, switching, masks."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg

import optax_accel as oa
from optax_accel.curvature import sgd_preconditioner
from optax_accel.subspace import optimizers, projections

DIAGONAL = np.array([10.0, 1.0, 0.1])


def quadratic(params):
    return 0.5 * jnp.sum(jnp.asarray(DIAGONAL) * params**2)


def step(tx, grads, params, state=None, **kwargs):
    state = tx.init(params) if state is None else state
    updates, state = tx.update(grads, state, params, **kwargs)
    return optax.apply_updates(params, updates), state


# -- golden values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "want"),
    [
        (lambda: oa.dom_sgd(0.1, 1), [0.9, 1, 1]),
        (lambda: oa.bulk_sgd(0.1, 1), [1, 0.8, 0.8]),
        (lambda: oa.interpolated_sgd(0.1, 1, 0.25, 0.75), [0.975, 0.85, 0.85]),
    ],
)
def test_golden_a(x64, optimizer, want):
    params, state = step(optimizer(), jnp.array([1.0, 2, 2]), jnp.ones(3), value_fn=quadratic)
    np.testing.assert_allclose(params, want, rtol=1e-12)
    np.testing.assert_allclose(optax.tree.get(state, "alignment"), 1 / 3, rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "want"),
    [
        (oa.dom_sgd, [1.9705375349, 2.9792372353]),
        (oa.bulk_sgd, [1.9994624651, 3.0007627647]),
    ],
)
def test_golden_b(x64, optimizer, want):
    objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
    w = jnp.array([2.0, 3.0])
    params, state = step(optimizer(0.01, 1), objective.grad(w), w, value_fn=objective)
    np.testing.assert_allclose(params, want, atol=1e-10)
    space = optax.tree.get(state, "space")
    np.testing.assert_allclose(space.eigenvalues, [13.9330343737], atol=1e-10)
    np.testing.assert_allclose(np.abs(space.basis[0]), [0.8174155605, 0.5760484368], atol=1e-10)
    np.testing.assert_allclose(optax.tree.get(state, "alignment"), 0.9996650386, atol=1e-10)
    # Curvature shares of the dominant subspace (spec 1.5), from the same products.
    u = space.basis[0]
    products = {
        "h": objective.hvp(w, u),
        "outer": objective.ggn_vp(w, u),
        "functional": objective.hvp(w, u) - objective.ggn_vp(w, u),
    }
    traces = [float(u @ products[name]) for name in ("h", "outer", "functional")]
    np.testing.assert_allclose(traces, [13.9330343737, 12.9912924621, 0.9417419116], atol=1e-9)
    energies = [float(products[name] @ products[name]) for name in ("h", "outer", "functional")]
    np.testing.assert_allclose(energies, [194.1294468576, 168.8868020068, 1.0], atol=1e-8)


def test_golden_c_projects_the_update_not_the_gradient(x64):
    tx = oa.bulk_sgd(0.1, 1, base=functools.partial(optax.sgd, momentum=0.9))
    params, state = jnp.ones(3), None
    for want, buffer in (
        ([1, 0.9, 0.99], [10, 1, 0.1]),
        ([1, 0.72, 0.9711], [19, 1.8, 0.189]),
    ):
        params, state = step(tx, jax.grad(quadratic)(params), params, state, value_fn=quadratic)
        np.testing.assert_allclose(params, want, rtol=1e-12)
        np.testing.assert_allclose(optax.tree.get(state, "trace"), buffer, rtol=1e-12)


def test_first_in_the_chain_the_moments_see_the_projected_gradient(x64):
    tx = optax.chain(oa.project_to_bulk(1), optax.sgd(0.1, momentum=0.9))
    _, state = step(tx, jnp.ones(3), jnp.ones(3), value_fn=quadratic)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), [0, 1, 1], atol=1e-12)


# -- limit cases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 5])
def test_all_directions_are_dominant_when_k_reaches_the_dimension(k):
    """Then only the dominant weight counts: Dom-SGD is SGD."""
    grads = jnp.array([1.0, -2.0, 3.0])
    dominant = oa.project_to_dominant(k)
    updates, state = dominant.update(grads, dominant.init(grads), grads, value_fn=quadratic)
    np.testing.assert_array_equal(updates, grads)
    assert state.space.basis.shape == (3, 3)
    np.testing.assert_allclose(state.space.eigenvalues, DIAGONAL, rtol=1e-5)
    assert state.alignment == 1
    halved = oa.interpolate_subspaces(k, 0.5, 0.0)
    np.testing.assert_array_equal(halved.update(grads, state, grads, refresh=False)[0], grads / 2)


def test_no_directions_need_no_objective():
    grads = jnp.array([1.0, -2.0, 3.0])
    for tx, scale in ((oa.project_to_bulk(0), 1), (oa.interpolate_subspaces(0, 0.0, 0.5), 0.5)):
        np.testing.assert_array_equal(tx.update(grads, tx.init(grads), grads)[0], scale * grads)


MASKED = {"w": True, "b": False}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oa.bulk_sgd(0.1, 5), "`num_directions` is 5, .* take part, 5.* at most 4 direct"),
        (lambda: oa.bulk_sgd(0.1, 9), "`num_directions` is 9, .* take part, 5.* at most 4 direct"),
        (lambda: oa.project_to_bulk(3, mask=MASKED), "is 3, .* part, 3.* at most 2 directions"),
        (lambda: oa.bulk_sgd(0.1, 3, mask=MASKED, start_step=3), "at most 2 directions"),
        (lambda: oa.interpolated_sgd(0.1, 5, 0, 0.5), "`dominant_weight` other than 0"),
        (lambda: oa.dom_sgd(0.1, 0), "with `num_directions=0` everything is bulk.*at least 1"),
        (lambda: oa.project_to_dominant(0), "with `num_directions=0` everything is bulk"),
        (lambda: oa.interpolate_subspaces(2, 0.0, 0.0), "are both 0"),
        (
            lambda: optax.inject_hyperparams(oa.bulk_sgd)(0.1, num_directions=5),
            "at most 4 directions",
        ),
        (lambda: oa.bulk_sgd(0.1, 5, tracker=oa.GradientTracker()), "at most 4 directions"),
    ],
)
def test_settings_that_train_nothing_are_refused(make, message):
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=f"every update would be zero, .*{message}"):
        make().init(params)


def test_weights_that_may_change_are_not_refused():
    params = jnp.ones(3)
    for tx in (
        oa.interpolated_sgd(0.1, 3, optax.linear_schedule(0.0, 1.0, 10), 1.0),
        oa.interpolate_subspaces(0, 0.0, lambda count: 0.0),
        oa.dom_sgd(0.1, 3),
        oa.bulk_sgd(0.1, 2),
    ):
        tx.init(params)


@pytest.mark.parametrize("factory", [oa.bulk_sgd, oa.dom_sgd])
def test_optax_injects_counts_as_arrays(factory):
    """Also the start step and the alignment at which the projection is switched on."""
    numbers = {"num_directions": 1, "start_step": 1, "switch_alignment": 0.0}
    injected = optax.inject_hyperparams(factory)(learning_rate=0.1, **numbers)
    params, grads = jnp.ones(3), jnp.array([1.0, 2.0, 3.0])
    states = [injected.init(params), factory(0.1, **numbers).init(params)]
    update = jax.jit(functools.partial(injected.update, value_fn=quadratic))
    plain = jax.jit(functools.partial(factory(0.1, **numbers).update, value_fn=quadratic))
    for _ in range(3):
        got, states[0] = update(grads, states[0], params)
        want, states[1] = plain(grads, states[1], params)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert oa.refresh_at(1, injected) == "cold"
    with pytest.raises(TypeError, match=r"decides the shape.* optax_accel\.inject_hyperparams"):
        jax.eval_shape(injected.init, params)


def test_zero_updates_have_alignment_zero():
    tx = oa.project_to_bulk(1)
    updates, state = tx.update(jnp.zeros(3), tx.init(jnp.ones(3)), jnp.ones(3), value_fn=quadratic)
    np.testing.assert_array_equal(updates, 0)
    assert state.alignment == 0


def test_repeated_eigenvalues_give_a_projector(x64):
    def loss(p):
        return 0.5 * jnp.sum(jnp.array([2.0, 2, 2, 1, 1]) * p**2)

    tx = oa.project_to_dominant(2, tracker=oa.BlockTracker(power_iterations=2))
    vector = jnp.arange(1.0, 6.0)
    once, state = tx.update(vector, tx.init(vector), vector, value_fn=loss)
    twice, _ = tx.update(once, state, vector, refresh=False)
    np.testing.assert_allclose(twice, once, rtol=1e-10)
    np.testing.assert_allclose(once[3:], 0, atol=1e-10)


def test_a_loss_that_is_not_finite_leaves_updates_and_basis_alone():
    def broken(p):
        return jnp.sum(jnp.log(p))

    tx = oa.project_to_bulk(1)
    params, bad = jnp.ones(3), -jnp.ones(3) * 0
    state = tx.init(params)
    updates, state = tx.update(jnp.ones(3), state, bad, value_fn=broken)
    np.testing.assert_array_equal(updates, 1)
    assert not state.space.ready
    _, state = tx.update(jnp.ones(3), state, params, value_fn=quadratic, refresh=True)
    assert state.space.ready
    basis = state.space.basis
    _, state = tx.update(jnp.ones(3), state, bad, value_fn=broken, refresh=True)
    np.testing.assert_array_equal(state.space.basis, basis)


# -- tracking -------------------------------------------------------------------------------------


def test_host_driven_refresh_is_the_in_graph_one():
    def loss(p):
        return jnp.sum(jnp.cos(p["a"]) * p["b"] ** 2) + 0.5 * jnp.sum(p["a"] ** 2)

    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (30,)), "b": jnp.linspace(0, 1, 30)}
    tracker = oa.BlockTracker(refresh_every=2, cold_start_products=6)
    tx = oa.bulk_sgd(0.05, 2, tracker=tracker)

    @functools.partial(jax.jit, static_argnames="refresh")
    def train_step(params, state, refresh=None):
        updates, state = tx.update(
            jax.grad(loss)(params), state, params, value_fn=loss, refresh=refresh
        )
        return optax.apply_updates(params, updates), state

    runs = []
    for driven in (False, True):
        p, state = params, tx.init(params)
        for i in range(5):
            p, state = train_step(p, state, oa.refresh_at(i, 2) if driven else None)
        runs.append((p, state))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        *[(p, optax.tree.get(s, "eigenvalues"), optax.tree.get(s, "alignment")) for p, s in runs],
    )


def _network(seed=0):
    rng = np.random.default_rng(seed)
    # A mean far from zero makes one curvature outlier per output, as in trained networks.
    x = (rng.normal(size=(200, 8)) + 1).astype(np.float32)
    y = np.eye(4, dtype=np.float32)[np.argmax(x @ rng.normal(size=(8, 4)), axis=1)]
    params = {
        "w": jnp.asarray(rng.normal(size=(8, 16)) / 3, jnp.float32),
        "v": jnp.asarray(rng.normal(size=(16, 4)) / 4, jnp.float32),
    }
    objective = oa.Objective(
        lambda p: jnp.tanh(x @ p["w"]) @ p["v"],
        lambda out: 0.5 * jnp.mean(jnp.sum((out - y) ** 2, axis=-1)),
    )
    return objective, params


@pytest.mark.parametrize("order", ["algebraic", "magnitude"])
def test_the_tracked_subspace_follows_arpack_along_training(order):
    objective, params = _network()
    tx = oa.interpolated_sgd(
        0.1, 4, 1.0, 1.0, tracker=oa.BlockTracker(order=order, refresh_every=5)
    )
    state = tx.init(params)

    @functools.partial(jax.jit, static_argnames="refresh")
    def train_step(params, state, refresh):
        grads = objective.grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective, refresh=refresh)
        return optax.apply_updates(params, updates), state, grads

    for i in range(101):
        before = params
        params, state, grads = train_step(params, state, oa.refresh_at(i, 5))
        if i % 50 == 0:
            flat, unravel = jax.flatten_util.ravel_pytree(before)
            hessian = jax.hessian(lambda p, u=unravel: objective(u(p)))(flat)
            which = {"algebraic": "LA", "magnitude": "LM"}[order]
            values, vectors = scipy.sparse.linalg.eigsh(
                np.asarray(hessian, np.float64), 4, which=which
            )
            gradient = jax.flatten_util.ravel_pytree(grads)[0]
            chi = np.linalg.norm(vectors.T @ gradient) / np.linalg.norm(gradient)
            assert abs(chi - optax.tree.get(state, "alignment")) < 0.01
            np.testing.assert_allclose(
                np.sort(optax.tree.get(state, "eigenvalues")), np.sort(values), rtol=0.02
            )


def test_without_a_cold_start_sweeps_grow_the_estimate_from_a_random_basis():
    assert [oa.refresh_at(i, 5, cold_start=False) for i in (0, 9, 10, 11, 15)] == [
        *["warm"] * 3,
        False,
        "warm",
    ]
    assert oa.refresh_at(2, 5, start_step=3, cold_start=False) is False
    objective, params = _network()
    tx = oa.project_to_bulk(4)
    update = jax.jit(
        lambda state: tx.update(params, state, params, value_fn=objective, refresh="warm")[1]
    )
    grown = tx.init(params)
    for _ in range(60):
        grown = update(grown)
    _, cold = tx.update(params, tx.init(params), params, value_fn=objective, refresh="cold")
    np.testing.assert_allclose(grown.space.eigenvalues, cold.space.eigenvalues, rtol=0.02)
    assert abs(grown.alignment - cold.alignment) < 0.02


def test_gauss_newton_curvature_needs_the_outputs():
    objective, params = _network()
    tx = oa.project_to_bulk(2, tracker=oa.BlockTracker(curvature="gauss_newton"))
    _, state = tx.update(params, tx.init(params), params, value_fn=objective)
    assert jnp.all(state.space.eigenvalues > 0)
    with pytest.raises(ValueError, match="build it with Objective"):
        tx.update(params, tx.init(params), params, value_fn=lambda p: objective(p))


def test_curvature_can_come_from_another_batch(x64):
    tx = oa.project_to_bulk(1)
    params = jnp.ones(3)
    updates, _ = tx.update(
        jnp.ones(3),
        tx.init(params),
        params,
        value_fn=quadratic,
        curvature_value_fn=lambda p: quadratic(p[::-1]),
    )
    np.testing.assert_allclose(updates, [1, 1, 0], atol=1e-12)


def test_extra_arguments_reach_the_value_function():
    def loss(p, scale):
        return jnp.sum(jnp.array([1.0, scale]) * p**2)

    tx = oa.project_to_bulk(1)
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params, value_fn=loss, scale=5.0, other=1)
    np.testing.assert_allclose(updates, [1, 0], atol=1e-6)


@pytest.mark.parametrize(("cold", "products"), [(True, 20), (False, 3)])
def test_products_are_counted_as_made(cold, products):
    _, params = _network()
    assert oa.BlockTracker(oversampling=1).num_products(params, 2, cold=cold) == products


# -- when it starts -------------------------------------------------------------------------------


def test_start_step_passes_updates_unchanged_before_it():
    tx = oa.project_to_dominant(1, start_step=2)
    params, grads = jnp.ones(3), jnp.array([0.1, 0.7, 0.3])
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, value_fn=quadratic))
    for i in range(4):
        updates, state = update(grads, state, params)
        assert bool(state.active) == (i >= 2)
        assert bool(jnp.all(updates == grads)) == (i < 2)


def test_switch_waits_for_the_average_alignment_and_stays():
    tx = oa.project_to_bulk(1, switch_alignment=0.95)
    aligned, bulk = jnp.array([1.0, 0, 0]), jnp.array([0.0, 1, 0])
    params = jnp.ones(3)
    state = tx.init(params)
    seen, averages = [], []

    @functools.partial(jax.jit, static_argnames="refresh")
    def update(grads, state, refresh):
        return tx.update(grads, state, params, value_fn=quadratic, refresh=refresh)

    for i, grads in enumerate((bulk, *[aligned] * 30, bulk)):
        _, state = update(grads, state, refresh="cold" if i == 0 else False)
        seen.append(bool(state.active))
        averages.append(float(state.alignment_ema))
    # 1 - 0.9**n > 0.95 first holds at n = 29.
    assert seen.index(True) == 29
    assert seen[-1]
    assert averages[0] < 1e-6
    np.testing.assert_allclose(averages[3], 1 - 0.9**3, rtol=1e-5)


# -- masks, dtypes, wrong input -------------------------------------------------------------------


def test_masked_parameters_are_held_fixed_and_pass():
    def loss(p):
        return 0.5 * (100 * p["frozen"] ** 2 + jnp.sum(jnp.array([3.0, 1.0]) * p["w"] ** 2))

    params = {"frozen": jnp.ones(()), "w": jnp.ones(2)}
    for mask in ({"frozen": False, "w": True}, lambda p: {"frozen": False, "w": True}):
        tx = oa.project_to_bulk(1, mask=mask)
        updates, state = tx.update(params, tx.init(params), params, value_fn=loss)
        assert updates["frozen"] == 1
        np.testing.assert_allclose(updates["w"], [0, 1], atol=1e-6)
        assert isinstance(state.space.basis["frozen"], optax.MaskedNode)
        np.testing.assert_allclose(state.space.eigenvalues, [3], rtol=1e-6)


def test_bfloat16_updates_stay_bfloat16_with_a_float32_basis():
    params = jnp.ones(3, jnp.bfloat16)
    tx = oa.project_to_bulk(1)
    updates, state = tx.update(
        params, tx.init(params), params, value_fn=lambda p: quadratic(p.astype(jnp.float32))
    )
    assert updates.dtype == jnp.bfloat16
    assert state.space.basis.dtype == jnp.float32
    # The products themselves are rounded to bfloat16, hence the basis.
    np.testing.assert_allclose(updates.astype(jnp.float32), [0, 1, 1], atol=0.01)


def test_scheduled_weights_move_from_sgd_to_bulk():
    tx = oa.interpolate_subspaces(1, optax.linear_schedule(1.0, 0.0, 2), 1.0)
    params = jnp.ones(3)
    state = tx.init(params)
    first = []
    update = jax.jit(functools.partial(tx.update, value_fn=quadratic))
    for _ in range(3):
        updates, state = update(jnp.ones(3), state, params)
        first.append(float(updates[0]))
    np.testing.assert_allclose(first, [1, 0.5, 0], atol=1e-6)


def test_errors_teach():
    tx = oa.project_to_bulk(1)
    params = jnp.ones(3)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"needs the extra argument `value_fn`.*tx\.update\("):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state, value_fn=quadratic)
    with pytest.raises(TypeError, match="`value_fn` must be callable, got float"):
        tx.update(params, state, params, value_fn=1.0)
    with pytest.raises(TypeError, match="static_argnames"):
        tx.update(params, state, params, value_fn=quadratic, refresh=jnp.array(True))
    with pytest.raises(
        ValueError, match=r"'warm', 'factors', .*Refresh of the first four; got 'hot'"
    ):
        tx.update(params, state, params, value_fn=quadratic, refresh="hot")
    with pytest.raises(ValueError, match="Give interpolate_subspaces its own `mask="):
        optax.masked(tx, {"a": True, "b": False}).init({"a": params, "b": params})
    with pytest.raises(TypeError, match=r"\['n'\] has dtype int32; leave it out"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="`num_directions` must be at least 0, got -1"):
        oa.project_to_bulk(-1)
    with pytest.raises(ValueError, match=r"`switch_alignment` must lie in \[0, 1\], got 2"):
        oa.project_to_bulk(1, switch_alignment=2)
    with pytest.raises(ValueError, match="`order` must be one of 'algebraic', 'magnitude'"):
        oa.BlockTracker(order="largest")
    with pytest.raises(ValueError, match="`refresh_every` must be at least 1, got 0"):
        oa.BlockTracker(refresh_every=0)
    with pytest.raises(ValueError, match="`mask` must be a pytree of booleans"):
        oa.project_to_bulk(1, mask={"a": True}).init({"b": params})
    with pytest.raises(ValueError, match=r"`mask` must be a pytree of booleans.*it contains 'no'"):
        oa.project_to_bulk(1, mask="no").init(params)
    with pytest.raises(TypeError, match=r"`tracker` must be a Tracker, .* got 'fast'"):
        oa.project_to_bulk(1, tracker="fast")
    with pytest.raises(TypeError, match=r"`base` must be a function of the learning rate.*inject"):
        oa.bulk_sgd(0.1, 1, base=optax.sgd(0.1))
    with pytest.raises(ValueError, match="`accumulator_dtype` must be a real floating-point dtype"):
        oa.BlockTracker(accumulator_dtype=jnp.int32)


@pytest.mark.parametrize(
    ("module", "name", "inner", "weights"),
    [
        (projections, "project_to_dominant", "interpolate_subspaces", (1, 0)),
        (projections, "project_to_bulk", "interpolate_subspaces", (0, 1)),
        (optimizers, "interpolated_sgd", "interpolate_subspaces", None),
        (optimizers, "dom_sgd", "interpolated_sgd", (1, 0)),
        (optimizers, "bulk_sgd", "interpolated_sgd", (0, 1)),
    ],
)
def test_wrappers_repeat_and_hand_on_every_argument(monkeypatch, module, name, inner, weights):
    outer, signature = getattr(module, name), inspect.signature(getattr(module, inner))
    parameters = inspect.signature(outer).parameters
    shared = [each for each in signature.parameters if each in parameters]
    assert {"tracker", "start_step", "switch_alignment", "alignment_decay", "mask"} < set(shared)
    for each in shared:
        assert parameters[each] == signature.parameters[each]
    calls = []

    def record(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return optax.identity()

    monkeypatch.setattr(module, inner, record)
    values = {each: object() for each in parameters} | {"learning_rate": 0.1, "base": optax.sgd}
    values |= {"metric": "preconditioned", "preconditioner": sgd_preconditioner()}
    values |= {"sharpness_factor": 1.0}
    outer(**{each: values[each] for each in parameters})
    for each in shared:
        assert calls[0][each] is values[each]
    if weights:
        assert (calls[0]["dominant_weight"], calls[0]["bulk_weight"]) == weights
