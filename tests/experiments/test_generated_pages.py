"""Every method and every public name has a page in the documentation."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import models
import optax_accel as oa
from experiments.methods import METHODS, Method

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generated_pages() -> ModuleType:
    path = DOCS / "_ext" / "generated_pages.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_left_out(
    generated_pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a method costs is read from the optimizer itself, which takes seconds for all of them;
    # the tests of the catalogue do that.
    monkeypatch.setattr(Method, "extra_cost", lambda self: f"the cost of {self.name}")
    shutil.copytree(DOCS / "_families", tmp_path / "_families")
    generated_pages.write(tmp_path)
    pages = {path.stem for path in (tmp_path / "methods").glob("*.md")} - {"index"}
    assert pages == {name for name, method in METHODS.items() if method.fidelity != "Optax"}
    index = (tmp_path / "api" / "index.rst").read_text(encoding="utf-8").split()
    modules = {"curvature", "topologies"}
    assert {f"optax_accel.{name}" for name in set(oa.__all__) - modules} <= set(index)
    listed = {name for name in index if name.startswith("optax_accel.")}
    assert {f"optax_accel.curvature.{name}" for name in oa.curvature.__all__} <= listed | {
        f"optax_accel.curvature.{name}" for name in oa.__all__
    }
    rule = (tmp_path / "methods" / "bulk_sgd.md").read_text(encoding="utf-8")
    assert "optax_accel.subspace" in rule
    assert "When not to use it" in rule
    assert "the cost of bulk_sgd, compared with `sgd`" in rule
    table = (tmp_path / "tables" / "mnist5k.md").read_text(encoding="utf-8")
    assert "| demon_sgd | 0.3 | 93.07 ± 0.05 |" in table
    zoo = (tmp_path / "tables" / "models.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in zoo for name in models.list())
    assert "`--task mnist5k --model capsnet --method adam`" in zoo
    tasks = (tmp_path / "tables" / "tasks.md").read_text(encoding="utf-8")
    assert "| `ncsn_digits` | `ncsn` | score_matching | `adam`, 0.001 | 128 |" in tasks
    notebooks = {path.name for path in (DOCS.parent / "notebooks").glob("*.ipynb")}
    assert {path.name for path in (tmp_path / "notebooks").glob("*.ipynb")} == notebooks


def test_a_method_without_a_function_is_an_error(
    generated_pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(generated_pages.FUNCTIONS, "vtpc_sgd")
    with pytest.raises(LookupError, match="vtpc_sgd"):
        generated_pages.function_behind(METHODS["vtpc_sgd"])
