"""The training command as a person uses it: runs, interruptions, mistakes."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import models
from experiments import data, engine, train
from experiments.checkpoints import Checkpoints
from experiments.methods import METHODS
from tests.experiments.test_data import write_sst2

ROOT = Path(__file__).parents[2]
# Small and quick to compile; 16 steps an epoch.
QUICK = ["--devices", "1", "--steps", "12", "--eval-every", "5"]
# 20 checkpoints, which give the test that kills the run the time to do so.
LONG = ["--method", "stoch_grad_adam", "--steps", "400", "--eval-every", "100"]
LONG += ["--checkpoint-every", "20", "--keep", "2"]


@pytest.fixture(autouse=True)
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
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


def final_state(folder):
    config = json.loads((folder / "config.json").read_text())["options"]
    names = ("task", "method", "steps", "batch_size", "seed")
    options = train.Options(devices=1, **{name: config[name] for name in names})
    _, _, state = train.build(train.resolve(options))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(state).state


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
    deadline = time.monotonic() + 100
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
    files = {"config.json", "metrics.jsonl", "metrics.csv", "result.json"}
    assert names == files | {"tensorboard", "checkpoints"}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["380", "400"]

    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["learning_rate"] == 0.003
    assert config["versions"]["jax"] == jax.__version__

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

    recorded = events(folder)
    assert len(recorded) == 400 + 2 * 4
    for line in lines:
        assert recorded["train/loss", line["step"]] == np.float32(line["loss"])
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
    assert len(events(killed)) == 400 + 2 * 4


@pytest.mark.parametrize(
    "method", ["sgd", "demon_adam", pytest.param("bulk_sgd", marks=pytest.mark.slow)]
)
def test_ctrl_c_saves_and_says_how_to_continue(runs, method, monkeypatch, capsys):
    arguments = [*QUICK, "--runs-dir", str(runs), "--method", method]
    assert train.main([*arguments, "--name", "full"]) == 0

    refresh = train.methods.Method.refresh

    def interrupted(self, step, **kwargs):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return refresh(self, step, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train.methods.Method, "refresh", interrupted)
        assert train.main([*arguments, "--name", "stopped"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted: saved step 7 of 12" in out
    assert [row["step"] for row in rows(runs / "stopped")] == list(range(1, 8))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    words = shlex.split(err.strip().removeprefix("to continue: python -m experiments.train "))
    assert train.main(words) == 0
    assert_same_run(runs / "stopped", runs / "full")
    # A run that is complete only tells its result again.
    assert train.main(words) == 0
    assert_same_run(runs / "stopped", runs / "full")


def test_run_killed_before_its_first_checkpoint_starts_again(runs):
    arguments = [*QUICK, "--runs-dir", str(runs), "--name", "run"]
    assert train.main(arguments) == 0
    shutil.copytree(runs / "run", runs / "full")
    shutil.rmtree(runs / "run" / "checkpoints")
    assert train.main([*arguments, "--resume"]) == 0
    assert_same_run(runs / "run", runs / "full")


@pytest.mark.parametrize("mode", ["jit", "pmap", "shard_map"])
def test_parallel_modes_train_alike(runs, mode):
    quick = [*QUICK, "--runs-dir", str(runs), "--method", "extrap_sgd"]
    assert train.main([*quick, "--name", "one"]) == 0
    assert train.main([*quick, "--name", mode, "--parallel", mode, "--devices", "4"]) == 0
    for row, expected in zip(rows(runs / mode), rows(runs / "one"), strict=True):
        assert row.keys() == expected.keys()
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
    # Resumed where it ended: the state goes back into its copies.
    assert train.main(["--runs-dir", str(runs), "--name", mode, "--resume"]) == 0


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
    graphdef, params, rest = engine.split(
        models.create("mlp", input_shape=task.input_shape, num_classes=10)
    )
    first = engine.objective(graphdef, rest, batch["x"], batch["y"], loss="mse")(params)
    np.testing.assert_allclose(rows(runs / "run")[0]["loss"], first, rtol=1e-6)
    # Validation and test use it too: below the 2.3 of a cross entropy before it has learned.
    assert rows(runs / "run")[-1]["validation_loss"] < 0.6
    assert json.loads((runs / "run" / "result.json").read_text())["test_loss"] < 0.6
    assert train.main([*quick[:-1], "cross_entropy", "--resume"]) == 2
    assert "a run with loss mse, now cross_entropy" in capsys.readouterr().err


def test_loss_that_is_not_finite_stays_valid_json(runs):
    quick = [*QUICK, "--runs-dir", str(runs), "--name", "run", "--learning-rate", "1e38"]
    assert train.main(quick) == 0
    assert rows(runs / "run")[-1]["loss"] is None


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("sgd", set()),
        ("demon_sgd", {"momentum"}),
        ("demon_adam", {"momentum"}),
        ("cosine_momentum_sgd", {"momentum"}),
        ("bulk_sgd", {"alignment", "top_eigenvalue"}),
    ],
)
def test_statistics_of_the_optimizer(method, names):
    tx = METHODS[method].build(0.1, total_steps=10, num_classes=2)
    found = train.statistics(tx.init({"value": jnp.ones((3, 2)), "momentum": jnp.ones(2)}))
    assert set(found) == names
    assert all(value.shape == () for value in found.values())


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task foo", "unknown task 'foo'; valid: digits, mnist"),
        ("--model foo", "unknown model 'foo'; valid: mlp, cnn"),
        ("--model transformer", "'transformer' reads token ids and needs vocabulary_size"),
        ("--loss foo", "unknown loss 'foo'; valid: cross_entropy, mse"),
        ("--method foo", "unknown method 'foo'; valid methods are sgd, "),
        ("--parallel foo", "unknown parallel mode 'foo'; valid: jit, fsdp, pmap, shard_map"),
        ("--learning-rate 0", "--learning-rate must be positive and finite, got 0.0"),
        ("--learning-rate nan", "--learning-rate must be positive and finite, got nan"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--keep 0", "--keep must be at least 1, got 0"),
        ("--seed -1", "--seed must be between 0 and "),
        ("--steps 3 --epochs 1", "--epochs and --steps exclude each other"),
        ("--batch-size 1078", "--batch-size 1078 is more than the 1077 training examples"),
        ("--devices 3", "--batch-size 64 does not split evenly over 3 devices; use e.g. 63 or 66"),
        ("--devices 9", "--devices 9: there are only 8 of kind cpu"),
        (
            "--devices 4 --method bulk_sgd --curvature-batch-size 30",
            "--curvature-batch-size 30 does not split evenly over 4 devices; use e.g. 28 or 32",
        ),
        ("--curvature-batch-size 64", "method sgd uses no curvature; leave it out"),
        ("--name a/b", "--name must be a plain folder name, got 'a/b'"),
        ("--task mnist --data-dir nowhere", "nowhere"),
        ("--resume", "config.json; leave out --resume to start a run"),
        ("--bogus 1", "Unrecognized options: --bogus, 1 Valid options: --task "),
        ("--learning-rate fast", "Error parsing --learning-rate: "),
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
    assert err.startswith("error: unknown method 'sdg'; valid methods are sgd, ")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def finished(runs):
    assert train.main([*QUICK, "--runs-dir", str(runs), "--name", "run"]) == 0
    return runs / "run"


def test_run_is_never_overwritten_or_mixed(finished, capsys):
    arguments = [*QUICK, "--runs-dir", str(finished.parent), "--name", "run"]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    capsys.readouterr()
    for extra, message in (
        ([], "holds a run; add --resume to continue it, or give another --name"),
        (["--resume", "--seed", "1"], "is a run with seed 0, now 1; resume it with the options"),
        (["--resume", "--steps", "13"], "is a run with steps 12, now 13"),
        (["--resume", "--parallel", "pmap"], "is a run with parallel jit, now pmap"),
    ):
        assert train.main([*arguments, *extra]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    # What does not change the numbers may change.
    assert train.main([*arguments, "--resume", "--keep", "1", "--checkpoint-every", "3"]) == 0


def test_damaged_run_is_refused(finished, capsys):
    resume = ["--runs-dir", str(finished.parent), "--name", "run", "--resume"]
    metrics = finished / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:7]))
    capsys.readouterr()
    assert train.main(resume) == 2
    assert "metrics.jsonl holds 7 of the 12 steps" in capsys.readouterr().err
    assert len(rows(finished)) == 7
    metrics.write_text("\n" * 12)
    assert train.main(resume) == 2
    assert "metrics.jsonl is damaged" in capsys.readouterr().err
    (finished / "config.json").write_text("{}")
    assert train.main(resume) == 2
    assert "config.json is not the config.json of a run" in capsys.readouterr().err


def test_other_folders_are_left_alone(runs, capsys):
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "thesis.txt").touch()
    assert train.main(["--runs-dir", str(runs), "--name", "mine"]) == 2
    assert "exists and holds no run; give another --name" in capsys.readouterr().err
    (runs / "file").touch()
    assert train.main(["--runs-dir", str(runs / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
