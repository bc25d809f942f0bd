"""What all commands do with options, files and what they print."""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import threading
import typing
from pathlib import Path

import pytest

import experiments.__main__
from experiments import cli
from experiments.cli import UsageError
from experiments.reporting import tables

COMMANDS = (
    *(
        "accelerator_report",
        "bench",
        "brief_review",
        "compare",
        "ensembles",
        "fault_drill",
        "input_overlap",
        "landscape",
        "launch",
    ),
    *("lr_range_test", "natural_gradient", "scaling", "solvers", "step_cost", "subspace_study"),
    *("survey", "trackers", "train"),
)


# Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_of_every_command_has_a_range(name, capsys):
    command = importlib.import_module(f"experiments.{name}")
    options = command.Options()
    options.check()
    hints = typing.get_type_hints(command.Options)
    for field in dataclasses.fields(options):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        if int not in kinds and float not in kinds:
            continue
        option = f"--{field.name.replace('_', '-')}"
        wrong = [-1, 10**30, "abc", [], True] if int in kinds else [-1.0, float("nan"), "abc", {}]
        for value in wrong:
            with pytest.raises(UsageError, match=f"{option} must be"):
                dataclasses.replace(options, **{field.name: value}).check()
    # The command line is checked alike: the last of the numbers stands for all.
    assert command.main([option, "-1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} must be ")
    assert error.count("\n") == 1


def test_ranges():
    for limits, value, problem in (
        (cli.COUNT, 1, None),
        (cli.COUNT, 0, "at least 1"),
        (cli.COUNT, 2**31, "at most 2147483647"),
        (cli.POSITIVE, 1e-300, None),
        (cli.POSITIVE, float("inf"), "positive and finite"),
        (cli.Range(0, 1, "[)"), 0.0, None),
        (cli.Range(0, 1, "[)"), 1.0, "at least 0 and below 1"),
        (cli.Range(0, 1, "(]"), float("nan"), "more than 0 and at most 1"),
    ):
        assert limits.problem(value) == problem


@dataclasses.dataclass(frozen=True)
class DataOptions(cli.Options):
    """Data and how they are read."""

    task: str = "digits"
    """Data set."""
    data_dir: Path | None = None
    """Folder with the files,
    if there are any."""


@dataclasses.dataclass(frozen=True)
class GroupedOptions(DataOptions):
    """Train."""

    steps: int = 3
    """Steps."""
    learning_rate: float | None = None
    """Learning rate; default: 0.1."""
    overwrite: bool = False
    """Replace what is there."""


@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_groups_and_values_but_no_types(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.parse(GroupedOptions(steps=5), ["--help"], "p")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    words = [word for word in out.split() if word.strip("│|─-╭╮╰╯+")]  # without the boxes
    text = " ".join(words)
    titles = [before for before, word in itertools.pairwise(words) if word == "options"]
    assert titles[1:] == ["data", "method", "length", "output"]
    for part in (
        "this help message and exit data options Data and how they are read. --task STR Data set.",
        "--data-dir PATH Folder with the files, if there are any. method options",
        "--learning-rate FLOAT Learning rate; default: 0.1. length options",
        f"{cli.GROUPS['length'].summary} --steps INT Steps. (default: 5) output options",
    ):
        assert part in text
    assert text.endswith("--overwrite Replace what is there.")


def test_a_line_is_read_or_explained(capsys):
    default = GroupedOptions(steps=5)
    assert cli.parse(default, [], "p") == default
    words = ["--task", "a", "--steps", "7", "--learning-rate", "1", "--overwrite"]
    assert cli.parse(default, words, "p") == GroupedOptions("a", None, 7, 1.0, True)
    assert cli.parse(GroupedOptions(learning_rate=1.0), ["--learning-rate", "None"], "p") == (
        GroupedOptions()
    )
    with pytest.raises(SystemExit):
        cli.parse(default, ["--stepz", "1", "--lr=0.1"], "p")
    error = capsys.readouterr().err
    assert error.endswith("; did you mean --steps, --learning-rate? p --help shows all options\n")
    assert error.count("\n") == 1
    with pytest.raises(UsageError, match="--steps must be at least 1, got 0"):
        cli.parse(default, ["--steps", "0"], "p")
    # A function's names of its arguments are shown as options, unless they are something else.
    cli.fail("learning_rate=0.1 and data_dir are wrong, 'data_dir' and a/data_dir may be names")
    assert capsys.readouterr().err == (
        "error: --learning-rate 0.1 and --data-dir are wrong, 'data_dir' and a/data_dir may be "
        "names\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_in_a_group(name):
    options = importlib.import_module(f"experiments.{name}").Options
    texts = cli._descriptions(options)
    for field in dataclasses.fields(options):
        assert texts[field.name]
        assert cli._group(options, field.name) != "other", field.name


def test_the_commands_are_listed(capsys):
    assert experiments.__main__.main([]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n{name} " in out
    assert "\ntrain               Train one model on one task with one method.\n" in out
    assert experiments.__main__.main(["tain"]) == 2
    assert "unknown command 'tain' (did you mean 'train'?); valid: " in capsys.readouterr().err
    assert experiments.__main__.main(["fault_drill", "--seed", "-1"]) == 2
    assert "--seed must be at least 0, got -1" in capsys.readouterr().err


def test_the_first_rule_that_does_not_hold_is_told():
    rules = [
        cli.Rule[int](lambda n: n > 0, lambda n: f"{n} is not positive"),
        cli.Rule[int](lambda n: 12 % n == 0, lambda n: f"{n} does not divide 12"),
    ]
    cli.enforce(rules, 4)
    for value, message in ((0, "0 is not positive"), (5, "5 does not divide 12")):
        with pytest.raises(UsageError, match=message):
            cli.enforce(rules, value)


# Files ------------------------------------------------------------------------------------------


def test_write_atomic_by_several_at_once(tmp_path):
    path = tmp_path / ("a" * 250)  # no room for a longer name
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=cli.write_atomic, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(IsADirectoryError):
        cli.write_atomic(tmp_path, "a")
    assert [*tmp_path.iterdir()] == [path]


# Output -----------------------------------------------------------------------------------------


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    @cli.command
    def main(argv=None):
        cli.write_atomic(tmp_path / "no" / "folder", "")
        return 0

    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 2] No such file or directory: ")
    assert error.count("\n") == 1
    (tmp_path / "a").mkdir()
    cli.check_files(
        {"--json": tmp_path / "b" / "c.json", "--html": tmp_path / "c", "--trace": None}
    )
    with pytest.raises(UsageError, match=r"--json .*a is not a file; give another one"):
        cli.check_files({"--json": tmp_path / "a"})
    with pytest.raises(
        UsageError, match=r"^--json and --html name the same file .*; give two files"
    ):
        cli.check_files({"--json": tmp_path / "c", "--html": tmp_path / "a" / ".." / "c"})


def test_names_are_shown_as_they_are(monkeypatch, capsys):
    for name in ("[/b]", "[red]x[/red]", ":smile:", "[link=http://a]b"):
        console = cli.console(80)
        console.file = io.StringIO()
        table = tables.table([name], title=name)
        table.add_row(name)
        console.print(f"-> {name}", table)
        assert console.file.getvalue().count(name) == 4
        assert cli.fail(name) == 2
        assert capsys.readouterr().err == f"error: {name}\n"
    console = cli.console(80)
    console.file = io.StringIO()
    console.print("a\x1b[31m\udcff")
    assert console.file.getvalue() == "a\\x1b[31m\\udcff\n"
    assert cli.fail("a\x1b[31m", 1) == 1
    assert capsys.readouterr().err == "error: a\\x1b[31m\n"
