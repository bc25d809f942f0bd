"""Makes what all notebooks share, runs them, and stores their outputs.

``python notebooks/store.py [NAME ...]`` does so for the notebooks named (by default all): it writes
the badge under the title and the cell that installs, both made from ``Repository`` in
``[project.urls]`` of ``pyproject.toml``; executes the notebook; and stores what it printed and
drew. The tests hold the notebooks against it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
# Where modules that notebooks import come from, beside those that JAX and Optax bring along.
DISTRIBUTIONS = {
    "grain": "grain",
    "matplotlib": "matplotlib",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}
# The kernel is another process: it finds the package as it lies here, takes warnings in the
# notebook's own cells for errors, and draws into the notebook.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "PYTHONWARNINGS": "error:::__main__",
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}

_BADGE = re.compile(r"^\[!\[Open in Colab\].*$", re.MULTILINE)
_INSTALL = """\
import importlib.util
import subprocess
import sys

# Where optax_accel comes from: a name on the package index, the path of a wheel, or a Git address.
SOURCE = "optax-accel"

packages = {packages}
missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
if missing:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *missing]
    result = subprocess.run(pip, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(
            f"pip could not install {{missing}}:\\n{{result.stderr[-500:]}}\\n"
            "Set SOURCE in this cell to one of these, and run the cell again:\\n"
            '- "git+{repository}", if this machine may read it;\\n'
            "- the path of a wheel: run `pip wheel --no-deps .` in a checkout and upload the .whl "
            "file (in Colab: the folder symbol on the left, then the arrow);\\n"
            '- the path of a checkout on this machine: ".." where this notebook lies in one.'
        )"""


def paths() -> list[Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def repository() -> str:
    """The address of the repository, or one to fill in while ``pyproject.toml`` names none."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = tomllib.loads(text)["project"].get("urls", {})
    return urls.get("Repository", "https://github.com/OWNER/optax_accel").rstrip("/")


def badge(path: Path) -> str:
    """The badge that opens a notebook in Colab."""
    owner_and_name = repository().removeprefix("https://github.com/")
    host = "https://colab.research.google.com"
    page = f"{host}/github/{owner_and_name}/blob/main/notebooks/{path.name}"
    return f"[![Open in Colab]({host}/assets/colab-badge.svg)]({page})"


def install_cell(notebook: nbformat.NotebookNode) -> str:
    """The source of the cell that installs what a notebook imports."""
    modules = set()
    for cell in notebook.cells:
        if cell.cell_type == "code" and not is_install_cell(cell):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    modules.add(node.module.partition(".")[0])
    lines = ['    "optax_accel": SOURCE,']
    for name in sorted(modules & {*DISTRIBUTIONS}):
        lines.append(f'    "{name}": "{DISTRIBUTIONS[name]}",')
    packages = "\n".join(["{", *lines, "}"])
    return _INSTALL.format(packages=packages, repository=repository())


def is_install_cell(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell is the one that installs."""
    return "install" in cell.metadata.get("tags", ())


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """A fingerprint of a notebook's code, stored with the outputs that this code has made."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def write_shared_parts(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Renews the badge and the cell that installs."""
    title = notebook.cells[0]
    title.source = _BADGE.sub(lambda _: badge(path), title.source)
    for cell in filter(is_install_cell, notebook.cells):
        cell.source = install_cell(notebook)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, for the kernel to inherit, and resets them."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a kernel of their own; their outputs take the place of those stored."""
    client = NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True)
    with environment(ENVIRONMENT):
        client.execute()


def store(path: Path) -> None:
    """Renews one notebook: shared parts, outputs, fingerprint."""
    notebook = read(path)
    write_shared_parts(path, notebook)
    execute(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "optax_accel": {"outputs_of": code_digest(notebook)},
    }
    nbformat.write(notebook, path)


def main() -> None:
    """Renews the notebooks named on the command line, or all."""
    by_name = {path.stem: path for path in paths()}
    for name in sys.argv[1:] or by_name:
        if name not in by_name:
            raise SystemExit(f"No notebook {name!r}; there are {', '.join(by_name)}.")
        print(f"{name} ...", flush=True)
        store(by_name[name])


if __name__ == "__main__":
    main()
