"""Every method and every public name has a page in the documentation."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import models
import optax_accel as oa
from experiments.methods import METHODS, Method
from experiments.referee import STUDIES

DOCS = Path(__file__).parents[2] / "docs"
# What the README says of measurements, by the record that has it.
FIGURES_OF_README = {
    "digits": (" 32 ", " 44 "),
    "mnist5k": ("93.07 ± 0.05", "90.55 ± 0.29", "91.80 ± 0.08", "93.01 ± 0.09"),
    "natural_gradients": (" 168 ", " 216 ", "1.4 ", "0.6 "),
    "sharp_and_flat": ("0.89 ", "1.08 ± 0.01"),
    "solvers": (" 21 ", " 531 ", " 745 "),
    "step_cost": (" 5.3 ", " 42.5"),
}


@pytest.fixture(scope="module", autouse=True)
def _extensions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "_ext")
        yield


def load(name: str) -> ModuleType:
    path = DOCS / "_ext" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated_pages() -> ModuleType:
    return load("generated_pages")


def test_types_of_other_projects_exist() -> None:
    links = load("external_links")
    for name in links.ADDRESSES:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


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
    modules = {"curvature", "equilibrium", "topologies"}
    assert {f"optax_accel.{name}" for name in set(oa.__all__) - modules} <= set(index)
    listed = {name for name in index if name.startswith("optax_accel.")}
    assert {f"optax_accel.curvature.{name}" for name in oa.curvature.__all__} <= listed | {
        f"optax_accel.curvature.{name}" for name in oa.__all__
    }
    rule = (tmp_path / "methods" / "bulk_sgd.md").read_text(encoding="utf-8")
    assert "optax_accel.subspace.optimizers" in rule
    assert "When not to use it" in rule
    assert "the cost of bulk_sgd, compared with `sgd`" in rule
    for name in pages:
        page = (tmp_path / "methods" / f"{name}.md").read_text(encoding="utf-8")
        assert f'aria-label="Paths of {name} and ' in page
    demon = (tmp_path / "methods" / "demon_sgd.md").read_text(encoding="utf-8")
    assert all(claim.criterion in demon for claim in STUDIES["demon"].claims)
    assert "AdaBound generalizes better than Adam" in (
        tmp_path / "methods" / "adabound.md"
    ).read_text(encoding="utf-8")
    table = (tmp_path / "tables" / "mnist5k.md").read_text(encoding="utf-8")
    assert "| demon_sgd | 0.3 | 93.07 ± 0.05 |" in table
    records = {path.stem for path in (DOCS / "evidence" / "records").glob("*.json")}
    assert {path.stem for path in (tmp_path / "tables").glob("*.md")} == records | {
        *("models", "tasks")
    }
    # Without what a build of the documentation has left there.
    typed = {*(DOCS / "evidence").glob("*.md")}
    typed -= {DOCS / "evidence" / path.name for path in (tmp_path / "evidence").glob("*.md")}
    pages = "".join(path.read_text(encoding="utf-8") for path in typed)
    assert all(f"../tables/{name}.md" in pages for name in records)
    # No table of figures is typed into a page.
    assert "\n|---" not in pages
    table = (tmp_path / "tables" / "solvers.md").read_text(encoding="utf-8")
    assert "Typed from what `python -m experiments.solvers" in table
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for name, numbers in FIGURES_OF_README.items():
        table = (tmp_path / "tables" / f"{name}.md").read_text(encoding="utf-8")
        assert all(number in table and number in readme for number in numbers), name
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


def test_pictures_show_what_the_methods_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load("method_pictures")
    monkeypatch.setattr(pictures, "STEPS", 8)
    lengths = (1 - 0.9 ** np.arange(1, 9)) / (1 - 0.9)  # momentum 0.9 sums a constant gradient
    np.testing.assert_allclose(pictures.step_lengths("sgd"), lengths, rtol=1e-5)
    rate, points = pictures.best_path("sgd")
    hessian = pictures.AXES.T @ np.diag(pictures.EIGENVALUES) @ pictures.AXES
    point, velocity = pictures.START, np.zeros(2)
    for found in points[:, 0]:
        np.testing.assert_allclose(found, point, rtol=1e-4)
        velocity = 0.9 * velocity + hessian @ (point - pictures.MINIMUM)
        point = point - rate * velocity
    svg = pictures.picture(dataclasses.replace(METHODS["sgd"], base="sgd"))  # needs no other run
    assert "currentColor" in svg
    assert "\n\n" not in svg  # which would end the block of HTML on the page
