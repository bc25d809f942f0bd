"""Checkpoints: what goes in comes out, bit by bit, and nothing else is accepted."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.runs.checkpoints import CheckpointError, Checkpoints, fingerprint

ROOT = Path(__file__).parents[3]


class Inner(NamedTuple):
    count: jax.Array
    key: jax.Array
    nothing: None
    empty: jax.Array


def make_state():
    params = nnx.State({"a": {"kernel": jnp.arange(6.0).reshape(2, 3) / 7}, "b": jnp.float32(0.1)})
    inner = Inner(jnp.int32(3), jax.random.key(1), None, jnp.zeros((2, 0), jnp.bfloat16))
    moments = optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.identity())
    return {"params": params, "opt": (moments.init(params), (), inner), "list": [jnp.uint8(9)]}


def same_bits(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_exact_whatever_the_structure(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, data={"next_index": 7})
    # Another process has only shapes to restore into.
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(jax.eval_shape(make_state))
    assert restored.step == 7
    assert restored.data == {"next_index": 7}
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    jax.tree.map(same_bits, restored.state, state)


def test_restores_into_the_shardings_of_the_target(tmp_path):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    state = {"w": jnp.arange(3.0), "empty": jnp.zeros((0,))}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        restored = checkpoints.restore(target).state
    for name, leaf in restored.items():
        assert leaf.sharding == replicated
        same_bits(leaf, state[name])


def test_keeps_the_latest_and_never_saves_a_step_twice(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.float32(step)})
        checkpoints.save(3, {"w": jnp.float32(-1)})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
        assert float(checkpoints.restore({"w": jnp.float32(0)}).state["w"]) == 3


def test_an_older_step_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"w": jnp.float32(3)})
        with pytest.raises(CheckpointError, match=r"cannot save step 2: .* checkpoint of step 3"):
            checkpoints.save(2, {"w": jnp.float32(2)})


def test_remains_of_killed_saves_are_ignored_then_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.float32(1)})
    for step in (2, 3):
        shutil.copytree(tmp_path / "1", tmp_path / f"{step}.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.restore({"w": jnp.float32(0)}).step == 1
        # Another process may be saving: who only reads does not clean up.
        assert len(list(tmp_path.iterdir())) == 3
        checkpoints.save(2, {"w": jnp.float32(2)})
        assert checkpoints.restore({"w": jnp.float32(0)}).step == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


# Saving in the background -----------------------------------------------------------------------


def mesh_of(number):
    return jax.make_mesh(
        (number,),
        ("batch",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:number],
    )


@pytest.mark.parametrize("spec", [None, jax.P(), jax.P("batch")], ids=["one", "copies", "spread"])
def test_the_next_step_may_take_the_buffers_at_once(tmp_path, spec):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"large": jnp.zeros((1 << 20,)), "small": jnp.zeros((8,), jnp.int32)}
    if spec is not None:
        state = jax.device_put(state, jax.NamedSharding(mesh_of(8), spec))
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for number in range(1, 31):
            state = jax.block_until_ready(step(state))
            if number % 5 == 1:
                checkpoints.save(number, state)
    for number in range(26, 0, -5):  # each on its own, without the fallback to another
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(jax.eval_shape(lambda: state))
        assert restored.step == number
        assert all(np.all(np.asarray(x) == number) for x in restored.state.values())
        shutil.rmtree(tmp_path / str(number))


@contextlib.contextmanager
def files_at_most(size):
    """Writing a larger file fails in this process, as writing any does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Of a save that failed, TensorStore's threads may still call an event loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [50_000, 10], ids=["the array", "anything"])
def test_a_failed_save_is_told_once_and_spoils_nothing(tmp_path, capfd, size):
    state = {"w": jax.random.normal(jax.random.key(0), (50_000,))}

    def fails(step, then):
        message = rf"cannot save the checkpoint of step {step} in {tmp_path}: File too large"
        with files_at_most(size), pytest.raises(CheckpointError, match=message) as caught:
            then()
        assert "\n" not in str(caught.value)

    def save_and_wait():
        checkpoints.save(2, state)
        checkpoints.wait()

    def save_twice():
        checkpoints.save(3, state)
        checkpoints.save(4, state)

    def save_and_leave():
        with Checkpoints(tmp_path) as last:
            last.save(6, state)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        fails(2, save_and_wait)
        assert checkpoints.latest() == 1
        checkpoints.wait()
        fails(3, save_twice)
        checkpoints.save(5, state)
    fails(6, save_and_leave)
    assert capfd.readouterr().err == ""
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored.step == 5
    same_bits(restored.state["w"], state["w"])


def test_a_failed_save_does_not_hide_the_error_under_way(tmp_path):
    said = []

    def interrupted():
        with Checkpoints(tmp_path, warn=said.append) as checkpoints:
            checkpoints.save(1, {"w": jax.random.normal(jax.random.key(0), (50_000,))})
            raise ZeroDivisionError

    with files_at_most(50_000), pytest.raises(ZeroDivisionError):
        interrupted()
    assert len(said) == 1
    assert "step 1" in said[0]


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=f"cannot keep checkpoints in {path}: "):
            Checkpoints(path)


# Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of the steps 1 and 2, and the state of step 2."""
    folder = tmp_path_factory.mktemp("two")
    state = make_state() | {
        "large": jax.random.normal(jax.random.key(0), (60, 50)),
        "even": jnp.zeros(5000),
        "half": jax.random.normal(jax.random.key(2), (999,), jnp.bfloat16),
    }
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, data={"next_index": 1})
        checkpoints.save(2, state, data={"next_index": 2})
    return folder, state


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, position=None, bit=3):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = {
    "array data": (lambda step: flip(largest(step / "state" / "ocdbt.process_0")), "the bits of "),
    "data cut": (lambda step: os.truncate(largest(step / "state" / "ocdbt.process_0"), 99), ""),
    "data gone": (lambda step: shutil.rmtree(step / "state" / "d"), ""),
    "manifest": (lambda step: os.truncate(step / "state" / "manifest.ocdbt", 50), "manifest"),
    "metadata": (lambda step: os.truncate(step / "state" / "_METADATA", 50), ""),
    "record": (lambda step: flip(step / "meta" / "metadata"), "record has changed"),
    "record cut": (lambda step: os.truncate(step / "meta" / "metadata", 50), ""),
    "record gone": (lambda step: shutil.rmtree(step / "meta"), ""),
    "all gone": (lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()], ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(two, tmp_path, capfd, damage):
    folder, state = two
    folder = shutil.copytree(folder, tmp_path / "run")
    act, reason = DAMAGES[damage]
    act(folder / "2")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said = []
    with Checkpoints(folder, warn=said.append) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
        assert checkpoints.latest() == 1
    assert restored.step == 1
    assert restored.data == {"next_index": 1}
    jax.tree.map(same_bits, restored.state, state)
    (line,) = said
    assert line.startswith("passing over the checkpoint of step 2, it is damaged: ")
    assert reason in line
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")
    # Reading changes nothing.
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_flipped_bit_is_ever_restored(two, tmp_path):
    folder, state = two
    folder = shutil.copytree(folder, tmp_path / "run")
    target = jax.eval_shape(lambda: state)
    rng = np.random.default_rng(0)
    passed_over = []
    for path in sorted(p for p in (folder / "2").rglob("*") if p.is_file()):
        content = path.read_bytes()
        for _ in range(4):
            flip(path, int(rng.integers(len(content))), int(rng.integers(8)))
            with Checkpoints(folder, warn=passed_over.append) as checkpoints:
                restored = checkpoints.restore(target)
            # Either what was saved in spite of it, or the checkpoint before.
            assert restored.data == {"next_index": restored.step}
            jax.tree.map(same_bits, restored.state, state)
            path.write_bytes(content)
    assert len(passed_over) > 10
    assert any("bits of" in line for line in passed_over)


def test_when_all_are_damaged(two, tmp_path):
    folder, state = two
    folder = shutil.copytree(folder, tmp_path / "run")
    for step in ("1", "2"):
        flip(folder / step / "meta" / "metadata")
    said = []
    with (
        Checkpoints(folder, warn=said.append) as checkpoints,
        pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: steps 1, 2"),
    ):
        checkpoints.restore(state)
    assert len(said) == 2


def test_after_damage_the_steps_are_saved_again(tmp_path):
    def save(checkpoints, step):
        checkpoints.save(step, {"w": jnp.full((999,), step)})
        checkpoints.wait()
        return sorted(path.name for path in tmp_path.iterdir())

    target = {"w": jnp.zeros((999,), jnp.int32)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30):
            save(checkpoints, step)
    flip(tmp_path / "30" / "meta" / "metadata")
    with Checkpoints(tmp_path, keep=2, warn=lambda line: None) as checkpoints:
        assert checkpoints.restore(target).step == 20
        assert save(checkpoints, 25) == ["20", "25", "30.damaged"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(target)
        assert restored.step == 25
        assert int(restored.state["w"][0]) == 25
        # Retention counts whole ones only; done again, the damaged one goes.
        assert save(checkpoints, 28) == ["25", "28", "30.damaged"]
        assert save(checkpoints, 30) == ["28", "30"]
        assert checkpoints.restore(target).step == 30


# Devices and processes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to_devices", "to_spec"),
    [
        (8, jax.P("batch")),
        (8, jax.P()),
        (4, jax.P("batch")),
        (4, jax.P(None, "batch")),
        (1, jax.P()),
    ],
)
def test_other_devices_and_shardings(tmp_path, to_devices, to_spec):
    state = {
        "w": jax.device_put(
            jax.random.normal(jax.random.key(0), (16, 8)),
            jax.NamedSharding(mesh_of(8), jax.P("batch")),
        ),
        "count": jax.device_put(jnp.int32(7), jax.NamedSharding(mesh_of(8), jax.P())),
    }
    mesh = mesh_of(to_devices)
    target = {
        "w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=jax.NamedSharding(mesh, to_spec)),
        "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P())),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        restored = checkpoints.restore(target).state
    for name, leaf in restored.items():
        assert leaf.sharding == target[name].sharding
        same_bits(leaf, state[name])


WORKER = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from experiments.runs.checkpoints import Checkpoints, fingerprint
port, process, folder, act = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
spread, copies = (jax.NamedSharding(mesh, spec) for spec in (jax.P("batch"), jax.P()))
def make():
    w = jnp.arange(8000, dtype=jnp.float32).reshape(8, 1000) * 1.1
    return {"w": w, "copies": w[0].astype(jnp.bfloat16), "key": jax.random.key(3),
            "empty": jnp.zeros((0, 4))}
shardings = {"w": spread, "copies": copies, "key": copies, "empty": copies}
state = jax.jit(make, out_shardings=shardings)()
said = []
with Checkpoints(folder, warn=said.append) as checkpoints:
    if act == "save":
        for step in (1, 2):
            checkpoints.save(step, state, data={"next_index": step})
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(make), shardings,
    )
    restored = checkpoints.restore(target)
    assert restored.data == {"next_index": restored.step}
    for name, x in restored.state.items():
        assert x.sharding == shardings[name], name
        for mine, other in zip(x.addressable_shards, state[name].addressable_shards):
            bits = [s.data if name != "key" else jax.random.key_data(s.data) for s in (mine, other)]
            assert np.asarray(bits[0]).tobytes() == np.asarray(bits[1]).tobytes(), name
    if act == "again":
        checkpoints.save(2, state, data={"next_index": 2})
print(json.dumps({"step": restored.step, "said": said,
                  "fingerprints": {name: fingerprint(x) for name, x in state.items()}}))
jax.distributed.shutdown()
"""


def two_processes(folder, act):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(i), str(folder), act],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        ends = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ends)
    said = [first.pop("said"), second.pop("said")]
    assert first == second
    return first, said


@pytest.mark.slow
def test_processes_save_and_restore_together(tmp_path):
    saved, said = two_processes(tmp_path, "save")
    assert saved["step"] == 2
    assert said == [[], []]
    # One process reads what two have written.
    w = jnp.arange(8000, dtype=jnp.float32).reshape(8, 1000) * 1.1
    state = {"w": w, "copies": w[0].astype(jnp.bfloat16), "key": jax.random.key(3)}
    state["empty"] = jnp.zeros((0, 4))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: state)).state
    for name, leaf in state.items():
        same_bits(restored[name], leaf)
        assert fingerprint(leaf) == saved["fingerprints"][name]
    # What only one of the two reads is damaged: both pass over it, and save the step again.
    shutil.rmtree(tmp_path / "2" / "state" / "ocdbt.process_1")
    again, (first, second) = two_processes(tmp_path, "again")
    assert again["step"] == 1
    assert len(first) == len(second) == 1
    assert "another process cannot read it" in first[0] + second[0]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    restored, said = two_processes(tmp_path, "restore")
    assert restored["step"] == 2
    assert said == [[], []]


# Fingerprints -----------------------------------------------------------------------------------

BITS = np.random.default_rng(0).integers(0, 256, 256, dtype=np.uint8)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "uint8", "int16", "bool", "float64", "complex64", "float8_e4m3fn"],
)
def test_fingerprints_see_each_bit(x64, dtype):
    numbers = (BITS % 2).astype(bool) if dtype == "bool" else BITS.view(jnp.dtype(dtype))
    expected = fingerprint(jnp.asarray(numbers))
    assert expected == fingerprint(jnp.asarray(numbers))
    step = 37
    for position in range(0, numbers.nbytes * 8, step):
        changed = numbers.view(np.uint8).copy()
        bit = 0 if dtype == "bool" else position % 8
        changed[position // 8] ^= 1 << bit
        assert fingerprint(jnp.asarray(changed.view(numbers.dtype))) != expected
    # Values that trade places, and pairs of changes in the highest bit, which sums may cancel.
    rolled = np.roll(numbers.view(np.uint8), numbers.itemsize).view(numbers.dtype)
    assert fingerprint(jnp.asarray(rolled)) != expected
    if dtype != "bool":
        pair = numbers.view(np.uint8).copy()
        pair[[numbers.itemsize - 1, 2 * numbers.itemsize - 1]] ^= 128
        assert fingerprint(jnp.asarray(pair.view(numbers.dtype))) != expected


@pytest.mark.parametrize(
    "make",
    [
        lambda key: jax.random.normal(key, (16, 24)),
        lambda key: jax.random.normal(key, (8, 8, 16), jnp.bfloat16),
        lambda key: jax.random.split(key, (8, 8)),
        lambda key: jnp.zeros((8, 8, 0)),
    ],
    ids=["float32", "bfloat16", "keys", "empty"],
)
def test_fingerprints_do_not_depend_on_the_devices(make):
    x = make(jax.random.key(0))
    expected = fingerprint(x)
    assert (expected == 0) == (x.size == 0)
    for number, spec in ((8, jax.P()), (8, jax.P("batch")), (4, jax.P(None, "batch"))):
        placed = jax.device_put(x, jax.NamedSharding(mesh_of(number), spec))
        assert fingerprint(placed) == expected


def test_fingerprints_of_keys():
    assert fingerprint(jax.random.key(0)) != fingerprint(jax.random.key(1))
