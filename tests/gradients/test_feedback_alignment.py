"""Feedback alignment against gradients written out by hand, and where nothing passes backward."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_accel as oa

P = jax.P


def cross_entropy(outputs, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(outputs), axis=-1))


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


MLP = oa.Objective(mlp, cross_entropy)
# Golden values: one example, two hidden units.
X, Y = [[1.0, 2.0]], [[1.0, 0.0]]
W1, W2, B = [[0.1, -0.2], [0.3, 0.4]], [[0.5, -0.5], [0.25, 0.75]], [[1.0, -1.0], [0.5, 0.5]]
BACK_PROPAGATION = [[-0.264571912, 0.1482997848], [-0.5291438239, 0.2965995695]]
DFA = [[-0.132285956, 0.4448993543], [-0.2645719120, 0.8897987086]]
BDFA = [[0, 0.4448993543], [0, 0.8897987086]]
OUT = [[-0.2519123446, 0.2519123446], [-0.2238527941, 0.2238527941]]


@pytest.mark.usefixtures("strict_dtypes")
def test_golden_values(x64):
    x, y, w1, w2, matrix = map(jnp.array, (X, Y, W1, W2, B))
    params = {"a": w1, "b": w2}
    layers = [lambda w, h: jnp.tanh(h @ w), lambda w, h: h @ w]

    @jax.jit
    def gradients(params):
        def objective(**options):
            name, fixed = "['b']", options.pop("matrix", matrix)
            return oa.feedback_alignment(MLP, params, {"x": x}, feedback={name: fixed}, **options)

        explicit = oa.dfa_value_and_grad(layers, cross_entropy, [matrix])
        return {
            "plain": MLP.value_and_grad(params, x=x, y=y),
            "dfa": objective().value_and_grad(params, x=x, y=y),
            "bdfa": objective(binary=True).value_and_grad(params, x=x, y=y),
            "fa": objective(kind="fa", matrix=w2).value_and_grad(params, x=x, y=y),
            "explicit": explicit([w1, w2], x, y),
        }

    found = jax.device_get(gradients(params))
    for kind, hidden in (
        ("plain", BACK_PROPAGATION),
        ("dfa", DFA),
        ("bdfa", BDFA),
        ("fa", BACK_PROPAGATION),
    ):
        value, gradient = found[kind]
        np.testing.assert_allclose(value, -np.log(0.5831803843), rtol=1e-9)
        np.testing.assert_allclose(gradient["a"], hidden, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(gradient["b"], OUT, rtol=1e-9)
    np.testing.assert_allclose(found["explicit"][1][0], found["dfa"][1]["a"], rtol=1e-15)
    np.testing.assert_allclose(found["explicit"][1][1], found["dfa"][1]["b"], rtol=1e-15)
    assert abs(found["bdfa"][1]["a"][:, 0]).max() < 1e-15


def chain(weights, x):
    for weight in weights:
        x = x @ weight
    return x


def chain_weights(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(3, 5), (5, 4), (4, 2)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def test_product_feedback_is_back_propagation_at_first(x64):
    """In a linear network, also where there are more outputs than examples."""
    weights, x = chain_weights(jnp.float64), jnp.arange(3.0).reshape(1, 3)
    objective = oa.Objective(chain, lambda outputs: jnp.mean(outputs**3))

    @jax.jit
    def gradients(weights):
        product = oa.dfa_feedback(0, weights, "product")
        explicit = oa.dfa_value_and_grad(
            [lambda w, h: h @ w] * 3, lambda outputs: jnp.mean(outputs**3), product
        )
        aligned = [
            oa.feedback_alignment(objective, weights, {"x": x}, kind=kind, feedback="product")
            for kind in ("dfa", "fa")
        ]
        found = [one.grad(weights, x=x) for one in aligned]
        return objective.grad(weights, x=x), [*found, explicit(weights, x)[1]]

    want, found = jax.device_get(gradients(weights))
    for gradient in found:
        for one, other in zip(gradient, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13)


def test_drawn_matrices():
    """Fixed by the key; of the scale 1 / sqrt(outputs); one absolute value when binary."""
    params = [jnp.ones((3, 400)), {}, {"w": jnp.ones((400, 4)), "b": jnp.ones(4)}]
    uniform, none = oa.dfa_feedback(1, params)
    assert none is None
    assert uniform.shape == (4, 400)
    np.testing.assert_array_equal(uniform, oa.dfa_feedback(jax.random.key(1), params)[0])
    assert np.any(uniform != oa.dfa_feedback(2, params)[0])
    assert 0.49 < np.abs(uniform).max() <= 0.5
    normal = np.asarray(oa.dfa_feedback(1, params, "normal")[0])
    assert abs(normal.std() - 0.5) < 0.5 * 4 / np.sqrt(2 * normal.size)  # 4 standard errors
    binary = np.asarray(oa.dfa_feedback(1, params, binary=True)[0])
    np.testing.assert_allclose(binary, np.sign(uniform) * np.abs(uniform).mean(), rtol=1e-6)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pooled(h):
    h = jax.nn.relu(h)
    return h.reshape(h.shape[0], 2, 2, 2, 2, -1).mean((2, 4)).reshape(h.shape[0], -1)


def cnn(params, x):
    h = jax.nn.relu(conv(x, params["c1"]))
    h = pooled(conv(h, params["c2"]))
    return jnp.tanh(h @ params["d1"] + params["bias"][None]) @ params["d2"]


CNN_SHAPES = {"c1": (3, 3, 1, 2), "c2": (3, 3, 2, 3), "d1": (12, 5), "bias": (5,), "d2": (5, 2)}


def normal_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def test_convolutions_against_gradients_by_hand():
    params = normal_tree(CNN_SHAPES)
    matrices = normal_tree({"['c2']": (2, 32), "['d1']": (2, 12), "['d2']": (2, 5)}, 1)
    batch = normal_tree({"x": (3, 4, 4, 1), "y": (3, 2)}, 2)
    objective = oa.Objective(cnn, lambda outputs, y: jnp.mean((outputs - y) ** 2))
    x, y = batch["x"], batch["y"]

    @jax.jit
    def gradients(params):
        def aligned(kind):
            names = list(matrices)[1:] if kind == "cdfa" else list(matrices)
            feedback = "product" if kind == "fa" else {name: matrices[name] for name in names}
            found = oa.feedback_alignment(objective, params, {"x": x}, kind=kind, feedback=feedback)
            return found.grad(params, **batch)

        def first(c1):
            return jax.nn.relu(conv(x, c1))

        def second(c2, h):
            return pooled(conv(h, c2))

        h1, of_first = jax.vjp(first, params["c1"])
        h2, of_second = jax.vjp(second, params["c2"], h1)
        h3, of_dense = jax.vjp(
            lambda w, b: jnp.tanh(h2 @ w + b[None]), params["d1"], params["bias"]
        )
        error = jax.grad(objective.loss_of_outputs)(h3 @ params["d2"], y=y)
        c2, below = of_second(error @ matrices["['d1']"])
        d1, bias = of_dense(error @ matrices["['d2']"])
        direct = of_first((error @ matrices["['c2']"]).reshape(h1.shape))[0]
        rest = {"c2": c2, "d1": d1, "bias": bias, "d2": h3.T @ error}
        by_hand = {"dfa": {"c1": direct, **rest}, "cdfa": {"c1": of_first(below)[0], **rest}}
        # From layer to layer through the initial weights: back-propagation at the first step.
        by_hand["fa"] = objective.grad(params, **batch)
        return {kind: aligned(kind) for kind in by_hand}, by_hand

    found, by_hand = jax.device_get(gradients(params))
    for kind, want in by_hand.items():
        for name, gradient in want.items():
            np.testing.assert_allclose(found[kind][name], gradient, rtol=1e-4, atol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.hidden = nnx.Linear(8, 4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.conv(x)))
        return self.out(nnx.relu(self.hidden(h.reshape(h.shape[0], -1))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(2, (3, 3))(x))
        return nn.Dense(2)(nn.relu(nn.Dense(4)(h.reshape(h.shape[0], -1))))


def shapes_needed(objective, params, example, **options):
    """The names and shapes of the matrices, as an error lists them."""
    with pytest.raises(ValueError, match="must hold arrays of the shapes") as caught:
        oa.feedback_alignment(objective, params, example, feedback={}, **options)
    return str(caught.value)


def test_layers_of_flax_models():
    """Found by shapes alone; batch statistics are passed on as they are."""
    images = jax.ShapeDtypeStruct((3, 4, 4, 1), jnp.float32)
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param, ...)

    def predict(params, x, rest):
        net = nnx.merge(graphdef, params, rest, copy=True)
        outputs = net(x)
        return outputs, nnx.state(net, nnx.BatchStat)

    objective = oa.Objective(
        predict, lambda outputs: (jnp.mean(outputs**2), outputs), has_aux="both"
    )
    example = {"x": images, "rest": rest}
    text = shapes_needed(objective, params, example)
    assert "['hidden']['kernel']" in text
    assert "(2, 8)" in text
    assert "(2, 4)" in text
    aligned = oa.feedback_alignment(objective, params, example)
    (value, (stats, outputs)), grads = jax.eval_shape(aligned.value_and_grad, params, **example)
    want = jax.eval_shape(objective.value_and_grad, params, **example)
    assert jax.tree.map(lambda a: a.shape, ((value, (stats, outputs)), grads)) == jax.tree.map(
        lambda a: a.shape, want
    )
    linen = LinenNet()
    variables = jax.eval_shape(linen.init, jax.random.key(0), images)
    objective = oa.Objective(lambda p, x: linen.apply(p, x), lambda outputs: jnp.mean(outputs))
    text = shapes_needed(objective, variables, {"x": images}, kind="fa")
    assert "(32, 4)" in text
    assert "(4, 2)" in text


def test_modes_agree():
    """Replicas, micro-batches, auxiliary outputs, seeds and bfloat16 against the plain gradient."""
    params = {"a": jnp.ones((3, 4)) / 3, "b": jnp.arange(8.0).reshape(4, 2) / 8}
    batch = normal_tree({"x": (4, 3), "y": (4, 2)})
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(outputs, y):
        return cross_entropy(outputs, y), {"largest": jnp.max(outputs)}

    objective = oa.Objective(mlp, loss, has_aux=True)
    replicated = objective.averaged_over("data")

    def of_seed(seed, kind="dfa", objective=objective, batch=batch, params=params):
        example = {"x": batch["x"]}
        aligned = oa.feedback_alignment(objective, params, example, kind=kind, key=seed)
        return aligned.value_and_grad(params, **batch)[1]

    def of_replica(kind):
        def gradient(batch):
            return of_seed(0, kind, replicated, batch)

        return jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P())(batch)

    def in_parts(kind):
        aligned = oa.feedback_alignment(objective, params, {"x": batch["x"]}, kind=kind)
        return aligned.accumulated(2, unroll=True, **batch).grad(params)

    @jax.jit
    def gradients():
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (batch, params))
        return {
            "dfa": of_seed(0),
            "fa": of_seed(0, "fa"),
            "replicas dfa": of_replica("dfa"),
            "replicas fa": of_replica("fa"),
            "parts dfa": in_parts("dfa"),
            "parts fa": in_parts("fa"),
            "seeds": jax.vmap(of_seed)(jnp.arange(2)),
            "bfloat16": of_seed(0, batch=narrow[0], params=narrow[1]),
        }

    found = jax.device_get(gradients())
    for kind in ("dfa", "fa"):
        for mode in ("replicas", "parts"):
            for name in params:
                want = found[kind][name]
                np.testing.assert_allclose(found[f"{mode} {kind}"][name], want, rtol=2e-6)
    np.testing.assert_allclose(found["seeds"]["a"][0], found["dfa"]["a"], rtol=2e-6)
    assert np.any(found["seeds"]["a"][1] != found["seeds"]["a"][0])
    assert found["bfloat16"]["a"].dtype == jnp.bfloat16
    narrow, wide = found["bfloat16"]["a"].astype(np.float32), found["dfa"]["a"]
    assert np.linalg.norm(narrow - wide) < 0.02 * np.linalg.norm(wide)
    assert np.any(found["dfa"]["a"] != found["fa"]["a"])


def test_pmap_and_explicit_axes():
    params = {"a": jnp.ones((3, 4)) / 3, "b": jnp.arange(8.0).reshape(4, 2) / 8}
    batch = normal_tree({"x": (4, 3), "y": (4, 2)})
    aligned = oa.feedback_alignment(MLP, params, {"x": batch["x"]})
    want = jax.jit(aligned.grad)(params, **batch)
    parts = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), batch)
    replicas = aligned.averaged_over("data")
    found = jax.pmap(lambda batch: replicas.grad(params, **batch), axis_name="data")(parts)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
    global_view = jax.jit(aligned.grad)(
        jax.device_put(params, jax.NamedSharding(mesh, P())), **sharded
    )
    for name in params:
        np.testing.assert_allclose(found[name][1], want[name], rtol=2e-6)
        np.testing.assert_allclose(global_view[name], want[name], rtol=2e-6)


@jax.custom_vjp
def one_way(x):
    return x


def refuse(*_):
    raise RuntimeError("an error came back")


one_way.defvjp(lambda x: (x, None), refuse)


def test_nothing_passes_backward_through_layers():
    """An optimizer trains although the backward pass of a branch raises."""
    x, y = jnp.eye(4, 3), jnp.eye(4, 2)

    def blocked(weights, x):
        h = jnp.tanh(x @ weights[0])
        h = jnp.tanh(h @ weights[1]) + one_way(h)
        return h @ weights[2]

    objective = oa.Objective(blocked, lambda outputs: jnp.mean((outputs - y) ** 2))
    weights = [0.1 * jnp.ones(shape) for shape in ((3, 5), (5, 5), (5, 2))]
    with pytest.raises(RuntimeError, match="an error came back"):
        objective.grad(weights, x=x)
    aligned = oa.feedback_alignment(objective, weights, {"x": x})
    tx = optax.chain(optax.clip(1.0), optax.adam(0.05))

    @jax.jit
    def train(weights):
        def step(carry, _):
            weights, state = carry
            value, grads = aligned.value_and_grad(weights, x=x)
            updates, state = tx.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), value

        return jax.lax.scan(step, (weights, tx.init(weights)), length=40)[1]

    values = np.asarray(train(weights))
    assert values[-1] < 0.2 * values[0]


def test_cost_of_the_backward_pass():
    """Wide layers and few outputs: two thirds of the multiply-adds of back-propagation."""
    deep = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 6 + [
        jax.ShapeDtypeStruct((64, 2), jnp.float32)
    ]
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    plain = oa.Objective(chain, lambda outputs: jnp.mean(outputs**2))
    direct = oa.feedback_alignment(plain, deep, {"x": x})
    flops = [
        jax.jit(one.grad).lower(deep, x=x).compile().cost_analysis()["flops"]
        for one in (plain, direct)
    ]
    product = 2 * 32 * 64 * 64
    assert flops[0] - flops[1] == pytest.approx(5 * product - 5 * 2 * 32 * 2 * 64, rel=0.05)


def test_explicit_layers_without_parameters_are_not_differentiated():
    layers = [lambda w, h: jnp.tanh(h @ w), lambda _, h: one_way(h), lambda w, h: h @ w]
    params = [jnp.ones((3, 4)), None, jnp.ones((4, 2))]
    feedback = oa.dfa_feedback(0, params)
    value_and_grad = oa.dfa_value_and_grad(layers, lambda o: jnp.mean(o**2), feedback)
    _, gradient = jax.jit(value_and_grad)(params, jnp.eye(3))
    assert gradient[1] is None
    assert np.all(np.isfinite(gradient[0]))
    assert np.any(gradient[0] != 0)


def test_what_cannot_be_aligned_is_named_and_back_propagated():
    """A layer in a loop: the feedback of the layer above comes back through all iterations."""
    x = jnp.eye(2, 3)

    def recurrent(params, x):
        def iteration(h, _):
            return jnp.tanh(h @ params["loop"]), None

        h = jax.lax.scan(iteration, jnp.tanh(x @ params["in"]), length=2)[0]
        return h @ params["out"]

    objective = oa.Objective(recurrent, lambda outputs: jnp.mean(outputs**3))
    params = normal_tree({"in": (3, 4), "loop": (4, 4), "out": (4, 2)})
    matrix = {"['out']": params["out"].T}
    with pytest.warns(UserWarning, match=r"\['loop'\] is used inside of a loop"):
        aligned = oa.feedback_alignment(objective, params, {"x": x}, feedback=matrix)
    found, want = jax.jit(lambda p: (aligned.grad(p, x=x), objective.grad(p, x=x)))(params)
    for name in params:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = shapes_needed(objective, params, {"x": x}, kind="fa")
    assert "{\"['out']\": (4, 2)}" in text


PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
EXAMPLE = {"x": jax.ShapeDtypeStruct((5, 3), jnp.float32)}


def network(predict):
    return oa.Objective(predict, lambda outputs: jnp.mean(outputs))


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (network(lambda p, x: jnp.sum(mlp(p, x))), {}, r"shape \(examples, outputs\).*\[\(\)\]"),
        (network(lambda p, x: mlp(p, x)[None]), {}, r"got the shapes \[\(1, 5, 2\)\]"),
        (network(lambda p, x: (mlp(p, x), x)), {}, "must be one array"),
        (network(lambda p, x: x @ p["a"]), {}, "no layers to align: a network needs a dense"),
        (
            oa.Objective.from_value_fn(lambda p: p["a"].sum()),
            {},
            "but the objective is a plain function",
        ),
        (MLP, {"feedback": "random"}, "`feedback` must be one of 'uniform', .*got 'random'"),
        (MLP, {"feedback": {"['b']": jnp.ones((4, 2))}}, r"shapes {\"\['b'\]\": \(2, 4\)}"),
        (
            network(lambda p, x: mlp(p, x) + (x @ p["a"])[:, :2]),
            {"feedback": "product"},
            r"needs a chain of layers .* above the layer \['b'\] is not",
        ),
    ],
)
def test_bad_input(objective, options, message):
    with pytest.raises(ValueError, match=message):
        oa.feedback_alignment(objective, PARAMS, EXAMPLE, **options)


def test_another_network_than_at_first_is_refused():
    aligned = oa.feedback_alignment(MLP, PARAMS, EXAMPLE)
    others = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}
    with pytest.raises(ValueError, match="feedback was made for"):
        jax.eval_shape(lambda p: aligned(p, x=jnp.ones((5, 3)), y=jnp.ones((5, 2))), others)


def test_explicit_bad_input():
    layers, params = [lambda w, h: h @ w] * 2, [jnp.ones((3, 4)), jnp.ones((4, 2))]
    for call, message in (
        (lambda: oa.dfa_value_and_grad(layers[:1], jnp.mean, []), "no layers to align"),
        (lambda: oa.dfa_value_and_grad(layers, jnp.mean, []), "one matrix for every layer"),
        (lambda: oa.dfa_feedback(0, params[:1]), "no layers to align"),
        (lambda: oa.dfa_feedback(0, [jnp.ones(3), *params]), "layer 0 must contain one matrix"),
        (lambda: oa.dfa_feedback(0, params, "random"), "`kind` must be one of 'uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    value_and_grad = oa.dfa_value_and_grad(layers, jnp.mean, [jnp.ones((4, 2))])
    x = jnp.ones((5, 3))
    with pytest.raises(ValueError, match=r"must have the shape \(2, 4\).*got \(4, 2\)"):
        jax.eval_shape(value_and_grad, params, x)
    with pytest.raises(ValueError, match="one entry for each of the 2 layers, got 1"):
        value_and_grad(params[:1], x)
    flat = oa.dfa_value_and_grad([layers[0], lambda w, h: (h @ w).sum()], jnp.mean, [x])
    with pytest.raises(ValueError, match=r"\(examples, outputs\), got \(\)"):
        jax.eval_shape(flat, params, x)
