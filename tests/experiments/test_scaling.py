"""`python -m experiments.scaling` counts, prints and says what is wrong with its options."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import pytest

from experiments import scaling


@pytest.fixture(autouse=True)
def backend():
    """Starts JAX before a command in this process can change its devices."""
    assert len(jax.devices()) == 8


def test_the_command(tmp_path, capsys):
    path = tmp_path / "numbers/scaling.json"
    arguments = ["--methods", "sgd,nesterov_sgd,decentlam", "--modes", "fsdp,shard_map"]
    arguments += ["--devices", "2", "--timed", "sgd", "--rounds", "2"]
    page = tmp_path / "scaling.html"
    assert scaling.main([*arguments, "--json", str(path), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "Like sgd: nesterov_sgd." in page.read_text()
    for part in ("on 2 devices", "Like sgd: nesterov_sgd.", "not a speed-up", "1024"):
        assert part in out
    results = json.loads(path.read_text())
    assert {(row["method"], row["mode"]) for row in results["counts"]} == {
        *((name, mode) for name in ("sgd", "nesterov_sgd") for mode in ("fsdp", "shard_map")),
        ("decentlam", "shard_map"),
    }
    assert list(results["paper"]) == ["sgd"]
    assert len(results["paper"]["sgd"]) == len(results["workers"]) == 11
    for row in results["times"]:
        one, two = row["devices"]
        assert (one["ratio"], two["base"]) == (None, "1")
        low, median, high = two["ratio"]
        assert 0 < low <= median <= high


@pytest.mark.slow
def test_makes_its_devices():
    arguments = ["--methods", "sgd", "--modes", "shard_map", "--rounds", "0", "--devices", "4"]
    command = [sys.executable, "-m", "experiments.scaling", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 4 devices" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "sgd,demon"], ["'demon'", "demon_sgd"]),
        (["--timed", "demon"], ["'demon'", "demon_sgd"]),
        (["--modes", "jit,pmap"], ["'pmap'", "jit, fsdp, shard_map"]),
        (["--task", "mnist6k"], ["'mnist6k'", "digits"]),
        (["--model", "mpl"], ["'mpl'", "mlp"]),
        (["--model", "transformer"], ["transformer"]),
        (["--devices", "6"], ["--devices", "power of two", "6"]),
        (["--devices", "1"], ["--devices", "from 2 on"]),
        (["--devices", "16"], ["--devices 16", "only 8"]),
        (["--batch-size", "63"], ["--batch-size 63", "56 or 64"]),
        (["--batch-size", "8000"], ["--batch-size", "1077"]),
        (["--rounds", "-1"], ["--rounds must be at least 0"]),
        (["--method", "sgd"], ["--method", "--methods"]),
    ],
)
def test_wrong_input(capsys, arguments, expected):
    try:
        code = scaling.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    for part in expected:
        assert part in error
