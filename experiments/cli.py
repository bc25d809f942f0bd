"""What the command lines share: options, errors and files."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import secrets
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T", bound="Options")


class UsageError(ValueError):
    """Wrong input: one line saying which value, what is allowed, how to fix it."""


class Interrupted(Exception):
    """Ctrl-C: one line saying what is kept and how to go on."""


def closest(value: str, valid: Sequence[str]) -> str | None:
    """The valid name that somebody probably meant; ``None`` if none is like theirs.

    >>> closest("adma", ["adamax", "adam"]), closest("lr", ["learning-rate", "seed"])
    ('adam', 'learning-rate')

    Args:
      value: what was typed.
      valid: the valid names.

    Returns:
      The one whose words begin with the letters typed, else among the similar names one with the
      same letters in another order, else the most similar.
    """
    typed = value.lower().replace("-", "_")
    names = {name.lower().replace("-", "_"): name for name in valid}
    for spelled, name in names.items():
        if len(typed) > 1 and "".join(word[:1] for word in spelled.split("_")) == typed:
            return name
    matches = difflib.get_close_matches(typed, names)
    swapped = [name for name in matches if sorted(name) == sorted(typed)]
    return names[(swapped or matches)[0]] if matches else None


def unknown(kind: str, value: str, valid: Sequence[str]) -> str:
    """The message about a name that is not valid: which one may be meant, which ones there are."""
    guess = closest(value, valid)
    meant = f" (did you mean {guess!r}?)" if guess else ""
    return f"unknown {kind} {value!r}{meant}; valid: {', '.join(valid)}"


def check_known(kind: str, value: str | None, valid: Sequence[str]) -> None:
    """Raises `UsageError`, listing the valid names, if a name is given and is none of them."""
    if value is not None and value not in valid:
        raise UsageError(unknown(kind, value, valid))


S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Rule(Generic[S]):
    """What has to hold of options, or of what they come to.

    Attributes:
      holds: whether it does.
      message: one line that says which value, what is allowed and how to fix it.
    """

    holds: Callable[[S], bool]
    message: Callable[[S], str]


def enforce(rules: Sequence[Rule[S]], subject: S) -> None:
    """Raises `UsageError` with the message of the first rule that does not hold."""
    for rule in rules:
        if not rule.holds(subject):
            raise UsageError(rule.message(subject))


# What Windows does not allow in a name, so that a run can be copied anywhere.
_FORBIDDEN = frozenset('/\\:*?"<>|')
_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{x}{i}" for x in ("COM", "LPT") for i in range(10)}
_LONGEST_NAME = 200  # bytes; common file systems allow 255


def check_folder_name(name: str) -> None:
    """Raises `UsageError` if `--name` is anything but the plain name of a folder.

    A plain name means the same folder on every system: no path, no control characters, nothing that
    Windows reserves or changes.
    """
    problem = None
    if not name or name.strip(".") == "" or _FORBIDDEN & set(name):
        problem = "must be a plain folder name"
    elif not name.isprintable():
        problem = "must hold no control characters and be valid UTF-8"
    elif name != name.strip() or name.endswith("."):
        problem = "must neither begin or end with a space nor end with a dot"
    elif name.partition(".")[0].strip().upper() in _RESERVED:
        problem = "must be a name that no system reserves"
    elif len(name.encode()) > _LONGEST_NAME:
        problem, name = f"must be at most {_LONGEST_NAME} bytes long", f"{name[:20]}..."
    if problem is not None:
        raise UsageError(
            f"--name {problem}, got {name!r}; --runs-dir says where the folder is made"
        )


class Range(NamedTuple):
    """The values that an option may have.

    Attributes:
      low: the lowest one.
      high: the highest one.
      ends: which of the two are allowed: ``"[]"``, ``"[)"``, ``"(]"`` or ``"()"``.
    """

    low: float
    high: float
    ends: str = "[]"

    def problem(self, value: float) -> str | None:
        """What a value has to be instead; ``None`` if it lies in the range."""
        above = value > self.low or (value == self.low and self.ends[0] == "[")
        below = value < self.high or (value == self.high and self.ends[1] == "]")
        if above and below:  # NaN is neither
            return None
        if isinstance(value, int):
            return f"at most {self.high}" if above else f"at least {self.low}"
        least = f"at least {self.low:g}" if self.ends[0] == "[" else f"more than {self.low:g}"
        if math.isinf(self.high):
            return "positive and finite" if self.ends[0] == "(" and self.low == 0 else least
        most = f"at most {self.high:g}" if self.ends[1] == "]" else f"below {self.high:g}"
        return f"{least} and {most}"


# Optax counts steps in 32 bits.
COUNT = Range(1, 2**31 - 1)
POSITIVE = Range(0, math.inf, "()")
# Rates are float32 in every step.
RATE = Range(0, 3e38, "(]")
# The one table of what numbers may be, by the option's name; a command's `limits` come first.
LIMITS: Mapping[str, Range] = {
    **dict.fromkeys(("steps", "epochs", "early_stopping", "eval_every", "checkpoint_every"), COUNT),
    **dict.fromkeys(("norms_every", "monitor_every"), COUNT),
    **dict.fromkeys(("batch_size", "curvature_batch_size", "curvature_batch", "accumulate"), COUNT),
    **dict.fromkeys(("switch_step", "keep", "examples", "chunk", "parameters"), COUNT),
    **dict.fromkeys(("seeds", "members", "max_replicas"), Range(1, 1_000)),
    **dict.fromkeys(("devices", "processes", "workers"), Range(1, 2**16)),
    **dict.fromkeys(("rounds", "repeats", "bins"), Range(1, 1_000_000)),
    **dict.fromkeys(("k", "directions", "image_size"), Range(1, 10_000)),
    **dict.fromkeys(("data_workers", "prefetch"), Range(0, 1_000)),
    **dict.fromkeys(("seed", "split_seed"), Range(0, 2**31 - 1)),
    **dict.fromkeys(("validation_fraction", "test_fraction"), Range(0, 1, "()")),
    "max_length": Range(1, 100_000),
    "process_id": Range(0, 2**16 - 1),
    "settings": Range(1, 6),
    **dict.fromkeys(("learning_rate", "minimum", "maximum", "clip"), RATE),
    **dict.fromkeys(("memory_gib", "time_factor", "budget_seconds"), POSITIVE),
    "weight_decay": Range(0, 3e38),
    "follow_threshold": Range(0, 3e38),
    "label_smoothing": Range(0, 1, "[)"),
    "smoothing": Range(0, 1, "[)"),
    "stop_factor": Range(1, math.inf, "()"),
    "tolerance": Range(0, 1, "()"),
    "ema": Range(0, 1, "()"),
    "target": Range(0, 1, "(]"),
    "reach": Range(0, 1e3, "(]"),
    "resolution": COUNT,
    "delay": Range(0, 60, "()"),
}
_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


class Group(NamedTuple):
    """A box of `--help`.

    Attributes:
      summary: what its options are about, in one line.
      options: names of the options that belong to it in any command.
    """

    summary: str
    options: tuple[str, ...]


# The boxes of every command's `--help`, in their order. An option belongs to the group after which
# the base class is named that has it (`DataOptions`), or else to the one that has its name here.
GROUPS: Mapping[str, Group] = {
    "data": Group(
        "Data and how they are read.",
        (
            *("task", "problem", "data_dir", "image_size", "augment", "examples", "chunk"),
            *("data_workers", "prefetch", "delay", "run"),
        ),
    ),
    "files": Group("Files of your own: tasks image_folder, arrays, text, text_lm and table.", ()),
    "model": Group("The model and its loss.", ("model", "models", "model_options", "loss")),
    "method": Group(
        "The training method and its settings.",
        (
            *("method", "methods", "learning_rate", "learning_rates", "minimum", "maximum"),
            *("spacing", "settings", "schedule", "variants", "kind", "members", "trackers", "k"),
            *("directions", "tolerance", "curvature_batch_size", "curvature_batch", "smoothing"),
            *("stop_factor", "switch_step", "target", "only", "accumulate"),
        ),
    ),
    "length": Group(
        "How much is computed: steps, examples, repetitions.",
        (
            *(
                "study",
                "scale",
                "quick",
                "epochs",
                "steps",
                "batch_size",
                "seed",
                "seeds",
                "rounds",
            ),
            *("repeats", "first_steps", "timed", "parameters", "time_factor", "budget_seconds"),
        ),
    ),
    "precision": Group("What the network computes in.", ("precision",)),
    "parallel": Group(
        "Devices, processes and memory.",
        ("devices", "modes", "workers", "processes", "max_replicas", "memory_gib"),
    ),
    "faults": Group("What happens when something goes wrong.", ()),
    "output": Group(
        "What is measured, printed and written.",
        (
            *(
                "eval_every",
                "panels",
                "slices",
                "reach",
                "resolution",
                "sections",
                "tables",
                "bins",
                "name",
                "runs_dir",
                "evidence_dir",
            ),
            *("overwrite", "json", "html", "trace", "list", "dry_run"),
        ),
    ),
    "other": Group("Further options.", ()),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the options of all commands have in common; the fields are the options.

    A command with many of them divides them into base classes, one for each group of its `--help`;
    see `GROUPS`.
    """

    limits: ClassVar[Mapping[str, Range]] = {}
    """Ranges of the command's own, which go before those of `LIMITS`."""

    def check(self) -> None:
        """Raises `UsageError` if an option has a value of another type or out of its range."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            option = f"--{field.name.replace('_', '-')}"
            allowed = typing.get_args(hints[field.name]) or (hints[field.name],)
            if value is None and type(None) in allowed:
                continue
            kind = next(kind for kind in _KINDS if kind in allowed)
            if type(value) is int and kind is float:
                value = float(value) if abs(value) < sys.float_info.max else math.inf
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not fits:
                raise UsageError(f"{option} must be {_KINDS[kind]}, got {shortened(repr(value))}")
            if kind in (int, float):
                limits = self.limits.get(field.name) or LIMITS[field.name]
                if problem := limits.problem(value):
                    raise UsageError(f"{option} must be {problem}, got {shortened(str(value))}")
            if field.name == "name":
                check_folder_name(value)


@dataclasses.dataclass(frozen=True)
class DryRunOptions(Options):
    """The options of a command that can say beforehand what it would take."""

    dry_run: bool = False
    """Print the plan, the number of runs, parameters, memory and an estimate of the time; write
    nothing."""


def print_forecast(console: Console, lines: Mapping[str, str]) -> int:
    """Prints what `--dry-run` has found out.

    Args:
      console: where.
      lines: what the command would do and take, by what the line is about.

    Returns:
      The exit code.
    """
    print_pairs(console, lines)
    console.print("dry run: nothing was written")
    return 0


def print_pairs(console: Console, lines: Mapping[str, str]) -> None:
    """Prints names with a text each, side by side; in a file, a line for each."""
    width = max(map(len, lines))
    table = Table.grid("name", "text", padding=(0, 2, 0, 0))
    for name, text in lines.items():
        if console.is_terminal:
            table.add_row(Text(name), Text(printable(text)))
        else:
            console.print(f"{name:<{width}}  {text}", soft_wrap=True)
    if console.is_terminal:
        console.print(table)


# What `--dry-run` says where nobody has measured it.
TIME_NOT_KNOWN = "not known beforehand"


def duration(seconds: float) -> str:
    """A time as somebody would say it.

    >>> duration(3.2), duration(200), duration(5000)
    ('4 s', '4 min', '1 h 24 min')

    Args:
      seconds: the time, which is rounded up.
    """
    if seconds <= 90:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def plural(number: int, noun: str) -> str:
    """``3 seeds`` or ``1 seed``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def shortened(text: str) -> str:
    """A text as a message shows it: not more than 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_files(files: Mapping[str, Path | None]) -> None:
    """Checks the files that a command will write.

    Args:
      files: paths by the options that name them; None where an option is not given.

    Raises:
      UsageError: a file cannot be written, or two options name the same one.
    """
    options: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path} is not a file; give another one")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise UsageError(f"{option} {path}: the folder {parent} cannot be written to")
        if (other := options.setdefault(path.resolve(), option)) != option:
            raise UsageError(f"{other} and {option} name the same file {path}; give two files")


def host_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not Linux or macOS
        return math.inf


def check_memory(need: float, what: str, available: float | None = None) -> None:
    """Raises `UsageError` for what cannot fit into memory, before it is made.

    Args:
      need: bytes.
      what: what takes them, for the message.
      available: bytes; default: the memory of this machine.
    """
    available = host_memory() if available is None else available
    if need > available:
        raise UsageError(
            f"{what} would take {need / 2**30:,.0f} GiB of memory, of which there are "
            f"{available / 2**30:,.0f}; make it smaller"
        )


def read_json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """The JSON object that an option holds; ``None`` if it is not given.

    Args:
      option: its name, for messages.
      text: its value.

    Returns:
      The object.

    Raises:
      UsageError: it is not a JSON object.
    """
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"{option} is a JSON object such as '{{\"a\": 1}}', got {shortened(repr(text))}"
        )
    return value


def read_rates(option: str, text: str | None) -> tuple[float, ...] | None:
    """The learning rates that an option holds; ``None`` if it is not given.

    >>> read_rates("--learning-rates", "0.1,0.01")
    (0.01, 0.1)

    Args:
      option: its name, for messages.
      text: its value, numbers separated by commas.

    Returns:
      The rates, the lowest one first.

    Raises:
      UsageError: one is no positive, finite number, or stands there twice.
    """
    if text is None:
        return None
    rates = []
    for word in text.split(","):
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if RATE.problem(rate):
            raise UsageError(
                f"{option} must be positive, finite numbers separated by commas, such as "
                f"0.01,0.1, got {shortened(repr(word.strip()))} in {shortened(repr(text))}"
            )
        if rate in rates:
            raise UsageError(f"{option} has {rate:g} more than once; give each rate once")
        rates.append(rate)
    return tuple(sorted(rates))


def parse_json(text: str | bytes) -> Any:
    """Reads JSON in UTF-8.

    Args:
      text: what to read.

    Returns:
      The value.

    Raises:
      ValueError: it is not JSON, not UTF-8, nested too deeply or holds NaN.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, parse_constant=refuse)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse(default: T, argv: Sequence[str] | None, prog: str) -> T:
    """Reads a command line; an unknown option's error names those that may be meant.

    Args:
      default: the values of the options that are not given.
      argv: the arguments; ``None`` for those of the process.
      prog: the command, for messages.

    Returns:
      The options. Unknown ones and values that cannot be read end the process with exit code 2.

    Raises:
      UsageError: an option is out of its range, see `Options`.
    """
    complaint = io.StringIO()
    grouped = _grouped(default)
    names = [
        f"--{field.name.replace('_', '-')}"
        for group in dataclasses.fields(grouped)
        for field in dataclasses.fields(getattr(grouped, group.name))
    ]
    words = _with_list(sys.argv[1:] if argv is None else argv)
    _TYPED.clear()
    _TYPED.update({name[2:].replace("-", "_"): name for name in names if name.count("-") > 2})
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                type(grouped),
                args=words,
                prog=prog,
                default=grouped,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.FlagCreatePairsOff,
                    # Each option has its text; a search of the sources takes half of the time.
                    tyro.conf.HelptextFromCommentsOff,
                ),
            )
    except SystemExit as stop:
        if stop.code not in (0, None):
            complained = textwrap.shorten(_first_paragraph(complaint.getvalue()), 500)
            reason = _value_error(complained, words, default)
            more = f"{_meant(words, names)} {prog} --help shows all options"
            fail(reason or f"{complained}{more}")
        raise
    values: dict[str, Any] = {}
    for group in dataclasses.fields(parsed):
        values |= vars(getattr(parsed, group.name))
    options = type(default)(**values)
    options.check()
    return options


def _with_list(words: Sequence[str]) -> list[str]:
    """The words of a command line in which `--list` alone stands for `--list all`."""
    complete: list[str] = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        complete.append(word)
        if word == "--list" and following.startswith("-"):
            complete.append("all")
    return complete


def _value_error(complaint: str, words: Sequence[str], default: Options) -> str | None:
    """What is wrong with the value of a valid option; ``None`` if something else is wrong."""
    found = re.match(r"(?:Error parsing|Missing value for argument) '?(--[\w-]+)", complaint)
    if found is None:
        return None
    option = found[1]
    hint = typing.get_type_hints(type(default))[option.removeprefix("--").replace("-", "_")]
    kinds = {int: "a whole number", float: "a number"}
    allowed = next((kinds[k] for k in (hint, *typing.get_args(hint)) if k in kinds), "a value")
    typed = itertools.chain.from_iterable(word.split("=", 1) for word in words)
    values = [
        value
        for word, value in itertools.pairwise(typed)
        if word.replace("_", "-") == option and not value.startswith("--")
    ]
    if not values or complaint.startswith("Missing"):
        return f"{option} needs {allowed} after it"
    return f"{option} must be {allowed}, got {values[-1]!r}"


def _meant(words: Sequence[str], names: Sequence[str]) -> str:
    """Which options somebody who typed others probably meant."""
    typed = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    bare = [name.removeprefix("--") for name in names]
    guesses = [closest(word.removeprefix("--"), bare) for word in typed if word not in names]
    meant = dict.fromkeys(f"--{guess}" for guess in guesses if guess)
    return f"; did you mean {', '.join(meant)}?" if meant else ";"


def _grouped(default: Options) -> Any:
    """The options as `--help` shows them: a field for each group, which becomes a box."""
    kind: Any = type(default)
    texts = _descriptions(kind)
    hints = typing.get_type_hints(kind)
    groups: dict[str, list[dataclasses.Field[Any]]] = {name: [] for name in GROUPS}
    for field in dataclasses.fields(default):
        groups[_group(kind, field.name)].append(field)
    members = []
    for name, fields in groups.items():
        if not fields:
            continue
        shown: list[Any] = [
            (field.name, _shown(hints[field.name], getattr(default, field.name), texts[field.name]))
            for field in fields
        ]
        group: Any = dataclasses.make_dataclass(name, shown, frozen=True)
        group.__doc__ = GROUPS[name].summary
        values = {field.name: getattr(default, field.name) for field in fields}
        members.append((name, group, group(**values)))
    made: Any = dataclasses.make_dataclass(kind.__name__, members, frozen=True)
    made.__doc__ = kind.__doc__
    return made()


def _group(kind: type[Options], name: str) -> str:
    """The group of an option: that of the base class that has it, else that of its name."""
    for base in kind.__mro__:
        title = base.__name__.removesuffix("Options").lower()
        if name in vars(base).get("__annotations__", {}) and title in GROUPS:
            return title
    return next((group for group, entry in GROUPS.items() if name in entry.options), "other")


def _shown(hint: Any, default: Any, text: str) -> Any:
    """A type with what `--help` says of an option: the kind of value, and a default that is one."""
    kinds = [k for k in typing.get_args(hint) if k is not type(None)] or [hint]
    plain = kinds[0].__name__.upper() if isinstance(kinds[0], type) else None
    flag = bool in (hint, *kinds)
    told = "" if default is None or flag else f"(default: {default})"
    argument = tyro.conf.arg(help=text, metavar=None if flag else plain, help_behavior_hint=told)
    return Annotated[hint, argument]


@functools.cache
def _descriptions(kind: Any) -> dict[str, str]:
    """What stands below each option where it is defined, by the option's name."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for node, following in itertools.pairwise(body.body):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                texts[node.target.id] = " ".join(str(following.value.value).split())
    return texts


def _first_paragraph(box: str) -> str:
    """What is wrong, in one line, from the box that Tyro draws: a title, what is wrong, help."""
    lines = (line.strip("│| ") for line in box.splitlines())

    def is_gap(line: str) -> bool:  # an empty line or a rule
        return not line.strip("─-")

    text = itertools.dropwhile(is_gap, lines)
    next(text, None)  # the title
    return " ".join(
        itertools.takewhile(lambda line: not is_gap(line), itertools.dropwhile(is_gap, text))
    )


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Makes a command's wrong input one line on the standard error output and the exit code 2.

    What the operating system refuses, such as to write to a full disk, is one line and the code 1,
    and so is an interruption, with the code 130 that a shell gives to Ctrl-C.

    Args:
      main: reads and runs a command line, returns the exit code.

    Returns:
      The same, which returns 2 where `main` raises `UsageError`, 1 where it raises `OSError` and
      130 where it raises `Interrupted`.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UsageError as error:
            return fail(error)
        except OSError as error:  # e.g. no space left
            return fail(error, 1)
        except Interrupted as stop:
            print(f"interrupted: {printable(str(stop))}", file=sys.stderr)
            return 130
        except KeyboardInterrupt:  # where there is nothing to keep
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Makes what is wrong with the options, wherever it is noticed, a `UsageError`.

    Raises:
      UsageError: the block raised a `ValueError`; the message is its own.
    """
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


# The options of the command line that was read last, as they are typed, by their names in Python.
_TYPED: dict[str, str] = {}


def _as_typed(message: str) -> str:
    """A message that names options as they are typed, where a function named its arguments."""

    def typed(found: re.Match[str]) -> str:
        option = _TYPED.get(found[1])
        return found[0] if option is None else option + (" " if found[2] else "")

    return re.sub(r"(?<![\w./'\"-])([a-z]+(?:_[a-z]+)+)\b(=?)", typed, message)


def fail(message: Any, code: int = 2) -> int:
    """Prints a message as ``error: ...`` on the standard error output.

    Args:
      message: one line, or an exception whose text is one. Options of the command in it are spelled
        as they are typed: `learning_rate=` becomes `--learning-rate`.
      code: the exit code.

    Returns:
      The exit code.
    """
    print(f"error: {printable(_as_typed(str(message)))}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    r"""Text with control characters, and what is not UTF-8, shown as escapes.

    >>> printable("a\x1b[31m b")
    'a\\x1b[31m b'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Printer(Console):
    """A console on which text, such as a name that somebody gave, is shown as it is.

    Attributes:
      printed: the texts and tables so far, of which a command can make a page.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.printed: list[Any] = []

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints, as `rich.console.Console.print` does, and remembers it."""
        shown = [printable(part) if isinstance(part, str) else part for part in objects]
        self.printed += shown
        super().print(*shown, **options)


def console(width: int, *, quiet: bool = False) -> Printer:
    """Where a command prints.

    Its text is not Rich markup: names may contain ``[...]`` and ``:...:``.

    Args:
      width: number of columns where the output is a file or a pipe; a terminal has its own.
      quiet: whether nothing is printed.

    Returns:
      The console.
    """
    terminal = Printer(highlight=False, markup=False, emoji=False, quiet=quiet)
    if not terminal.is_terminal:
        terminal.width = width
    return terminal


PARTIAL = ".partial"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: an interrupted run never leaves half a file.

    Two processes that write the same file do not mix their contents: the later one wins.

    Args:
      path: the file; it is replaced if it exists.
      content: what it holds then.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def to_json(value: Any) -> str:
    """Indented JSON; numbers that are not finite are refused (None stands for them)."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
