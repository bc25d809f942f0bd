"""Equilibrium layers: golden gradients, all orders of derivatives, memory, devices, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from optax_accel import equilibrium as eq
from tests.helpers import tree_allclose

W = np.array([[0.5, 0.2], [0.1, 0.4]])
X = np.linspace(-1.0, 1.0, 6).reshape(3, 2)
EXACT = eq.broyden(20, 1e-14)


def affine(z, params, x):
    del x
    return z @ params["w"].T + params["b"]


def nonlinear(z, w, x):
    return jnp.tanh(z @ w + x)


def layer(w, x, gradient="implicit", solver=EXACT, **options):
    z0 = jnp.zeros((x.shape[0], w.shape[0]), w.dtype)
    return oa.deq(
        nonlinear, z0, w, x, solver=solver, gradient=gradient, backward_solver=EXACT, **options
    )[0]


def loss(w, x, gradient="implicit", **options):
    return jnp.sum(jnp.sin(layer(w, x, gradient, **options)))


def test_golden_gradients(x64):
    """The cotangent (1, -1) of the affine map, by all gradients."""

    def bias_gradient(gradient):
        def value(b):
            params = {"w": jnp.asarray(W), "b": b}
            z0 = jnp.zeros((1, 2))
            z, _ = oa.deq(
                affine, z0, params, None, solver=EXACT, gradient=gradient, backward_solver=EXACT
            )
            return jnp.sum(z * jnp.array([[1.0, -1.0]]))

        return jax.jit(jax.grad(value))(jnp.ones((1, 2)))[0]

    golden = {
        "implicit": (1.7857142857, -1.0714285714),
        "unrolled": (1.7857142857, -1.0714285714),
        eq.phantom(): (1, -1),
        eq.phantom(3): (1.58, -1.2),
        eq.phantom(3, 0.5): (1.0975, -0.975),
    }
    for gradient, expected in golden.items():
        np.testing.assert_allclose(bias_gradient(gradient), expected, atol=1e-9)


def test_golden_penalty():
    """In expectation |J|^2 / 2 = 0.23, over Gaussian vectors; here at three standard errors."""
    params = {"w": jnp.asarray(W, jnp.float32), "b": jnp.ones((1, 2))}
    penalty = jax.jit(
        lambda key: eq.jacobian_penalty(affine, jnp.zeros((1, 2)), params, 0, key, 20_000)
    )
    spread = np.sqrt(2 * np.trace(np.linalg.matrix_power(W @ W.T, 2))) / 2 / np.sqrt(20_000)
    assert abs(penalty(0) - 0.23) < 3 * spread
    gradient = jax.grad(
        lambda w: eq.jacobian_penalty(affine, jnp.zeros((1, 2)), params | {"w": w}, 0, 0)
    )(params["w"])
    assert bool(jnp.abs(gradient).max() > 0)


def test_derivatives_of_all_orders_and_modes(x64):
    """Implicit derivatives equal those through the steps: reverse, forward, second order."""

    def derivatives(function, w, x, v):
        at = lambda w: function(w, x)  # noqa: E731
        product = jax.jvp(jax.grad(at), (w,), (v,))[1]
        reverse = jax.grad(lambda w: jnp.vdot(jax.grad(at)(w), v))(w)
        return jax.grad(function, (0, 1))(w, x), jax.jvp(at, (w,), (v,))[1], product, reverse

    def by_iteration(w, x):
        z = jax.lax.fori_loop(0, 90, lambda _, z: nonlinear(z, w, x), jnp.zeros((3, 2)))
        return jnp.sum(jnp.sin(z))

    w, x, v = jnp.asarray(W), jnp.asarray(X), jnp.asarray(W.T - 0.3)
    run = jax.jit(derivatives, static_argnums=0)
    implicit = run(loss, w, x, v)
    through = run(by_iteration, w, x, v)
    tree_allclose(implicit, through, rtol=1e-9)
    np.testing.assert_allclose(implicit[2], implicit[3], rtol=1e-9)


def test_phantom_tends_to_the_implicit_gradient(x64):
    w, x = jnp.asarray(W), jnp.asarray(X)
    exact = jax.jit(jax.grad(loss))(w, x)
    for gradient, below in (
        (eq.phantom(5), 5e-2),
        (eq.phantom(30), 1e-7),
        (eq.phantom(30, 0.5), 1e-3),
    ):
        found = jax.jit(jax.grad(functools.partial(loss, gradient=gradient)))(w, x)
        error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
        assert error < below, gradient


def test_what_f_closes_over_is_differentiated_and_integers_pass():
    tokens = jnp.array([0, 2, 1])

    def value(w, table):
        f = lambda z, _, tokens: jnp.tanh(z @ w + table[tokens])  # noqa: E731
        return jnp.sum(oa.deq(f, jnp.zeros((3, 2)), None, tokens)[0])

    gradients = jax.jit(jax.grad(value, (0, 1)))(jnp.asarray(W, jnp.float32), jnp.ones((3, 2)))
    assert all(bool(jnp.abs(g).max() > 0) for g in gradients)


@pytest.mark.parametrize("through", ["jit", "scan"])
def test_f_may_close_over_traced_integers_masks_and_keys(through):
    """Derivatives that are taken outside of the program in which they are traced."""
    w = jnp.asarray(W, jnp.float32)
    tokens, mask, key = jnp.array([0, 2, 1]), jnp.array([True, False, True]), jax.random.key(0)

    def value(w, tokens, mask, key):
        def f(z, w, _):
            drawn = jax.random.normal(key, z.shape) + jnp.eye(3, 2)[tokens]
            return jnp.where(mask[:, None], jnp.tanh(z @ w + drawn), 0)

        return jnp.sum(oa.deq(f, jnp.zeros((3, 2)), w, None)[0])

    def scanned(w, *arguments):
        several = jax.tree.map(lambda leaf: leaf[None], arguments)
        return jax.lax.scan(lambda c, a: (c + value(w, *a), None), 0.0, several)[0]

    function = {"jit": jax.jit(value), "scan": scanned}[through]
    found = jax.grad(function)(w, tokens, mask, key)
    expected = jax.grad(lambda w: value(w, tokens, mask, key))(w)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_memory_does_not_depend_on_the_steps_of_the_solver():
    """The bytes of the compiled gradient: constant for implicit and phantom, growing unrolled."""
    w, x = jnp.zeros((64, 64)), jnp.ones((32, 64))

    def memory(gradient, steps):
        solver = eq.fixed_point(steps)
        function = jax.jit(jax.grad(functools.partial(loss, gradient=gradient, solver=solver)))
        analysis = function.lower(w, x).compile().memory_analysis()
        return analysis.temp_size_in_bytes - 4 * 32 * steps  # the residuals that are reported

    for gradient in ("implicit", eq.phantom()):
        assert memory(gradient, 40) <= 1.02 * memory(gradient, 10)
    assert memory("unrolled", 40) > 1.5 * memory("unrolled", 10)


def test_corrections_start_where_the_last_output_ends(x64):
    """Three segments of four plain steps and one phantom step each: outputs after 5, 10, 15."""
    w, x = jnp.asarray(W), jnp.asarray(X)
    options = {"solver": eq.fixed_point(12, 0.0), "gradient": eq.phantom()}
    outputs, report = oa.deq(nonlinear, jnp.zeros((3, 2)), w, x, corrections=3, **options)
    z = np.zeros((3, 2))
    for output in outputs:
        for _ in range(5):
            z = np.tanh(z @ W + X)
        np.testing.assert_allclose(output, z, rtol=1e-12)
    assert list(report.steps) == [12, 12, 12]
    total = eq.correction_loss([jnp.sum(output) for output in outputs], 0.5)
    np.testing.assert_allclose(total, sum(0.5 ** (2 - i) * o.sum() for i, o in enumerate(outputs)))


def test_under_vmap_and_with_examples_on_eight_devices():
    w, x = jnp.asarray(W, jnp.float32), jnp.asarray(np.resize(X, (8, 2)), jnp.float32)
    solver = eq.anderson(12, 1e-6)
    value = jax.jit(jax.value_and_grad(functools.partial(loss, solver=solver)))
    expected = value(w, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    tree_allclose(value(w, sharded), expected, rtol=1e-4)
    by_one = jax.jit(jax.vmap(lambda w, x: loss(w, x, solver=solver), (None, 0)))
    np.testing.assert_allclose(by_one(w, x[:, None]).sum(), expected[0], rtol=1e-4)


@pytest.mark.parametrize("gradient", ["implicit", eq.phantom(2), "unrolled"])
def test_in_shard_map_and_on_explicit_axes_it_is_the_same(gradient):
    """A start that is the same everywhere, examples that are not."""
    w, x = jnp.asarray(W, jnp.float32), jnp.asarray(np.resize(X, (8, 2)), jnp.float32)

    def value(w, x, start):
        z, _ = oa.deq(
            nonlinear, start, w, x, solver=eq.anderson(6, 1e-6), gradient=gradient,
            backward_solver=eq.broyden(6, 1e-6),
        )  # fmt: skip
        return jnp.sum(jnp.sin(z))

    expected = jax.jit(jax.value_and_grad(lambda w: value(w, x, jnp.zeros((8, 2)))))(w)

    def part(w, x):
        return jax.lax.psum(value(w, x, jnp.zeros((1, 2))), "data")

    mesh = jax.make_mesh((8,), ("data",))
    specs = {"mesh": mesh, "in_specs": (jax.P(), jax.P("data")), "out_specs": (jax.P(), jax.P())}
    divided = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    found = jax.jit(jax.shard_map(jax.value_and_grad(part), **specs))(w, divided)
    tree_allclose(found, expected, rtol=1e-4)
    with jax.set_mesh(mesh):
        explicit = jax.jit(jax.value_and_grad(lambda w, x: value(w, x, jnp.zeros((8, 2)))))
        tree_allclose(explicit(jax.device_put(w, jax.P()), divided), expected, rtol=1e-4)


@pytest.mark.parametrize("gradient", ["implicit", eq.phantom(2), "unrolled"])
@pytest.mark.parametrize("solver", [eq.fixed_point(12, 1e-2), eq.broyden(6, 1e-2)])
def test_a_diverging_example_leaves_the_gradient_of_the_others_alone(gradient, solver):
    x = jnp.array([[1.0, 1.0], [200.0, 200.0]])

    def f(z, w, x):
        return jnp.where(x[:, :1] > 100, 1e10 * z**2 + x, jnp.tanh(z @ w + x))

    def value(w, x):
        z0 = jnp.zeros_like(x)
        z, report = oa.deq(f, z0, w, x, solver=solver, gradient=gradient)
        return jnp.sum(jnp.where(report.converged[:, None], z, 0)), report.converged

    run = jax.jit(jax.grad(value, has_aux=True))
    found, converged = run(jnp.asarray(W, jnp.float32), x)
    expected, _ = run(jnp.asarray(W, jnp.float32), x[:1])
    assert list(converged) == [True, False]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "solver", [eq.anderson(8, 1e-6, ridge=0, relative_ridge=1e-8), eq.anderson(8, 0.0, ridge=0)]
)
def test_unrolled_gradients_survive_singular_systems(solver):
    """An example that is solved at once, and more pairs than dimensions."""
    x, z0 = jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.zeros((2, 2))
    f = lambda z, w, x: z @ w + x  # noqa: E731

    def value(w):
        z, _ = oa.deq(f, z0, w, x, solver=solver, gradient="unrolled")
        return jnp.sum(z)

    w = jnp.asarray(W, jnp.float32)
    gradient = jax.jit(jax.grad(value))(w)
    assert bool(jnp.isfinite(gradient).all())
    exact = jax.grad(lambda w: jnp.sum(jnp.linalg.solve(jnp.eye(2) - w.T, x.T)))(w)
    np.testing.assert_allclose(gradient, exact, rtol=0.2)  # that of the steps, not of their limit


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": eq.Phantom(0, 0.5)}, ValueError, "`steps` must be at least 1, got 0"),
        ({"gradient": eq.Phantom(2, 5.0)}, ValueError, r"`damping` must lie in \(0, 1\], got 5"),
        ({"gradient": np.ones(2)}, ValueError, "`gradient` must be 'implicit', 'unrolled' or"),
        ({"z0": "a"}, TypeError, "`z0` must be of floating-point arrays, got 'a' at z0"),
        ({"z0": jnp.zeros((0, 2))}, ValueError, r"with entries, got arrays of shapes \[\(0, 2\)\]"),
        ({"f": 3}, TypeError, r"`f` must be a function, called as f\(z, params, x\); got 3"),
        (
            {"f": lambda z, w: z},
            TypeError,
            r"`f` is called as f\(z, params, x\), which .* too many",
        ),
        ({"gradient": "exact"}, ValueError, "`gradient` must be 'implicit', 'unrolled' or"),
        ({"solver": "anderson"}, TypeError, r"`solver` must be a solver.*anderson\(\)"),
        ({"backward_solver": 3}, TypeError, "`backward_solver` must be a solver"),
        ({"corrections": 0}, ValueError, "`corrections` must be at least 1"),
        ({"corrections": 30}, ValueError, "`max_steps` of at least 60"),
        ({"corrections": 2, "gradient": "unrolled"}, ValueError, "needs the gradient 'implicit'"),
        (
            {"z0": jnp.zeros((3, 2), int)},
            TypeError,
            "`z0` must be of floating-point arrays, got int",
        ),
        ({"z0": jnp.zeros(())}, ValueError, "`batched=False`"),
        ({"z0": ()}, ValueError, "`z0` must contain arrays"),
        ({"f": lambda z, w, x: z[:, :1]}, ValueError, r"maps float32\[3, 2\] to float32\[3, 1\]"),
        ({"f": lambda z, w, x: (z, z)}, ValueError, "must have the structure of `z`"),
        ({"f": lambda z, w, x: z.astype(jnp.bfloat16)}, ValueError, r"to bfloat16\[3, 2\]"),
    ],
)
def test_wrong_input(options, error, message):
    arguments = {"f": nonlinear, "z0": jnp.zeros((3, 2)), "params": jnp.zeros((2, 2)), "x": 0.0}
    with pytest.raises(error, match=message):
        oa.deq(**{**arguments, **options})


def test_wrong_options_of_gradients_and_losses():
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        eq.phantom(0)
    with pytest.raises(ValueError, match=r"`damping` must lie in \(0, 1\], got 2"):
        eq.phantom(1, 2)
    for losses in ([], iter(())):
        with pytest.raises(ValueError, match="at least one output"):
            eq.correction_loss(losses)
    for losses in (1.0, jnp.ones(3)):
        with pytest.raises(TypeError, match="`losses` must be a list or a tuple of scalars"):
            eq.correction_loss(losses)
    with pytest.raises(ValueError, match=r"one of shape \(2,\) at 1: take its mean or sum"):
        eq.correction_loss([1.0, jnp.ones(2)])


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        ({}, ValueError, "`z` must contain arrays with entries, got none"),
        (jnp.zeros((0, 2)), ValueError, "`z` must contain arrays with entries"),
        (jnp.zeros((3, 2), int), TypeError, "`z` must be of floating-point arrays, got int"),
        (jnp.zeros((3, 2), complex), TypeError, "`z` must be of floating-point arrays, got comp"),
    ],
)
def test_a_penalty_needs_a_real_state(z, error, message):
    with pytest.raises(error, match=message):
        eq.jacobian_penalty(lambda z, w, x: z, z, None, None, 0)


def test_a_leaf_of_a_state_may_be_empty():
    f = lambda z, w, x: {"a": jnp.tanh(z["a"] @ w + x), "b": z["b"]}  # noqa: E731
    z0 = {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 0))}
    z, report = oa.deq(f, z0, jnp.asarray(W, jnp.float32), 1.0, solver=eq.fixed_point(20))
    assert z["b"].shape == (3, 0)
    assert bool(report.converged.all())
