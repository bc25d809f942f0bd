"""What is published: a wheel with the library alone, which passes tests without our checkout."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
# Tests of commands, models and notebooks; all others are tests of the library.
OTHERS = [TESTS / name for name in ("experiments", "models", "notebooks")]
# A part of the library's tests that needs nothing but pytest beside its dependencies: doctests of
# all its modules would compile for minutes. They run with all optimizations of XLA, as users do.
OF_THE_WHEEL = [
    *("test_public_api.py", "momentum/test_demon.py", "test_adabound.py", "test_sharding.py"),
    *("curvature/test_blocks.py", "workers/test_post_local.py"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_tests_of_the_library_import_neither_models_nor_experiments() -> None:
    paths = [p for p in TESTS.rglob("*.py") if not any(p.is_relative_to(o) for o in OTHERS)]
    assert len(paths) > 30
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in paths
        if (found := imported(path) & {"experiments", "models"})
    }
    assert not wrong


@pytest.mark.parametrize("name", [*OF_THE_WHEEL, "conftest.py", "helpers.py", "methods.py"])
def test_tests_of_the_wheel_need_no_extras(name: str) -> None:
    allowed = {"chex", "jax", "jaxlib", "numpy", "optax", "optax_accel", "pytest", "tests"}
    assert imported(TESTS / name) <= allowed | sys.stdlib_module_names


@pytest.mark.slow
def test_wheel_holds_the_library_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"optax_accel"}
    assert "optax_accel/py.typed" in names
    assert {"optax_accel/refresh.py", "optax_accel/curvature/blocks.py"} <= set(names)


@pytest.mark.slow
def test_readme_of_the_wheel_has_no_relative_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name).decode()
    assert "```python" in text
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert links
    assert all(link.startswith("https://") for link in links)


@pytest.mark.slow
def test_wheel_passes_tests_of_the_library(wheel: Path, tmp_path: Path) -> None:
    """In an environment with its declared dependencies and pytest, in the versions used here."""
    versions = tmp_path / "versions.txt"
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    installed.pop("optax-accel", None)
    versions.write_text("".join(f"{name}=={version}\n" for name, version in installed.items()))
    uv = [sys.executable, "-m", "uv", "--quiet"]
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    for command in (
        ["venv", "--python", sys.executable, str(venv)],
        ["pip", "install", "--python", str(python), "-c", str(versions), str(wheel), "pytest"],
    ):
        subprocess.run([*uv, *command], check=True, capture_output=True, text=True)

    checkout = tmp_path / "checkout"
    needed = ["pyproject.toml", "experiments/methods/references.json"]
    needed += [f"tests/{name}.py" for name in ("conftest", "helpers", "methods")]
    for path in needed:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    for name in OF_THE_WHEEL:
        (checkout / "tests" / name).parent.mkdir(exist_ok=True)
        shutil.copy(TESTS / name, checkout / "tests" / name)
    result = subprocess.run(
        [str(python), "-m", "pytest", "-q", "tests"],
        cwd=checkout,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "XLA", "COV"))}
        | {"OPTAX_ACCEL_OPTIMIZE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    where = "import optax_accel; print(optax_accel.__file__)"
    found = subprocess.run(
        [str(python), "-c", where], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert venv in Path(found.stdout.strip()).parents
