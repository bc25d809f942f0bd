"""Folders of studies: whose they are, how they continue, what an interruption says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import cli
from experiments.cli import UsageError
from experiments.runs import folders
from experiments.runs.study import StudyFolder, claim_results, write_results


def results_of(folder: Path, command: str) -> None:
    with claim_results(folder, command, ["a.png"]):
        write_results(folder, command, cli.Options(), {"numbers": [1]})


def test_a_folder_is_its_command_s(tmp_path):
    folder = tmp_path / "runs" / "a"
    results_of(folder, "one")
    results_of(folder, "one")
    assert json.loads((folder / "results.json").read_text())["numbers"] == [1]
    with pytest.raises(UsageError, match="a holds something else than two; give another --name"):
        results_of(folder, "two")
    (folder / "a.png").mkdir()
    with pytest.raises(UsageError, match=r"a\.png is not a file; remove it"):
        results_of(folder, "one")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is not a folder"):
        results_of(tmp_path / "file", "one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="mine holds something else"):
        results_of(tmp_path / "mine", "one")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def study(folder: Path, steps: int = 3, **settings: Any) -> StudyFolder:
    config = {"rates": [0.1], "steps": steps}
    return StudyFolder(folder, config, "a study", "rates", ["a.png"], ["parts"], **settings)


def test_a_study_continues_with_the_same_settings_only(tmp_path):
    folder = tmp_path / "a"
    with study(folder).claim():
        (folder / "parts" / "one").touch()
        with pytest.raises(UsageError, match="a is in use by process"):
            folders.lock(folder)
    with study(folder, overwrite=False).claim():
        assert (folder / "parts" / "one").exists()
    for overwrite, remedy in ((None, ""), (False, " --overwrite to replace it,")):
        expected = (
            f"{folder} holds a study with steps 3, now 4; give another --name,{remedy} or the old "
            "settings to continue it"
        )
        with pytest.raises(UsageError) as error, study(folder, 4, overwrite=overwrite).claim():
            pass
        assert str(error.value) == expected
    (folder / "notes.txt").touch()
    with study(folder, 4, overwrite=True).claim():
        assert json.loads((folder / "config.json").read_text())["steps"] == 4
    assert not (folder / "parts" / "one").exists()
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("overwrite", [None, False, True])
def test_what_is_not_a_study_is_left_alone(overwrite, tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    with pytest.raises(UsageError, match="is not a study's folder; give another --name"):
        study(tmp_path, overwrite=overwrite).check()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_interruption_says_what_is_kept(tmp_path, capsys):
    @cli.command
    def piece_by_piece(argv=None):
        with study(tmp_path / "a").claim():
            raise KeyboardInterrupt

    @cli.command
    def at_the_end(argv=None):
        with claim_results(tmp_path / "b", "b", []):
            raise KeyboardInterrupt

    assert piece_by_piece() == 130
    kept = f"finished runs are kept in {tmp_path / 'a'}; the same command continues"
    assert capsys.readouterr().err == f"interrupted: {kept}\n"
    assert at_the_end() == 130
    error = capsys.readouterr().err
    assert error == "interrupted: nothing is kept; the same command starts again\n"
    assert not (tmp_path / "b" / "results.json").exists()
    for name in "ab":
        folders.lock(tmp_path / name).release()
