"""`python -m experiments.referee` as a person types it: tuning, fresh seeds, ledger, continuing."""

from __future__ import annotations

import concurrent.futures
import io
import json
import pickle
import time
from pathlib import Path

import filelock
import pytest
from rich.console import Console

from experiments import referee
from experiments.runs import ledger
from experiments.training.studies.refereeing import Arena
from tests.experiments.reporting.test_referee import contestant, small_study

TINY = ("tiny", "--name", "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and a study of two contestants."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(referee.STUDIES, "tiny", small_study())
    return tmp_path


def seeds_in(path: Path) -> set[int]:
    return {json.loads(line)["seed"] for line in path.read_text().splitlines()}


def test_a_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert referee.main(TINY) == 0
    out = capsys.readouterr().out
    folder = here / "runs" / "tiny"
    setting = folder / "one"
    results = json.loads((folder / "results.json").read_text())
    final = setting / "final" / "metrics" / "sgd.jsonl"
    assert seeds_in(setting / "tuning" / "metrics" / "sgd.jsonl") == {0}
    # The tuning's seed is not used again; a third fresh seed, since two decide nothing.
    assert "seed 3 of up to 3 for ours, free" in out
    assert seeds_in(final) == {1, 2, 3}
    (entry,) = ledger.read(here / "evidence" / "tiny.jsonl")
    assert (entry["verdict"], entry["seeds"]) == (results["verdicts"][0]["verdict"], 3)
    assert entry["runs"] == 2 * 2 + 2 * 3
    assert "10 runs, of which 0 diverged; 1 verdict added to evidence" in out
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
    alone = Arena(plan, 3, here / "alone").train_trials(Console(quiet=True))

    metrics = here / "together" / "tuning" / "metrics"
    metrics.mkdir(parents=True)
    lock = filelock.FileLock(metrics / "sgd.lock")
    lock.acquire()  # a process that trains the first method, and is killed
    outputs = [Console(file=io.StringIO(), width=200) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [
            pool.submit(Arena(plan, 3, here / "together", 2).train_trials, output)
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
        assert copy.config("small") == study.config("small")


def test_dry_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert referee.main((*TINY, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "runs  8, finished ones included, and up to 2 more where a sequential test" in out
    assert "hours" in out
    assert [*here.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no study given; valid: demon"),
        (("demno",), "unknown study 'demno' (did you mean 'demon'?); valid: demon"),
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
