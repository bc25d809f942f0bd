"""The small problems: their data, networks and losses."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from experiments.training.studies import problems


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


def test_scanned_transformer_is_its_twin(shakespeare: Path) -> None:
    listed, scanned = (
        problems.PROBLEMS[name](False, shakespeare, 0)
        for name in ("shakespeare_transformer", "shakespeare_scanned")
    )
    x = listed.train[0][:2]
    want = listed.objective.outputs(listed.params, x=x)
    np.testing.assert_allclose(
        scanned.objective.outputs(scanned.params, x=x), want, rtol=1e-5, atol=1e-5
    )
    assert scanned.params["stacked"]["up"]["w"].shape == (2, 48, 192)


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
