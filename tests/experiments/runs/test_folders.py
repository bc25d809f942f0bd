"""What all commands do with names, folders, numbers and files."""

from __future__ import annotations

import os

import pytest

from experiments.cli import UsageError
from experiments.runs import folders
from experiments.runs.metric_files import MetricFiles
from experiments.runs.records import read_json, read_record, write_record

# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "...",
            "a/..",
            "../a",
            "/tmp",
            "a/b",
            "a\\b",
            "C:",
            "a:b",
            "a|b",
            "*",
            "~?",
        ),
        *("a\0b", "a\nb", "a\x1b[31m", "\u202ea", "\udcff", " a", "a ", "a.", "nul", "COM1.txt"),
        "ä" * 101,
    ],
)
def test_names_that_are_refused(name, tmp_path):
    with pytest.raises(UsageError, match="--name must ") as error:
        folders.locate(tmp_path, name, "run")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["a", ".a", "a.b", "[red]a", "a b", "größe-0.1", "a" * 200])
def test_names_that_are_allowed(name, tmp_path):
    assert folders.locate(tmp_path, name, "run") == tmp_path / name


def test_names_are_checked_by_where_they_lead(tmp_path):
    runs = tmp_path / "runs"
    assert folders.locate(runs, None, "a") == runs / "a"  # which need not exist
    (runs / "a").mkdir(parents=True)
    for link, target in (
        ("out", tmp_path / "elsewhere"),
        ("up", runs),
        ("deep", runs / "a" / "b"),
        ("loop", runs / "loop"),
    ):
        (runs / link).symlink_to(target)
        with pytest.raises(UsageError, match=f"'{link}': .*; give another --name"):
            folders.locate(runs, link, "a")
    (runs / "same").symlink_to(runs / "a")
    assert folders.locate(runs, "same", "a") == runs / "same"
    (tmp_path / "other").symlink_to(runs)
    assert folders.locate(tmp_path / "other", "a", "b") == tmp_path / "other" / "a"


# Folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("events.jsonl", "file"), ("metrics.csv", "file"), ("tensorboard", "folder")]
)
@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_through_a_link(name, kind, dangling, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    folder.mkdir()
    if not dangling:
        outside.mkdir() if kind == "folder" else outside.write_text("precious")
    (folder / name).symlink_to(outside)
    with pytest.raises(UsageError, match=f"{name} is not a {kind}; remove it or give another"):
        MetricFiles(folder, ["step", "seconds"], 0)
    assert [*folder.iterdir()] == [folder / name]
    assert not dangling or not outside.exists()


def test_a_folder_is_one_process_s(tmp_path):
    with folders.claim(tmp_path, lambda: None):
        for owner in ("process 1 on a machine", "\udcff" * 100):
            (tmp_path / "run.lock").write_bytes(owner.encode(errors="surrogateescape"))
            with pytest.raises(UsageError, match=r"is in use by .*; wait until it ends, or give"):
                folders.lock(tmp_path)
    (tmp_path / ".0.partial").touch()  # of a process that was killed
    folders.lock(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    (tmp_path / "run.lock").unlink()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"run\.lock is not a file"):
        folders.lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[NaN]", "NaN is not JSON"),
        (b"1" * 5_000, "Exceeds the limit"),
    ],
)
def test_damaged_json(content, reason, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"a.json is damaged \\({reason}.*; delete it") as error:
        read_json(path, "delete it")
    assert "\n" not in str(error.value)


def test_what_is_not_a_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UsageError, match="is not a file"):
            read_json(tmp_path / name)
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        read_json(tmp_path / "nothing")


def test_records_notice_any_change(tmp_path):
    path = tmp_path / "a.json"
    assert read_record(path) is None
    record = {"rows": [{"loss": 0.25, "step": 3}], "name": "ü"}
    write_record(path, record)
    assert read_record(path) == record
    whole = path.read_text()
    for content in (whole.replace("0.25", "0.26"), whole.replace("crc32", "crc"), "null", "[]"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"a\.json is damaged .*; delete it, so that"):
            read_record(path)
