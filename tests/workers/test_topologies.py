"""Mixing matrices, their decomposition into permutations, and mixing in every mode."""

from __future__ import annotations

import functools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel import topologies
from tests.helpers import WORKER_MODES, over_workers


def permutation_mixture(num_workers: int, count: int, seed: int) -> np.ndarray:
    """A random doubly stochastic matrix: by Birkhoff's theorem each is of this kind."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(count))
    permutations = [np.eye(num_workers)[rng.permutation(num_workers)] for _ in range(count)]
    return sum(w * p for w, p in zip(weights, permutations, strict=True))


def directed(num_workers: int) -> np.ndarray:
    """Unequal degrees: a mixture of the identity and three permutations."""
    return 0.25 * np.eye(num_workers) + 0.75 * permutation_mixture(num_workers, 3, 0)


ON_EIGHT = {
    "ring": topologies.ring(8),
    "exponential": topologies.exponential(8),
    "one_peer_exponential": topologies.one_peer_exponential(8),
    "mesh_2d": topologies.mesh_2d(2, 4),
    "complete": topologies.complete(8),
    "from_matrix": topologies.from_matrix(directed(8)),
    "from_matrices": topologies.from_matrix([directed(8), topologies.mesh_2d(4, 2).matrix(0)]),
}


# -- matrices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 5, 6, 8, 13, 16])
@pytest.mark.parametrize(
    "make",
    [
        topologies.ring,
        topologies.exponential,
        lambda n: topologies.exponential(n, symmetric=True),
        topologies.one_peer_exponential,
        topologies.complete,
        lambda n: topologies.mesh_2d(2, n),
        lambda n: topologies.mesh_2d(n, 1),
    ],
)
def test_constructors_pass_the_validation_of_matrices(make: Any, num_workers: int) -> None:
    """Doubly stochastic, connected and mixing; and the decomposition is what was decomposed."""
    topology = make(num_workers)
    checked = topologies.from_matrix(topology.matrices)
    np.testing.assert_array_equal(checked.matrices, topology.matrices)
    assert 0 < topology.spectral_gap <= 1
    check_decomposition(topology)


def check_decomposition(topology: topologies.Topology) -> None:
    degree = 0
    for t in range(topology.period):
        w, rounds = topology.matrix(t), topology._rounds(t)
        again = np.diag(np.diagonal(w))
        for r in rounds:
            senders, receivers = zip(*r.pairs, strict=True)
            assert len(set(senders)) == len(set(receivers)) == len(r.pairs)
            again[receivers, senders] += r.weights[list(receivers)]
            assert np.count_nonzero(r.weights) == len(r.pairs)
        np.testing.assert_array_equal(again, w)
        others = (w > 0) & ~np.eye(len(w), dtype=bool)
        # No decomposition can have fewer rounds than the busiest worker has partners.
        assert len(rounds) == max(others.sum(0).max(), others.sum(1).max())
        degree = max(degree, len(rounds))
    assert degree == topology.max_degree


def test_matrices_are_those_of_the_definitions() -> None:
    np.testing.assert_array_equal(topologies.ring(1).matrix(0), [[1]])
    np.testing.assert_array_equal(topologies.ring(2).matrix(5), np.full((2, 2), 0.5))
    third = 1 / 3
    row = [third, third, 0, 0, third]
    np.testing.assert_array_equal(topologies.ring(5).matrix(0)[0], row)
    assert set(np.flatnonzero(topologies.exponential(6).matrix(0)[3])) == {3, 4, 5, (3 + 4) % 6}
    np.testing.assert_array_equal(topologies.exponential(6).matrix(0)[3, [3, 4, 5, 1]], 0.25)
    both = topologies.exponential(16, symmetric=True).matrix(0)
    np.testing.assert_array_equal(both, both.T)
    assert set(np.flatnonzero(both[0])) == {0, 1, 2, 4, 8, 12, 14, 15}
    peers = topologies.one_peer_exponential(8)
    for step, offset in ((0, 1), (1, 2), (2, 4), (3, 1)):
        np.testing.assert_array_equal(
            peers.matrix(step)[6], 0.5 * (np.eye(8)[6] + np.eye(8)[(6 + offset) % 8])
        )
    # Rows of three: corners have 2 neighbors, the middle ones 3.
    a, b = 1 / 3, 1 / 4
    np.testing.assert_allclose(
        topologies.mesh_2d(2, 3).matrix(0),
        [
            [1 - a - b, b, 0, a, 0, 0],
            [b, 1 - 3 * b, b, 0, b, 0],
            [0, b, 1 - a - b, 0, 0, a],
            [a, 0, 0, 1 - a - b, b, 0],
            [0, b, 0, b, 1 - 3 * b, b],
            [0, 0, a, 0, b, 1 - a - b],
        ],
        rtol=1e-15,
    )


def test_statistics() -> None:
    assert topologies.complete(8).is_all_reduce
    assert topologies.ring(3).is_all_reduce
    assert not topologies.ring(4).is_all_reduce
    assert [topologies.ring(n).max_degree for n in (1, 2, 3, 8)] == [0, 1, 2, 2]
    assert topologies.exponential(1024).max_degree == 10
    assert topologies.exponential(1024).sends_per_step == 10
    assert topologies.one_peer_exponential(1024).sends_per_step == 1
    assert topologies.mesh_2d(3, 3).sends_per_step == 4
    assert topologies.complete(8).sends_per_step == 2 * 7 / 8
    for n in (4, 5, 16):
        gap = topologies.ring(n).spectral_gap
        second = max(abs(1 + 2 * np.cos(2 * np.pi * k / n)) / 3 for k in range(1, n))
        np.testing.assert_allclose(gap, 1 - second, rtol=1e-12)
    assert repr(topologies.mesh_2d(3, 4)) == "topologies.mesh_2d(3, 4)"


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8, 16, 32])
def test_one_peer_exponential_is_exact_after_log2_n_steps(num_workers: int) -> None:
    topology = topologies.one_peer_exponential(num_workers)
    steps = int(math.log2(num_workers))
    assert topology.period == max(steps, 1)
    x = np.random.default_rng(0).normal(size=num_workers)
    for step in range(steps):
        x = topology.matrix(step) @ x
        if step < steps - 1:
            assert np.ptp(x) > 1e-3
    np.testing.assert_allclose(x, x.mean(), rtol=0, atol=1e-15)
    assert topology.spectral_gap == 1


def test_one_peer_exponential_on_another_number_only_tends_to_the_mean() -> None:
    topology = topologies.one_peer_exponential(6)
    assert 0.1 < topology.spectral_gap < 1
    x = start = np.arange(6.0)
    for step in range(3):
        x = topology.matrix(step) @ x
    assert np.ptp(x) > 0.1
    bound = (1 - topology.spectral_gap) ** 3 * np.linalg.norm(start - 2.5)
    assert np.linalg.norm(x - 2.5) <= bound


def test_topologies_are_values() -> None:
    assert topologies.ring(4) == topologies.ring(4) != topologies.ring(5)
    assert topologies.ring(4) != "ring(4)"
    assert len({topologies.ring(4), topologies.ring(4), topologies.exponential(4)}) == 2
    with pytest.raises(ValueError, match="read-only"):
        topologies.ring(4).matrices[0, 0, 0] = 1
    given = np.full((2, 2), 0.5)
    topology = topologies.from_matrix(given)
    given[0] = 0  # its owner may go on using it
    np.testing.assert_array_equal(topology.matrix(0), np.full((2, 2), 0.5))
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def use(topology: topologies.Topology, x: jax.Array) -> jax.Array:
        traces.append(topology)
        return x

    use(topologies.ring(4), 1.0)
    use(topologies.ring(4), 1.0)
    assert len(traces) == 1


# -- any doubly stochastic matrix -----------------------------------------------------------------


@hypothesis.given(
    num_workers=st.integers(1, 9), count=st.integers(1, 6), seed=st.integers(0, 2**16)
)
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_any_doubly_stochastic_matrix_round_trips(num_workers: int, count: int, seed: int) -> None:
    matrix = 0.5 * np.eye(num_workers) + 0.5 * permutation_mixture(num_workers, count, seed)
    # Powers of a matrix tend to the mean unless it falls into groups.
    limit = np.linalg.matrix_power(matrix, 2**20)
    if np.abs(limit - 1 / num_workers).max() > 0.01:
        with pytest.raises(ValueError, match="never exchange anything"):
            topologies.from_matrix(matrix)
    else:
        check_decomposition(topologies.from_matrix(matrix))


def test_dense_matrices_need_as_many_rounds_as_there_are_others() -> None:
    """Where the edges have to be recolored: every entry positive, in no regular order."""
    for seed in range(5):
        matrix = permutation_mixture(9, 40, seed)
        topology = topologies.from_matrix(matrix)
        check_decomposition(topology)


def test_matrices_that_only_together_connect_the_workers() -> None:
    pairs = np.kron(np.eye(2), np.full((2, 2), 0.5))
    across = pairs[:, [0, 2, 1, 3]][[0, 2, 1, 3]]
    with pytest.raises(ValueError, match="2 of 4 workers are connected with worker 0"):
        topologies.from_matrix(pairs)
    assert topologies.from_matrix([pairs, across]).spectral_gap == 1
    swap = np.eye(2)[::-1]
    with pytest.raises(ValueError, match="2 groups that only pass their values around"):
        topologies.from_matrix(swap)
    with pytest.raises(ValueError, match="workers 0 and 1 never exchange"):
        topologies.from_matrix([swap, swap])  # where they come back to themselves


def test_sums_are_checked_up_to_the_rounding_of_the_dtype() -> None:
    single = topologies.ring(7).matrix(0).astype(np.float32)
    topologies.from_matrix(single)
    with pytest.raises(ValueError, match=r"row 0 sums to 1\.00000003, not 1"):
        topologies.from_matrix(single.astype(np.float64))
    with pytest.raises(ValueError, match=r"must not be negative, but entry \(0, 0\) is nan"):
        topologies.from_matrix([[np.nan, 1], [1, 0]])
    assert topologies.from_matrix([[1]]).num_workers == 1


# -- mixing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", WORKER_MODES)
@pytest.mark.parametrize("name", ON_EIGHT)
def test_mixing_is_the_product_with_the_matrix(x64: None, name: str, mode: str) -> None:
    topology = ON_EIGHT[name]
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(8, 2, 3)), "b": [rng.normal(size=8)], "empty": np.zeros((8, 0))}
    mix = over_workers(mode, lambda x, step: topology.mix(x, step, "workers"), 8)
    for step in range(topology.period + 1):
        mixed = jax.device_get(mix(tree, np.full(8, step)))
        product = functools.partial(np.tensordot, topology.matrix(step), axes=1)
        expected = jax.tree.map(product, tree)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-15), mixed, expected
        )
        tree = mixed


@pytest.mark.parametrize("name", ON_EIGHT)
def test_one_permutation_for_each_partner_and_leaf(name: str) -> None:
    """On devices: as `shard_map` lowers it, and as XLA compiles it."""
    topology = ON_EIGHT[name]
    mix = over_workers("shard_map", lambda x: topology.mix(x, 0, "workers"), 8)
    tree = {"a": jnp.ones((8, 3)), "b": jnp.ones((8, 2))}
    lowered = mix.lower(tree)
    text, compiled = lowered.as_text(), lowered.compile().as_text()
    rounds = [len(topology._rounds(t)) for t in range(topology.period)]
    all_reduces = text.count('"stablehlo.all_reduce"')
    if topology.is_all_reduce:
        assert (all_reduces, text.count("collective_permute")) == (2, 0)
        assert compiled.count(" all-reduce(") == 1
    else:
        assert (all_reduces, text.count('"stablehlo.collective_permute"')) == (0, 2 * sum(rounds))
        assert "all-reduce" not in compiled
        assert "all-gather" not in compiled


def test_workers_without_a_partner_stay_silent_on_devices() -> None:
    """In a row of three the outer workers are no neighbors: 4 messages in two rounds."""
    topology = topologies.mesh_2d(1, 3)
    mix = over_workers("shard_map", lambda x: topology.mix(x, 0, "workers"), 3)
    text = mix.lower(jnp.ones(3)).as_text()
    pairs = [
        line.split("source_target_pairs = dense<")[1]
        for line in text.splitlines()
        if "source_target_pairs" in line
    ]
    assert [pair.partition("tensor<")[2].partition("x2")[0] for pair in pairs] == ["2", "2"]


def test_narrow_leaves_are_summed_in_float32() -> None:
    topology = topologies.ring(4)
    x = np.random.default_rng(0).normal(size=(4, 100)).astype(jnp.bfloat16)
    mixed = over_workers("vmap", lambda x: topology.mix(x, 0, "workers"), 4)(x)
    assert mixed.dtype == jnp.bfloat16
    exact = topology.matrix(0) @ x.astype(np.float64)
    # Rounded once, in the end: within half a unit in the last place of 8 bits.
    np.testing.assert_allclose(np.asarray(mixed, np.float64), exact, rtol=2**-8, atol=1e-7)
    wave = np.exp(1j * np.arange(4)).astype(np.complex64)
    mixed = over_workers("vmap", lambda x: topology.mix(x, 0, "workers"), 4)(wave)
    np.testing.assert_allclose(mixed, topology.matrix(0) @ wave, rtol=1e-6)


def test_number_of_workers_is_checked_while_tracing() -> None:
    ring = topologies.ring(8)

    def mix(axis_name: str | None, num_workers: int) -> Any:
        run = over_workers("vmap", lambda x: ring.mix(x, 0, axis_name), num_workers)
        return jax.eval_shape(run, jnp.zeros(num_workers))

    with pytest.raises(
        ValueError, match=r"ring\(8\) .* axis 'workers' has 4; make .* for 4 workers"
    ):
        mix("workers", 4)
    with pytest.raises(ValueError, match=r"ring\(8\) .* `axis_name` is None, .* a single one"):
        mix(None, 8)
    with pytest.raises(ValueError, match="axis 'data', which does not exist here"):
        mix("data", 8)
    assert topologies.ring(1).mix(3.0, 0, None) == 3.0


@pytest.mark.parametrize("mode", WORKER_MODES)
def test_consensus_distance(mode: str) -> None:
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(8, 3)), "b": rng.normal(size=(8, 2, 2))}
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    run = over_workers(mode, lambda x: topologies.consensus_distance(x, "workers"), 8)
    flat = np.concatenate([tree["a"], tree["b"].reshape(8, 4)], 1)
    expected = np.sqrt(np.mean(np.sum((flat - flat.mean(0)) ** 2, 1)))
    np.testing.assert_allclose(run(tree), np.full(8, expected), rtol=1e-5)
    assert topologies.consensus_distance(tree, None) == 0
