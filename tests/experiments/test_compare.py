"""`python -m experiments.compare` as a person types it."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from experiments import compare, methods
from experiments.reporting.summary import COMPARISON
from experiments.runs import folders
from experiments.training import networks, replicas
from experiments.training.studies import comparison
from tests.experiments.data.files import write_sst2

TINY = ["--task", "digits", "--methods", "sgd,adam", "--seeds", "2", "--steps", "12"]
ROOT = Path(compare.__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    try:
        return compare.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_table_and_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--name", "first", "--eval-every", "6") == 0
    out = capsys.readouterr().out
    assert "sgd" in out
    assert "adam" in out
    assert "standard error" in out

    folder = here / "runs" / "first"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("run.lock", "config.json", "metrics", "timing.json", "results.json", "results.csv"),
        *("curves.png", "curves.svg", "rates.png", "rates.svg", "report.html"),
    }
    for method in ("sgd", "adam"):
        lines = (folder / "metrics" / f"{method}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 5 * 2 * 3  # rates x seeds x evaluations at 0, 6 and 12
        assert {record["step"] for record in records} == {0, 6, 12}
        assert all("test_accuracy" in record for record in records if record["step"] == 12)
        # One seed, one start: the untrained model scores the same at every rate.
        start = [r["validation_loss"] for r in records if r["step"] == 0 and r["seed"] == 1]
        np.testing.assert_allclose(start, start[0], rtol=1e-6)
    results = json.loads((folder / "results.json").read_text())
    sgd, adam = results["rows"]
    assert (sgd["state_relative_to_parameters"], sgd["time_relative_to_base"]) == (1.0, None)
    assert adam["state_relative_to_parameters"] == pytest.approx(2.0, abs=0.01)
    assert sgd["gradient_evaluations"] == 12
    with (folder / "results.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["sgd", "adam"]


def test_both_methods_start_alike_and_differ_by_seed(here: Path) -> None:
    grid = ["--learning-rates", "0.1"]
    assert run(*TINY, "--name", "a", "--eval-every", "12", *grid) == 0

    def starts(method: str) -> dict[int, float]:
        lines = (here / "runs/a/metrics" / f"{method}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["seed"]: r["validation_loss"] for r in records if r["step"] == 0}

    assert starts("sgd") == starts("adam")
    assert len(set(starts("sgd").values())) == 2
    results = json.loads((here / "runs/a/results.json").read_text())
    assert results["config"]["methods"] == {"sgd": [0.1], "adam": [0.1]}
    chosen = [(row["learning_rate"], row["grid_edge"]) for row in results["rows"]]
    assert chosen == [(0.1, None), (0.1, None)]  # the only one is on no edge


@pytest.mark.slow
def test_curvature_is_counted(here: Path) -> None:
    method = methods.METHODS["bulk_sgd"]
    period = method.refresh_every
    assert period is not None
    steps = period + 1
    arguments = ["--methods", "bulk_sgd", "--seeds", "1", "--steps", str(steps), "--name", "bulk"]
    assert run(*arguments, "--batch-size", "32", "--curvature-batch-size", "64") == 0
    row = json.loads((here / "runs/bulk/results.json").read_text())["rows"][0]
    plan = compare.resolve(
        compare.Options(
            methods="bulk_sgd", seeds=1, steps=steps, batch_size=32, curvature_batch_size=64
        )
    )
    products = replicas.Trainer(plan).products(method)
    assert products[0] > products[period] > 0  # cold start, warm sweep
    assert products[1] == 0
    # Each product: two gradients of a batch twice as large.
    assert row["gradient_evaluations"] == steps + 4 * sum(products)
    # The base is timed, though it was not asked for.
    assert row["time_relative_to_base"] > 0


@pytest.mark.slow
def test_one_at_a_time_gives_the_same(here: Path) -> None:
    assert run(*TINY, "--name", "together") == 0
    assert run(*TINY, "--name", "alone", "--max-replicas", "1") == 0
    assert run(*TINY, "--name", "chunks", "--max-replicas", "4") == 0  # 3, 3, 3 and 1 of 10

    def losses(name: str) -> dict[tuple[float, int, int], float]:
        lines = (here / "runs" / name / "metrics/sgd.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {(r["learning_rate"], r["seed"], r["step"]): r["validation_loss"] for r in records}

    together = losses("together")
    for name in ("alone", "chunks"):
        other = losses(name)
        assert other.keys() == together.keys()
        keys = [key for key in together if key[0] <= 0.1]  # beyond, rounding errors grow
        np.testing.assert_allclose(
            [other[key] for key in keys], [together[key] for key in keys], rtol=1e-4
        )


@pytest.mark.slow
def test_token_ids_and_another_loss(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TIMING_SECONDS", 0.0)
    write_sst2(here, rows=1_000)
    arguments = ["--task", "sst2_1k", "--data-dir", str(here), "--methods", "sgd", "--seeds", "1"]
    arguments += ["--steps", "2", "--batch-size", "8", "--loss", "mse"]
    assert run(*arguments, "--name", "a") == 0
    settings = json.loads((here / "runs/a/config.json").read_text())
    assert (settings["model"], settings["loss"]) == ("transformer", "mse")
    plan = compare.resolve(
        compare.Options(task="sst2_1k", data_dir=here, methods="sgd", seeds=1, steps=2, loss="mse")
    )
    trainer = replicas.Trainer(plan)
    score = functools.partial(networks.evaluate, trainer.graphdef, *trainer.weights[0], loss="mse")
    validation = plan.task.validation
    start = jax.jit(score)({"x": validation.x, "y": validation.y})["loss"]
    lines = (here / "runs/a/metrics/sgd.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    starts = [record["validation_loss"] for record in records if record["step"] == 0]
    np.testing.assert_allclose(starts, [start] * 5, rtol=1e-5)
    # Five rates, five results.
    assert len({record["test_loss"] for record in records if record["step"] == 2}) == 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "sgd,adamm"], ["adamm", "adam", "demon_sgd"]),
        (["--methods", ","], ["no method", "demon_sgd"]),
        (["--methods", "sgd,adam,sgd"], ["sgd more than once"]),
        (["--task", "digit"], ["'digit'", "digits", "cifar10"]),
        (["--model", "mlpp"], ["'mlpp'", "mlp", "resnet20"]),
        (["--model", "transformer"], ["needs vocabulary_size", "number of different token ids"]),
        (["--loss", "hinge"], ["'hinge'", "cross_entropy", "mse"]),
        (["--epoch-count", "3"], ["--epoch-count", "--help shows all options"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--seeds", "three"], ["--seeds", "three"]),
        (["--steps", "5", "--epochs", "1"], ["--epochs", "--steps"]),
        (["--learning-rates", "0.1,0.01,0.1"], ["--learning-rates has 0.1 more than once"]),
        (["--learning-rates", "0.1,-1"], ["positive, finite numbers", "'-1' in '0.1,-1'"]),
        (["--target", "95"], ["--target must be more than 0 and at most 1, got 95"]),
        (["--batch-size", "100000"], ["--batch-size 100000", "training examples"]),
        (["--name", "../x"], ["--name", "'../x'", "--runs-dir"]),
        (["--task", "mnist", "--data-dir", "nowhere"], ["nowhere"]),
    ],
)
def test_wrong_input_is_explained_and_nothing_written(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    for part in expected:
        assert part in captured.err
    assert captured.out == ""
    assert list(here.iterdir()) == []


def test_catalogue(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    out = capsys.readouterr().out
    for method in methods.METHODS.values():
        assert f"  {method.name}: {method.summary}\n" in out
        assert f"{method.fidelity}: {method.paper.authors}, {method.paper.link}\n" in out
        assert f"{method.family}:\n" in out
    costs = {entry.name: entry.extra_cost() for entry in methods.METHODS.values()}
    assert costs["sgd"] == "state 1 x the parameters"
    assert costs["extrap_sgd"] == "2 gradients a step, state 1 x the parameters"
    assert costs["bulk_sgd"].startswith("10 Hessian-vector products every 20 steps, state 11 x")
    assert costs["bulk_sgd_round_robin"].startswith("1 Hessian-vector product every step, ")
    assert all(f"cost: {cost}" in out for cost in costs.values())
    assert run("--list", "methods") == 0
    assert capsys.readouterr().out in out
    assert run("--list", "tasks") == 0
    tasks = capsys.readouterr().out
    assert "  digits: classification, model mlp, method sgd\n" in tasks
    assert "multi30k" not in tasks  # which `train` has
    assert run("--list", "models") == 0
    for name in models.list():
        assert f"  {name}: " in out
    assert "  resnet20: The CIFAR networks of He et al. (2015)" in capsys.readouterr().out
    assert list(here.iterdir()) == []


def test_a_method_that_needs_the_objective_says_so() -> None:
    with pytest.raises(ValueError, match="finds the layers in the objective"):
        methods.METHODS["kfac"].build(0.1, total_steps=10, num_classes=2)


@pytest.mark.slow
def test_another_configuration_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--name", "a") == 0
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    capsys.readouterr()
    assert run(*TINY, "--name", "a", "--batch-size", "32") == 2
    error = capsys.readouterr().err
    assert "--batch-size 64, now 32" in error
    assert "--name" in error
    assert "--overwrite" in error
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert run(*TINY, "--name", "a", "--batch-size", "32", "--overwrite") == 0
    assert json.loads((here / "runs/a/config.json").read_text())["batch_size"] == 32


def test_a_strange_folder_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs/a").mkdir(parents=True)
    (here / "runs/a/thesis.txt").write_text("years of work")
    # One with settings, but those of a training run.
    for settings in (None, '{"task": "digits", "method": "sgd"}'):
        if settings is not None:
            (here / "runs/a/config.json").write_text(settings)
        assert run(*TINY, "--name", "a", "--overwrite") == 2
        assert "not a comparison's folder" in capsys.readouterr().err
        assert (here / "runs/a/thesis.txt").exists()
    # A file where the folder should be.
    (here / "runs/b").write_text("")
    assert run(*TINY, "--name", "b") == 2
    assert "runs/b" in capsys.readouterr().err


def test_damaged_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--methods", "sgd", "--seeds", "1", "--steps", "4", "--name", "a"]
    assert run(*arguments) == 0
    folder = here / "runs/a"
    # Each of these ends the command with one line that names the file.
    for name, content, message in (
        ("timing.json", "{}", "is damaged (it is not what was written there); delete it"),
        ("timing.json", "null", "is damaged"),
        ("timing.json", "[" * 100_000, "is damaged (nested too deeply); delete it"),
        ("config.json", "{", "is damaged (Expecting"),
        ("config.json", b"\xff", "is damaged (not UTF-8)"),
        ("config.json", "5", "is not a comparison's folder"),
        ("metrics/sgd.jsonl", None, "sgd.jsonl is not a file"),
        ("curves.png", None, "curves.png is not a file"),
    ):
        path = folder / name
        before = path.read_bytes()
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        capsys.readouterr()
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        path.rmdir() if content is None else path.unlink()
        path.write_bytes(before)

    plan = compare.resolve(compare.Options(methods="sgd", seeds=1, steps=4))
    (method,), path = plan.methods, folder / "metrics/sgd.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(comparison.read_records(plan, method, path)) == len(lines)
    last = json.loads(lines[-1])
    # Each of these loses the last run, which is trained again, and no other.
    kept = [line for line in lines if json.loads(line)["learning_rate"] != last["learning_rate"]]
    points = [line for line in lines if line not in kept]
    for damaged in (
        points[:-1],
        [*points[:-1], points[-1][:40]],
        [*points, points[-1]],
        [*points[:-1], b"\xff\n"],
        [*points[:-1], b"5\n"],
        *(
            [*points[:-1], json.dumps(last | change).encode()]
            for change in (
                {"test_accuracy": 1.5},
                {"test_loss": "low"},
                {"step": 3},
                {"seed": [0]},
                {"gradient_evaluations": -1},
            )
        ),
    ):
        path.write_bytes(b"".join([*kept, *damaged]))
        found = comparison.read_records(plan, method, path)
        assert [*map(json.loads, kept)] == found
    path.write_bytes(b"".join([*kept, *points[:-1]]))
    assert run(*arguments) == 0
    assert "damaged runs in" in capsys.readouterr().out
    again = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert again[: len(kept)] == [*map(json.loads, kept)]
    for record, line in zip(again[len(kept) :], points, strict=True):
        expected = json.loads(line)
        assert record.pop("method") == expected.pop("method")
        assert record == pytest.approx(expected, rel=1e-4)


def test_locked_and_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "runs/a"
    arguments = ["--methods", "sgd", "--seeds", "1", "--steps", "2", "--name", "a"]
    assert run(*arguments) == 0
    (folder / "notes.txt").write_text("mine")
    held = folders.lock(folder)
    capsys.readouterr()
    for extra in ([], ["--overwrite"]):
        assert run(*arguments, *extra) == 2
        assert "a is in use by process" in capsys.readouterr().err
    held.release()
    config = (folder / "config.json").read_text()
    COMPARISON(folder, json.loads(config), overwrite=True).open()
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics", "notes.txt", "run.lock"}
    assert not [*(folder / "metrics").iterdir()]


@pytest.mark.slow
def test_interrupted_and_continued(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--methods", "sgd,adam", "--seeds", "2", "--steps", "400", "--name", "a"]
    # A test runner in the background may have switched Ctrl-C off for its children.
    command = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('experiments.compare', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", command, *arguments, "--runs-dir", str(here)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first, second = here / "a/metrics/sgd.jsonl", here / "a/metrics/adam.jsonl"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "the same command continues" in error
    assert "Traceback" not in error
    assert not second.exists()
    assert not (here / "a/results.json").exists()

    before = first.stat().st_mtime_ns
    assert run(*arguments, "--runs-dir", str(here)) == 0
    out = capsys.readouterr().out
    assert "sgd                already done" in out
    assert first.stat().st_mtime_ns == before
    assert len(json.loads((here / "a/results.json").read_text())["rows"]) == 2


def test_only_missing_runs_are_trained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--name", "a") == 0
    path = here / "runs/a/metrics/sgd.jsonl"
    whole = path.read_text()
    kept = [line for line in whole.splitlines() if json.loads(line)["learning_rate"] != 0.1]
    path.write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    assert run(*TINY, "--name", "a") == 0
    assert "2 runs of 12 steps" in capsys.readouterr().out
    again = path.read_text().splitlines()
    assert len(again) == len(whole.splitlines())
    assert again[: len(kept)] == kept


def test_diverging_runs_do_not_stop_the_others(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = dataclasses.replace(
        methods.METHODS["plain_sgd"], learning_rates=(0.01, 0.1, 1e10, 1e30, 1e38)
    )
    monkeypatch.setitem(methods.METHODS, "plain_sgd", wild)
    arguments = ["--methods", "plain_sgd", "--seeds", "1", "--steps", "4", "--name", "wild"]
    assert run(*arguments) == 0
    row = json.loads((here / "runs/wild/results.json").read_text())["rows"][0]
    assert row["learning_rate"] in (0.01, 0.1)
    assert row["diverged"] >= 1
    assert "Diverged" in capsys.readouterr().out
