"""Who may import whom in `experiments/`: commands on top, rooms below, arrows one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
TOOLS = {"cli", "timing", "hlo"}
# What each room may import of the project, beside itself and the tools, which import nothing of it.
ROOMS = {
    "data": set(),
    "methods": {"optax_accel"},
    "runs": set(),
    "training": {"data", "methods", "runs", "models", "optax_accel"},
    "reporting": {"methods", "runs"},
}
COMMANDS = {path.stem for path in EXPERIMENTS.glob("*.py")} - TOOLS - {"__init__"}


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
