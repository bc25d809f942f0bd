"""Who may import whom in `experiments/`: commands on top, rooms below, arrows one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
TOOLS = {"cli", "hlo", "progress", "timing"}
# What each room may import of the project, beside itself and the tools, which import nothing of it.
ROOMS = {
    "data": set(),
    "methods": {"optax_accel"},
    "runs": set(),
    "training": {"data", "methods", "runs", "models", "optax_accel"},
    "reporting": {"methods", "runs"},
}
COMMANDS = {path.stem for path in EXPERIMENTS.glob("*.py")} - TOOLS - {"__init__", "__main__"}


def imported(path: Path) -> set[str]:
    """Rooms, tools, commands and packages of the project that a file imports anywhere."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    inside = {part[1] for part in parts if part[0] == "experiments"}
    return inside | {part[0] for part in parts} & {"models", "optax_accel", "tests"}


def test_every_file_stands_in_a_room() -> None:
    folders = {path.name for path in EXPERIMENTS.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(ROOMS)
    assert {f"{name}.py" for name in TOOLS} <= {path.name for path in EXPERIMENTS.iterdir()}
    for name in COMMANDS:
        assert "def main(" in (EXPERIMENTS / f"{name}.py").read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_command_imports_a_command(name: str) -> None:
    assert not imported(EXPERIMENTS / f"{name}.py") & COMMANDS


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_tools_import_nothing_of_the_project(name: str) -> None:
    assert not imported(EXPERIMENTS / f"{name}.py")


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_arrows_point_down(name: str) -> None:
    for path in (EXPERIMENTS / name).rglob("*.py"):
        assert imported(path) <= ROOMS[name] | TOOLS | {name}, path.relative_to(ROOT)


def test_what_all_training_shares_imports_no_study() -> None:
    for path in (EXPERIMENTS / "training").glob("*.py"):
        assert "experiments.training.studies" not in path.read_text(encoding="utf-8"), path.name


# The map ----------------------------------------------------------------------------------------


def first_line(path: Path) -> str:
    """The first line of a module's docstring, as a sentence."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".") + "."


def map_of_the_house() -> str:
    """The tables of rooms and of commands in CONTRIBUTING.md."""
    rows = ["| room | what is in it | modules |", "|---|---|---|"]
    packages = [ROOT / "optax_accel", *sorted((ROOT / "optax_accel").iterdir())]
    packages += [EXPERIMENTS / name for name in ROOMS]
    packages += [path.parent for path in EXPERIMENTS.glob("*/*/__init__.py")]
    for package in sorted(packages):
        if not (package / "__init__.py").exists():
            continue
        modules = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
        names = ", ".join(f"`{name}`" for name in modules)
        folder = package.relative_to(ROOT)
        rows.append(f"| `{folder}/` | {first_line(package / '__init__.py')} | {names} |")
    rows += ["", "| command | what it does |", "|---|---|"]
    rows += [
        f"| `{name}` | {first_line(EXPERIMENTS / f'{name}.py')} |" for name in sorted(COMMANDS)
    ]
    return "\n".join(rows)


def test_the_map_is_that_of_the_house() -> None:
    """Where this fails, put the tables that `map_of_the_house` returns into CONTRIBUTING.md."""
    assert map_of_the_house() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
