"""DecentLaM and DmSGD: golden biases, limit cases, and the plain simulation `W @ x`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel import topologies
from optax_accel.workers.decentralized import consensus_growth
from tests.helpers import WORKER_MODES, over_workers, signature

N = 8
METHODS = {"decentlam": oa.decentlam, "dmsgd": oa.dmsgd}


def run(
    tx: Any, x: Any, gradient: Any, num_steps: int, *, mode: str = "vmap", num_workers: int = N
) -> tuple[list[Any], Any]:
    """Parameters after each step and the last state; ``gradient(x, i)`` is worker i's."""

    def step(x: Any, state: Any, i: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient(x, i), state, x)
        return optax.apply_updates(x, updates), state

    step = over_workers(mode, step, num_workers)
    state, workers = jax.vmap(tx.init)(x), np.arange(num_workers)
    seen = []
    for _ in range(num_steps):
        x, state = jax.block_until_ready(step(x, state, workers))
        seen.append(jax.device_get(x))
    return seen, state


def simulate(
    method: str, topology: Any, x: np.ndarray, gradient: Any, rates: Any, momentum: float
) -> list[np.ndarray]:
    """The rules of the module's docstring, for all workers at once."""
    m, seen = np.zeros_like(x), []
    for step, rate in enumerate(rates):
        w, g = topology.matrix(step), gradient(x)
        if method == "dmsgd":
            m = momentum * m + g
            x = np.tensordot(w, x - rate * m, 1)
        else:
            m = momentum * m + (x - np.tensordot(w, x - rate * g, 1)) / rate
            x = x - rate * m
        seen.append(x)
    return seen


# -- the bias of the fixed points -----------------------------------------------------------------

# Worker i's loss is h_i / 2 (x - c_i) ** 2. The reference run that the golden figures come from is
# known as "8 heterogeneous quadratics" only: scale and curvature here are chosen to meet them.
CURVATURES = 0.9 + 0.045 * np.arange(N)
CENTERS = np.where(np.arange(N) < 4, 2.206, -2.206)
OPTIMUM = CURVATURES @ CENTERS / CURVATURES.sum()


def fixed_point(rate: float) -> np.ndarray:
    """The solution of x = W (x - rate * gradient(x)) on the ring."""
    w = topologies.ring(N).matrix(0)
    return np.linalg.solve(np.eye(N) - w + rate * w * CURVATURES, rate * w @ (CURVATURES * CENTERS))


def bias(x: np.ndarray) -> float:
    return float(np.mean((x - OPTIMUM) ** 2))


@functools.cache
def converged(method: str, rate: float, momentum: float) -> np.ndarray:
    ring = topologies.ring(N)
    tx = METHODS[method](rate, momentum, topology=ring, axis_name="workers", consensus_every=0)
    curvatures, centers = jnp.asarray(CURVATURES), jnp.asarray(CENTERS)

    def worker(h: jax.Array, c: jax.Array) -> jax.Array:
        def body(_: Any, carry: Any) -> Any:
            x, state = carry
            updates, state = tx.update(h * (x - c), state, x)
            return x + updates, state

        start = jnp.zeros(())
        return jax.lax.fori_loop(0, 6000, body, (start, tx.init(start)))[0]

    return np.asarray(jax.jit(jax.vmap(worker, axis_name="workers"))(curvatures, centers))


def test_golden_biases(x64: None) -> None:
    """Mean squared bias on a ring of 8, learning rate 0.01, momentum 0, 0.5 and 0.9."""
    biases = {
        method: [
            round(bias(converged(method, 0.01, momentum)), places)
            for momentum, places in ((0.0, 4), (0.5, 4), (0.9, 4 if method == "decentlam" else 3))
        ]
        for method in METHODS
    }
    assert biases == {"dmsgd": [0.0072, 0.0266, 0.381], "decentlam": [0.0072] * 3}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_decentlam_has_the_bias_of_gradient_descent_for_every_momentum(
    x64: None, momentum: float
) -> None:
    np.testing.assert_allclose(
        converged("decentlam", 0.01, momentum), fixed_point(0.01), rtol=1e-12
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_dmsgd_has_the_bias_of_a_larger_learning_rate(x64: None, momentum: float) -> None:
    expected = fixed_point(0.01 / (1 - momentum))
    np.testing.assert_allclose(converged("dmsgd", 0.01, momentum), expected, rtol=1e-12)


def test_dmsgd_at_half_the_rate_is_gradient_descent_at_the_limit(x64: None) -> None:
    left, right = converged("dmsgd", 0.005, 0.5), converged("dmsgd", 0.01, 0.0)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-13)
    np.testing.assert_allclose(bias(left), bias(right), rtol=0, atol=1e-14)


def test_biases_are_of_the_order_that_the_paper_states(x64: None) -> None:
    """Quadratic in the rate for DecentLaM, in rate / (1 - momentum) for DmSGD."""
    for momentum in (0.0, 0.5, 0.9):
        ratio = bias(converged("decentlam", 0.01, momentum)) / bias(
            converged("decentlam", 0.005, momentum)
        )
        assert 3.8 < ratio < 4
    ratio = bias(converged("dmsgd", 0.01, 0.5)) / bias(converged("dmsgd", 0.01, 0.0))
    assert 3.5 < ratio < 4


# -- limit cases ----------------------------------------------------------------------------------


def problem(seed: int = 0) -> tuple[Any, Any, Any]:
    """Random quadratics in 3 dimensions: start and gradient, for JAX and for NumPy."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(N, 3, 3))
    hessians = root @ root.transpose(0, 2, 1) / 3
    centers, start = rng.normal(size=(2, N, 3))

    def one(x: Any, i: Any) -> Any:
        return jnp.asarray(hessians)[i] @ (x - jnp.asarray(centers)[i])

    def everyone(x: np.ndarray) -> np.ndarray:
        return np.einsum("nij,nj->ni", hessians, x - centers)

    return start, one, everyone


ON_EIGHT = {
    "ring": topologies.ring(N),
    "exponential": topologies.exponential(N),
    "symmetric exponential": topologies.exponential(N, symmetric=True),
    "one_peer_exponential": topologies.one_peer_exponential(N),
    "mesh_2d": topologies.mesh_2d(2, 4),
    "complete": topologies.complete(N),
    "from_matrix": topologies.from_matrix(
        [[0.8 * (i == j) + 0.2 * ((5 * i + 1) % N == j) for j in range(N)] for i in range(N)]
    ),
}


CASES = [
    (method, topology, mode)
    for method in METHODS
    for topology in ON_EIGHT
    for mode in WORKER_MODES
    if method == "decentlam" or mode == "vmap" or topology == "one_peer_exponential"
]


@pytest.mark.parametrize(("method", "topology", "mode"), CASES)
def test_workers_follow_the_simulation(x64: None, method: str, topology: str, mode: str) -> None:
    """Of all workers in one NumPy array, with a learning rate that changes."""
    start, one, everyone = problem()
    schedule = lambda t: 0.1 - 0.01 * t  # noqa: E731
    graph = ON_EIGHT[topology]
    tx = METHODS[method](schedule, 0.3, topology=graph, axis_name="workers", consensus_every=2)
    seen, state = run(tx, start, one, 6, mode=mode)
    rates = [schedule(t) for t in range(6)]
    expected = simulate(method, ON_EIGHT[topology], start, everyone, rates, 0.3)
    np.testing.assert_allclose(seen, expected, rtol=1e-11)
    # Measured after steps 0, 2 and 4.
    spread = expected[4] - expected[4].mean(0)
    distance = np.sqrt(np.mean(np.sum(spread**2, 1)))
    np.testing.assert_allclose(
        state.consensus_distance, np.full(N, distance), rtol=1e-6, atol=1e-15
    )


def parallel_sgd(start: np.ndarray, everyone: Any, rates: Any, momentum: float) -> list[np.ndarray]:
    x, m, seen = start.mean(0), 0.0, []
    for rate in rates:
        m = momentum * m + everyone(np.broadcast_to(x, start.shape)).mean(0)
        x = x - rate * m
        seen.append(x)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_on_the_complete_graph_it_is_parallel_momentum_sgd(x64: None, method: str) -> None:
    """Also with a scheduled rate, as the momentum sums gradients, not steps."""
    start, one, everyone = problem()
    start = np.broadcast_to(start.mean(0), start.shape)
    schedule = optax.cosine_decay_schedule(0.1, 30)
    tx = METHODS[method](schedule, 0.9, topology=topologies.complete(N), axis_name="workers")
    seen, _ = run(tx, start, one, 20)
    rates = [float(schedule(t)) for t in range(20)]
    for x, expected in zip(seen, parallel_sgd(start, everyone, rates, 0.9), strict=True):
        # DecentLaM divides by the rate: the spread of one rounding, 1e-16, is not amplified.
        assert np.ptp(x, axis=0).max() <= 4e-16 * max(1, np.abs(x).max())
        np.testing.assert_allclose(x, np.broadcast_to(expected, x.shape), rtol=1e-12)


def test_without_momentum_both_are_decentralized_sgd(x64: None) -> None:
    start, one, everyone = problem()
    ring = topologies.ring(N)
    runs = {
        name: run(make(0.05, 0.0, topology=ring, axis_name="workers"), start, one, 10)[0]
        for name, make in METHODS.items()
    }
    np.testing.assert_allclose(runs["decentlam"], runs["dmsgd"], rtol=1e-13)
    x = start
    for actual in runs["dmsgd"]:
        x = topologies.ring(N).matrix(0) @ (x - 0.05 * everyone(x))
        np.testing.assert_allclose(actual, x, rtol=1e-12)


@pytest.mark.parametrize("topology", ON_EIGHT)
def test_the_mean_gradient_is_kept_where_the_workers_agree(x64: None, topology: str) -> None:
    """After one step from a common point, the momentum is the corrected gradient."""
    start, one, everyone = problem()
    start = np.broadcast_to(start[0], start.shape)
    tx = oa.decentlam(0.05, 0.3, topology=ON_EIGHT[topology], axis_name="workers")
    _, state = run(tx, start, one, 1)
    corrected, own = np.asarray(state.momentum), everyone(start)
    np.testing.assert_allclose(corrected.mean(0), own.mean(0), rtol=1e-12)
    # From a common point it is the mixed gradient, no one's own.
    np.testing.assert_allclose(corrected, ON_EIGHT[topology].matrix(0) @ own, rtol=1e-11)


def test_the_mean_over_the_workers_takes_a_mean_step(x64: None) -> None:
    """Columns that sum to 1: mixing moves no mean, also where the workers disagree."""
    start, one, everyone = problem()
    for make in METHODS.values():
        tx = make(0.05, topology=topologies.mesh_2d(2, 4), axis_name="workers")
        (x,), _ = run(tx, start, one, 1)
        np.testing.assert_allclose(
            x.mean(0), start.mean(0) - 0.05 * everyone(start).mean(0), rtol=1e-12
        )


@pytest.mark.parametrize("method", METHODS)
def test_one_worker_is_sgd_with_momentum(x64: None, method: str) -> None:
    params = {"w": jnp.linspace(-1.0, 1, 6).reshape(2, 3), "b": jnp.ones(2)}
    ours, theirs = METHODS[method](0.1, topology=topologies.exponential(1)), optax.sgd(0.1, 0.9)
    left = right = params
    states = [ours.init(params), theirs.init(params)]
    for _ in range(5):
        updates, states[0] = ours.update(jax.tree.map(jnp.sinh, left), states[0], left)
        left = optax.apply_updates(left, updates)
        updates, states[1] = theirs.update(jax.tree.map(jnp.sinh, right), states[1], right)
        right = optax.apply_updates(right, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), left, right)
    assert states[0].consensus_distance == 0


# -- where DecentLaM is stable --------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("topology", ON_EIGHT)
def test_growth_is_that_of_the_simulation(topology: str, momentum: float) -> None:
    """Of differences between the workers, without gradients; per cycle of three steps."""
    start = problem()[0] - problem()[0].mean(0)
    growth = consensus_growth(ON_EIGHT[topology], momentum)
    rates = [1.0] * 603
    seen = simulate("decentlam", ON_EIGHT[topology], start, np.zeros_like, rates, momentum)
    left, right = (np.linalg.norm(seen[t] - seen[t].mean(0)) for t in (-301, -1))
    if growth < 0.9:  # gone: nothing but rounding is left, and the mean is kept
        assert right < 1e-12
        return
    # A defective or oscillating mode may add a factor that is no power.
    np.testing.assert_allclose((right / left) ** (1 / 300), growth, rtol=0.01)


@pytest.mark.parametrize(
    "topology", ["exponential", "one_peer_exponential", "from_matrix"], ids=str
)
def test_momentum_that_diverges_is_refused(topology: str) -> None:
    message = r"decentlam diverges with momentum 0\.9 on topologies\..* grow by 1\.[0-9]+ a step"
    with pytest.raises(ValueError, match=message):
        oa.decentlam(0.1, 0.9, topology=ON_EIGHT[topology])
    oa.decentlam(0.1, 0.3, topology=ON_EIGHT[topology])
    oa.dmsgd(0.1, 0.9, topology=ON_EIGHT[topology])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8, 64, 200])
def test_symmetric_topologies_are_stable_for_every_momentum(num_workers: int) -> None:
    for make in (topologies.ring, lambda n: topologies.exponential(n, symmetric=True)):
        for momentum in (0.0, 0.5, 0.99):
            assert consensus_growth(make(num_workers), momentum) < 1


# -- options --------------------------------------------------------------------------------------


def test_weight_decay_in_front_belongs_to_each_workers_loss(x64: None) -> None:
    """The decay changes what is sent; behind the optimizer it would not."""
    start, one, everyone = problem()
    for name, make in METHODS.items():
        tx = make(0.05, 0.9, topology=topologies.ring(N), axis_name="workers")
        seen, _ = run(optax.chain(optax.add_decayed_weights(0.1), tx), start, one, 5)
        expected = simulate(
            name, topologies.ring(N), start, lambda x: everyone(x) + 0.1 * x, [0.05] * 5, 0.9
        )
        np.testing.assert_allclose(seen, expected, rtol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_at_a_learning_rate_of_zero_parameters_are_only_mixed(x64: None, method: str) -> None:
    """Warm-up from 0 and decay to 0 must not divide by it."""
    start, one, everyone = problem()
    warm = lambda t: 0.05 * (t == 1)  # noqa: E731
    tx = METHODS[method](warm, topology=topologies.ring(N), axis_name="workers")
    (first, second, third), state = run(tx, start, one, 3)
    w = topologies.ring(N).matrix(0)
    np.testing.assert_allclose(first, w @ start, rtol=1e-12)
    np.testing.assert_allclose(third, w @ second, rtol=1e-12)
    assert np.all(np.isfinite(state.momentum))
    if method == "decentlam":
        corrected = (first - w @ (first - 0.05 * everyone(first))) / 0.05
        np.testing.assert_allclose(state.momentum, 0.9 * corrected, rtol=1e-11)


def test_consensus_distance_is_measured_as_often_as_told() -> None:
    start, one, _ = problem()

    def distances(every: int) -> list[float]:
        tx = oa.dmsgd(0.05, topology=topologies.ring(N), axis_name="workers", consensus_every=every)

        def worker(x: Any, i: Any) -> Any:
            state, seen = tx.init(x), []
            for _ in range(4):
                updates, state = tx.update(one(x, i), state, x)
                x = optax.apply_updates(x, updates)
                seen.append(state.consensus_distance)
            return jnp.stack(seen)

        return over_workers("vmap", worker, N)(np.float32(start), np.arange(N))[0].tolist()

    always, every_third = distances(1), distances(3)
    assert every_third == [always[0], always[0], always[0], always[3]]
    assert len(set(always)) == 4
    assert np.all(np.isnan(distances(0)))
    assert np.isnan(
        oa.dmsgd(0.05, topology=topologies.ring(N)).init(jnp.ones(2)).consensus_distance
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [0, 100])
def test_communication(method: str, every: int) -> None:
    """One copy of the parameters to each neighbor, the same for both methods."""
    start = problem()[0]
    params = {"a": np.float32(start), "b": np.float32(start[:, :2])}
    ring = topologies.ring(N)
    tx = METHODS[method](0.05, topology=ring, axis_name="workers", consensus_every=every)

    def step(x: Any, state: Any) -> Any:
        return tx.update(x, state, x)

    state = jax.vmap(tx.init)(params)
    text = over_workers("shard_map", step, N).lower(params, state).as_text()
    assert text.count('"stablehlo.collective_permute"') == 2 * 2  # neighbors times leaves
    # The distance: the mean of each leaf and of the squared distance, once in a hundred steps.
    assert text.count('"stablehlo.all_reduce"') == (3 if every else 0)
    assert text.count('"stablehlo.case"') == (1 if every else 0)
    assert "all_gather" not in text


def test_narrow_parameters_and_wide_momentum() -> None:
    """With an accumulator in float32 the rounding of the parameters stays out of the momentum."""
    start, one, everyone = problem()
    narrow = jnp.asarray(start, jnp.bfloat16)
    exact = np.asarray(narrow, np.float64)
    w = topologies.ring(N).matrix(0)
    corrected = (exact - w @ (exact - 0.01 * everyone(exact))) / 0.01
    errors = {}
    for dtype in (None, jnp.float32):
        tx = oa.decentlam(
            0.01, topology=topologies.ring(N), axis_name="workers", accumulator_dtype=dtype
        )
        gradient = lambda x, i: one(x.astype(jnp.float32), i).astype(jnp.bfloat16)  # noqa: E731
        seen, state = run(tx, narrow, gradient, 1)
        assert seen[0].dtype == jnp.bfloat16
        assert state.momentum.dtype == (dtype or jnp.bfloat16)
        errors[dtype] = np.abs(np.asarray(state.momentum, np.float64) - corrected).max()
        assert signature(state) == signature(jax.vmap(tx.init)(narrow))
    assert errors[jnp.float32] < 0.02 < 0.2 < errors[None]


def test_loop_inside_the_mapped_function() -> None:
    """Under `shard_map` the types of a loop's state must not change: varying stays varying."""
    tx = oa.decentlam(0.05, topology=topologies.ring(N), axis_name="workers", consensus_every=2)
    start, one, _ = problem()

    def worker(x: Any, i: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, state = tx.update(one(x, i), state, x)
            return (optax.apply_updates(x, updates), state), None

        state = jax.tree.map(lambda s: s + 0 * i.astype(s.dtype), tx.init(x))
        return jax.lax.scan(body, (x, state), length=4)[0][0]

    x = np.float32(start)
    on_devices = over_workers("shard_map", worker, N)(x, np.arange(N))
    np.testing.assert_allclose(on_devices, run(tx, x, one, 4)[0][-1], rtol=1e-5)
