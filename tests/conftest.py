"""Settings and fixtures that all tests share."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

# Figures are only written to files, never shown.
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest

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


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Leaves out most optimizations of XLA in one module whose tests mainly compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
