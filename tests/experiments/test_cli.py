"""What all commands do with options, files and what they print."""

from __future__ import annotations

import dataclasses
import importlib
import io
import threading
import typing

import pytest

from experiments import cli
from experiments.cli import UsageError
from experiments.reporting import tables

COMMANDS = (
    *("bench", "brief_review", "compare", "ensembles", "fault_drill", "input_overlap", "launch"),
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
        wrong = [-1, 10**30, "abc", [], True] if int in kinds else [-1.0, float("nan"), "abc", {}]
        for value in wrong:
            with pytest.raises(UsageError, match=f"--{field.name.replace('_', '-')} must be"):
                dataclasses.replace(options, **{field.name: value}).check()
        option = f"--{field.name.replace('_', '-')}"
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


@dataclasses.dataclass(frozen=True)
class LengthOptions(cli.Options):
    """How many steps."""

    steps: int = 3
    """Steps."""


@dataclasses.dataclass(frozen=True)
class GroupedOptions(DataOptions, LengthOptions):
    """Train."""


def test_groups_of_options_are_boxes_of_the_help(capsys):
    default = GroupedOptions(steps=5)
    assert cli.parse(default, [], "p") == default
    parsed = cli.parse(default, ["--task", "a", "--steps", "7"], "p")
    assert parsed == GroupedOptions(task="a", steps=7)
    with pytest.raises(SystemExit):
        cli.parse(default, ["--help"], "p")
    out = capsys.readouterr().out
    for text in ("data options", "Data and how they are read.", "length options", "default: 5"):
        assert text in out
    with pytest.raises(SystemExit):
        cli.parse(default, ["--stepz", "1"], "p")
    assert capsys.readouterr().err.endswith("Valid options: --task --steps\n")
    with pytest.raises(UsageError, match="--steps must be at least 1, got 0"):
        cli.parse(default, ["--steps", "0"], "p")


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
    cli.check_file("--json", tmp_path / "b" / "c.json")
    with pytest.raises(UsageError, match=r"--json .*a is not a file; give another one"):
        cli.check_file("--json", tmp_path / "a")


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
