"""The notebooks run from top to bottom and are stored as a reader should find them."""

from __future__ import annotations

import builtins
import importlib.util
import re
import subprocess

import pytest

from notebooks import store

NOTEBOOKS = store.paths()
# Folders of one machine; an address has no space or quotation mark before its slashes.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/-])/(?:content|home|mnt|opt|root|tmp|usr|var|Users|work)/\w")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts_of(output):
    if output.output_type == "stream":
        return [output.text]
    return [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]


def check_outputs(notebook):
    """Figures are there, and no error, warning, foreign path or address."""
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        for text in texts_of(output):
            assert "Warning" not in text
            assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)
            assert "http" not in text  # a figure that loads something is none without a network


def test_stored_with_the_outputs_of_its_code(path):
    notebook = store.read(path)
    check_outputs(notebook)
    renew = f"run `python notebooks/store.py {path.stem}`"
    assert notebook.metadata.optax_accel.outputs_of == store.code_digest(notebook), renew
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), renew


def test_small_enough_together():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 3e5 * len(NOTEBOOKS)


def test_badge_and_install_cell_follow_the_setting(path):
    notebook = store.read(path)
    assert notebook.cells[0].source.count(store.badge(path)) == 1
    assert [cell.source for cell in notebook.cells if store.is_install_cell(cell)] == [
        store.install_cell(notebook)
    ]
    first_code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert store.is_install_cell(first_code)
    assert "/".join(store.badge(path).split("/")[-4:]) == f"blob/main/notebooks/{path.name})"


def test_install_cell_asks_pip_and_says_what_to_do_without(monkeypatch):
    commands, exit_codes = [], [0, 1]

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, exit_codes.pop(0), "", "no such package")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = store.install_cell(store.read(NOTEBOOKS[0]))
    exec(source, {"__builtins__": builtins})
    assert commands[0][-3:] == ["optax-accel", "matplotlib", "scikit-learn"]
    with pytest.raises(RuntimeError, match=r"(?s)no such package.*git\+https://.*\.whl.*\.\."):
        exec(source, {"__builtins__": builtins})


@pytest.mark.slow
def test_runs(path):
    notebook = store.read(path)
    store.execute(notebook)
    check_outputs(notebook)
