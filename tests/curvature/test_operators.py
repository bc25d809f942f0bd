"""Curvature operators against matrices built entry by entry, in double precision."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

import optax_accel as oa
from optax_accel import curvature

RNG = np.random.default_rng(0)
N = 6
X = RNG.normal(size=(N, 3))
TARGETS = {"mse": RNG.normal(size=(N, 2)), "cross_entropy": RNG.integers(0, 2, N)}
PARAMS = {"w": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4,)), "v": RNG.normal(size=(4, 2))}


def predict(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


def mse(outputs, y):
    return 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


def cross_entropy(outputs, y):
    log_p = jax.nn.log_softmax(outputs, axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=-1))


LOSSES = {"mse": mse, "cross_entropy": cross_entropy}
OPERATORS = {
    "hessian": curvature.hessian,
    "gauss_newton": curvature.gauss_newton,
    "functional_hessian": curvature.functional_hessian,
    "fisher_categorical": curvature.fisher,
    "fisher_gaussian": functools.partial(curvature.fisher, likelihood="gaussian"),
    "empirical_fisher": curvature.empirical_fisher,
    "gradient_covariance": curvature.gradient_covariance,
}
# One of each way to compute a product.
EACH_KIND = ["hessian", "fisher_categorical", "gradient_covariance"]


def as_float64(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(params=LOSSES)
def problem(x64, request):
    objective = oa.Objective(predict, LOSSES[request.param])
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(TARGETS[request.param])}
    return objective, as_float64(PARAMS), batch, request.param


@functools.cache
def matrices(loss_name):
    """All matrices of the problem, from the Jacobians and Hessians of one example at a time."""
    flat, unravel = ravel_pytree(as_float64(PARAMS))

    @jax.vmap
    def one(x, y):
        def outputs(p):
            return predict(unravel(p), x[None])[0]

        def loss_of(out):
            return LOSSES[loss_name](out[None], y[None])

        out, jacobian = outputs(flat), jax.jacobian(outputs)(flat)
        p, slope, bend = jax.nn.softmax(out), jax.grad(loss_of)(out), jax.hessian(loss_of)(out)
        gradient = jacobian.T @ slope
        return gradient, {
            "hessian": jax.hessian(lambda q: loss_of(outputs(q)))(flat),
            "gauss_newton": jacobian.T @ bend @ jacobian,
            "functional_hessian": jnp.einsum("c,cij->ij", slope, jax.hessian(outputs)(flat)),
            "fisher_categorical": jacobian.T @ (jnp.diag(p) - jnp.outer(p, p)) @ jacobian,
            "fisher_gaussian": jacobian.T @ jacobian,
            "empirical_fisher": jnp.outer(gradient, gradient),
        }

    gradients, terms = jax.jit(one)(X, TARGETS[loss_name])
    result = {name: np.mean(term, axis=0) for name, term in terms.items()}
    result["gradient_covariance"] = np.cov(gradients, rowvar=False, bias=True)
    return result


def in_batches(batch, *cuts):
    cuts = [0, *cuts, N]
    return [
        jax.tree.map(lambda leaf, i=i, j=j: np.asarray(leaf[i:j]), batch)
        for i, j in itertools.pairwise(cuts)
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_match_the_dense_matrix(problem, name):
    objective, params, batch, loss_name = problem
    operator = OPERATORS[name](objective, params, **batch)
    want = matrices(loss_name)[name]
    got = operator.dense()
    assert operator.dimension == len(want) == 24
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(got, got.T, rtol=1e-11, atol=1e-14)
    if name not in EACH_KIND or loss_name != "mse":
        return
    # One product, and the vectorized form that jit uses.
    vector = jax.tree.map(jnp.cos, params)
    product = ravel_pytree(operator(vector))[0]
    np.testing.assert_allclose(product, want @ ravel_pytree(vector)[0], rtol=1e-11, atol=1e-13)
    block = jax.tree.map(lambda v: jnp.stack([v, -2 * v]), vector)
    jitted = jax.jit(lambda p, b: OPERATORS[name](objective, p, **batch).block(b))(params, block)
    for row, factor in enumerate((1, -2)):
        got = ravel_pytree(jax.tree.map(lambda b, row=row: b[row], jitted))[0]
        np.testing.assert_allclose(got, factor * product, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", EACH_KIND)
def test_batches_of_any_size_give_the_mean_over_all_examples(x64, name):
    objective = oa.Objective(predict, mse)
    params = as_float64(PARAMS)
    data = in_batches({"x": X, "y": TARGETS["mse"]}, 3, 5)  # of 3, 2 and 1 examples
    operator = OPERATORS[name](objective, params, batches=data)
    want = matrices("mse")[name]
    np.testing.assert_allclose(operator.dense(), want, rtol=1e-11, atol=1e-13)
    product = operator(jax.tree.map(jnp.cos, params))
    vector = np.cos(ravel_pytree(params)[0])
    np.testing.assert_allclose(ravel_pytree(product)[0], want @ vector, rtol=1e-11, atol=1e-13)


def masked(loss):
    """A mean over what a mask leaves, 0 / 0 of nothing."""
    return lambda out, y, mask: jnp.sum(loss(out, y) * mask) / jnp.sum(mask)


MASKED = {
    "categorical": masked(
        lambda out, y: -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1)[:, 0]
    ),
    "gaussian": masked(lambda out, y: 0.5 * jnp.sum((out - y) ** 2, axis=-1)),
}


def test_examples_that_a_network_is_sure_of_count_as_the_others(x64):
    """Their own information is 0 in float32, but not the share that they have in the mean."""
    objective = oa.Objective(
        lambda w, x: x @ w, MASKED["categorical"], weight=lambda mask: jnp.sum(mask)
    )
    slopes = np.array([[0.4, -0.2]])
    x, mask = np.array([[0.5], [-1.0], [200.0], [300.0]]), np.array([1.0, 0.5, 2.0, 0.5])
    exact = {"x": x, "y": np.array([0, 1, 0, 1]), "mask": mask}
    single = jax.tree.map(lambda a: np.float32(a) if a.dtype == np.float64 else a, exact)
    fisher = curvature.fisher(objective, jnp.float32(slopes), **single)
    want = curvature.gauss_newton(objective, jnp.asarray(slopes), **exact)
    np.testing.assert_allclose(fisher.dense(), want.dense(), rtol=1e-5)


@pytest.mark.parametrize("likelihood", MASKED)
def test_batches_count_with_the_weight_of_the_objective(x64, likelihood):
    params = as_float64(PARAMS)
    y = TARGETS["mse" if likelihood == "gaussian" else "cross_entropy"]
    batch = {"x": X, "y": y, "mask": np.array([2.0, 0.5, 0.0, 0.0, 1.0, 0.0])}
    data = in_batches(batch, 2, 2, 4)  # of weight 2.5, empty, of weight 0, and of weight 1
    objective = oa.Objective(predict, MASKED[likelihood], weight=lambda mask: jnp.sum(mask))
    vector = jax.tree.map(jnp.cos, params)
    operators = {"fisher": functools.partial(curvature.fisher, likelihood=likelihood)}
    if likelihood == "categorical":
        operators["gauss_newton"] = curvature.gauss_newton
    else:
        operators["gradient_covariance"] = curvature.gradient_covariance
    found = {}
    for name, build in operators.items():
        found[name] = ravel_pytree(build(objective, params, batches=data)(vector))[0]
        whole = build(objective, params, **as_float64(batch))(vector)
        np.testing.assert_allclose(found[name], ravel_pytree(whole)[0], rtol=1e-11, atol=1e-14)
    with pytest.raises(ValueError, match="of a `weight` above 0"):
        curvature.hessian(objective, params, batches=data[1:3])(vector)
    if likelihood == "categorical":
        np.testing.assert_allclose(found["fisher"], found["gauss_newton"], rtol=1e-11, atol=1e-14)
        return
    # From the outputs and gradients of one example at a time, with their weights.
    weights, v = batch["mask"] / 3.5, np.asarray(ravel_pytree(vector)[0])
    flat, unravel = ravel_pytree(params)
    jacobians = np.asarray(jax.jacobian(lambda p: predict(unravel(p), X))(flat))
    slopes = np.asarray(predict(params, X)) - y
    gradients = np.einsum("nc,ncp->np", slopes, jacobians)
    gradients -= (weights @ gradients)[None]
    want = gradients.T @ (weights * (gradients @ v))
    np.testing.assert_allclose(found["gradient_covariance"], want, rtol=1e-10, atol=1e-13)
    want = np.einsum("n,ncp,ncq,q->p", weights, jacobians, jacobians, v)
    np.testing.assert_allclose(found["fisher"], want, rtol=1e-10, atol=1e-13)


def test_flags_in_a_batch_stay_flags():
    def with_flag(params, x, train, mode):
        assert train is True
        assert mode == "fast"
        return predict(params, x)

    objective, params = oa.Objective(with_flag, mse), jax.tree.map(jnp.float32, PARAMS)
    data = [{**batch, "train": True, "mode": "fast"} for batch in DATA]
    got = curvature.empirical_fisher(objective, params, batches=data)(params)
    want = curvature.empirical_fisher(oa.Objective(predict, mse), params, batches=DATA)(params)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


def test_fisher_is_the_gauss_newton_matrix_of_the_log_likelihood(problem):
    objective, params, batch, loss_name = problem
    likelihood = {"mse": "gaussian", "cross_entropy": "categorical"}[loss_name]
    fisher = curvature.fisher(objective, params, likelihood=likelihood, **batch).dense()
    gauss_newton = curvature.gauss_newton(objective, params, **batch).dense()
    np.testing.assert_allclose(fisher, gauss_newton, rtol=1e-11, atol=1e-14)


def test_golden_hessian_split(x64):
    """Spec B: f = w1 w2, target 5, w = (2, 3)."""
    objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
    w = jnp.array([2.0, 3.0])
    got = {name: OPERATORS[name](objective, w).dense() for name in list(OPERATORS)[:3]}
    np.testing.assert_allclose(got["hessian"], [[9, 7], [7, 4]])
    np.testing.assert_allclose(got["gauss_newton"], [[9, 6], [6, 4]])
    np.testing.assert_allclose(got["functional_hessian"], [[0, 1], [1, 0]])
    gaussian = curvature.fisher(objective, w, likelihood="gaussian").dense()
    np.testing.assert_allclose(gaussian, [[9, 6], [6, 4]])
    values, vectors = np.linalg.eigh(got["hessian"])
    np.testing.assert_allclose(values, [-0.9330343737, 13.9330343737], rtol=1e-9)
    np.testing.assert_allclose(np.abs(vectors[:, 1]), [0.8174155605, 0.5760484368], rtol=1e-9)


def test_reverse_mode_objectives_and_value_functions(x64):
    params, want = as_float64(PARAMS), matrices("mse")
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(TARGETS["mse"])}
    objective = oa.Objective(predict, mse, hvp_mode="reverse_over_reverse")
    for name in ("hessian", "functional_hessian"):
        got = OPERATORS[name](objective, params, **batch).dense()
        np.testing.assert_allclose(got, want[name], rtol=1e-11, atol=1e-13)
    value_fn = oa.Objective.from_value_fn(lambda p, x, y: mse(predict(p, x), y))
    for name in ("hessian", "empirical_fisher"):
        got = OPERATORS[name](value_fn, params, **batch).dense()
        np.testing.assert_allclose(got, want[name], rtol=1e-11, atol=1e-13)
    for name in ("gauss_newton", "functional_hessian", "fisher_gaussian"):
        with pytest.raises(ValueError, match="needs the network outputs"):
            OPERATORS[name](value_fn, params, **batch)


@jax.custom_vjp
def tanh_kernel(h):
    """A kernel with a backward pass of its own, as fused attention has."""
    return jnp.tanh(h)


tanh_kernel.defvjp(lambda h: (jnp.tanh(h), jnp.tanh(h)), lambda t, g: (g * (1 - t**2),))


@jax.custom_vjp
def opaque_kernel(h):
    """A kernel whose backward pass cannot be differentiated."""
    return jnp.tanh(h)


def opaque_backward(h, g):
    def backward(h, g):
        return np.asarray(g * (1 - np.tanh(h) ** 2), h.dtype)

    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return (jax.pure_callback(backward, shape, h, g, vmap_method="expand_dims"),)


opaque_kernel.defvjp(lambda h: (jnp.tanh(h), h), opaque_backward)


def kernel_objective(kernel, mode):
    def predict(params, x):
        return kernel(x @ params["w"] + params["b"][None]) @ params["v"]

    return oa.Objective(predict, cross_entropy, hvp_mode=mode)


@pytest.mark.parametrize(
    ("kernel", "mode", "dtype", "error"),
    [
        (tanh_kernel, "reverse_over_reverse", np.float64, 1e-13),
        (opaque_kernel, "finite_difference", np.float64, 1e-9),
        (opaque_kernel, "finite_difference", np.float32, 2e-4),
    ],
)
def test_every_product_honours_the_mode(x64, kernel, mode, dtype, error):
    objective = kernel_objective(kernel, mode)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    batch = {"x": jnp.asarray(X, dtype), "y": TARGETS["cross_entropy"]}
    vector = jax.tree.map(jnp.cos, params)
    flat = np.float64(ravel_pytree(vector)[0])
    found = {name: build(objective, params, **batch)(vector) for name, build in OPERATORS.items()}
    parts = objective.accumulated(2, **batch)
    found["hessian in parts"] = jax.jit(parts.hvp)(params, vector)
    found["gauss_newton in parts"] = jax.jit(parts.ggn_vp)(params, vector)
    for name, product in found.items():
        want = matrices("cross_entropy")[name.split()[0]] @ flat
        got = np.float64(ravel_pytree(product)[0])
        assert np.linalg.norm(got - want) <= error * np.linalg.norm(want), name


def test_a_missing_derivative_names_the_mode_that_helps():
    params = jax.tree.map(jnp.float32, PARAMS)
    batch = {"x": np.float32(X), "y": TARGETS["cross_entropy"]}
    objective = kernel_objective(tanh_kernel, "forward_over_reverse")
    for name in ("gauss_newton", "fisher_gaussian", "empirical_fisher"):
        with pytest.raises(TypeError, match=r"hvp_mode='forward_over_reverse'.*reverse_over_rev"):
            OPERATORS[name](objective, params, **batch)(params)
    with pytest.raises(TypeError, match="'reverse_over_reverse', which differentiates"):
        objective.bind(**batch).accumulated(1).ggn_vp(params, params)
    objective = kernel_objective(opaque_kernel, "reverse_over_reverse")
    for name in ("hessian", "gauss_newton"):
        with pytest.raises(TypeError, match=r"hvp_mode='reverse_over_reverse'.*finite_difference"):
            OPERATORS[name](objective, params, **batch)(params)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_differences_do_not_depend_on_the_size_of_the_vector(size):
    objective = oa.Objective(lambda w: jnp.sin(w), jnp.sum, hvp_mode="finite_difference")
    w, v = jnp.array([1.0, 2.0]), jnp.array([1.0, -2.0])
    np.testing.assert_allclose(objective.hvp(w, size * v) / size, -jnp.sin(w) * v, rtol=1e-3)
    np.testing.assert_array_equal(objective.hvp(w, 0 * v), jnp.zeros(2))


@pytest.mark.parametrize("name", EACH_KIND)
def test_new_parameters_and_data_do_not_compile_again(name):
    traces = []

    def counting_predict(params, x):
        traces.append(x.shape)
        return predict(params, x)

    objective = oa.Objective(counting_predict, mse)
    params = jax.tree.map(jnp.float32, PARAMS)
    batch = {"x": np.float32(X), "y": np.float32(TARGETS["mse"])}
    vector = jax.tree.map(jnp.ones_like, params)
    block = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), vector)
    build = OPERATORS[name]

    def products(scale):
        p, b = jax.tree.map(lambda leaf: scale * leaf, (params, batch))
        operator = build(objective, p, **b)
        loader = build(objective, p, batches=in_batches(b, 3))
        return [operator(vector), operator.block(block), loader(vector), loader.block(block)]

    first = products(np.float32(1))
    assert traces
    traces.clear()
    second = products(np.float32(0.5))
    assert traces == []
    assert not np.allclose(first[0]["w"], second[0]["w"])


def test_compiled_code_lives_as_long_as_the_objective():
    x = jnp.asarray(np.float32(X))
    objective = oa.Objective(functools.partial(predict, x=x), lambda out: jnp.mean(out**2))
    params = jax.tree.map(jnp.float32, PARAMS)
    curvature.hessian(objective, params).block(jax.tree.map(lambda p: p[None], params))
    gone = weakref.ref(objective)
    del objective
    gc.collect()
    assert gone() is None


def test_vectors_are_at_least_float32():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    params["b"] = params["b"].astype(jnp.float32)
    batch = {"x": jnp.asarray(X, jnp.float32), "y": jnp.asarray(TARGETS["mse"], jnp.float32)}
    objective = oa.Objective(predict, mse)
    want = matrices("mse")["gauss_newton"]
    for data in (batch, {"batches": in_batches(batch, 4)}):
        operator = curvature.gauss_newton(objective, params, **data)
        assert {leaf.dtype for leaf in jax.tree.leaves(operator.like)} == {jnp.dtype("float32")}
        got = operator.dense()
        assert got.dtype == jnp.float32
        # bfloat16 has 8 bits.
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


def test_empty_trees_and_blocks():
    objective = oa.Objective.from_value_fn(lambda p: jnp.zeros(()))
    operator = curvature.hessian(objective, {})
    assert operator.dense().shape == (0, 0)
    assert operator({}) == {}
    operator = curvature.hessian(oa.Objective.from_value_fn(jnp.sum), jnp.ones(3))
    assert operator.block(jnp.zeros((0, 3))).shape == (0, 3)


class Shuffled:
    """A loader that starts afresh at every pass."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


DATA = in_batches({"x": np.float32(X), "y": np.float32(TARGETS["mse"])}, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": iter(DATA)}, TypeError, "gives its batches once"),
        ({"batches": (b for b in DATA)}, TypeError, "gives its batches once"),
        ({"batches": DATA, **DATA[0]}, ValueError, r"both `batches` and a batch \(x, y\)"),
        ({}, TypeError, r"takes the arguments \['x', 'y'\], which were not given"),
        ({"x": DATA[0]["x"]}, TypeError, r"takes the arguments \['y'\]"),
        ({"batches": DATA[0]}, TypeError, "one batch is given as"),
        ({"batches": 3}, TypeError, "must be an iterable of dicts"),
    ],
)
def test_errors_when_an_operator_is_built(arguments, error, message):
    params = jax.tree.map(jnp.float32, PARAMS)
    with pytest.raises(error, match=message):
        curvature.hessian(oa.Objective(predict, mse), params, **arguments)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "`batches` is empty"),
        (Shuffled([]), ValueError, "`batches` is empty"),
        ([tuple(DATA[0].values())], TypeError, "must give dicts"),
        ([jax.tree.map(lambda leaf: leaf[:0], DATA[0])], ValueError, "one batch with examples"),
        ([{"x": DATA[0]["x"], "y": DATA[0]["y"][:1]}], ValueError, "the same leading axis"),
    ],
)
def test_errors_when_the_data_is_read(data, error, message):
    params = jax.tree.map(jnp.float32, PARAMS)
    operator = curvature.hessian(oa.Objective(predict, mse), params, batches=data)
    with pytest.raises(error, match=message):
        operator(params)
    with pytest.raises(error, match=message):
        curvature.gradient_covariance(oa.Objective(predict, mse), params, batches=data)


def test_other_errors():
    params = jax.tree.map(jnp.float32, PARAMS)
    bound = oa.Objective(predict, mse).bind(**DATA[0])
    with pytest.raises(TypeError, match=r"Objective\.from_value_fn"):
        curvature.hessian(lambda p: jnp.sum(p["w"]), params)
    with pytest.raises(TypeError, match="real floating-point parameters"):
        curvature.hessian(bound, {"w": jnp.arange(3)})
    for build in (curvature.empirical_fisher, curvature.gradient_covariance):
        with pytest.raises(ValueError, match="needs data with a leading axis"):
            build(bound, params)
    with pytest.raises(ValueError, match="`likelihood` must be one of"):
        curvature.fisher(bound, params, likelihood="poisson")
    with pytest.raises(ValueError, match="one array of logits"):
        curvature.fisher(oa.Objective(lambda p: p["w"][0, 0], jnp.sum), params)
    objective = oa.Objective(predict, mse)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda p: curvature.hessian(objective, p, batches=DATA)(p))(params)


def test_arguments_that_the_objective_does_not_name_are_ignored(x64):
    objective, params = oa.Objective(predict, mse), as_float64(PARAMS)
    data = in_batches({"x": X, "y": TARGETS["mse"], "index": np.arange(N)}, 2)
    data[0]["file"] = "train.npz"
    got = curvature.hessian(objective, params, batches=data).dense()
    np.testing.assert_allclose(got, matrices("mse")["hessian"], rtol=1e-11, atol=1e-13)


# -- models whose loss is not a plain function of the parameters -----------------------------------


class Noisy(nnx.Module):
    def __init__(self, kind, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
        if kind == "batch_norm":
            self.middle = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
        else:
            self.middle = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.last(jnp.tanh(self.middle(self.first(x))))


@pytest.mark.parametrize("kind", ["batch_norm", "dropout"])
def test_batch_norm_and_dropout_with_a_fixed_key(x64, kind):
    graphdef, *states = nnx.split(Noisy(kind, nnx.Rngs(0)), nnx.Param, ...)
    params, rest = (nnx.as_pure(state) for state in states)
    if kind == "batch_norm":
        rest = as_float64(jax.tree.map(np.float64, rest))

    def forward(params, x):  # in training mode; `rest` is merged as a copy and so stays as it is
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    objective = oa.Objective(forward, cross_entropy)
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(TARGETS["cross_entropy"])}
    hessian = curvature.hessian(objective, params, **batch)
    dense = hessian.dense()
    np.testing.assert_allclose(dense, dense.T, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(dense, curvature.hessian(objective, params, **batch).dense())
    # Against central differences of the gradient, along the parameters themselves.
    gradient = jax.jit(
        lambda scale: objective.grad(jax.tree.map(lambda p: scale * p, params), **batch)
    )
    up, down = (ravel_pytree(gradient(1 + step))[0] for step in (1e-5, -1e-5))
    want = (up - down) / 2e-5
    np.testing.assert_allclose(dense @ ravel_pytree(params)[0], want, atol=1e-8)
    parts = [
        ravel_pytree(build(objective, params, **batch)(params))[0]
        for build in (curvature.gauss_newton, curvature.functional_hessian)
    ]
    np.testing.assert_allclose(sum(parts), want, atol=1e-8)
    # The loss is the one of training: in evaluation mode it is another.
    model = nnx.merge(graphdef, params, rest, copy=True)
    model.eval()
    evaluated = jax.jit(lambda x, y: cross_entropy(model(x), y))(X, batch["y"])
    assert abs(evaluated - jax.jit(objective)(params, **batch)) > 1e-3


# -- several devices -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A network whose leaves divide by eight, on sixteen examples."""
    rng = np.random.default_rng(3)
    params = {"w": rng.normal(size=(8, 16)), "b": rng.normal(size=(16,))}
    params["v"] = rng.normal(size=(16, 8))
    batch = {"x": rng.normal(size=(16, 8)), "y": rng.normal(size=(16, 8))}
    return jax.tree.map(np.float32, (params, batch))


@pytest.mark.parametrize("name", EACH_KIND)
def test_sharded_parameters_and_data(wide, name):
    params, batch = wide
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, P("data"))
    build = functools.partial(OPERATORS[name], oa.Objective(predict, mse))
    vector = jax.tree.map(np.cos, params)
    block = jax.tree.map(lambda v: np.stack([v, np.sin(v)]), vector)
    want = build(params, **batch)(vector), build(params, **batch).block(block)

    params, batch, vector = jax.device_put((params, batch, vector), sharding)
    block = jax.device_put(block, jax.NamedSharding(mesh, P(None, "data")))
    for data in (batch, {"batches": [batch]}):
        operator = build(params, **data)
        assert operator.like["w"].sharding == sharding
        product, rows = operator(vector), operator.block(block)
        for got, expected in zip((product, rows), want, strict=True):
            jax.tree.map(
                lambda g, w: np.testing.assert_allclose(g, w, atol=2e-6 * np.abs(w).max()),
                got,
                expected,
            )
        for got, like in ((product, vector), (rows, block)):
            for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
                assert g.sharding.is_equivalent_to(v.sharding, g.ndim)


@pytest.mark.parametrize("name", EACH_KIND)
def test_replicas_average_over_their_axis(wide, name):
    params, batch = wide
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    vector = jax.tree.map(np.cos, params)
    want = OPERATORS[name](oa.Objective(predict, mse), params, **batch)(vector)
    objective = oa.Objective(predict, mse, axis_name="data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
    )
    def product(params, vector, batch):
        operator = OPERATORS[name](objective, params, **batch)
        rows = operator.block(jax.tree.map(lambda v: v[None], vector))
        return operator(vector), jax.tree.map(lambda r: r[0], rows)

    for got in product(params, vector, batch):
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, atol=2e-6 * np.abs(w).max()), got, want
        )
