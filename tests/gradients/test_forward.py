from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optax_accel as oa
from optax_accel.gradients import forward

TAPS = oa.Taps()
SLOW = pytest.mark.slow  # what the gauntlet covers in another form
X = np.array([[1.0, 2.0]], np.float32)
W = np.array([[0.5, -0.5, 1.0], [0.25, 0.5, -1.0]], np.float32)
EXACT = np.array([[0, 0.5, 0], [0, 1, 0]], np.float32)


def relu_loss(w, x=X, tap=TAPS):
    z = x @ w
    z = tap(z, active=z > 0)
    return tap.mean(0.5 * jnp.sum((jax.nn.relu(z) - jnp.array([[1.0, 0.0, 0.0]])) ** 2, axis=-1))


def mlp(params, x, tap):
    for w in params[:-1]:
        x = jnp.tanh(tap(x @ w))
    return tap(x @ params[-1])


def mlp_loss(params, x, y, tap=TAPS):
    outputs = mlp(params, x, tap)
    return tap.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))


def a_network(sizes=(3, 4, 2), examples=6):
    keys = jax.random.split(jax.random.key(5), len(sizes))
    pairs = zip(keys, sizes, sizes[1:], strict=False)
    params = [jax.random.normal(k, (m, n)) for k, m, n in pairs]
    x = jax.random.normal(keys[-1], (examples, sizes[0]))
    return params, {"x": x, "y": jnp.arange(examples) % sizes[-1]}


def test_one_direction_by_hand(monkeypatch):
    """u = (.3, -1, 2), the last entry of an inactive unit: the derivative along it is -.5."""
    u = jnp.array([[[0.3, -1.0, 2.0]]])
    monkeypatch.setattr(forward, "_drawn", lambda *_: u)
    value, estimate = oa.forward_value_and_grad(relu_loss, W, key=0, perturb="activations")
    assert float(value) == 0.125
    # g_z = (-.15, .5, 0), times the inputs.
    expected = [[-0.15, 0.5, 0], [-0.3, 1, 0]]
    np.testing.assert_allclose(estimate, expected, rtol=1e-6, atol=1e-7)


def test_the_mean_of_the_estimates_is_the_gradient():
    def of_key(w):
        return oa.forward_value_and_grad(
            relu_loss, w, key=0, perturb="activations", num_samples=200_000
        )[1]

    np.testing.assert_allclose(jax.jit(of_key)(W), EXACT, atol=5e-3)
    np.testing.assert_allclose(jax.grad(relu_loss)(W), EXACT, atol=1e-6)


def test_variances_are_those_of_the_closed_forms():
    """Averages over batches that are drawn anew each time, of one linear layer."""
    p, q, examples, batch = 3, 4, 8, 2
    x = jax.random.normal(jax.random.key(0), (examples, p))
    slopes = jax.random.normal(jax.random.key(1), (examples, q))
    of_examples = np.einsum("np,nq->npq", x, slopes)
    mean_square = np.mean(of_examples.mean(0) ** 2)  # S
    variance = np.mean(of_examples.var(0))  # V

    def loss(w, x, slopes, tap=TAPS):
        return tap.mean(jnp.sum(tap(x @ w) * slopes, axis=-1))

    def estimate_of(key, **options):
        chosen = jax.random.randint(jax.random.fold_in(key, 1), (batch,), 0, examples)
        w = jnp.zeros((p, q))
        kwargs = {"x": x[chosen], "slopes": slopes[chosen]}
        return oa.forward_value_and_grad(loss, w, key=key, **options, **kwargs)[1]

    def both(key):
        options = {"perturb": "activations"}
        return jnp.stack(
            [
                estimate_of(key, perturb="weights"),
                estimate_of(key, **options),
                estimate_of(key, **options, num_samples=4),
                estimate_of(key, **options, directions="signs"),
            ]
        )

    @jax.jit
    def of_all(keys):
        estimates = jax.vmap(both)(keys)
        return estimates.mean(0), estimates.var(0).mean((1, 2))

    means, found = of_all(jax.random.split(jax.random.key(3), 40_000))
    for mean in means:
        np.testing.assert_allclose(mean, of_examples.mean(0), atol=0.12)
    # Of the weights all examples share one direction: V as if they did not, S undivided.
    weights = (p * q + 2) / batch * variance + (p * q + 1) * mean_square
    activations = (q + 2) / batch * variance + (q + 1) / batch * mean_square
    of_batch = variance / batch  # what samples do not average out
    samples = (activations - of_batch) / 4 + of_batch
    # Signs: E[u^4] = 1 in place of 3, so that the squares of single entries count 2 times less.
    signs = activations - 2 * (variance + mean_square) / batch
    np.testing.assert_allclose(found, [weights, activations, samples, signs], rtol=0.05)


@pytest.mark.parametrize("perturb", [pytest.param("weights", marks=SLOW), "activations"])
@pytest.mark.parametrize("derivative", ["exact", "antithetic"])
def test_as_many_orthogonal_samples_as_values_give_the_gradient(perturb, derivative):
    params, batch = a_network()
    size = sum(p.size for p in params) if perturb == "weights" else 2
    if perturb == "activations":  # one tap: others would add their noise
        params, batch = a_network((3, 2))
    tolerance = 1e-5 if derivative == "exact" else 1e-3

    @jax.jit
    def both(params):
        options = {"directions": "orthogonal", "num_samples": size, "derivative": derivative}
        return oa.forward_value_and_grad(
            mlp_loss, params, key=1, perturb=perturb, **options, **batch
        ), jax.value_and_grad(mlp_loss)(params, **batch)

    (value, estimate), (loss, gradient) = both(params)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    for e, g in zip(estimate, gradient, strict=True):
        np.testing.assert_allclose(e, g, rtol=tolerance, atol=tolerance)


def raise_in_the_backward_pass(x):
    """The identity, whose derivative cannot be transposed."""

    @jax.custom_jvp
    def identity(x):
        return x

    def no_transpose(*_):
        raise AssertionError("back-propagation was called")

    @identity.defjvp
    def _(primals, tangents):
        call = jax.custom_derivatives.linear_call
        return primals[0], call(lambda _, moved: moved, no_transpose, (), tangents[0])

    return identity(x)


@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_reverse_mode_is_never_called(perturb):
    params, batch = a_network()

    def loss(params, x, y, tap=TAPS):
        for w in params:
            x = raise_in_the_backward_pass(tap(x @ w))
        return tap.mean(optax.softmax_cross_entropy_with_integer_labels(x, y))

    with pytest.raises(AssertionError, match="back-propagation"):
        jax.grad(loss)(params, **batch)
    _, estimate = jax.jit(
        lambda params: oa.forward_value_and_grad(loss, params, key=0, perturb=perturb, **batch)
    )(params)
    assert all(np.isfinite(e).all() and (e != 0).any() for e in estimate)


def test_memory_does_not_grow_with_the_depth():
    """One matrix, applied many times, so that parameters and directions take the same memory."""
    w, x = jnp.ones((32, 32)), jnp.ones((256, 32))

    def bytes_of(gradient, depth):
        def loss(w):
            h = x
            for _ in range(depth):
                h = jnp.tanh(h @ w)
            return jnp.mean(h)

        compiled = jax.jit(functools.partial(gradient, loss)).lower(w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def estimate(loss, w):
        return oa.forward_value_and_grad(loss, w, key=0)[1]

    shallow, deep = (bytes_of(estimate, depth) for depth in (16, 32))
    assert deep < 1.1 * shallow
    reverse = [bytes_of(lambda loss, w: jax.grad(loss)(w), depth) for depth in (16, 32)]
    assert reverse[1] > 1.7 * reverse[0]


def test_parameters_behind_the_last_tap_and_without_one_get_their_exact_gradient():
    params, batch = a_network()

    def loss(params, x, y, tap=TAPS):
        logits = jnp.tanh(tap(x @ params[0])) @ params[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return tap.mean(losses) + 0.1 * jnp.sum(params[1] ** 2)

    @jax.jit
    def both(params):
        estimate = oa.forward_value_and_grad(loss, params, key=0, perturb="activations", **batch)[1]
        return estimate, jax.grad(loss)(params, **batch)

    estimate, gradient = both(params)
    np.testing.assert_allclose(estimate[1], gradient[1], rtol=1e-5, atol=1e-6)
    assert abs(estimate[0] - gradient[0]).max() > 0.01


def test_local_losses_keep_their_noise_apart_and_count_as_the_objective_says():
    """Two layers, each with a loss of its own: orthogonal directions over each make them exact."""
    params, batch = a_network((3, 2, 2))

    def loss(params, x, y, factor, tap=TAPS):
        first = tap(x @ params[0], loss="first")
        second = tap(jax.lax.stop_gradient(jnp.tanh(first)) @ params[1], loss="second")
        losses = optax.softmax_cross_entropy_with_integer_labels
        return factor * tap.mean(losses(first, y), loss="first") + tap.mean(
            losses(second, y), loss="second"
        )

    @jax.jit
    def both(params):
        options = {"perturb": "activations", "directions": "orthogonal", "num_samples": 2}
        arguments = {**batch, "factor": 3.0}
        scaled = oa.Objective.from_value_fn(loss).scaled(2.0)
        estimate = oa.forward_value_and_grad(scaled, params, key=0, **options, **arguments)[1]
        return estimate, jax.grad(loss)(params, **arguments)

    estimate, gradient = both(params)
    for e, g in zip(estimate, gradient, strict=True):
        np.testing.assert_allclose(e, 2 * g, rtol=1e-4, atol=1e-5)


def test_losses_of_parts_and_taps_on_weights():
    """Losses (examples, parts); an activation of its own part; a weight for each part."""
    x = jax.random.normal(jax.random.key(0), (4, 3, 2))
    params = {"shared": jnp.ones((2, 1)), "own": jnp.ones((3, 1, 1))}

    def loss(params, copies=False, tap=TAPS):
        h = tap(x @ params["shared"], axes=(0, 1))
        own = tap(params["own"], axes=(1,))
        h = h * own[None, :, 0]
        return tap.mean(h[..., 0] ** 2, copies=copies)

    @jax.jit
    def both(params, keys):
        def mean_of_estimates(copies):
            def estimate(key):
                return oa.forward_value_and_grad(
                    loss, params, key=key, perturb="activations", directions="signs", copies=copies
                )[1]

            return jax.tree.map(lambda e: e.mean(0), jax.vmap(estimate)(keys))

        return mean_of_estimates(False), mean_of_estimates(True), jax.grad(loss)(params)

    mean, copies, gradient = both(params, jax.random.split(jax.random.key(1), 4000))
    for name, exact in gradient.items():
        tolerance = 0.1 * float(abs(exact).max())
        np.testing.assert_allclose(mean[name], exact, atol=tolerance)
        np.testing.assert_allclose(copies[name], 3 * exact, atol=3 * tolerance)


def test_copies_have_the_value_of_one_and_the_derivatives_of_all():
    losses = jnp.broadcast_to(jnp.array([1.0, 3.0])[:, None], (2, 4))
    mean = functools.partial(oa.Taps().mean, copies=True)
    value, gradient = jax.value_and_grad(mean)(losses)
    assert float(value) == 2
    np.testing.assert_array_equal(gradient, np.full((2, 4), 0.5))


def test_as_an_element_of_the_chain():
    params, batch = a_network()
    key = jax.random.key(7)
    tx = optax.chain(
        oa.forward_gradient(perturb="activations", num_samples=2, key=key), optax.sgd(0.5)
    )
    wrapped = oa.forward_gradient(
        optax.sgd(0.5), perturb="activations", num_samples=2, key=key, mask=[True, False]
    )

    @jax.jit
    def run(params):
        zeros = optax.tree.zeros_like(params)
        options = {"perturb": "activations", "num_samples": 2}
        updates, state = tx.update(zeros, tx.init(params), params, value_fn=mlp_loss, **batch)
        again, state = tx.update(zeros, state, params, value_fn=mlp_loss, **batch)
        partly, own = wrapped.update(
            zeros, wrapped.init(params), params, value_fn=mlp_loss, grad=zeros, **batch
        )
        value, expected = oa.forward_value_and_grad(
            mlp_loss, params, key=jax.random.fold_in(key, 0), **options, **batch
        )
        return updates, again, partly, own, state, value, expected

    updates, again, partly, own, state, value, expected = run(params)
    for u, e in zip(updates, expected, strict=True):
        np.testing.assert_allclose(u, -0.5 * e, rtol=1e-6)
    assert (updates[0] != again[0]).any()
    # The same directions; the gradient of what is masked out passes.
    np.testing.assert_allclose(partly[0], updates[0], rtol=1e-6)
    assert (partly[1] == 0).all()
    assert float(optax.tree.get(state, "objective_value")) == float(value)
    assert int(own.count) == 1


@pytest.mark.parametrize("perturb", [pytest.param("weights", marks=SLOW), "activations"])
def test_half_precision(perturb):
    params, batch = a_network()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    batch["x"] = batch["x"].astype(jnp.bfloat16)

    @jax.jit
    def both(half):
        full = [p.astype(jnp.float32) for p in half]
        wide = {**batch, "x": batch["x"].astype(jnp.float32)}
        of = functools.partial(oa.forward_value_and_grad, mlp_loss, key=0, perturb=perturb)
        return of(half, **batch)[1], of(full, **wide)[1]

    low, high = both(half)
    assert {e.dtype for e in low} == {jnp.dtype("bfloat16")}
    for a, b in zip(low, high, strict=True):  # the same directions, rounded
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.05 * float(abs(b).max()))


@pytest.mark.parametrize("perturb", [pytest.param("weights", marks=SLOW), "activations"])
def test_replicas_average_their_estimates(perturb):
    params, batch = a_network(examples=8)
    objective = oa.Objective(
        predict=lambda params, x, tap=TAPS: mlp(params, x, tap),
        loss=lambda outputs, y, tap=TAPS: tap.mean(
            optax.softmax_cross_entropy_with_integer_labels(outputs, y)
        ),
        axis_name="data",
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"perturb": perturb, "num_samples": 2}

    def of_replica(params, x, y):
        return oa.forward_value_and_grad(objective, params, key=3, x=x, y=y, **options)

    @jax.jit
    def all_of_them(params, x, y):
        sharded = jax.shard_map(
            of_replica,
            mesh=mesh,
            in_specs=(jax.P(), jax.P("data"), jax.P("data")),
            out_specs=jax.P(),
        )(params, x, y)
        parts = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
        keys = [
            jax.random.fold_in(jax.random.key(3), i) if perturb == "activations" else 3
            for i in range(4)
        ]
        single = [
            oa.forward_value_and_grad(mlp_loss, params, key=k, x=x, y=y, **options)
            for k, (x, y) in zip(keys, parts, strict=True)
        ]
        return sharded, jax.tree.map(lambda *leaves: sum(leaves) / 4, *single)

    found, expected = all_of_them(params, **batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_a_batch_divided_over_devices_gives_the_same_estimate():
    params, batch = a_network(examples=8)
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=kinds)

    @jax.jit
    def estimate(params, x, y):
        return oa.forward_value_and_grad(
            mlp_loss, params, key=0, perturb="activations", num_samples=2, x=x, y=y
        )

    expected = estimate(params, **batch)
    with jax.set_mesh(mesh):
        spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        found = estimate(params, **spread)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, tap=TAPS):
        return tap(self.last(jnp.tanh(tap(self.first(x)))))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, tap=TAPS):
        return tap(nn.Dense(2)(jnp.tanh(tap(nn.Dense(4)(x)))))


@pytest.mark.parametrize("framework", ["nnx", pytest.param("linen", marks=SLOW)])
def test_taps_in_modules_of_flax(framework):
    _, batch = a_network()
    if framework == "nnx":
        graphdef, params = nnx.split(NnxNetwork(nnx.Rngs(0)))
        predict = lambda params, x, tap: nnx.merge(graphdef, params)(x, tap)  # noqa: E731
    else:
        params = LinenNetwork().init(jax.random.key(0), batch["x"])
        predict = LinenNetwork().apply

    def loss(params, x, y, tap=TAPS):
        outputs = predict(params, x, tap)
        return tap.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))

    tx = oa.forward_gradient(optax.sgd(0.1), perturb="activations")
    update = jax.jit(
        lambda params: tx.update(params, tx.init(params), params, value_fn=loss, **batch)[0]
    )
    updates = update(params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all((np.asarray(u) != 0).any() for u in jax.tree.leaves(updates))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`perturb` must be one of 'weights', 'activations'"):
        oa.forward_gradient(perturb="inputs")
    with pytest.raises(ValueError, match="`directions` must be one of"):
        oa.forward_gradient(directions="uniform")
    with pytest.raises(ValueError, match="`derivative` must be one of"):
        oa.forward_gradient(derivative="reverse")
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        oa.forward_gradient(num_samples=0)
    with pytest.raises(TypeError, match="must be an Optax transformation"):
        oa.forward_gradient(optax.sgd)
    tx = oa.forward_gradient()
    with pytest.raises(TypeError, match="int32"):
        tx.init(jnp.arange(3))
    with pytest.raises(ValueError, match="needs the extra argument `value_fn`"):
        tx.update(W, tx.init(W), W)
    with pytest.raises(ValueError, match="at most 6 directions can be orthogonal"):
        oa.forward_value_and_grad(relu_loss, W, key=0, directions="orthogonal", num_samples=7)


def wrong_taps(w, x=X, *, how, tap=TAPS):
    z = x @ w
    if how == "axes":
        return tap.mean(jnp.sum(tap(z.T), axis=0))
    if how == "name":
        return tap.mean(jnp.sum(tap(z, loss="other"), axis=-1))
    if how == "twice":
        return tap.mean(jnp.sum(tap(z), axis=-1)) + tap.mean(z[:, 0])
    if how == "scalar":
        return tap.mean(jnp.sum(tap(z)))
    if how == "integer":
        return tap.mean(jnp.sum(tap(jnp.arange(3)) * z, axis=-1))
    return tap.mean(z[:, 0]) if how == "no tap" else jnp.sum(tap(z))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("axes", ValueError, r"of shape \(3, 1\), must begin with the axes \(0,\) of the loss"),
        ("name", ValueError, "names the loss 'other', but tap.mean was called for 'loss'"),
        ("twice", ValueError, "called twice for the loss 'loss'"),
        ("scalar", ValueError, "needs the losses of single examples"),
        ("integer", TypeError, "tap number 0 was given an array of dtype int32"),
        ("no tap", ValueError, "never called `tap`"),
        ("no mean", ValueError, "never called `tap.mean`"),
    ],
)
def test_taps_that_do_not_fit(how, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda w: oa.forward_value_and_grad(
                wrong_taps, w, key=0, perturb="activations", how=how
            ),
            W,
        )


def test_losses_without_taps():
    options = {"key": 0, "perturb": "activations"}
    with pytest.raises(ValueError, match="needs a loss with an argument `tap`, got one that takes"):
        oa.forward_value_and_grad(lambda w, x: jnp.sum(x @ w), W, x=X, **options)
    parts = oa.Objective.from_value_fn(relu_loss).accumulated(2, x=np.concatenate([X, X]))
    with pytest.raises(ValueError, match="cannot tap the activations of micro-batches"):
        oa.forward_value_and_grad(parts, W, **options)
    whole, loss = oa.forward_value_and_grad(parts, W, key=0)[0], relu_loss(W)
    np.testing.assert_allclose(whole, loss)
