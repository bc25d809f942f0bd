"""Sampled products: golden values, exact moments over all draws, modes, layers, devices."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import optax_accel as oa

A = np.array([[1.0, 2, 0], [0, 1, 3]])
B = np.array([[1.0, 1], [2, 0], [1, -1]])
C = A @ B
W = np.linalg.norm(A, axis=0) * np.linalg.norm(B, axis=1)
ONES = np.ones((2, 2))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@functools.partial(jax.jit, static_argnames=("method", "where", "num_samples"))
def product_and_gradients(key: Any, a: Any, b: Any, slope: Any, **settings: Any) -> Any:
    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return oa.sampled_matmul(a, b, key, uniform=None, **settings)

    result, pullback = jax.vjp(multiply, a, b)
    return result, *pullback(slope)


def test_probabilities_of_the_example() -> None:
    np.testing.assert_allclose(W, [1.4142135624, 4.472135955, 4.2426406871], rtol=1e-9)
    scales = {
        None: [0.2792407799, 0.8830368802, 0.8377223398],
        "1/n": [0.2846500353, 0.8280665255, 0.7872834392],
        "k/n": [0.3179833686, 0.8613998589, 0.8206167725],
    }
    with jax.enable_x64(True):
        for uniform, expected in scales.items():
            draw = functools.partial(
                oa.sample_terms, num_samples=2, method="bernoulli", uniform=uniform
            )
            terms = jax.jit(jax.vmap(draw, in_axes=(None, 0)))(
                W, jax.random.split(jax.random.key(0), 64)
            )
            # Every term is drawn in some of the draws, and has the inverse of its probability.
            assert terms.indices.shape == (64, 3)
            np.testing.assert_allclose(1 / terms.scales.max(0), expected, rtol=1e-9)
            assert not terms.num_dropped.any()


def test_top_k_is_the_largest_terms_within_its_bound(x64: None) -> None:
    result, of_a, of_b = product_and_gradients(
        None, A, B, ONES, method="top_k", where="forward", num_samples=2
    )
    np.testing.assert_allclose(result, [[4, 0], [5, -3]], **CLOSE)
    np.testing.assert_allclose(np.linalg.norm(result - C), W[0], **CLOSE)  # the bound is reached
    np.testing.assert_allclose(of_a, (ONES @ B.T) * [0, 1, 1], **CLOSE)
    np.testing.assert_allclose(of_b, (A.T @ ONES) * [[0], [1], [1]], **CLOSE)


def every_draw(method: str) -> list[tuple[float, np.ndarray]]:
    """All draws of two terms by their probabilities and scales, from the formulas."""
    p = W / W.sum()
    draws = []
    if method == "crs":
        for pair in itertools.product(range(3), repeat=2):
            scale = np.zeros(3)
            for i in pair:
                scale[i] += 1 / (2 * p[i])
            draws.append((np.prod(p[list(pair)]), scale))
        return draws
    q = np.minimum(1, 2 * p)
    for drawn in itertools.product((0, 1), repeat=3):
        z = np.array(drawn)
        draws.append((np.prod(np.where(z, q, 1 - q)), z / q))
    return draws


@pytest.mark.parametrize(
    ("method", "error"), [("crs", 21.2982212813), ("bernoulli", 11.2982212813)]
)
def test_draws_are_unbiased_with_the_error_of_the_formula(
    x64: None, method: Any, error: float
) -> None:
    """What the library draws is one of the enumerated draws, each as often as it should be."""
    draws = every_draw(method)
    results = np.array([(A * scale) @ B for _, scale in draws])
    chances = np.array([chance for chance, _ in draws])
    np.testing.assert_allclose(np.tensordot(chances, results, 1), C, **CLOSE)
    squares = ((results - C) ** 2).sum((1, 2))
    np.testing.assert_allclose(chances @ squares, error, rtol=1e-9)

    run = functools.partial(product_and_gradients, method=method, where="forward", num_samples=2)
    keys = jax.random.split(jax.random.key(0), 4096)
    mapped = jax.jit(jax.vmap(run, in_axes=(0, None, None, None)))
    sampled, of_a, of_b = map(np.asarray, mapped(keys, A, B, ONES))
    far = np.abs(sampled[:, None] - results).max((2, 3))
    which = far.argmin(1)
    assert far.min(1).max() < 1e-9
    # Two draws of CRS, (i, j) and (j, i), give one product.
    same = np.abs(results[:, None] - results).max((2, 3)) < 1e-12
    counts = (same @ np.bincount(which, minlength=len(draws))) / 4096
    np.testing.assert_allclose(counts, same @ chances, atol=4 * 0.5 / 64)
    scales = np.array([scale for _, scale in draws])[which]
    np.testing.assert_allclose(of_a, (ONES @ B.T)[None] * scales[:, None, :], **CLOSE)
    np.testing.assert_allclose(of_b, (A.T @ ONES)[None] * scales[:, :, None], **CLOSE)
    if method == "bernoulli":
        index = np.flatnonzero(((scales > 0) == [False, True, True]).all(1))[0]
        np.testing.assert_allclose(
            sampled[index], [[4.5298221281, 0], [5.8460498942, -3.5811388301]], atol=1e-9
        )
        np.testing.assert_allclose(of_a[index], [[0, 2.2649110641, 0]] * 2, atol=1e-9)
        np.testing.assert_allclose(
            of_b[index], [[0, 0], [3.3973665961] * 2, [3.5811388301] * 2], atol=1e-9
        )


def test_backward_products_are_sampled_over_outputs_and_examples(x64: None) -> None:
    rng = np.random.default_rng(0)
    a, b, slope = (rng.normal(size=shape) for shape in ((6, 5), (5, 4), (6, 4)))
    result, of_a, of_b = product_and_gradients(
        None, a, b, slope, method="top_k", where="backward", num_samples=3
    )
    np.testing.assert_allclose(result, a @ b, **CLOSE)
    norm = np.linalg.norm
    outputs = np.argsort(norm(slope, axis=0) * norm(b, axis=0))[-3:]
    examples = np.argsort(norm(a, axis=1) * norm(slope, axis=1))[-3:]
    np.testing.assert_allclose(of_a, slope[:, outputs] @ b[:, outputs].T, **CLOSE)
    np.testing.assert_allclose(of_b, a[examples].T @ slope[examples], **CLOSE)
    result, of_a, of_b = product_and_gradients(
        None, a, b, slope, method="top_k", where="forward_only", num_samples=3
    )
    assert np.abs(result - a @ b).max() > 0.1
    np.testing.assert_allclose(of_a, slope @ b.T, **CLOSE)
    np.testing.assert_allclose(of_b, a.T @ slope, **CLOSE)


def test_a_convolution_is_sampled_over_its_channels() -> None:
    rng = np.random.default_rng(0)
    images = np.float32(rng.normal(size=(4, 6, 6, 8)))
    kernel = np.float32(rng.normal(size=(3, 3, 8, 5)))
    layout = ("NHWC", "HWIO", "NHWC")

    @jax.jit
    def run(images: jax.Array, kernel: jax.Array) -> Any:
        def loss(images: jax.Array, kernel: jax.Array, where: Any, **number: Any) -> jax.Array:
            return (
                oa.sampled_conv(
                    images,
                    kernel,
                    window_strides=(2, 2),
                    padding="SAME",
                    dimension_numbers=layout,
                    where=where,
                    **number,
                )
                ** 2
            ).sum()

        def exact(images: jax.Array, kernel: jax.Array) -> jax.Array:
            result = lax.conv_general_dilated(
                images, kernel, (2, 2), "SAME", dimension_numbers=layout
            )
            return (result**2).sum()

        both = (0, 1)
        weights = (images**2).sum((0, 1, 2)) * (kernel**2).sum((0, 1, 3))
        kept = (weights >= jnp.sort(weights)[4]).astype(images.dtype)
        return (
            jax.grad(loss, both)(images, kernel, "forward", num_samples=4),
            jax.grad(exact, both)(
                images * kept[None, None, None], kernel * kept[None, None, :, None]
            ),
            kept,
            jax.grad(loss, both)(images, kernel, "backward", num_samples=8),
            jax.grad(exact, both)(images, kernel),
        )

    some, expected, kept, whole, exact = jax.device_get(run(images, kernel))
    assert kept.sum() == 4
    np.testing.assert_allclose(some[0], expected[0] * kept, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(some[1], expected[1] * kept[:, None], rtol=1e-4, atol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), whole, exact)


PARAMS = {
    "u": jax.random.normal(jax.random.key(1), (6, 12)),
    "w": 0.3 * jax.random.normal(jax.random.key(2), (12, 12)),
    "o": jax.random.normal(jax.random.key(3), (2, 12)),
}
X = jax.random.normal(jax.random.key(0), (4, 3, 6))


def recurrent(params: Any, x: jax.Array) -> jax.Array:
    """A network with a loop, a checkpoint and a transposed weight."""

    @jax.checkpoint
    def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ params["u"] + h @ params["w"]), None

    h, _ = lax.scan(cell, jnp.zeros((3, 12)), x)
    return (params["o"] @ h.T).T


RECURRENT = oa.Objective(recurrent, lambda outputs: jnp.mean(outputs**2))


def test_layers_of_an_objective_are_sampled() -> None:
    @jax.jit
    def run(params: Any, x: jax.Array, step: jax.Array) -> Any:
        def some(ratio: float, **settings: Any) -> oa.Objective:
            return oa.sample_products(RECURRENT, ratio, min_samples=1, key=0, **settings)

        def drawn(step: jax.Array) -> jax.Array:
            return some(0.5, method="bernoulli", step=step)(params, x=x)

        last = {"u": False, "w": False, "o": True}
        hidden = RECURRENT.with_predict(lambda predict, aux: lambda p, x: recurrent_state(p, x))
        return {
            "exact": RECURRENT(params, x=x),
            "whole": some(1.0, method="crs")(params, x=x),
            "half": some(0.5).value_and_grad(params, x=x),
            "drawn": jax.vmap(drawn)(step + jnp.arange(2)),
            "last": some(0.5, mask=last)(params, x=x),
            "by hand": last_sampled(hidden.outputs(params, x=x), params["o"]),
        }

    def recurrent_state(params: Any, x: jax.Array) -> jax.Array:
        return recurrent({**params, "o": jnp.eye(12)}, x)

    def last_sampled(h: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.mean(oa.sampled_matmul(h, o.T, num_samples=6) ** 2)

    results = jax.device_get(run(PARAMS, X, jnp.int32(3)))
    np.testing.assert_allclose(results["whole"], results["exact"], rtol=1e-5)
    values = [results["exact"], results["half"][0], *results["drawn"], results["last"]]
    assert len({round(float(value), 4) for value in values}) == 5
    np.testing.assert_allclose(results["last"], results["by hand"], rtol=1e-5)
    unused = np.abs(results["half"][1]["o"]).sum(0) == 0
    assert unused.sum() == 6  # columns whose terms were left out
    program = str(jax.make_jaxpr(lambda p: oa.sample_products(RECURRENT, 0.9)(p, x=X))(PARAMS))
    assert "remat" in program or "checkpoint" in program


def test_the_program_has_fewer_multiplications() -> None:
    objective = oa.Objective(
        lambda p, x: jnp.tanh(x @ p[0]) @ p[1], lambda outputs: jnp.mean(outputs**2)
    )
    params, x = [jnp.ones((256, 256)), jnp.ones((256, 256))], jnp.ones((256, 256))

    def flops(objective: oa.Objective) -> float:
        compiled = jax.jit(lambda p: objective.grad(p, x=x)).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    exact = flops(objective)
    assert flops(oa.sample_products(objective, 0.5)) < 0.53 * exact
    assert flops(oa.sample_products(objective, 0.5, where="backward")) < 0.73 * exact


def test_devices_sum_only_the_sampled_rows() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = (
        jax.random.normal(jax.random.key(1), (16, 40)),
        jax.random.normal(jax.random.key(2), (40, 6)),
    )

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(oa.sampled_matmul(x, w, num_samples=20, scores="weights") ** 2)

    spec = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P()}

    @functools.partial(jax.shard_map, mesh=mesh, **spec)
    def on_devices(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.grad(lambda w: lax.pmean(loss(w, x), "data"))(w)

    compiled = jax.jit(on_devices).lower(w, x).compile()
    text = compiled.as_text()
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for line in re.findall(r"= (.*?) all-reduce", text)
        for shape in re.findall(r"f32\[([\d,]+)\]", line)
    ]
    assert sizes == [20 * 6]  # of 40 rows
    np.testing.assert_allclose(compiled(w, x), jax.jit(jax.grad(loss))(w, x), rtol=1e-5, atol=1e-6)


def test_flax_layers_are_sampled_in_training_and_exact_in_evaluation() -> None:
    draws = oa.sampled_dot_general(0.5, min_samples=1, method="crs", rngs=nnx.Rngs(1))
    channels = oa.sampled_conv_general_dilated(0.5, min_samples=1)
    model = nnx.Sequential(
        nnx.Conv(8, 4, (3, 3), conv_general_dilated=channels, rngs=nnx.Rngs(0)),
        nnx.Linear(4, 3, dot_general=draws, rngs=nnx.Rngs(0)),
    )
    plain = nnx.Sequential(
        nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    )
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))

    @nnx.jit
    def run(model: nnx.Module, x: jax.Array) -> jax.Array:
        return model(x)  # type: ignore[operator]

    first, second = run(model, x), run(model, x)
    assert not np.allclose(first, second)  # the count of the stream is part of the state
    model.eval()
    np.testing.assert_allclose(run(model, x), run(plain, x), rtol=1e-5, atol=1e-6)


def test_bfloat16_and_batch_axes_keep_dtype_and_shape() -> None:
    a, b = jnp.ones((3, 2, 5, 16), jnp.bfloat16), jnp.ones((3, 16, 4), jnp.bfloat16)
    product = oa.sampled_dot_general(0.5, min_samples=1, method="bernoulli", rngs=nnx.Rngs(0))
    numbers = (((3,), (1,)), ((0,), (0,)))
    result = nnx.eval_shape(lambda product, a, b: product(a, b, numbers), product, a, b)
    assert (result.shape, result.dtype) == ((3, 2, 5, 4), jnp.bfloat16)
    half = oa.sampled_dot_general(0.5, min_samples=1)
    np.testing.assert_array_equal(jax.jit(lambda a, b: half(a, b, numbers))(a, b), 8)


def test_a_chain_draws_anew_at_every_step() -> None:
    objective = oa.Objective(lambda w, x: x @ w, jnp.mean)
    w, x = jnp.ones((32, 1)), jnp.ones((4, 32))
    tx = optax.chain(
        oa.sampled_product_gradients(0.5, method="bernoulli", uniform=None, key=1), optax.sgd(1.0)
    )

    @jax.jit
    def step(w: jax.Array, state: Any) -> Any:
        return tx.update(jnp.zeros_like(w), state, w, value_fn=objective, x=x)

    first, state = step(w, tx.init(w))
    second, state = step(w, state)
    for updates in (first, second):  # all weights are alike: each term is drawn with 1/2
        assert set(np.unique(updates)) == {-2.0, 0.0}
    assert (first != second).any()
    assert int(optax.tree.get(state, "count")) == 2


CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "ratio 0": (lambda: oa.sampled_matmul(A, B, ratio=0.0), ValueError, r"`ratio` must lie in \(0"),
    "ratio 2": (lambda: oa.sample_products(RECURRENT, 1.5), ValueError, r"`ratio` must lie in"),
    "ratio array": (
        lambda: optax.inject_hyperparams(oa.sampled_product_gradients)(0.5).init(jnp.ones(2)),
        TypeError,
        "use optax_accel.inject_hyperparams",
    ),
    "both": (
        lambda: oa.sampled_matmul(A, B, ratio=0.5, num_samples=2),
        ValueError,
        "either `ratio`, a share of the terms in",
    ),
    "none": (lambda: oa.sampled_dot_general(), ValueError, "either `ratio`"),
    "no samples": (lambda: oa.sampled_matmul(A, B, num_samples=0), ValueError, "at least 1"),
    "method": (
        lambda: oa.sampled_product_gradients(0.5, method="best"),  # type: ignore[arg-type]
        ValueError,
        "`method` must be one of 'top_k'",
    ),
    "pair": (lambda: oa.sampled_matmul(A, B, ratio=(0.5, 0.5)), ValueError, "may be a pair only"),
    "weights": (
        lambda: oa.sampled_matmul(A, B, ratio=0.5, where="backward", scores="weights"),
        ValueError,
        "scores='both'",
    ),
    "no key": (
        lambda: oa.sampled_matmul(A, B, num_samples=2, method="crs"),
        TypeError,
        "give a `key`",
    ),
    "no rngs": (lambda: oa.sampled_dot_general(0.5, method="crs"), TypeError, "give `rngs`"),
    "shapes": (lambda: oa.sampled_matmul(A, A, ratio=0.5), ValueError, r"multiplies \(\.\.\., n\)"),
    "groups": (
        lambda: oa.sampled_conv(
            jnp.ones((1, 4, 3, 3)),
            jnp.ones((4, 1, 3, 3)),
            window_strides=(1, 1),
            padding="SAME",
            feature_group_count=4,
            ratio=0.5,
        ),
        ValueError,
        "feature_group_count=4, allowed is 1",
    ),
    "too many": (
        lambda: oa.sample_terms(jnp.ones(3), num_samples=4),
        ValueError,
        "at most the number of weights, 3, got 4",
    ),
    "value function": (
        lambda: oa.sample_products(oa.Objective.from_value_fn(jnp.sum), 0.5),
        ValueError,
        "plain function of the parameters",
    ),
    "no products": (
        lambda: oa.sample_products(oa.Objective(lambda p: 2 * p, jnp.sum), 0.5)(jnp.ones(3)),
        ValueError,
        "found nothing to sample",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_raises_at_once(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        call()
