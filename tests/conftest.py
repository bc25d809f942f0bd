"""Settings and fixtures that all tests share."""

from __future__ import annotations

import copy
import gc
import itertools
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Figures are only written to files, never shown.
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import jaxlib
import pytest

# Most tests spend their time on compiling programs too small to gain from optimization. Without
# LLVM's optimizations, with the older emitters of fused loops and one LLVM module for each program,
# XLA compiles them three to five times faster. Processes that tests start inherit the environment.
# `OPTAX_ACCEL_OPTIMIZE=1` leaves these flags out, to test what XLA makes of the library for users.
QUICK_COMPILATION = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def compile_quickly() -> None:
    """Sets the flags that this version of XLA knows: it aborts on one that it does not know."""
    given = os.environ.get("XLA_FLAGS", "")
    xla = Path(jaxlib.__file__).with_name("libjax_common.so")
    if os.environ.get("OPTAX_ACCEL_OPTIMIZE") or not xla.exists():
        return
    with xla.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        flags = [
            f"--{name}={value}"
            for name, value in QUICK_COMPILATION.items()
            if name not in given and binary.find(name.encode()) >= 0
        ]
    os.environ["XLA_FLAGS"] = " ".join([*flags, given]).strip()


compile_quickly()

# What one process of the tests has compiled is read by the other one and by later runs, which takes
# a third off the time of tests. Names of files follow from the program, its flags and versions.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
MOST_BYTES = 2e9
if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_configure(config: pytest.Config) -> None:
    """Empties the folder of compiled programs before a run if it has grown too large."""
    if hasattr(config, "workerinput") or not COMPILED.exists():
        return
    if sum(file.stat().st_size for file in COMPILED.iterdir()) > MOST_BYTES:
        shutil.rmtree(COMPILED)


# Eight virtual devices, so that the parallel modes are tested on any machine. The number has to be
# set before JAX starts its backends, which the first use of a device does.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Silent broadcasting between ranks hides shape bugs. (Strict dtype promotion cannot be on for
# everything, because Optax's own schedules multiply integer counts by floats: see
# `strict_dtypes`.)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Compiled programs are mapped into memory, and Linux allows a process 65,530 mappings by default:
# beyond, XLA crashes in the middle of a compilation.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 30_000
tests_run = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Forgets compiled programs now and then, before there are too many."""
    if next(tests_run) % 50 or not MAPPINGS.exists():
        return
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish() -> None:
    """Lets the garbage collector run less often, over less.

    By default it takes a twentieth of the time, most of it to look again at what was imported.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each test draws the same numbers from its module's `RNG`, whichever tests ran before it."""
    module = getattr(request, "module", None)
    if hasattr(module, "RNG"):
        monkeypatch.setattr(module, "RNG", copy.deepcopy(module.RNG))


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Makes implicit promotion between different dtypes an error during one test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data sets; skips the test where none is named."""
    value = os.environ.get("OPTAX_ACCEL_DATA")
    if not value:
        pytest.skip("OPTAX_ACCEL_DATA names no data directory")
    return Path(value)
