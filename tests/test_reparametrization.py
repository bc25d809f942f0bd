"""Reparametrization: the same steps as a model that is written in the coordinates."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_accel as oa
from tests.helpers import mlp_apply, mlp_init, tree_allclose, tree_equal

X = np.linspace(-1, 1, 24).reshape(8, 3)
Y = np.stack([np.sin(3 * X[:, 0]), X[:, 1] * X[:, 2]], axis=1)
SIGNED_ROOT = oa.Reparametrization(
    forward=lambda c: c["a"] ** 3 + c["b"], inverse=lambda w: {"a": jnp.cbrt(w) / 2, "b": 7 / 8 * w}
)
MAPS = {
    "weight_norm": oa.weight_norm(),
    "powerprop": oa.powerprop(1.5),
    "own": SIGNED_ROOT,
}


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, float), tree)


def loss_fn(params):
    return jnp.mean((mlp_apply(params, X) - Y) ** 2)


def explicit(maps):
    """The model of `mlp_apply` in coordinates: what a person would write by hand."""

    def to_params(coordinates):
        return {
            name: {"w": maps.forward(layer["w"]), "b": layer["b"]}
            for name, layer in coordinates.items()
        }

    def start(params):
        return {
            name: {"w": maps.inverse(layer["w"]), "b": layer["b"]} for name, layer in params.items()
        }

    return to_params, start


def trained(tx, loss, params, steps=12):
    """All parameters on the way, in one compiled loop."""

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])(params)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.03),
    "adamw": optax.adamw(0.03, weight_decay=0.1),  # decays the coordinates
    "clipped": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.3)),
    "extragradient": oa.extrap_sgd(0.1),  # evaluates the loss at other coordinates
    "linesearch": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8)),
}


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_same_steps_as_a_model_in_the_coordinates(x64, maps, inner):
    maps, inner = MAPS[maps], OPTIMIZERS[inner]
    to_params, start = explicit(maps)
    params = double(mlp_init((3, 5, 2)))

    @jax.jit
    def both(params):
        actual, _ = trained(oa.reparametrize(inner, maps), loss_fn, params)
        expected, _ = trained(inner, lambda c: loss_fn(to_params(c)), start(params))
        return actual, jax.vmap(to_params)(expected)

    actual, expected = both(params)
    tree_allclose(actual, expected, rtol=1e-11)
    moved = jax.tree.map(lambda a, p: np.abs(a[-1] - p).max(), actual, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_decay_of_the_parameters(x64):
    """In front, decay is the gradient of a penalty on the parameters, pulled back."""
    maps = oa.weight_norm()
    to_params, start = explicit(maps)
    params = double(mlp_init((3, 5, 2)))

    def penalized(coordinates):
        params = to_params(coordinates)
        return loss_fn(params) + 0.05 * optax.tree.norm(params, squared=True)

    tx = optax.chain(optax.add_decayed_weights(0.1), oa.reparametrize(optax.sgd(0.1), maps))
    actual, _ = trained(tx, loss_fn, params)
    expected, _ = trained(optax.sgd(0.1), penalized, start(params))
    tree_allclose(actual, jax.vmap(to_params)(expected), rtol=1e-11)
    inside, _ = trained(
        oa.reparametrize(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), maps),
        loss_fn,
        params,
    )
    assert optax.tree.norm(optax.tree.sub(actual, inside)) > 1e-2  # another method


def test_gradients_of_weight_normalization(x64):
    """Salimans and Kingma, equations 3 and 4, and what follows from them."""
    rng = np.random.default_rng(0)
    v, g, gradient = rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=(4, 3))
    _, pull = jax.vjp(
        oa.weight_norm().forward, {"lengths": jnp.asarray(g), "directions": jnp.asarray(v)}
    )
    (actual,) = pull(jnp.asarray(gradient))
    norm = np.linalg.norm(v, axis=0)
    along = np.sum(gradient * v, axis=0) / norm
    across = g / norm * gradient - g * along / norm**2 * v
    tree_allclose(actual, {"lengths": along, "directions": across}, rtol=1e-13)
    np.testing.assert_allclose(np.sum(np.asarray(actual["directions"]) * v, axis=0), 0, atol=1e-13)


def test_directions_grow(x64):
    params = double(mlp_init((3, 5, 2)))
    _, state = trained(oa.reparametrize(optax.sgd(0.3), oa.weight_norm()), loss_fn, params, 30)
    length = np.linalg.norm(state.coordinates["layer0"]["w"]["directions"], axis=1)
    assert np.all(np.diff(length, axis=0) > 0)


@pytest.mark.parametrize(("axes", "shape"), [(-1, (5,)), ((0, -1), (2, 5)), (0, (2,)), ((), ())])
def test_output_axes(axes, shape):
    maps = oa.weight_norm(axes)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
    coordinates = maps.inverse(w)
    assert coordinates["lengths"].shape == shape
    tree_allclose(maps.forward(coordinates), w, rtol=3e-7)
    kept = {range(4)[axis] for axis in ((axes,) if isinstance(axes, int) else axes)}
    norm = jnp.sqrt(jnp.sum(w**2, tuple(axis for axis in range(4) if axis not in kept)))
    tree_allclose(coordinates["lengths"], norm, rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 5.0])
def test_gradient_of_powerpropagation(x64, alpha):
    maps = oa.powerprop(alpha)
    w = jnp.array([-2.0, -1e-3, 0.0, 1e-9, 0.5, 1.0, 30.0])
    theta = maps.inverse(w)
    np.testing.assert_allclose(maps.forward(theta), w, rtol=1e-13)
    gradient = jax.grad(lambda t: jnp.sum(maps.forward(t)))(theta)
    np.testing.assert_allclose(gradient, alpha * np.abs(theta) ** (alpha - 1), rtol=1e-12)
    np.testing.assert_array_equal(np.isfinite(jax.jvp(maps.forward, (theta,), (w,))[1]), True)


def test_zero_stays_zero_under_powerpropagation():
    params = {"w": jnp.array([[0.0, 1.0], [-0.5, 0.0]])}
    tx = oa.reparametrize(optax.adam(0.1), oa.powerprop(1.5))
    path, _ = trained(tx, lambda p: jnp.sum((p["w"] - 3) ** 2), params)
    assert not path["w"][:, [0, 1], [0, 1]].any()
    assert jnp.all(path["w"][-1, [0, 1], [1, 0]] > params["w"][[0, 1], [1, 0]])


def test_power_one_is_the_inner_optimizer():
    """Bit for bit in the coordinates; the parameters follow them to one rounding."""
    params = mlp_init((3, 5, 2))
    inner = optax.sgd(0.1)
    steps = 12
    tx = oa.reparametrize(inner, oa.powerprop(1.0))

    @jax.jit
    def step(i, state, inner_state, expected, actual):
        gradient = jax.tree.map(lambda p: 0.1 * jnp.sin(p + i), params)
        updates, inner_state = inner.update(gradient, inner_state, expected)
        expected = optax.apply_updates(expected, updates)
        updates, state = tx.update(gradient, state, actual)
        return state, inner_state, expected, optax.apply_updates(actual, updates)

    carry = tx.init(params), inner.init(params), params, params
    for i in range(steps):
        carry = step(i, *carry)
    state, _, expected, actual = carry
    weights = {name: {"w": layer["w"]} for name, layer in expected.items()}
    coordinates = {name: {"w": layer["w"]} for name, layer in state.coordinates.items()}
    tree_equal(coordinates, weights)
    tree_allclose(actual, expected, rtol=1e-7)


def test_larger_weights_move_more(x64):
    """SGD moves a weight in proportion to alpha^2 |theta|^(2 alpha - 2) (to first order)."""
    w = jnp.array([[0.25, 1.0, 4.0]])
    tx = oa.reparametrize(optax.sgd(1e-7), oa.powerprop(2.0))
    updates, _ = tx.update(jnp.ones_like(w), tx.init(w), w)
    np.testing.assert_allclose(updates / updates[0, 0], w / w[0, 0], rtol=1e-5)


def test_units_without_weights_learn():
    params = {"w": jnp.zeros((3, 2)).at[:, 1].set(1.0), "b": jnp.zeros(2)}
    x = jnp.asarray(X, jnp.float32)
    target = x @ jnp.array([[1.0, 2.0], [0.5, 1.0], [-1.0, 0.0]])

    def loss(p):
        return jnp.mean((x @ p["w"] + p["b"][None] - target) ** 2)

    tx = oa.reparametrize(optax.sgd(0.2), oa.weight_norm())
    tree_equal(
        tx.init(params).coordinates["w"]["lengths"], jnp.array([0.0, np.sqrt(np.float32(3))])
    )
    path, _ = trained(tx, loss, params, 300)
    assert all(map(jnp.all, map(jnp.isfinite, jax.tree.leaves(path))))
    assert loss(jax.tree.map(lambda leaf: leaf[-1], path)) < 1e-3


def test_mask_says_what_is_reparametrized():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(())}
    for mask, chosen in (
        (None, {"w"}),
        (True, {"w", "b", "scale"}),
        ({"w": False, "b": True, "scale": False}, {"b"}),
        (lambda p: {name: name == "scale" for name in p}, {"scale"}),
    ):
        tx = oa.reparametrize(optax.sgd(0.1, momentum=0.9), oa.weight_norm(), mask=mask)
        state = tx.init(params)
        for name in params:
            assert isinstance(state.coordinates[name], dict) == (name in chosen)
        gradient = jax.tree.map(lambda p: 0.5 * p, params)
        updates, state = tx.update(gradient, state, params)
        rest = {name: leaf for name, leaf in updates.items() if name not in chosen}
        tree_allclose(rest, {name: -0.1 * gradient[name] for name in rest})


def test_coordinates_are_a_master_copy_of_bfloat16():
    """Steps that are far below the spacing of bfloat16 add up."""
    params = {"w": jnp.full((4, 2), 1.0, jnp.bfloat16)}
    tx = oa.reparametrize(optax.sgd(1e-4), oa.powerprop(2.0))
    state = tx.init(params)
    assert state.coordinates["w"].dtype == jnp.float32
    gradient = jax.tree.map(jnp.ones_like, params)
    for _ in range(50):
        updates, state = tx.update(gradient, state, params)
        assert updates["w"].dtype == jnp.bfloat16
        params = optax.apply_updates(params, updates)
    exact = (1 - 2e-4) ** 100  # theta <- theta (1 - 2 learning_rate), w = theta^2
    np.testing.assert_allclose(np.float32(params["w"]), exact, rtol=2**-8)
    assert np.float32(params["w"][0, 0]) < 1


def test_parameters_changed_from_outside_are_taken():
    """Their coordinates are computed anew, those of other arrays and the inner state are kept."""
    params = mlp_init((3, 5, 2))
    tx = oa.reparametrize(optax.sgd(0.1, momentum=0.9), oa.weight_norm())
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    params["layer0"]["w"] = params["layer0"]["w"].at[0, 0].multiply(1.001)  # or pruned, or loaded
    still = tx.init(params)._replace(inner_state=state.inner_state)
    expected, fresh = tx.update(params, still, params)
    actual, after = tx.update(params, state, params)
    assert (state.resets, after.resets, fresh.resets) == (0, 1, 0)
    tree_equal(actual["layer0"], expected["layer0"])
    tree_equal(after.coordinates["layer0"]["w"], fresh.coordinates["layer0"]["w"])
    tree_equal(after.inner_state[0].trace["layer0"], fresh.inner_state[0].trace["layer0"])
    # The other layer's directions have grown and stay so.
    lengths = (jnp.linalg.norm(s.coordinates["layer1"]["w"]["directions"]) for s in (after, fresh))
    assert next(lengths) > next(lengths)


@pytest.mark.parametrize("behind", [lambda tx: optax.lookahead(tx, 3, 0.5), None])
def test_wrapped_in_methods_that_move_parameters(behind):
    """The identity as a map changes nothing, whoever averages or scales what it led to."""

    def wrapped(inner):
        if behind is not None:
            return behind(inner)
        return optax.chain(inner, optax.scale(0.5), optax.keep_params_nonnegative())

    results = []
    for inner in (
        optax.sgd(0.2),
        oa.reparametrize(optax.sgd(0.2), oa.powerprop(1.0), mask=True),
    ):
        tx = wrapped(inner)
        params = jnp.array([1.0, 0.02, 3.0])
        if behind is not None:
            params = optax.LookaheadParams.init_synced(params)
        state = tx.init(params)
        for _ in range(8):
            point = params if behind is None else params.fast
            updates, state = tx.update(jnp.array([3.0, 1.0, 0.1]) * (point + 0.5), state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    tree_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_is_no_change_from_outside(dtype):
    """Compiled or not, with gradients of another dtype, and with weights that cross zero."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), dtype)}
    for maps in (oa.weight_norm(), oa.powerprop(2.0)):
        tx = oa.reparametrize(optax.sgd(0.3), maps)
        for wrap in (jax.jit, lambda step: step):
            for gradient_dtype in {dtype, "float32"}:

                def step(params, state, tx=tx, gradient_dtype=gradient_dtype):
                    gradient = jax.tree.map(lambda p: (p + 0.1).astype(gradient_dtype), params)
                    updates, state = tx.update(gradient, state, params)
                    return optax.apply_updates(params, updates), state

                now, state = params, tx.init(params)
                run = wrap(step)
                for _ in range(6):
                    now, state = run(now, state)
                assert state.resets == 0


def test_flax_model_with_explicit_weight_normalization(x64):
    """Flax's own layer in place of ours in the model: the same outputs and steps."""

    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64)
    graphdef, params = nnx.split(layer)
    params = nnx.to_pure_dict(params)

    def loss(p):
        return jnp.mean((nnx.merge(graphdef, nnx.State(p))(X) - Y) ** 2)

    normed = nnx.WeightNorm(
        nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64),
        rngs=nnx.Rngs(0),
        use_scale=True,
        param_dtype=jnp.float64,
        epsilon=0,
    )
    definition, theirs = nnx.split(normed)
    theirs = nnx.to_pure_dict(theirs)
    length = jnp.linalg.norm(params["kernel"], axis=0)
    scale_path = next(
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(theirs)
        if "scale" in jax.tree_util.keystr(path)
    )
    theirs = jax.tree_util.tree_map_with_path(
        lambda path, leaf: length if path == scale_path else leaf, theirs
    )

    def their_outputs(p):
        return nnx.merge(definition, nnx.State(p))(X)

    def their_loss(p):
        return jnp.mean((their_outputs(p) - Y) ** 2)

    actual, _ = trained(oa.reparametrize(optax.sgd(0.1), oa.weight_norm()), loss, params)
    expected, _ = trained(optax.sgd(0.1), their_loss, theirs)
    tree_allclose(
        jax.vmap(lambda p: nnx.merge(graphdef, nnx.State(p))(X))(actual),
        jax.vmap(their_outputs)(expected),
        rtol=1e-10,
    )


def test_wrong_maps_are_refused():
    halves = oa.Reparametrization(forward=lambda c: c[:1], inverse=lambda w: w)
    params = {"layer": {"w": jnp.ones((3, 2))}}
    text = re.escape("for ['layer']['w'] it is (1, 2), not (3, 2)")
    with pytest.raises(ValueError, match=text):
        oa.reparametrize(optax.sgd(0.1), halves).init(params)
    for mask, advice in ((None, "leave it out with `mask=`"), (True, "`mask` selects it")):
        with pytest.raises(TypeError, match=rf"'n'.* has dtype int32; {advice}"):
            oa.reparametrize(optax.sgd(0.1), oa.weight_norm(), mask=mask).init(
                {"n": jnp.ones((2, 2), int)}
            )


def test_an_output_axis_that_an_array_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`output_axes` must lie in \[-2, 1\] .* got 2"):
        oa.reparametrize(optax.sgd(0.1), oa.weight_norm(2)).init(jnp.ones((2, 3)))
