"""The commands, with a line each: what `python -m experiments` prints.

    python -m experiments
    python -m experiments train --help

The second line is the same as `python -m experiments.train --help`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli

FOLDER = Path(__file__).parent


def commands() -> dict[str, str]:
    """The first line of the docstring of every module that has a command line, by its name."""
    lines = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and "\n@cli.command\ndef main(" in text:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            lines[path.stem] = docstring.partition("\n")[0]
    return lines


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Lists the commands, or runs the one that the first word names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not words or words[0] in ("-h", "--help", "--list"):
        console = cli.console(120)
        console.print("usage: python -m experiments COMMAND [OPTIONS]")
        console.print("COMMAND --help shows the options.\n")
        cli.print_pairs(console, known)
        return 0
    cli.check_known("command", words[0], tuple(known))
    code: int = importlib.import_module(f"experiments.{words[0]}").main(words[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
