"""The training command as a person uses it: runs, interruptions, mistakes."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import models
from experiments import data, train
from experiments.data import detection
from experiments.methods import METHODS, Method
from experiments.runs import folders
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.metric_files import TIMES
from experiments.training import cluster, networks
from experiments.training import program as program_module
from experiments.training.options import Options
from experiments.training.plan import prepare
from experiments.training.program import Program, build, evaluation_batch, statistics
from tests.experiments.data.files import (
    arrays,
    membranes,
    write_imagenet,
    write_pairs,
    write_sst2,
    write_text,
)

ROOT = Path(__file__).parents[2]
# Small and quick to compile; 16 steps an epoch.
QUICK = ["--devices", "1", "--steps", "12", "--eval-every", "5"]
# 20 checkpoints, which give the test that kills the run the time to do so.
LONG = ["--method", "stoch_grad_adam", "--steps", "400", "--eval-every", "100"]
LONG += ["--checkpoint-every", "20", "--keep", "2"]


@pytest.fixture(scope="module", autouse=True)
def backend():
    """Starts JAX before `--devices` of a command in this process can change its devices."""
    assert len(jax.devices()) == 8


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def command(folder, *arguments):
    """Starts the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def final_state(folder):
    config = json.loads((folder / "config.json").read_text())["options"]
    names = ("task", "method", "steps", "batch_size", "seed")
    options = Options(devices=1, **{name: config[name] for name in names})
    program = build(prepare(options))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(program.runner.abstract_state(program.make_state)).state


def assert_same_run(folder, expected):
    """The same metrics and, bit by bit, the same final state."""
    assert untimed(folder) == untimed(expected)
    assert (folder / "result.json").read_text() == (expected / "result.json").read_text()

    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same, final_state(folder), final_state(expected))


def events(folder):
    """All numbers in the event files: {(tag, step): value}."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):  # length, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += 12 + length + 4
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


# Runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """An uninterrupted run, as typed, and one that is killed at the same time."""
    folder = tmp_path_factory.mktemp("train")
    process = command(folder, *LONG, "--name", "full")
    victim = command(folder, *LONG, "--name", "killed")
    metrics = folder / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300  # other tests run beside this one
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 90:
        assert victim.poll() is None, finish(victim)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.kill()
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    return folder / "runs", finish(process)


def test_run_leaves_what_it_promises(full):
    folder, (code, out, err) = full
    assert (code, err) == (0, "")
    folder = folder / "full"
    assert "digits, mlp, stoch_grad_adam at learning rate 0.003: 400 steps" in out
    assert "step 400: validation loss" in out
    assert out.splitlines()[-1].endswith("metrics and checkpoints are in runs/full")
    names = {path.name for path in folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "metrics.csv", "result.json", "run.lock"}
    # In a checkout with changes there is `source.diff`, too.
    assert names - {"source.diff"} == files | {"tensorboard", "checkpoints"}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["380", "400"]

    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["learning_rate"] == 0.003
    assert config["versions"]["jax"] == jax.__version__
    assert config["command"] == shlex.join(
        ["python", "-m", "experiments.train", *LONG, "--name", "full"]
    )

    lines = rows(folder)
    assert [row["step"] for row in lines] == list(range(1, 401))
    assert [row["step"] for row in lines if "validation_loss" in row] == [100, 200, 300, 400]
    assert lines[15]["epoch"] == 1
    assert lines[-1]["loss"] < 0.2 < 2 < lines[0]["loss"]
    assert lines[-1]["validation_accuracy"] > 0.9
    assert json.loads((folder / "result.json").read_text())["test_accuracy"] > 0.9

    with (folder / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(table, lines, strict=True):
        assert {k: float(v) for k, v in row.items() if v} == line

    curves = ("loss", "learning_rate", "gradient_norm", "update_norm", *TIMES[:2])
    recorded = events(folder)
    names = {f"train/{name}" for name in curves} | {"state/0/count", "state/1/count"}
    assert {tag for tag, _ in recorded if not tag.startswith("validation/")} == names
    assert len(recorded) == len(names) * 400 + 2 * 4
    for line in lines:
        assert recorded["train/loss", line["step"]] == np.float32(line["loss"])
        assert recorded["train/gradient_norm", line["step"]] == np.float32(line["gradient_norm"])
        assert line["learning_rate"] == pytest.approx(0.003)
        assert line["state/1/count"] == line["step"]
        # Of a group of steps the time is the mean.
        assert line["examples_per_second"] == pytest.approx(64 / line["step_seconds"], rel=2e-3)
    assert sum(line["step_seconds"] for line in lines) <= lines[-1]["seconds"] + 0.1
    assert recorded["validation/accuracy", 400] == np.float32(lines[-1]["validation_accuracy"])


def test_killed_run_resumes_bit_by_bit(full):
    folder, _ = full
    killed = folder / "killed"
    left = len((killed / "metrics.jsonl").read_text().splitlines())
    saved = max(
        int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit()
    )
    # More metrics than the checkpoint knows of, the last line perhaps cut: they are dropped.
    assert left >= saved
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')
    # The other options come from the folder.
    code, out, err = finish(command(folder.parent, "--name", "killed", "--resume"))
    assert (code, err) == (0, "")
    assert f"resuming at step {saved}" in out
    assert_same_run(killed, folder / "full")
    assert len(events(killed)) == len(events(folder / "full"))


@pytest.mark.parametrize(
    "method", ["demon_adam", pytest.param("bulk_sgd_adaptive", marks=pytest.mark.slow)]
)
def test_ctrl_c_saves_and_says_how_to_continue(runs, method, monkeypatch, capsys):
    arguments = [*QUICK, "--runs-dir", str(runs), "--method", method]
    assert train.main([*arguments, "--name", "full"]) == 0

    before = signal.getsignal(signal.SIGINT)
    schedule = Method.schedule

    def interrupted(self, **kwargs):
        refresh_at = schedule(self, **kwargs)

        def at(step, state):
            if step == 6:
                signal.raise_signal(signal.SIGINT)
            return refresh_at(step, state)

        return at

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Method, "schedule", interrupted)
        assert train.main([*arguments, "--name", "stopped"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted: saved step 7 of 12" in out
    assert [row["step"] for row in rows(runs / "stopped")] == list(range(1, 8))
    assert signal.getsignal(signal.SIGINT) is before

    words = shlex.split(err.strip().removeprefix("to continue: python -m experiments.train "))
    assert words[-2:] == ["--devices", "1"]  # made before the folder is read
    assert train.main(words) == 0
    assert_same_run(runs / "stopped", runs / "full")
    # A run that is complete only tells its result again.
    assert train.main(words) == 0
    assert_same_run(runs / "stopped", runs / "full")


def test_run_killed_before_its_first_checkpoint_starts_again(runs, complete, monkeypatch):
    steps, begun = [], []

    def init(**settings):
        begun.append((settings["id"], settings["config"]["method"]))
        run = types.SimpleNamespace(id="abc", finish=lambda: None)
        run.log = lambda numbers, step: steps.append((step, "train/gradient_norm" in numbers))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    arguments = [*QUICK, "--runs-dir", str(runs), "--name", "run", "--log", "wandb"]
    assert train.main(arguments) == 0
    shutil.rmtree(runs / "run" / "checkpoints")
    assert train.main([*arguments, "--resume"]) == 0
    assert_same_run(runs / "run", complete)
    assert begun == [(None, "sgd"), ("abc", "sgd")]
    assert steps == [(step, True) for step in range(1, 13)]


@pytest.fixture(scope="module")
def parallel_runs(tmp_path_factory):
    """A folder with the run of one device, and the options of the others."""
    folder = tmp_path_factory.mktemp("parallel")
    quick = [*QUICK, "--runs-dir", str(folder), "--method", "extrap_sgd"]
    assert train.main([*quick, "--name", "one"]) == 0
    return folder, quick


@pytest.mark.parametrize("mode", ["jit", "fsdp", "pmap", "shard_map"])
def test_parallel_modes_train_alike(parallel_runs, mode):
    runs, quick = parallel_runs
    assert train.main([*quick, "--name", mode, "--parallel", mode, "--devices", "4"]) == 0
    for row, expected in zip(rows(runs / mode), rows(runs / "one"), strict=True):
        assert row.keys() == expected.keys()
        assert "gradient_norm" not in row  # it would bring back a gradient that is not used
        for name in ("loss", "update_norm", "state/count"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-5)
    # Resumed where it ended: the state goes back into its copies.
    assert train.main(["--runs-dir", str(runs), "--name", mode, "--resume"]) == 0


@pytest.mark.slow
def test_token_ids(runs, tmp_path):
    write_sst2(tmp_path, rows=1_000)
    quick = ["--task", "sst2_1k", "--data-dir", str(tmp_path), "--runs-dir", str(runs)]
    quick += ["--batch-size", "8", "--devices", "1", "--steps", "4", "--checkpoint-every", "2"]
    assert train.main([*quick, "--name", "run"]) == 0
    expected = untimed(runs / "run")
    assert json.loads((runs / "run" / "config.json").read_text())["run"]["model"] == "transformer"
    # From the checkpoint in the middle it goes on with the same batches.
    shutil.rmtree(runs / "run" / "checkpoints" / "4")
    assert train.main(["--runs-dir", str(runs), "--name", "run", "--resume"]) == 0
    assert untimed(runs / "run") == expected


def test_loss_can_be_chosen(runs, capsys):
    quick = [*QUICK, "--runs-dir", str(runs), "--name", "run", "--loss", "mse"]
    assert train.main(quick) == 0
    task = data.load_task("digits")
    batch = next(iter(data.batches(task.train, batch_size=64, seed=0)))
    graphdef, params, rest = networks.split(
        models.create("mlp", input_shape=task.input_shape, num_classes=10)
    )
    first = networks.objective(graphdef, "mse")(params, rest=rest, x=batch["x"], y=batch["y"])
    np.testing.assert_allclose(rows(runs / "run")[0]["loss"], first, rtol=1e-6)
    # Validation and test use it too: below the 2.3 of a cross entropy before it has learned.
    assert rows(runs / "run")[-1]["validation_loss"] < 0.6
    assert json.loads((runs / "run" / "result.json").read_text())["test_loss"] < 0.6
    assert train.main([*quick[:-1], "cross_entropy", "--resume"]) == 2
    assert "a run with loss mse, now cross_entropy" in capsys.readouterr().err


def resumed(runs, name, step):
    """What a run's metrics were, and are after its last checkpoint is lost and it is resumed."""
    expected = untimed(runs / name)
    shutil.rmtree(runs / name / "checkpoints" / str(step))
    assert train.main(["--runs-dir", str(runs), "--name", name, "--resume"]) == 0
    return expected, untimed(runs / name)


def test_augmented_run_resumes_bit_by_bit(runs):
    quick = [*QUICK, "--runs-dir", str(runs), "--augment", "flip,crop,mixup", "--label-smoothing"]
    quick += ["0.1", "--checkpoint-every", "6"]
    assert train.main([*quick, "--name", "run"]) == 0
    expected, again = resumed(runs, "run", 12)
    assert again == expected
    config = json.loads((runs / "run" / "config.json").read_text())["run"]
    assert (config["augment"], config["label_smoothing"]) == (["crop", "flip", "mixup"], 0.1)
    # Neither workers nor prefetching change a number.
    assert train.main([*quick, "--name", "other", "--data-workers", "2", "--prefetch", "0"]) == 0
    assert untimed(runs / "other") == expected


@pytest.fixture
def few_pictures(monkeypatch):
    """The task of finding digits with few pictures."""
    monkeypatch.setattr(detection.load_digits_detection, "__defaults__", ((80, 8, 8),))
    monkeypatch.delenv("OPTAX_ACCEL_DATA", raising=False)


@pytest.mark.slow
def test_run_whose_batches_follow_the_loss_resumes_bit_by_bit(runs, few_pictures, capsys):
    quick = [*QUICK, "--runs-dir", str(runs), "--task", "digits_detection", "--follow", "box"]
    quick += ["--model-options", '{"width": 2, "depth": 0}', "--batch-size", "4"]
    quick += ["--checkpoint-every", "6"]
    assert train.main([*quick, "--name", "run"]) == 0
    shares = [row["share"] for row in rows(runs / "run")]
    # Both kinds of batches are there; of stitched ones small objects are nearly all.
    assert min(shares) < 0.5 < 0.7 < shares[0]
    expected, again = resumed(runs, "run", 12)
    assert again == expected
    result = json.loads((runs / "run" / "result.json").read_text())
    assert {"test_average_precision", "test_average_precision_small"} < result.keys()
    with Image.open(runs / "run" / "detections.png") as drawn:
        assert drawn.size == (3 * (3 * 64 + 2) + 2, 3 * (3 * 64 + 2) + 2)  # of eight test pictures
    # The position has the share of the last step, so that a run may stop behind any step.
    with Checkpoints(runs / "run" / "checkpoints") as checkpoints:
        options = json.loads((runs / "run" / "config.json").read_text())["options"]
        chosen = Options(**options | {"runs_dir": runs, "data_dir": None})
        program = build(prepare(chosen))
        kept = checkpoints.restore(program.runner.abstract_state(program.make_state)).data
    chooser = kept["batches"]["chooser"]
    assert chooser["share"] == pytest.approx(shares[-1], rel=1e-6)
    # The first batch is stitched, then those behind a share below the threshold.
    stitched = 1 + sum(share < 0.1 for share in shares[:-1])
    assert chooser["counts"] == {"regular": 12 - stitched, "stitched": stitched}
    # Neither workers nor prefetching nor devices change what is chosen.
    more = ["--data-workers", "2", "--prefetch", "0", "--parallel", "shard_map", "--devices", "2"]
    assert train.main([*quick, "--name", "other", *more]) == 0
    others = [row["share"] for row in rows(runs / "other")]
    np.testing.assert_allclose(others, shares, rtol=1e-3)
    capsys.readouterr()
    assert train.main([*quick, "--name", "run", "--resume", "--follow", "class"]) == 2
    assert "is a run with follow box, now class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--follow", "small"], "unknown --follow loss 'small'; valid: none, box, class"),
        (["--task", "digits", "--follow", "box"], "--follow box is for pictures with boxes"),
        (["--follow", "box", "--batch-size", "21"], "takes 84 of the 80 training pictures"),
        (["--follow-threshold", "-1"], "--follow-threshold must be at least 0"),
        (["--follow-threshold", "0.5"], "--follow-threshold is the share of --follow"),
        (["--augment", "flip"], "--augment does not move boxes"),
    ],
)
def test_what_batches_that_follow_the_loss_need(runs, few_pictures, arguments, message, capsys):
    task = ["--task", "digits_detection", "--devices", "1"]
    assert train.main(["--runs-dir", str(runs), *task, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not runs.exists()


EVERYTHING = ["--method", "extrap_sgd", "--accumulate", "4", "--precision", "f16", "--ema", "0.9"]
EVERYTHING += ["--weight-decay", "0.01", "--clip", "1.0"]


def test_run_with_everything_resumes_bit_by_bit(runs, capsys):
    quick = [*QUICK, "--runs-dir", str(runs), *EVERYTHING, "--checkpoint-every", "6"]
    assert train.main([*quick, "--name", "run"]) == 0
    # The scale and the averages are in the checkpoint.
    expected, again = resumed(runs, "run", 12)
    assert again == expected
    assert {row["loss_scale"] for row in expected} == {2**16}
    config = json.loads((runs / "run" / "config.json").read_text())["run"]
    assert (config["accumulate"], config["precision"], config["clip"]) == (4, "f16", 1.0)
    assert (config["value_fn_precision"], config["weight_decay"], config["ema"]) == (
        "f32",
        0.01,
        0.9,
    )
    capsys.readouterr()
    for change in (["--accumulate", "2"], ["--precision", "bf16"], ["--ema", "0.5"]):
        assert train.main([*quick, "--name", "run", "--resume", *change]) == 2
        name = change[0].removeprefix("--")
        assert f"a run with {name} " in capsys.readouterr().err


def test_monitored_run_is_the_same_resumes_and_is_drawn(runs):
    quick = [*QUICK, "--runs-dir", str(runs), "--method", "sgd", "--checkpoint-every", "6"]
    watched = ["--monitor", "--monitor-every", "4"]
    assert train.main([*quick, "--name", "plain"]) == 0
    assert train.main([*quick, *watched, "--name", "run"]) == 0
    lines = rows(runs / "run")
    recorded = [row["step"] for row in lines if row.get("monitor/sharpness") is not None]
    assert recorded == list(range(1, len(lines) + 1, 4))
    for row, expected in zip(lines, rows(runs / "plain"), strict=True):
        assert row["loss"] == expected["loss"]
    for name in ("sharpness", "effective_sharpness", "alignment"):
        assert (runs / "run" / f"{name}.png").stat().st_size > 10_000
        assert (runs / "run" / f"{name}.svg").exists()
    expected, again = resumed(runs, "run", 12)
    assert again == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "pmap", "shard_map"])
def test_everything_in_parallel(runs, mode):
    quick = [*QUICK, "--runs-dir", str(runs), *EVERYTHING]
    assert train.main([*quick, "--name", "one"]) == 0
    assert train.main([*quick, "--name", mode, "--parallel", mode, "--devices", "4"]) == 0
    for row, expected in zip(rows(runs / mode), rows(runs / "one"), strict=True):
        # Sums in another order round to other float16 numbers.
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=2e-3)
        if "validation_loss" in expected:
            np.testing.assert_allclose(
                row["validation_loss"], expected["validation_loss"], rtol=2e-3
            )


@pytest.mark.slow
def test_micro_batches_change_no_number(runs):
    """Of a method that evaluates the loss itself, too."""
    quick = [*QUICK, "--runs-dir", str(runs), "--method", "extrap_sgd", "--ema", "0.5"]
    for name, number in (("whole", "1"), ("parts", "5")):
        assert train.main([*quick, "--name", name, "--accumulate", number]) == 0
    for row, expected in zip(rows(runs / "parts"), rows(runs / "whole"), strict=True):
        for name in ("loss", "validation_loss"):
            if name in expected:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-5)


def test_averages_are_what_is_evaluated(runs, complete):
    arguments = [*QUICK, "--runs-dir", str(runs), "--name", "ema", "--ema", "0.999"]
    assert train.main(arguments) == 0
    plain, averaged = rows(complete), rows(runs / "ema")
    assert [row["loss"] for row in averaged] == [row["loss"] for row in plain]
    # The mean over the run lags behind its end.
    assert averaged[-1]["validation_loss"] > plain[-1]["validation_loss"] + 0.05
    results = [json.loads((run / "result.json").read_text()) for run in (complete, runs / "ema")]
    assert results[1]["test_loss"] > results[0]["test_loss"] + 0.05


def test_profile(runs, capsys):
    quick = [*QUICK, "--runs-dir", str(runs), "--name", "run", "--profile"]
    assert train.main(quick) == 0
    out = capsys.readouterr().out
    (trace,) = (runs / "run" / "profile").rglob("perfetto_trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))  # what TensorBoard reads
    recorded = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    # Steps 10 and 11, of 12.
    assert sum(event.get("name") == "train" for event in recorded) == 2
    assert "profile: " not in out  # fewer steps than it would have recorded
    assert "profile" not in json.loads((runs / "run" / "config.json").read_text())["run"]


@pytest.mark.parametrize(("model", "loops"), [("mlp", True), ("cnn", False)])
def test_convolutions_are_not_put_into_loops_on_a_cpu(model, loops):
    plan = prepare(Options(model=model, devices=1, accumulate=4))
    program = build(plan)
    state = jax.eval_shape(program.make_state)
    x, y = (part[: plan.batch_size] for part in (plan.task.train.x, plan.task.train.y))
    text = program.runner.lower(state, {"x": x, "y": y}).as_text()
    assert ("stablehlo.while" in text) == loops


def test_precision_of_what_the_method_evaluates():
    """A network in bfloat16: gradients elsewhere and products are float32's, unless asked."""

    def half_products(value_fn_precision):
        options = Options(
            method="extrap_sgd",
            devices=1,
            precision="bf16",
            value_fn_precision=value_fn_precision,
        )
        plan = prepare(options)
        program = build(plan)
        x, y = (part[: plan.batch_size] for part in (plan.task.train.x, plan.task.train.y))
        state = jax.eval_shape(program.make_state)
        text = program.runner.lower(state, {"x": x, "y": y}).as_text()
        return sum("dot_general" in line and "bf16" in line for line in text.splitlines())

    once = half_products("f32")
    assert once > 0
    assert half_products("bf16") == 2 * once


def test_early_stopping(runs, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.5, 1.0, math.nan, 1.5, 9.0])

    def evaluate(*args):
        return {"loss": next(losses), "accuracy": 0.5}

    monkeypatch.setattr(Program, "evaluate", evaluate)
    quick = ["--devices", "1", "--runs-dir", str(runs), "--name", "run", "--early-stopping", "3"]
    quick += ["--eval-every", "2"]
    # A validation that is no better, NaN included, counts, until there is one that is.
    assert train.main([*quick, "--steps", "40"]) == 0
    assert "stopped early at step 10: 3 validations in a row" in capsys.readouterr().out
    assert [row["step"] for row in rows(runs / "run")] == list(range(1, 11))
    assert json.loads((runs / "run" / "result.json").read_text())["test_loss"] == 1.0
    # Resumed it has nothing left to do; from an earlier checkpoint it goes the same way.
    resume = ["--runs-dir", str(runs), "--name", "run", "--resume"]
    losses = iter([7.0])
    assert train.main(resume) == 0
    assert json.loads((runs / "run" / "result.json").read_text())["test_loss"] == 7.0
    shutil.rmtree(runs / "run" / "checkpoints" / "10")
    losses = iter([2.5, 7.0])
    assert train.main(resume) == 0
    assert rows(runs / "run")[-1]["step"] == 10


@pytest.mark.parametrize(
    ("task", "write", "options", "scores"),
    [
        (
            "tiny_shakespeare",
            write_text,
            {"embedding_size": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
            {"loss", "accuracy", "perplexity"},
        ),
        pytest.param(
            "multi30k",
            write_pairs,
            {"embedding_size": 8, "num_layers": 1, "num_heads": 2, "feedforward_size": 8},
            {"loss", "accuracy", "perplexity"},
            marks=pytest.mark.slow,
        ),
        ("vae_digits", lambda folder: None, {"hidden_sizes": [8]}, {"loss"}),
        pytest.param(
            "moving_digits_flow",
            lambda folder: np.savez(folder / "mnist.npz", **arrays((28, 28), rows=10_000)),
            {"width": 2, "radius": 1, "steps": 2, "corrections": 1},
            {"loss", "end_point_error"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ncsn_digits",
            lambda folder: None,
            {"width": 2, "num_levels": 1},
            {"loss"},
            marks=pytest.mark.slow,  # a minute of compilation
        ),
    ],
)
def test_other_tasks(runs, tmp_path, task, write, options, scores):
    write(tmp_path)
    quick = ["--task", task, "--data-dir", str(tmp_path), "--runs-dir", str(runs), "--name", "run"]
    quick += ["--model-options", json.dumps(options), "--batch-size", "4", "--devices", "1"]
    assert train.main([*quick, "--steps", "2"]) == 0
    (row,) = (row for row in rows(runs / "run") if "validation_loss" in row)
    assert {name for name in row if "validation" in name} == {f"validation_{n}" for n in scores}
    result = json.loads((runs / "run" / "result.json").read_text())
    assert result.keys() == {"steps", *(f"test_{name}" for name in scores)}
    pictures = runs / "run" / "samples.png"
    assert pictures.exists() == task.startswith(("vae", "ncsn"))
    if pictures.exists():  # 8 x 8 images, four times as large, and lines of two pixels
        image = Image.open(pictures)
        assert (image.size, image.mode) == ((8 * 34 + 2, 8 * 34 + 2), "L")
        assert np.ptp(np.asarray(image)) > 0
    if "perplexity" in scores:
        np.testing.assert_allclose(
            result["test_perplexity"], math.exp(result["test_loss"]), rtol=1e-6
        )


def test_evaluation_batches_are_small_where_inputs_or_outputs_are_large():
    digits = data.load_task("digits")
    assert evaluation_batch(digits) == 1000
    tokens = np.zeros((9, 35), np.int32)
    words = dataclasses.replace(
        digits, train=data.Split(tokens, tokens), num_classes=0, vocabulary_size=33_278
    )
    assert evaluation_batch(words) == 28
    pictures = data.Split(np.zeros((1, 224, 224, 3), np.float32), np.zeros(1, np.int32))
    assert evaluation_batch(dataclasses.replace(digits, train=pictures)) == 27
    pictures = data.Split(np.zeros((1, 3000, 3000, 1), np.float32), np.zeros(1, np.int32))
    assert evaluation_batch(dataclasses.replace(digits, train=pictures)) == 1


def test_scores_are_means_over_the_labels_that_count(monkeypatch):
    monkeypatch.setattr(
        program_module, "EVALUATION_BATCH", 4
    )  # of ten rows: two whole batches and a half
    program = build(prepare(Options(devices=1)))
    state = program.runner.init(program.make_state)
    rng = np.random.default_rng(0)
    losses = rng.random((10, 5), np.float32)
    y = rng.integers(-1, 2, (10, 5)).astype(np.int32)
    split = data.Split(losses, y)
    task = dataclasses.replace(
        data.load_task("digits"), name="multi30k", train=split, num_classes=0, vocabulary_size=9
    )

    def compiled(params, rest, batch):
        x, y = batch["x"], batch["y"]
        counted = y >= 0
        values = (x * counted, (x > 0.5) & counted, counted)
        names = ("loss", "accuracy", "counted")
        return {name: jnp.mean(value) for name, value in zip(names, values, strict=True)}

    plan = dataclasses.replace(program.plan, task=task)
    scores = dataclasses.replace(program, plan=plan, compiled_scores=compiled).evaluate(
        state, split
    )
    loss = losses[y >= 0].mean()
    np.testing.assert_allclose(scores["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(scores["accuracy"], (losses[y >= 0] > 0.5).mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["perplexity"], np.exp(loss), rtol=1e-5)
    # Of a task without language there is no perplexity.
    plan = dataclasses.replace(plan, task=dataclasses.replace(task, name="segmentation"))
    scores = dataclasses.replace(program, plan=plan, compiled_scores=compiled).evaluate(
        state, split
    )
    assert set(scores) == {"loss", "accuracy"}


def test_model_whose_outputs_fit_no_labels(runs, tmp_path, capsys):
    write_imagenet(tmp_path, rows=8)
    arguments = ["--task", "image_folder", "--data-dir", str(tmp_path), "--image-size", "16"]
    assert train.main(["--runs-dir", str(runs), *arguments, "--model", "unet"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "model unet does not fit the task image_folder (classification); its own is cnn" in err
    assert not runs.exists()


FOLDER = ["--task", "imagenet_folder", "--image-size", "8", "--model", "mlp"]
FOLDER += ["--model-options", '{"hidden_sizes": [8]}', "--batch-size", "4", "--devices", "1"]


def test_folder_of_images_is_read_while_it_trains(runs, tmp_path, capsys):
    write_imagenet(tmp_path, rows=6)
    quick = [*FOLDER, "--data-dir", str(tmp_path), "--runs-dir", str(runs), "--steps", "6"]
    quick += ["--checkpoint-every", "3", "--augment", "flip", "--data-workers", "2"]
    assert train.main([*quick, "--name", "run"]) == 0
    expected, again = resumed(runs, "run", 6)
    assert again == expected
    # A picture that cannot be read ends the run, in one line.
    path = tmp_path / "train" / "n01" / "n01_2.png"
    path.write_bytes(path.read_bytes()[:50])
    capsys.readouterr()
    assert train.main([*quick, "--name", "broken"]) == 1
    err = capsys.readouterr().err
    reason = "not a readable picture (image file is truncated); replace or remove it"
    assert err == f"error: {path}: {reason}\n"


@pytest.mark.slow
def test_segmentation(runs, tmp_path):
    np.savez(tmp_path / "isbi_em.npz", **membranes())
    quick = ["--task", "segmentation", "--data-dir", str(tmp_path), "--runs-dir", str(runs)]
    quick += ["--model-options", '{"width": 2, "depth": 1}', "--devices", "1", "--steps", "40"]
    quick += ["--learning-rate", "0.03", "--eval-every", "40", "--augment", "crop,flip"]
    assert train.main([*quick, "--name", "run"]) == 0
    # Brightness tells the class.
    assert json.loads((runs / "run" / "result.json").read_text())["test_accuracy"] > 0.8


@pytest.fixture
def bad_batch(monkeypatch):
    """Some training examples are broken, all of the batch of step 8."""
    task = data.load_task("digits")
    x = task.train.x.copy()
    batches = data.index_batches(len(x), batch_size=64, seed=0)
    for _ in range(8):
        batch = next(batches)
    curvature = np.random.default_rng(0).permutation(len(x))[:128]
    x[np.setdiff1d(batch, curvature)[:7], 3, 3] = np.nan
    task = dataclasses.replace(task, train=data.Split(x, task.train.y))
    monkeypatch.setattr(data, "load_task", lambda *args, **kwargs: task)


def events_log(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def finite_state(folder):
    state = final_state(folder)
    return all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


BAD = ["--devices", "1", "--steps", "13", "--eval-every", "5", "--method", "bulk_sgd", "--name"]


def test_not_finite_ends_the_run_by_default(runs, bad_batch, capsys):
    arguments = ["--runs-dir", str(runs), *BAD, "run"]
    assert train.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: step 8 is not finite (loss nan, ")
    assert "first in the state: params/layers" in err
    assert err.count("\n") == 1
    assert [row["loss"] is None for row in rows(runs / "run")] == [False] * 7 + [True]
    (event,) = events_log(runs / "run")
    assert (event["step"], event["policy"]) == (8, "raise")
    assert event["last_loss"] == rows(runs / "run")[-2]["loss"]
    assert {"alignment", "top_eigenvalue"} < event.keys()
    # The checkpoint is the one before, and the run goes on from it under another policy.
    assert finite_state(runs / "run")
    resume = ["--runs-dir", str(runs), "--name", "run", "--resume", "--non-finite", "skip"]
    assert train.main(resume) == 0
    assert "resuming at step 5" in capsys.readouterr().out
    assert rows(runs / "run")[-1]["step"] == 13


def test_not_finite_can_be_skipped(runs, bad_batch, capsys):
    # A run with curvature skips it where the one above is resumed.
    arguments = ["--runs-dir", str(runs), *BAD, "run", "--non-finite", "skip", "--method", "sgd"]
    assert train.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "step 8 is not finite (loss nan, " in out
    assert err == ""
    assert [row["step"] for row in rows(runs / "run") if row["loss"] is None] == [8]
    assert [event["step"] for event in events_log(runs / "run")] == [8]
    assert finite_state(runs / "run")


@pytest.mark.slow
def test_not_finite_can_be_rolled_back(runs, bad_batch, capsys):
    arguments = ["--runs-dir", str(runs), *BAD, "run", "--non-finite", "rollback"]
    assert train.main(arguments) == 0
    assert ": back to step 5" in capsys.readouterr().out
    lines = rows(runs / "run")
    assert [row["step"] for row in lines] == list(range(1, 14))
    assert all(row["loss"] is not None for row in lines)
    (event,) = events_log(runs / "run")
    assert (event["step"], event["back_to"]) == (8, 5)
    assert finite_state(runs / "run")
    # Steps 1 to 5 are those of a run without the broken batch.
    seen = ["--runs-dir", str(runs), *BAD, "seen", "--steps", "5"]
    assert train.main(seen) == 0
    assert [row["loss"] for row in lines[:5]] == [row["loss"] for row in rows(runs / "seen")]
    # Before there is a checkpoint, it is the start that the run goes back to.
    arguments[-3] = "early"
    assert train.main([*arguments, "--steps", "8", "--checkpoint-every", "8"]) == 0
    assert events_log(runs / "early")[0]["back_to"] == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [("skip", "10 steps in a row were"), ("rollback", "3 rollbacks did not help")],
)
def test_not_finite_for_good_ends_the_run(runs, policy, message, capsys):
    quick = [*QUICK, "--runs-dir", str(runs), "--name", "run", "--learning-rate", "1e38"]
    assert train.main([*quick, "--non-finite", policy]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert all(row["loss"] is None for row in rows(runs / "run")[1:])


def test_sigterm_saves_and_is_no_failure(runs, complete, monkeypatch, capsys):
    arguments = [*QUICK, "--runs-dir", str(runs), "--name"]
    step = Program.step

    def interrupted(self, state, *args):
        if jax.device_get(state.step) == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(self, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "step", interrupted)
        assert train.main([*arguments, "run"]) == 0
    out, err = capsys.readouterr()
    assert "interrupted: saved step 7 of 12" in out
    assert "to continue: python -m experiments.train" in err
    assert train.main(["--runs-dir", str(runs), "--name", "run", "--resume"]) == 0
    assert_same_run(runs / "run", complete)


def test_second_run_in_the_same_folder_is_refused(finished, capsys):
    resume = ["--runs-dir", str(finished.parent), "--name", "run"]
    before = contents(finished)
    held = folders.lock(finished)
    capsys.readouterr()
    for arguments in ([*resume, "--resume"], resume):
        assert train.main(arguments) == 2
        err = capsys.readouterr().err
        assert f"{finished} is in use by process {os.getpid()} on" in err
        assert err.count("\n") == 1
    held.release()
    assert contents(finished) == before
    assert train.main([*resume, "--resume"]) == 0


@pytest.mark.slow
def test_resumed_on_other_devices_it_is_the_same_up_to_rounding(runs, capsys):
    quick = [*QUICK, "--runs-dir", str(runs), "--method", "bulk_sgd", "--checkpoint-every", "6"]
    assert train.main([*quick, "--name", "full"]) == 0
    assert train.main([*quick, "--name", "run"]) == 0
    capsys.readouterr()
    for mode, devices in (("fsdp", "8"), ("pmap", "2"), ("shard_map", "4")):
        shutil.rmtree(runs / "run" / "checkpoints" / "12")
        resume = ["--runs-dir", str(runs), "--name", "run", "--resume", "--parallel", mode]
        assert train.main([*resume, "--devices", devices]) == 0
        out = capsys.readouterr().out
        assert (
            f"the run began with parallel jit, now {mode}; devices 1, now {devices}: equal" in out
        )
        assert "resuming at step 6" in out
        for row, expected in zip(rows(runs / "run"), rows(runs / "full"), strict=True):
            np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "mode", ["jit", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("shard_map", "pmap"))]
)
def test_workers_with_parameters_of_their_own(runs, mode, capsys):
    quick = ["--runs-dir", str(runs), "--method", "decentlam", "--steps", "12", "--eval-every", "6"]
    one = [*quick, "--devices", "1", "--workers", "4", "--name", "one"]
    assert train.main(one) == 0
    assert train.main([*quick, "--devices", "4", "--parallel", mode, "--name", mode]) == 0
    for row, expected in zip(rows(runs / mode), rows(runs / "one"), strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
    assert json.loads((runs / mode / "config.json").read_text())["run"]["workers"] == 4
    shutil.rmtree(runs / mode / "checkpoints" / "12")
    before = untimed(runs / mode)
    assert train.main(["--runs-dir", str(runs), "--name", mode, "--resume"]) == 0
    assert untimed(runs / mode) == before


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("sgd", set()),
        ("demon_sgd", {"momentum", "state/0/count"}),
        ("demon_adam", {"momentum", "state/0/count", "state/0/momentum_product"}),
        ("adam", {"state/0/count"}),
        ("cosine_momentum_sgd", {"momentum", "state/0/count"}),
        ("vtpc_sgd", {"state/count"}),  # the rate has a column of its own
        ("bulk_sgd", {"alignment", "top_eigenvalue", "state/1/count"}),
    ],
)
def test_statistics_of_the_optimizer(method, names):
    tx = METHODS[method].build(0.1, total_steps=10, num_classes=2)
    # A parameter that is a scalar is no statistic, and neither are its moments.
    params = {"value": jnp.ones((3, 2)), "momentum": jnp.ones(2), "scale": jnp.ones(())}
    found = statistics(tx.init(params))
    assert names <= set(found)
    assert {name for name in found if not name.startswith("state/")} <= names
    assert not any(name.endswith(("/scale", "/learning_rate")) for name in found)
    assert all(value.shape == () for value in found.values())


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task foo", "unknown task 'foo'; valid: digits, mnist"),
        ("--log foo", "unknown --log service 'foo'; valid: none, wandb, aim, mlflow"),
        ("--log aim", "--log aim needs the package aim; install it with pip install aim"),
        ("--model foo", "unknown model 'foo'; valid: mlp, cnn"),
        ("--model transformer", "'transformer' needs vocabulary_size"),
        ("--model transformer_lm", "is trained by --task tiny_shakespeare"),
        ("--model-options [1]", "--model-options is a JSON object such as"),
        ("--model-options {'a':1}", "--model-options is a JSON object such as"),
        ("""--model-options '{"depth": 3}'""", "'mlp' has no option 'depth'; valid: hidden"),
        (
            """--model-options '{"hidden_sizes": [1000000, 1000000]}'""",
            "GiB of memory, of which there are",
        ),
        ("""--model-options '{"hidden_sizes": [1e9]}'""", "hidden_sizes must be at most 1000000"),
        ("""--model cnn --model-options '{"norm": 3}'""", "unknown norm 3; valid: batch"),
        *(
            (f"--model-options '{options}'", "--model-options {")
            for options in (
                '{"hidden_sizes": "a"}',
                '{"hidden_sizes": [-3]}',
                '{"hidden_sizes": [1.5]}',
                '{"dtype": "foo"}',
                '{"rngs": 3}',
            )
        ),
        ("""--model-options '{"hidden_sizes": [-3]}'""", "do not fit the model mlp: "),
        (
            "--task sst2_1k --model-options '{\"num_layers\": 1e6}'",
            "num_layers must be at most 1000",
        ),
        ("--devices 4096", "--devices must be at most 512 in a process, got 4096"),
        ("--epochs 2000000000", "--epochs 2000000000 are 32000000000 steps; give at most"),
        ("--steps 99999999999999", "--steps must be at most 2147483647, got 99999999999999"),
        ("--checkpoint-every 0", "--checkpoint-every must be at least 1, got 0"),
        ("--task ../x", "unknown task '../x'"),
        ("--method ../x", "unknown method '../x'"),
        ("--name ..", "--name must be a plain folder name, got '..'"),
        ("--loss foo", "unknown loss 'foo'; valid: cross_entropy, mse, elbo, margin"),
        ("--loss elbo", "--loss elbo does not fit the task digits; valid: cross_entropy, mse"),
        ("--task vae_mnist --loss mse", "does not fit the task vae_mnist; valid: elbo"),
        (
            "--model ncsn",
            "its own is mlp, and ncsn is trained by --task ncsn_digits, ncsn_cifar10_5k",
        ),
        ("--task vae_digits --model ncsn", "model ncsn does not fit the task vae_digits"),
        ("--label-smoothing 1", "--label-smoothing must be at least 0 and below 1, got 1.0"),
        ("--loss mse --label-smoothing 0.1", "for the loss cross_entropy, not for mse"),
        ("--augment flop", "unknown augmentation 'flop'; valid: randaugment, crop, flip"),
        (
            "--image-size 32",
            "--image-size is for the tasks image_folder and imagenet_folder; digits has sizes",
        ),
        ("--early-stopping 0", "--early-stopping must be at least 1, got 0"),
        ("--data-workers -1", "--data-workers must be at least 0, got -1"),
        ("--prefetch -1", "--prefetch must be at least 0, got -1"),
        ("--accumulate 0", "--accumulate must be at least 1, got 0"),
        (
            "--devices 1 --accumulate 65",
            "--accumulate 65 is more than the 64 examples of a step on one device",
        ),
        ("--devices 4 --accumulate 17", "is more than the 16 examples of a step on one device"),
        ("--precision f8", "unknown precision 'f8'; valid: f32, bf16, f16"),
        ("--value-fn-precision f16", "(did you mean 'bf16'?); valid: f32, bf16"),
        (
            """--precision bf16 --model-options '{"dtype": "float16"}'""",
            "leave it out of --model-o",
        ),
        ("--weight-decay -1", "--weight-decay must be at least 0 and at most 3e+38, got -1.0"),
        ("--clip 0", "--clip must be more than 0 and at most 3e+38, got 0.0"),
        ("--ema 1", "--ema must be more than 0 and below 1, got 1.0"),
        ("--method foo", "unknown method 'foo'; valid: sgd, "),
        ("--parallel foo", "unknown parallel mode 'foo'; valid: jit, fsdp, pmap, shard_map"),
        ("--learning-rate 0", "--learning-rate must be more than 0 and at most 3e+38, got 0.0"),
        ("--learning-rate nan", "--learning-rate must be more than 0 and at most 3e+38, got nan"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--keep 0", "--keep must be at least 1, got 0"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--steps 3 --epochs 1", "--epochs and --steps exclude each other"),
        ("--batch-size 1078", "--batch-size 1078 is more than the 1077 training examples"),
        ("--devices 3", "--batch-size 64 does not split evenly over 3 devices; use e.g. 63 or 66"),
        ("--devices 2 --batch-size 1", "--batch-size 1 does not split evenly over 2 devices"),
        ("--devices 9", "--devices 9: there are only 8 of kind cpu"),
        (
            "--loss margin --model mlp",
            "lengths of capsules, which the model mlp has not; give --mo",
        ),
        (
            "--devices 4 --method bulk_sgd --curvature-batch-size 30",
            "--curvature-batch-size 30 does not split evenly over 4 devices; use e.g. 28 or 32",
        ),
        ("--curvature-batch-size 64", "method sgd uses no curvature; leave it out"),
        ("--name a/b", "--name must be a plain folder name, got 'a/b'"),
        ("--task mnist --data-dir nowhere", "nowhere"),
        ("--resume", "config.json; leave out --resume to start a run"),
        ("--lr 1", "Unrecognized options: --lr, 1; did you mean --learning-rate? python"),
        ("--list tusks", "unknown list 'tusks' (did you mean 'tasks'?); valid: tasks, models"),
        ("--bogus 1", "--bogus, 1; python -m experiments.train --help shows all options\n"),
        ("--learning-rate fast", "error: --learning-rate must be a number, got 'fast'\n"),
        ("--steps=1.5", "error: --steps must be a whole number, got '1.5'\n"),
        ("--seed x", "error: --seed must be a whole number, got 'x'\n"),
        ("--method --seed 1", "error: --method needs a value after it\n"),
    ],
)
def test_wrong_option_is_one_clear_line(runs, arguments, message, capsys):
    try:
        code = train.main(["--runs-dir", str(runs), *shlex.split(arguments)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not runs.exists()


def test_wrong_option_as_typed(tmp_path):
    code, out, err = finish(command(tmp_path, "--method", "sdg"))
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown method 'sdg' (did you mean 'sgd'?); valid: sgd, ")
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    """When each file of a run was written last; its lock is there to be taken."""
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    del files[folder / "run.lock"]
    return files


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    assert train.main([*QUICK, "--runs-dir", str(folder), "--name", "run"]) == 0
    return folder / "run"


@pytest.fixture
def finished(complete, runs):
    return shutil.copytree(complete, runs / "run")


def test_run_is_never_overwritten_or_mixed(finished, capsys, monkeypatch):
    arguments = [*QUICK, "--runs-dir", str(finished.parent), "--name", "run"]
    before = contents(finished)
    capsys.readouterr()
    for extra, message in (
        ([], "holds a run; add --resume to continue it, or give another --name"),
        (["--resume", "--seed", "1"], "is a run with seed 0, now 1; resume it with the options"),
        (["--resume", "--steps", "13"], "is a run with steps 12, now 13"),
        (["--resume", "--batch-size", "32"], "is a run with --batch-size 64, now 32"),
    ):
        assert train.main([*arguments, *extra]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    task = data.load_task("digits")
    test = data.Split(task.test.x * 0, task.test.y, task.test.pixels)
    with monkeypatch.context() as patch:
        other = dataclasses.replace(task, test=test)
        patch.setattr(data, "load_task", lambda *args, **kwargs: other)
        assert train.main([*arguments, "--resume"]) == 2
    assert "a run with other examples of the test split; resume" in capsys.readouterr().err
    assert contents(finished) == before
    # What does not change the numbers may change.
    assert train.main([*arguments, "--resume", "--keep", "1", "--checkpoint-every", "3"]) == 0


def test_processes_with_other_data_are_refused(monkeypatch):
    task = data.load_task("digits")
    train.check_same_data(task)

    def gather(numbers):
        other = numbers.copy()
        other[3] += 1
        return np.stack([numbers, numbers, other])

    monkeypatch.setattr(cluster, "gather", gather)
    with pytest.raises(ValueError, match="process 2 has other labels of the validation split than"):
        train.check_same_data(task)


def test_damaged_run_is_refused(finished, capsys):
    resume = ["--runs-dir", str(finished.parent), "--name", "run", "--resume"]
    names = ("config.json", "metrics.jsonl", "metrics.csv", "result.json")
    whole = {name: (finished / name).read_bytes() for name in names}
    metrics = finished / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:7]))
    capsys.readouterr()
    assert train.main(resume) == 2
    assert "metrics.jsonl holds 7 of the 12 steps" in capsys.readouterr().err
    assert len(rows(finished)) == 7
    shutil.rmtree(finished / "tensorboard")
    (finished / "tensorboard").touch()
    assert train.main(resume) == 2
    assert "tensorboard is not a folder" in capsys.readouterr().err
    (finished / "tensorboard").unlink()

    def option(name, value):
        config = json.loads(whole["config.json"])
        config["options"][name] = value
        return json.dumps(config).encode()

    row = json.loads(whole["metrics.jsonl"].splitlines()[0])
    for name, content, message in (
        ("metrics.jsonl", b"\n" * 12, "metrics.jsonl is damaged (line 1: Expecting value"),
        ("metrics.jsonl", b"{}\n" * 12, "metrics.jsonl is damaged (line 1: step or seconds"),
        ("metrics.jsonl", b"5\n" * 12, "metrics.jsonl is damaged (line 1: not a row of"),
        ("metrics.jsonl", b"\xff\n" * 12, "metrics.jsonl is damaged (not UTF-8)"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n" * 12, "(line 1: nested too deeply)"),
        *(
            (
                "metrics.jsonl",
                json.dumps(row | change).encode() + b"\n" + b"{}\n" * 11,
                "metrics.jsonl is damaged (line 1: ",
            )
            for change in ({"loss": "low"}, {"loss": 10**400}, {"step": 2}, {"other": 1})
        ),
        ("metrics.csv", b"\xff\n" * 13, "metrics.csv is damaged (not UTF-8)"),
        ("metrics.csv", b"step\n" * 13, "metrics.csv holds 0 of the 12 steps"),
        ("metrics.csv", None, "metrics.csv is not a file"),
        ("result.json", None, "result.json is not a file"),
        ("config.json", None, "config.json is not a file"),
        ("config.json", b"{}", "config.json is not the config.json of a run"),
        ("config.json", b"null", "config.json is not the config.json of a run"),
        ("config.json", b"[" * 100_000, "config.json is damaged (nested too deeply)"),
        ("config.json", option("steps", "abc"), "--steps must be a whole number, got 'abc'"),
        ("config.json", option("seed", None), "--seed must be a whole number, got None"),
        ("config.json", option("learning_rate", -1), "--learning-rate must be more than 0"),
        ("config.json", option("data_dir", 5), "is of another version of this command"),
        ("config.json", option("task", "foo"), "unknown task 'foo'"),
        ("config.json", option("model_options", "[1]"), "--model-options is a JSON object"),
    ):
        for other, before in whole.items():
            (finished / other).write_bytes(before)
        (finished / name).unlink()
        (finished / name).mkdir() if content is None else (finished / name).write_bytes(content)
        assert train.main(resume) == 2
        out, error = capsys.readouterr()
        assert message in error
        assert error.count("\n") == 1
        assert "compiling" not in out
        if content is None:
            (finished / name).rmdir()
            (finished / name).touch()


def test_other_folders_are_left_alone(runs, capsys):
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "thesis.txt").touch()
    assert train.main(["--runs-dir", str(runs), "--name", "mine"]) == 2
    assert "exists and holds no run; give another --name" in capsys.readouterr().err
    (runs / "file").touch()
    assert train.main(["--runs-dir", str(runs / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
