"""The comparison of natural-gradient methods as functions and as a person types it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from experiments import natural_gradient as study
from experiments.reporting import natural_gradient as report
from experiments.training import problems
from experiments.training.tuning import batches, final_loss


def run(*arguments: str) -> int:
    try:
        return study.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


# The parts ---------------------------------------------------------------------------------------


def test_all_methods_are_tuned_on_the_same_number_of_settings() -> None:
    assert {len(method.settings) for method in study.CANDIDATES.values()} == {6}
    for method in study.CANDIDATES.values():
        assert len({tuple(setting.values()) for setting in method.settings}) == 6


def test_batches_are_epochs_of_all_rows() -> None:
    rows = batches(10, 3, seed=0)
    epochs = [np.concatenate([next(rows) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 9
    assert epochs[0].tolist() != epochs[1].tolist()
    again = batches(10, 3, seed=0)
    np.testing.assert_array_equal(np.concatenate([next(again) for _ in range(3)]), epochs[0])


def row(name: str, losses: list[float], seconds: float) -> dict[str, Any]:
    count = len(losses)
    curve = {
        "step": [float(i) for i in range(count)],
        "seconds": [seconds * i for i in range(count)],
        "train": losses,
        "test": losses,
    }
    return {"method": name, "curve": curve, "reached": report.reached(curve, 0.5)}


def test_conclusion_says_what_the_numbers_say() -> None:
    rows = [
        row("sgd", [2.0, 1.5, 1.0, 0.7, 0.5], 1.0),
        row("adam", [2.0, 1.0, 0.4, 0.6, 0.3], 1.5),
        row("kfac", [2.0, 0.5, 0.2], 8.0),
        row("ekfac", [2.0, 1.0, 0.9, 0.8, 0.4], 1.01),
        row("hessian_free", [2.0, 0.9], 9.0),
    ]
    assert report.conclusion(rows) == [
        "sgd gets to a training loss of 0.5 in 4 steps, 4 s",
        "adam gets there in 2 steps, 2 times fewer, and 3 s, 1.3 times less",
        "kfac gets there in 1 steps, 4 times fewer, and 8 s, 2 times more",
        "ekfac gets there in 4 steps, about as many, and 4.04 s, about as much",
        "hessian_free does not get there in 9 s (lowest: 0.9)",
        "fewest steps: kfac; least time: adam; lowest training loss at the end: kfac",
    ]


def test_a_run_that_diverged_is_not_chosen() -> None:
    curve = row("sgd", [2.0, 1.0, 0.1], 1.0)["curve"]
    assert final_loss(curve, 2, 100.0) == 0.1
    assert final_loss(curve, 100, 2.0) == 0.1
    assert final_loss(curve, 3, 100.0) == math.inf


def test_autoencoder_has_a_linear_code() -> None:
    """Scaling what comes after the middle by nothing but the code's scale."""
    widths = (6, 4, 2, 4, 6)
    keys = jax.random.split(jax.random.key(0), 4)
    params = [
        problems.init_linear(key, n_in, n_out)
        for key, n_in, n_out in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    x = jnp.linspace(0.0, 1.0, 12).reshape(2, 6)
    hidden = jnp.tanh(x @ params[0]["w"])
    code = hidden @ params[1]["w"]
    outputs = jnp.tanh(code @ params[2]["w"]) @ params[3]["w"]
    np.testing.assert_allclose(problems.autoencoder_outputs(params, x), outputs, rtol=1e-6)
    # Cross-entropy of pixels, summed: with logits of 0, log 2 a pixel.
    np.testing.assert_allclose(
        problems.pixel_loss(jnp.zeros((2, 6)), x), 6 * math.log(2), rtol=1e-6
    )


@pytest.fixture
def shakespeare(tmp_path: Path) -> Path:
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: that is it.\n" * 100)
    return tmp_path


def test_transformer_does_not_see_the_future(shakespeare: Path) -> None:
    problem = problems.PROBLEMS["shakespeare_transformer"](False, shakespeare, 0)
    x, y = problem.train
    assert x.shape[1] == 32
    np.testing.assert_array_equal(x[0, 1:], y[0, :-1])
    changed = x[:2].at[:, 20].set((x[:2, 20] + 1) % 10)
    outputs, others = (problem.objective.outputs(problem.params, x=v) for v in (x[:2], changed))
    np.testing.assert_allclose(outputs[:, :20], others[:, :20], rtol=1e-5, atol=1e-6)
    assert np.abs(outputs[:, 20:] - others[:, 20:]).max(axis=(0, 2)).min() > 1e-4
    # K-FAC finds all of its layers.
    text = oa.describe_layers(problem.objective, problem.params, {"x": x[:2]})
    assert text.count("dense") >= 6 * 2 + 1, text


def test_digits_have_labels_and_all_examples() -> None:
    problem = problems.PROBLEMS["digits_mlp"](False, None, 0)
    assert problem.train[0].shape == (1077, 8, 8, 1)
    assert problem.steps == 40 * 8


@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.slow), True])
def test_autoencoder_of_real_images(data_dir: Path, full: bool) -> None:
    problem = problems.PROBLEMS["mnist_autoencoder"](full, data_dir, 0)
    x, y = problem.train
    assert x is y
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    widths = [layer["w"].shape[1] for layer in problem.params]
    if full:
        assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]
        assert problem.steps == 20 * (len(x) // 1000)
    start = problem.objective(problem.params, x=x[:100], y=y[:100])
    assert 300 < start < 1000  # log 2 a pixel is 543


# The command -------------------------------------------------------------------------------------


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
