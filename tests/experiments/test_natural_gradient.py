"""`python -m experiments.natural_gradient` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from experiments import natural_gradient as study


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
    arguments = ["--steps", "12", "--settings", "1", "--runs-dir", str(tmp_path), "--name", "tiny"]
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    for name in study.CANDIDATES:
        assert name in out
    assert "fewest steps: " in out
    folder = tmp_path / "tiny"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert [entry["method"] for entry in results["methods"]] == list(study.CANDIDATES)
    assert all(line in out.replace("\n", " ") for line in results["conclusion"][-1:])
    for entry in results["methods"]:
        curve = entry["curve"]
        assert len({len(values) for values in curve.values()}) == 1
        assert curve["step"] == sorted(curve["step"])
        assert curve["seconds"] == sorted(curve["seconds"])
        assert curve["train"][-1] < curve["train"][0]
        assert entry["compile_seconds"] > 0
        assert len(entry["settings"]) == len(entry["final_losses"]) == 1
    by_name = {entry["method"]: entry["curve"] for entry in results["methods"]}
    assert {curve["train"][0] for curve in by_name.values()} == {by_name["sgd"]["train"][0]}
    # A step of second order is worth several of first order here.
    assert by_name["hessian_free"]["train"][1] < by_name["sgd"]["train"][1]


def test_hessian_free_is_left_out_of_convolutions_in_a_loop() -> None:
    left_out = set(study.CANDIDATES) - set(study.default_methods("cifar10_5k_cnn"))
    assert left_out == ({"hessian_free"} if jax.default_backend() == "cpu" else set())
    assert set(study.default_methods("digits_mlp")) == set(study.CANDIDATES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "imagenet"], "unknown problem 'imagenet'; valid: digits_mlp"),
        (["--scale", "huge"], "unknown scale 'huge'; valid: small, full"),
        (["--methods", "sgd,lion"], "unknown method 'lion'; valid: sgd, adam, kfac"),
        (["--steps", "0"], "--steps must be at least 1"),
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
