"""`python -m experiments.subspace_study` as a person types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from experiments import subspace_study
from experiments.reporting.subspace.claims import CLAIMS
from experiments.reporting.subspace.report import PANELS
from experiments.training.studies.subspace_runs import Study

TINY = ["--scale", "tiny", "--panels", "switch"]


def run(*arguments: str) -> int:
    try:
        return subspace_study.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run of one panel (and of alignment, where it starts)."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace_study, "Study", lambda plan: study)
        assert run(*TINY, "--runs-dir", str(runs), "--name", "a") == 0
    return runs / "a"


def again(folder: Path, *arguments: str) -> int:
    return run(*TINY, "--runs-dir", str(folder.parent), "--name", folder.name, *arguments)


def table(folder: Path, panel: str) -> list[dict[str, str]]:
    with (folder / f"{panel}.csv").open() as file:
        return list(csv.DictReader(file))


def test_files(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    panels = ("alignment", "switch")
    pictures = {f"{panel}.{kind}" for panel in panels for kind in ("png", "svg", "csv")}
    others = {
        "run.lock",
        "config.json",
        "units",
        "snapshots",
        "claims.json",
        "report.md",
        "report.html",
    }
    assert names == pictures | others
    for panel in panels:
        assert (folder / f"{panel}.png").read_bytes().startswith(b"\x89PNG")


def test_branches_leave_from_one_point(folder: Path) -> None:
    rows = table(folder, "switch")
    methods = {(row["method"], row["alpha"]) for row in rows}
    assert len(methods) == 3 + 2 * 3
    starts = {row["train_loss"] for row in rows if row["step"] == "20"}
    # The same weights; evaluated by the same program.
    assert len(starts) == 1
    ends = {row["train_loss"] for row in rows if row["step"] == "40"}
    assert len(ends) == len(methods)
    along = {row["step"]: row["train_loss"] for row in table(folder, "alignment")}
    assert along["20"] in starts
    # The branch (1, 1) is SGD itself, step by step.
    sgd = [row for row in rows if row["method"] == "sgd"]
    assert [along[row["step"]] for row in sgd] == [row["train_loss"] for row in sgd]


def test_alignment_is_measured(folder: Path) -> None:
    rows = table(folder, "alignment")
    solved = [row for row in rows if row["chi"]]
    assert [row["step"] for row in solved] == ["0", "10", "20", "30", "40"]
    for row in solved:
        assert row["converged"] == "True"
        values = [float(row[f"eigenvalue_{i}"]) for i in range(1, 15)]
        assert values == sorted(values, reverse=True)
        assert 0 < float(row["chi"]) <= 1
    # The tracked basis of the same point, on fewer examples.
    (switch,) = (row for row in solved if row["step"] == "20")
    assert float(switch["tracked_chi"]) == pytest.approx(float(switch["chi"]), abs=0.1)


def test_resumed_run_makes_the_same_files(
    folder: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace_study, "Study", lambda plan: study)
    units = sorted((folder / "units").rglob("*.json"))
    assert len(units) == 1 + 9
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in units}
    report = (folder / "report.html").read_bytes()
    lost = folder / "units/switch/sgd-1.0-1.0-0.json"
    for path in (lost, folder / "report.html"):
        path.unlink()
    assert again(folder) == 0
    for path in units:
        time, content = before[path]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != lost)
    assert (folder / "report.html").read_bytes() == report


def test_nothing_is_trained_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Study, "walk", fail)
    assert again(folder) == 0


def test_damaged_files_are_named(
    folder: Path,
    study: Study,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(subspace_study, "Study", lambda plan: study)
    unit = folder / "units/switch/sgd-1.0-1.0-0.json"
    snapshots = folder / "snapshots/seed0.npz"
    units = unit.read_bytes(), snapshots.read_bytes()
    for content in (b"null", b"[" * 100_000, b"\xff", units[0].replace(b'"step"', b'"stop"')):
        unit.write_bytes(content)
        assert again(folder) == 2
        error = capsys.readouterr().err
        assert f"{unit} is damaged" in error
        assert error.count("\n") == 1
    unit.unlink()  # its training starts from the snapshots
    for damaged in (None, b"", units[1][:-100], units[1].replace(b"0/0", b"0/9")):
        snapshots.unlink() if damaged is None else snapshots.write_bytes(damaged)
        assert again(folder) == 2
        error = capsys.readouterr().err
        assert "seed0.npz is missing or damaged" in error
        assert error.count("\n") == 1
    unit.write_bytes(units[0])
    snapshots.write_bytes(units[1])


def test_another_configuration_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert again(folder, "--learning-rate", "0.1") == 2
    error = capsys.readouterr().err
    assert "--learning-rate 0.05, now 0.1" in error
    assert "--name" in error
    assert again(folder, "--loss", "cross_entropy") == 2
    assert "loss mse, now cross_entropy" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_strange_or_broken_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text('{"task": "digits"}')
    assert again(tmp_path / "a") == 2
    assert "not a study's folder" in capsys.readouterr().err
    (tmp_path / "a/config.json").write_text("{")
    assert again(tmp_path / "a") == 2
    assert f"{tmp_path / 'a/config.json'} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "mnist"], ["'mnist'", "digits", "mnist5k", "cifar10_5k", "sst2_1k"]),
        (["--loss", "hinge"], ["'hinge'", "cross_entropy", "mse"]),
        (["--scale", "huge"], ["'huge'", "small", "full"]),
        (["--panels", "switch,noisy"], ["'noisy'", "alignment", "noise"]),
        (["--panels", ","], ["--panels", "alignment"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--learning-rate", "-1"], ["--learning-rate must be more than 0"]),
        (["--switch-step", "0"], ["--switch-step must be at least 1, got 0"]),
        (["--name", "../x"], ["--name", "--runs-dir"]),
        (["--speed", "1"], ["--speed", "--help shows all options"]),
        (["--task", "mnist5k", "--data-dir", "nowhere"], ["nowhere"]),
    ],
)
def test_wrong_input_is_explained_and_nothing_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    for part in expected:
        assert part in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_panel_end_to_end(tmp_path: Path) -> None:
    arguments = ["--scale", "tiny", "--loss", "cross_entropy", "--seeds", "2", "--name", "a"]
    assert run(*arguments, "--runs-dir", str(tmp_path)) == 0
    claims = json.loads((tmp_path / "a/claims.json").read_text())
    assert len(claims) == len(CLAIMS)
    report = (tmp_path / "a/report.md").read_text()
    for panel, title in PANELS.items():
        assert f"## {title}" in report
        assert table(tmp_path / "a", panel)
    # Nothing but numbers and None: diverged runs of the stability panel did not stop it.
    values = {row["value"] for row in table(tmp_path / "a", "stability")}
    assert len(values) > 10
