"""`python -m experiments.natural_gradient` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import natural_gradient as study
from experiments.methods import METHODS


def run(*arguments: str) -> int:
    try:
        return study.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_all_methods_are_tuned_on_the_same_number_of_settings() -> None:
    assert {len(method.settings) for method in study.CANDIDATES.values()} == {6}
    for method in study.CANDIDATES.values():
        assert len({tuple(setting.values()) for setting in method.settings}) == 6


@pytest.mark.slow
def test_compares_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "12", "--settings", "1", "--seeds", "2"]
    assert run(*sizes, "--runs-dir", str(tmp_path), "--name", "tiny") == 0
    out = capsys.readouterr().out
    methods = list(study.default_methods("digits_mlp"))
    # kfac-jax runs where it is installed, five of Optax's recent optimizers where they are named.
    assert set(methods) < set(study.CANDIDATES) - {"kfac_jax"}
    for name in methods:
        assert name in out
    assert "fewest steps: " in out
    folder = tmp_path / "tiny"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert [entry["method"] for entry in results["methods"]] == methods
    assert all(line in out.replace("\n", " ") for line in results["conclusion"][-1:])
    for entry in results["methods"]:
        curve, other = entry["curves"]  # of two seeds
        assert curve["train"][0] != other["train"][0]
        assert len({len(values) for values in curve.values()}) == 1
        assert curve["step"] == sorted(curve["step"])
        assert curve["seconds"] == sorted(curve["seconds"])
        assert curve["gradients"] == sorted(curve["gradients"])
        assert curve["train"][-1] < curve["train"][0]
        assert entry["compile_seconds"] > 0
        assert len(entry["settings"]) == len(entry["final_losses"]) == 1
    by_name = {entry["method"]: entry["curves"][0] for entry in results["methods"]}
    assert by_name["sgd"]["gradients"] == by_name["sgd"]["step"]
    assert by_name["kfac"]["gradients"][-1] == 2 * 12
    assert by_name["batch_gauss_newton"]["gradients"][-1] > 12 * (4 + 2)
    starts = [curve["train"][0] for curve in by_name.values()]
    assert starts == pytest.approx([starts[0]] * len(starts), rel=1e-6)  # averages are rounded
    # A step of second order is worth several of first order here.
    assert by_name["hessian_free"]["train"][1] < by_name["sgd"]["train"][1]


def test_what_does_not_suit_a_problem_is_left_out() -> None:
    rivals = set(study._RIVALS)
    left_out = set(study.CANDIDATES) - set(study.default_methods("cifar10_5k_cnn")) - rivals
    loops = {"hessian_free", "batch_gauss_newton"} if jax.default_backend() == "cpu" else set()
    assert left_out == {"kfac_jax"} | loops
    left_out = set(study.CANDIDATES) - set(study.default_methods("digits_mlp")) - rivals
    assert left_out == (set() if study.kfac_jax_rival.installed() else {"kfac_jax"})


def test_muon_takes_the_matrices_of_the_layers() -> None:
    params = {
        "embedding": jnp.zeros((5, 4)),
        "stacked": {"w": jnp.zeros((2, 4, 6)), "b": jnp.zeros((2, 6))},
        "layer": {"w": jnp.zeros((4, 4)), "kernel": jnp.zeros((3, 3, 4, 8)), "b": jnp.zeros(4)},
    }
    matrix = optax.contrib.MuonDimensionNumbers
    assert METHODS["muon"].factory.keywords["muon_weight_dimension_numbers"](params) == {
        "embedding": None,
        "stacked": {"w": matrix((1,), 2), "b": None},
        "layer": {"w": matrix((0,), 1), "kernel": matrix((0, 1, 2), 3), "b": None},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "imagenet"], "unknown problem 'imagenet'; valid: digits_mlp"),
        (["--scale", "huge"], "unknown scale 'huge'; valid: small, full"),
        (["--methods", "sgd,lamb"], "unknown method 'lamb'; valid: sgd, adam, muon"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--problem", "cifar10_5k_cnn", "--methods", "sgd,kfac_jax"], "kfac_jax "),
        (["--settings", "7"], "--settings must be at most 6, got 7"),
        (["--time-factor", "0"], "--time-factor must be positive and finite, got 0"),
        (["--name", "a/b"], "--name must be a plain folder name"),
        (["--problem", "shakespeare_transformer", "--data-dir", "."], "tinyshakespeare.txt"),
        (["--problem", "mnist_autoencoder", "--data-dir", "/nowhere"], "no such folder"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--runs-dir", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_does_not_write_into_a_training_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "config.json").write_text("{}")
    assert run("--name", "train", "--runs-dir", str(tmp_path)) == 2
    assert f"holds something else than {study.PROG}; give another" in capsys.readouterr().err
