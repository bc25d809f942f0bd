"""Every way of spreading a run over devices and processes computes what one device computes."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from experiments.methods import METHODS
from experiments.training import networks
from experiments.training.parallel import AXIS, MODES, Parallel, check_divisible
from experiments.training.step import init_state, train_step
from tests.experiments.training import parallel_worker as worker

ROOT = Path(__file__).parents[3]
# Relative error of the parameters after 20 steps.
BOUNDS = {"float32": 1e-5, "float64": 1e-10}
# Rounding turns eigenvectors by eps over the gap of their eigenvalues, and EKFAC's are close.
EKFAC_BOUNDS = {"float32": 1e-4, "float64": 1e-9}
# The other methods run in the slow tests.
QUICK = ("sgd", "stoch_grad_adam", "bulk_sgd", "extrap_sgd_past", "decentlam")
# Families whose updates take each number of an averaged gradient by itself: what a mode does to
# one of them it does to SGD, which runs in every mode. Only LAMB, YellowFin, Muon and Prodigy take
# norms or products of whole arrays, and a plateau is one of the losses.
ELEMENTWISE = ("base", "adaptive rates", "recent optimizers", "momentum", "momentum decay")
ELEMENTWISE += ("cyclical schedules", "schedules")
EXCEPT = ("lamb", "yellowfin", "plateau_sgd", "muon", "prodigy")
# Where an axis has a name, each device chooses the largest terms of its own examples.
OWN_TERMS = ("sampled_products_sgd",)
TOGETHER = [n for n, m in METHODS.items() if m.family not in ELEMENTWISE or n in EXCEPT]
# Those that differ from another method in numbers or in what is done to averaged gradients.
VARIANTS = ("dom_sgd", "interpolated_sgd", "bulk_sgd_adaptive", "optimistic_sgd")
VARIANTS += ("weight_norm_adam", "sam_sgd")


def num_workers(name):
    return 8 if METHODS[name].per_worker else None


@functools.cache
def one_device(name, dtype):
    """The reference: one device, which simulates the workers where there are any."""
    with jax.enable_x64(dtype == "float64"):
        return worker.train(name, "jit", 1, workers=num_workers(name), dtype=dtype)


def check_equal(name, dtype, vector, losses):
    expected, expected_losses, _ = one_device(name, dtype)
    assert vector.dtype == expected.dtype == dtype
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    bound = (EKFAC_BOUNDS if name == "ekfac" else BOUNDS)[dtype]
    assert np.linalg.norm(vector - expected) <= bound * np.linalg.norm(expected)


def cases():
    """Every method; in the modes that can differ, in the dtype that shows more.

    `fsdp` divides what `jit` does and the state besides; `pmap` and `shard_map` both run a program
    with a named axis. A method runs in one mode of each kind, the quick ones in float32, too; SGD
    runs in all modes and dtypes.
    """
    every = list(itertools.product(MODES, BOUNDS))
    turns, named = itertools.cycle(every), itertools.cycle(("pmap", "shard_map"))
    for name, method in METHODS.items():
        divided = "jit" if method.per_worker else "fsdp"
        if name == "sgd":
            layouts = every
        elif name in VARIANTS:  # eigenvectors of float32 are too coarse
            layouts = [(next(turns)[0], "float64")]
        elif name not in TOGETHER:
            layouts = [next(turns)]
        elif name in OWN_TERMS:
            layouts = [(divided, "float64")]
        else:
            layouts = [(divided, "float64"), (next(named), "float64")]
        quick = []
        if name in QUICK:
            # Eigensolvers take seconds to compile.
            modes = {"sgd": MODES, "bulk_sgd": ("shard_map",)}.get(name, (divided, "shard_map"))
            quick = [(mode, "float32") for mode in modes]
        for mode, dtype in dict.fromkeys([*layouts, *quick]):
            marks = [] if (mode, dtype) in quick else pytest.mark.slow
            yield pytest.param(name, mode, dtype, marks=marks)


@pytest.mark.parametrize(("name", "mode", "dtype"), list(cases()))
def test_eight_devices_equal_one(name, mode, dtype):
    with jax.enable_x64(dtype == "float64"):
        vector, losses, state = worker.train(name, mode, 8, workers=num_workers(name), dtype=dtype)
    check_equal(name, dtype, vector, losses)
    assert state.step.shape == ((8,) if num_workers(name) else ())


# Several processes -----------------------------------------------------------------------------


def run_two_processes(folder, plan, timeout):
    """What each of two processes with 4 devices each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    logs = [folder / f"{i}.log" for i in range(2)]
    processes = []
    try:
        for i, log in enumerate(logs):
            arguments = [port, "2", str(i), str(folder), json.dumps(plan)]
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, worker.__file__, *arguments],
                        cwd=ROOT,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    return [dict(np.load(folder / f"{i}.npz")) for i in range(2)]


def check_two_processes(results, runs):
    assert len(results[0]) >= 2 * len(runs)
    for key, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][key], err_msg=key)
    for run in runs:
        vector, losses = (results[0][json.dumps([kind, run])] for kind in ("params", "losses"))
        check_equal(run["name"], run["dtype"], vector, losses)


def make_run(name, mode, dtype="float32"):
    return {"name": name, "mode": mode, "dtype": dtype, "workers": num_workers(name)}


@pytest.mark.slow
def test_two_processes_equal_one_device_and_share_a_nan(tmp_path):
    runs = [
        make_run("sgd", "jit"),
        make_run("sgd", "fsdp"),
        make_run("stoch_grad_adam", "pmap"),  # has a typed random key in its state
        make_run("decentlam", "shard_map"),
    ]
    poisoned = [{"mode": mode} for mode in MODES]
    poisoned += [{"mode": mode, "workers": 8} for mode in ("jit", "pmap", "shard_map")]
    results = run_two_processes(tmp_path, {"runs": runs, "poisoned": poisoned}, 300)
    for run in poisoned:
        for result in results:
            assert not np.any(np.isfinite(result.pop(json.dumps(["loss", run]))))
            assert not np.any(result.pop(json.dumps(["finite", run])))
    check_two_processes(results, runs)


@pytest.mark.slow
def test_methods_in_two_processes(tmp_path):
    """One method of each family: of the others, eight devices of one process show all there is."""
    families = {METHODS[name].family: name for name in reversed(TOGETHER)}
    runs = [make_run(name, "jit") for name in families.values()]
    for mode in ("fsdp", "pmap", "shard_map"):
        runs += [make_run(name, mode) for name in ("adam", "bulk_sgd", "extrap_sgd_past")]
    for i, name in enumerate(filter(num_workers, METHODS)):
        runs.append(make_run(name, ("pmap", "shard_map")[i % 2]))
    check_two_processes(run_two_processes(tmp_path, {"runs": runs}, 900), runs)


# Not a number ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "workers"),
    [*((mode, None) for mode in MODES), ("jit", 8), ("pmap", 8), ("shard_map", 8)],
)
def test_nan_on_one_device_is_seen_by_all(mode, workers):
    metrics = worker.poisoned_metrics(mode, 8, workers)
    assert metrics["loss"].shape == metrics["finite"].shape == (8,)
    assert not np.any(np.isfinite(metrics["loss"]))
    assert not np.any(metrics["finite"])


# Sharded states --------------------------------------------------------------------------------


def leaves_by_path(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def bytes_per_device(tree):
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


@pytest.mark.parametrize(
    "name",
    [
        *("adam", "bulk_sgd", "extrap_sgd_past"),
        pytest.param("interpolated_sgd", marks=pytest.mark.slow),
    ],
)
def test_sharded_state_stays_sharded(name):
    """Parameters, moments, past gradients and eigenbases: in the state, at every step."""
    method, tx = worker.build(name)
    parallel, make_state = worker.setup(tx, "fsdp", jax.devices(), min_sharded_size=0)
    expected = {
        "['hidden']['kernel']": ((6, 16), (None, AXIS)),
        "['hidden']['bias']": ((16,), (AXIS,)),
        "['head']['kernel']": ((16, 3), (AXIS,)),
    }

    def check(state):
        sharded = set()
        for path, leaf in leaves_by_path(state).items():
            name = next((name for name in expected if path.endswith(name)), None)
            if name is None:
                assert leaf.is_fully_replicated, path
                continue
            shape, spec = expected[name]
            more = leaf.ndim - len(shape)
            assert leaf.shape[more:] == shape
            assert leaf.sharding == jax.NamedSharding(parallel.mesh, jax.P(*[None] * more, *spec))
            assert {s.data.size * 8 for s in leaf.addressable_shards} == {leaf.size}
            sharded.add(path.removesuffix(name))
        return sharded

    state = parallel.init(make_state)
    trees = check(state)
    for i, batch in enumerate(worker.batches()[:7]):
        # The first refresh is a cold one, later ones (here, at every other step) are warm.
        refresh = None if method.refresh_every is None else ("cold" if i == 0 else i % 2 == 1)
        batch = parallel.put_batch(batch)
        state, metrics = parallel.step(state, batch, batch if refresh else None, refresh)
        jax.block_until_ready(metrics)
        assert check(state) == trees
    fields = {"adam": ".mu .nu", "extrap_sgd_past": ".past .trace"}.get(name, ".basis .trace")
    assert {"." + tree.rpartition(".")[2] for tree in trees} == {".params", *fields.split()}


class Wide(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(48, 160, rngs=rngs)
        self.head = nnx.Linear(160, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


def wide_state():
    _, tx = worker.build("bulk_sgd")
    parallel, make_state = worker.setup(tx, "fsdp", jax.devices(), model=Wide)
    return parallel, make_state, parallel.init(make_state)


def test_a_device_holds_an_eighth():
    """Also while the state is made."""
    _, make_state, state = wide_state()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Replicated are what has fewer than 4096 elements: a bias and the head (643 of 8323).
    small = 643 / 8323
    held = bytes_per_device(state)
    assert held[0] == pytest.approx((small + (1 - small) / 8) * total, rel=0.01)
    assert len(set(held)) == 1
    made = jax.jit(make_state, out_shardings=jax.tree.map(lambda a: a.sharding, state))
    memory = made.lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.5 * total


@pytest.mark.parametrize("refresh", [False, "warm", pytest.param("cold", marks=pytest.mark.slow)])
def test_a_step_on_few_examples_gathers_no_eigenbasis(refresh):
    """With more examples XLA prefers to gather parameters, and what multiplies their inputs."""
    parallel, _, state = wide_state()
    examples = {"x": np.ones((16, 48), np.float32), "y": np.zeros(16, np.int32)}
    batch = parallel.put_batch(examples)
    compiled = parallel.lower(state, batch, batch if refresh else None, refresh).compile()
    # Shapes in the compiled program are those of one device.
    shapes = set(re.findall(r"f32\[([\d,]+)\]", compiled.as_text()))
    assert any(shape.endswith(",48,20") for shape in shapes)
    # A single random direction may be drawn whole.
    assert not any(shape.endswith(",48,160") for shape in shapes - {"1,48,160"}), shapes
    # The state is updated in place.
    assert compiled.memory_analysis().alias_size_in_bytes > 0.95 * bytes_per_device(state)[0]


def test_small_and_uneven_parameters_are_replicated():
    parallel = Parallel("fsdp", jax.devices(), lambda *args, **kwargs: None)
    state = {
        "large": jnp.zeros((3, 64, 64)),
        "small": jnp.zeros((8, 8)),
        "uneven": jnp.zeros((65, 65)),
        "empty": jnp.zeros((0, 8)),
        "key": jax.random.key(0),
    }
    specs = jax.tree.map(lambda a: a.sharding.spec, parallel.put_state(state))
    assert specs.pop("large") == jax.P(None, None, AXIS)
    assert set(specs.values()) == {jax.P()}


# Other models and losses -----------------------------------------------------------------------


class WithNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


@functools.cache
def train_on_token_ids(mode, num_devices):
    options = {"embedding_size": 4, "num_heads": 2, "feedforward_size": 8, "num_layers": 1}
    graphdef, params, rest = networks.split(
        models.create("transformer", input_shape=(5,), num_classes=3, vocabulary_size=7, **options)
    )
    x = np.random.default_rng(0).integers(0, 7, (8, 5), dtype=np.int32)
    _, tx = worker.build("sgd")

    step = functools.partial(train_step, tx, networks.objective(graphdef, "mse"))
    parallel = Parallel(mode, jax.devices()[:num_devices], step, min_sharded_size=0)
    state = parallel.put_state(init_state(tx, params, rest))
    for _ in range(3):
        state, metrics = parallel.step(state, parallel.put_batch({"x": x, "y": x[:, 0] % 3}))
        jax.block_until_ready(metrics)
    return jax.device_get((parallel.get_state(state).params, metrics["loss"]))


@pytest.mark.parametrize("mode", MODES)
def test_token_ids_and_another_loss_on_four_devices(mode):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        train_on_token_ids(mode, 4),
        train_on_token_ids("jit", 1),
    )


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_batch_statistics_are_averaged(mode):
    """Over the devices: means and variances of each part, moved by a tenth at each step."""
    _, losses, state = worker.train("sgd", mode, 4, model=WithNorm)
    assert np.all(np.isfinite(losses))
    mean, variance = np.zeros(6), np.ones(6)
    for batch in worker.batches():
        parts = batch["x"].reshape(4, -1, 6)
        mean = 0.9 * mean + 0.1 * parts.mean(1).mean(0)
        variance = 0.9 * variance + 0.1 * parts.var(1).mean(0)
    np.testing.assert_allclose(state.rest["norm"]["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.rest["norm"]["var"], variance, rtol=1e-4)


# States ----------------------------------------------------------------------------------------

LAYOUTS = [(mode, None) for mode in MODES] + [("jit", 8), ("pmap", 4), ("shard_map", 4)]


def first_state():
    shared = jnp.arange(3.0)
    return {"a": shared, "b": shared, "key": jax.random.key(0), "empty": jnp.zeros((2, 0))}


def plain(state):
    """As NumPy arrays, keys as bits."""
    return jax.tree.map(
        lambda a: np.asarray(jax.random.key_data(a) if a.dtype == jax.random.key(0).dtype else a),
        state,
    )


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, plain(left), plain(right))


@pytest.mark.parametrize(("mode", "workers"), LAYOUTS)
def test_state_survives_put_and_get(mode, workers):
    parallel = Parallel(
        mode, jax.devices()[:4], lambda *args, **kwargs: None, workers=workers, min_sharded_size=0
    )
    state = first_state()
    if workers is not None:
        state = jax.tree.map(lambda a: jnp.stack([a] * workers), state)
    before = plain(state)
    placed = parallel.put_state(state)
    restored = parallel.get_state(placed)
    expected = parallel.replicated if workers is None else parallel.sharded
    assert restored["a"].sharding == expected
    assert_same(restored, state)
    # What was put is a copy: a step may overwrite it, and leaves may share a buffer.
    jax.block_until_ready(jax.jit(lambda t: t, donate_argnums=0)(placed))
    jax.tree.map(lambda a: a.delete(), placed)
    jax.tree.map(np.testing.assert_array_equal, before, plain(state))


@pytest.mark.parametrize(("mode", "workers"), LAYOUTS)
def test_made_state_is_the_put_one(mode, workers):
    parallel = Parallel(
        mode, jax.devices()[:4], lambda *args, **kwargs: None, workers=workers, min_sharded_size=0
    )
    made = parallel.init(first_state)
    view = parallel.get_state(made)
    assert_same(parallel.consensus(made), first_state())
    # A checkpoint of the one fits the other.
    abstract = parallel.abstract_state(first_state)
    for leaf, target in zip(jax.tree.leaves(view), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype)
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
    again = parallel.put_state(view)
    assert_same(again, made)
    assert jax.tree.leaves(again)[0].sharding == jax.tree.leaves(made)[0].sharding


@pytest.mark.parametrize("mode", ["jit", "pmap", "shard_map"])
def test_workers_keep_states_of_their_own(mode):
    """Each adds up its own rows; metrics that it did not average are averaged."""

    def step(state, batch, curvature, *, refresh, axis_name):
        del curvature, refresh
        own = jnp.sum(batch)
        state = {"sum": state["sum"] + own, "worker": jax.lax.axis_index(axis_name)}
        mean = jax.lax.pmean(own, axis_name)
        return state, {"own": own, "mean": mean, "worker": state["worker"], "flag": own > 20}

    parallel = Parallel(mode, jax.devices()[:4], step, workers=4)
    state = parallel.init(lambda: {"sum": jnp.zeros(()), "worker": jnp.zeros((), jnp.int32)})
    batch = np.arange(8.0, dtype=np.float32)
    for _ in range(2):
        state, metrics = parallel.step(state, parallel.put_batch(batch))
        jax.block_until_ready(metrics)
    view = parallel.get_state(state)
    np.testing.assert_array_equal(view["sum"], [2, 10, 18, 26])
    np.testing.assert_array_equal(view["worker"], [0, 1, 2, 3])
    found = jax.tree.map(lambda a: a.item(), {**parallel.consensus(state), "m": metrics})
    assert found == {
        "sum": 14.0,
        "worker": 0,
        "m": {"own": 7.0, "mean": 7.0, "worker": 0, "flag": False},
    }


def test_any_number_of_workers_on_one_device():
    _, tx = worker.build("decentlam", workers=6)
    parallel, make_state = worker.setup(tx, "jit", jax.devices()[:1], workers=6)
    state, metrics = parallel.step(
        parallel.init(make_state), parallel.put_batch(worker.own_rows(worker.batches()[0], 30))
    )
    assert parallel.get_state(state).step.shape == (6,)
    assert metrics["loss"].shape == ()


# Wrong input -----------------------------------------------------------------------------------


def test_batch_that_does_not_split_is_refused():
    check_divisible(32, 4, "--batch-size")
    with pytest.raises(ValueError, match=r"--batch-size 33 .* 4 devices; use e\.g\. 32 or 36"):
        check_divisible(33, 4, "--batch-size")
    with pytest.raises(ValueError, match=r"--batch-size 3 .* use e\.g\. 4"):
        check_divisible(3, 4, "--batch-size")


@pytest.mark.parametrize(("mode", "workers"), LAYOUTS)
def test_put_batch_refuses_what_does_not_split(mode, workers):
    parallel = Parallel(mode, jax.devices()[:4], lambda *args, **kwargs: None, workers=workers)
    parallel.put_batch((np.ones((16, 2)), np.ones(16)))
    with pytest.raises(ValueError, match=r"a batch of (12|18) "):
        parallel.put_batch((np.ones((16, 2)), np.ones(12 if workers == 8 else 18)))


@pytest.mark.parametrize(
    ("mode", "workers", "message"),
    [
        ("tpu", None, "'tpu'; valid modes are jit, fsdp, pmap, shard_map"),
        ("fsdp", 8, "fsdp shares one state among all devices, got workers=8; use jit"),
        ("jit", 12, "a multiple of the 8 devices as workers, got 12"),
        ("jit", 0, "a multiple of the 8 devices as workers, got 0"),
        ("pmap", 4, "pmap runs one worker a device, got workers=4 on 8 devices; use the mode jit"),
        ("shard_map", 16, "shard_map runs one worker a device, got workers=16 on 8"),
    ],
)
def test_wrong_layouts_are_refused(mode, workers, message):
    with pytest.raises(ValueError, match=message):
        Parallel(mode, jax.devices(), lambda *args, **kwargs: None, workers=workers)
