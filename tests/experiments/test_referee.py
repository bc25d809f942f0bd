"""`python -m experiments.referee` as a person types it: tuning, fresh seeds, ledger, continuing."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import json
import pickle
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from rich.console import Console

from experiments import data, referee
from experiments.cli import UsageError
from experiments.reporting.referee import report
from experiments.reporting.referee.study import FAILS, HOLDS, UNDECIDED, Results
from experiments.runs import ledger
from experiments.training.replicas import Trainer
from experiments.training.studies import refereeing
from experiments.training.studies.refereeing import Arena
from tests.experiments.reporting.test_referee import contestant, small_study

TINY = ("tiny", "--name", "tiny")
VERDICTS = {HOLDS, FAILS, UNDECIDED}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and a study of two contestants."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(referee.STUDIES, "tiny", small_study())
    return tmp_path


def seeds_in(path: Path) -> set[int]:
    return {json.loads(line)["seed"] for line in path.read_text().splitlines()}


def test_a_study(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each final seed has a tuning of its own."""
    shared = small_study()
    scale = dataclasses.replace(shared.scales["small"], own_tuning=True)
    study = dataclasses.replace(shared, scales={"small": scale})
    monkeypatch.setitem(referee.STUDIES, "tiny", study)
    assert study.config("small") != shared.config("small")
    assert referee.main(TINY) == 0
    out = capsys.readouterr().out
    folder = here / "runs" / "tiny"
    setting = folder / "one"
    results = json.loads((folder / "results.json").read_text())
    final = setting / "final" / "metrics" / "sgd.jsonl"
    assert seeds_in(setting / "tuning" / "metrics" / "sgd.jsonl") == {0, 1, 2}
    # The tuning's seeds are not used again; a third fresh seed, since two decide nothing.
    assert "seed 3 of up to 3 for ours, free" in out
    assert seeds_in(final) == {3, 4, 5}
    (entry,) = ledger.read(here / "evidence" / "tiny.jsonl")
    ((_, chosen),) = results["chosen"].items()
    runs = {json.loads(line)["learning_rate"]: None for line in final.read_text().splitlines()}
    assert list(runs) == list(dict.fromkeys(rate for _, rate in chosen["free"]))
    assert [len(each) for each in chosen.values()] == [3, 3]
    assert "each seed tuned anew" in entry["note"]
    assert (entry["verdict"], entry["seeds"]) == (results["verdicts"][0]["verdict"], 3)
    assert entry["runs"] == (2 * 2 + 2) * 3
    assert "18 runs, of which 0 diverged; 1 verdict added to evidence" in out
    assert {row["contestant"] for row in results["ranks"]} == {"free", "ours"}

    # The same command finds all of it done, and adds no verdict twice.
    before = final.stat().st_mtime_ns
    assert referee.main(TINY) == 0
    assert "0 verdicts added" in capsys.readouterr().out
    assert final.stat().st_mtime_ns == before
    assert json.loads((folder / "results.json").read_text()) == {
        **results,
        "verdicts": [{**results["verdicts"][0], "date": entry["date"]}],
    }


def test_processes_share_a_folder(here: Path) -> None:
    """Each method is trained by one of three, one of which gives up; the numbers are the same."""
    study = small_study()
    setting, scale = study.scales["small"].settings[0], study.scales["small"]
    plan = referee.plan(setting, scale, referee.Options())
    alone = Arena(plan, 3, here / "alone").train_trials(plan.methods, 1, Console(quiet=True))

    metrics = here / "together" / "tuning" / "metrics"
    metrics.mkdir(parents=True)
    lock = filelock.FileLock(metrics / "sgd.lock")
    lock.acquire()  # a process that trains the first method, and is killed
    outputs = [Console(file=io.StringIO(), width=200) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [
            pool.submit(Arena(plan, 3, here / "together", 2).train_trials, plan.methods, 1, output)
            for output in outputs
        ]
        while not (metrics / "demon_sgd.jsonl").exists():
            time.sleep(0.05)
        lock.release()
        results = [each.result() for each in found]
    assert results[0] == results[1] == alone
    text = "".join(output.file.getvalue() for output in outputs)  # type: ignore[attr-defined]
    assert text.count("2 runs") == 2  # each of the two methods once


@pytest.mark.slow
def test_several_processes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert referee.main(TINY) == 0
    assert referee.main((*TINY, "--name", "shared", "--processes", "2")) == 0
    assert "0 verdicts added" in capsys.readouterr().out
    files = sorted((here / "runs" / "tiny").rglob("*.jsonl"))
    assert len(files) == 4
    for path in files:
        other = here / "runs" / "shared" / path.relative_to(here / "runs" / "tiny")
        assert other.read_text() == path.read_text()


def test_studies_can_be_sent_to_other_processes() -> None:
    for study in referee.STUDIES.values():
        copy = pickle.loads(pickle.dumps(study))
        assert copy.config("full") == study.config("full")


@pytest.mark.parametrize("name", sorted(referee.STUDIES.keys() - {"demon"}))
def test_studies(name: str) -> None:
    """They are fair at each scale, and can be judged whatever the runs measure."""
    study = referee.find_study(name)
    assert set(study.scales) >= {"medium", "full"}
    rng = np.random.default_rng(0)
    for scale in study.scales.values():
        members = {c.name: c for setting in scale.settings for c in setting.contestants}
        shape = len(scale.settings), len(members)
        trials = members[study.free_rival].size
        rates = [r for m in members[study.free_rival].trials for r in m.learning_rates]
        outcome = Results(
            settings=tuple(setting.name for setting in scale.settings),
            contestants=tuple(members),
            ranked=np.array([member.ranked for member in members.values()]),
            errors=rng.uniform(size=(*shape, scale.seeds)),
            equal_errors=rng.uniform(size=(*shape, scale.seeds)),
            tuned=rng.uniform(size=(*shape, trials, scale.tuned(scale.seeds))),
            rates=np.broadcast_to(rates, (*shape, trials)),
            costs=rng.uniform(1, 2, (*shape, scale.most_seeds)),
            budgets=np.full(shape, 3.0),
            unit=study.unit,
            diverged=np.zeros(shape, int),
            runs=0,
        )
        assert {j.verdict for j in report.judge(study, outcome).values()} <= VERDICTS


def test_wrong_examples() -> None:
    """Of the training split alone, as many as asked for, the same ones each time."""
    task = data.load_classification("digits")
    number = len(task.train.y)
    noisy, again = (refereeing.corrupted(task, 0.4, 0.2) for _ in range(2))
    changed = noisy.train.x != task.train.x
    assert (noisy.train.y != task.train.y).sum() == round(0.4 * number)
    assert changed.any(axis=(1, 2, 3)).sum() == round(0.2 * number)
    assert noisy.validation is task.validation
    assert noisy.checksums == again.checksums != task.checksums
    assert refereeing.corrupted(task, 0.0, 0.0) is task
    pixels = dataclasses.replace(task.train, y=np.zeros((number, 3, 2), np.int32))
    wrong = refereeing.corrupted(dataclasses.replace(task, train=pixels), 0.4, 0.0).train.y
    assert ((wrong != 0).sum(), wrong.shape) == (round(0.4 * 6 * number), pixels.y.shape)


def test_settings_on_a_part_of_texts(tmp_path: Path) -> None:
    """Windows of a text, the first ones of which are used; a share of the tokens is right."""
    (tmp_path / "tinyshakespeare.txt").write_text("to be, or not to be. " * 1000)
    study = referee.find_study("extrapolation_transformer")
    scale = study.scales["medium"]
    small = {"embedding_size": 16, "num_layers": 1, "num_heads": 2}
    setting = dataclasses.replace(scale.settings[0], examples=32, model_options=small)
    options = referee.Options(data_dir=tmp_path, steps=4)
    plan = referee.plan(setting, scale, options)
    assert (len(plan.task.train), plan.workers, plan.batch_size) == (32, 8, 32)
    last = Trainer(plan).train(plan.methods[0], [(0.03, 0)])[-1]
    assert 0 < last["test_accuracy"] < 1
    assert "test_counted" not in last
    with pytest.raises(UsageError, match=r"has 147 training examples.*got 200"):
        referee.plan(dataclasses.replace(setting, examples=200), scale, options)
    with pytest.raises(UsageError, match="kind of task 'translation'; valid: classification"):
        referee.plan(dataclasses.replace(setting, task="multi30k"), scale, options)


def test_dry_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert referee.main((*TINY, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "runs  8, finished ones included, and up to 2 more where a sequential test" in out
    assert "hours" in out
    assert [*here.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no study given; valid: demon, subspaces, stoch_grad_adam, stoch_grad_adam_vit"),
        (("demno",), "unknown study 'demno' (did you mean 'demon'?); valid: demon, subspaces"),
        (("tiny", "--scale", "huge"), "unknown scale 'huge'; valid: small"),
        (("demon", "--scale", "medium"), "mnist"),  # no data
        (("tiny", "--name", "a/b"), "--name must be a plain folder name"),
        (("unfair",), "one: ours has 3 trials, free has 2; give every contestant the same"),
    ],
)
def test_wrong_input(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.delenv("OPTAX_ACCEL_DATA", raising=False)
    unfair = small_study(contestant("free", "sgd"), contestant("ours", "demon_sgd", rates=3))
    monkeypatch.setitem(referee.STUDIES, "unfair", unfair)
    assert referee.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_the_ledger_keeps_what_is_refuted(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "demon.jsonl"
    first = dict.fromkeys(ledger.FIELDS) | {
        "study": "demon",
        "claim": "a",
        "text": "x | y",
        "verdict": "holds",
        "estimate": 1.25,
        "low": 0.5,
        "run": "1",
        "date": "2026-01-01",
    }
    later = first | {"verdict": "does not hold here", "run": "2", "date": "2026-01-02"}
    assert ledger.append(path, [first]) == 1
    assert ledger.append(path, [first | {"date": "2026-01-03"}, later]) == 1
    assert ledger.read(path) == [first, later]
    assert [remark for _, remark in ledger.standing([first, later])] == ["refuted later", ""]
    page = ledger.page(path.parent)
    assert page.index("does not hold here") < page.index("holds (refuted later)")
    assert "x \\| y" in page
    assert "1.25 [0.5, …]" in page
    assert "No verdict is recorded yet" in ledger.page(tmp_path / "nothing")
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"demon.jsonl, line 3, is not a verdict"):
        ledger.append(path, [later])
