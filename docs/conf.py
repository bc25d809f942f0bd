"""Configuration of Sphinx: `make docs` builds the pages of this folder."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import generated_pages  # noqa: E402  (in the folder that was just added)

project = "optax_accel"
author = "the optax_accel authors"
copyright = f"2026, {author}"
release = version = importlib.metadata.version("optax-accel")

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_families", "_templates", "tables"]
templates_path = ["_templates"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"optax_accel {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # their outputs are stored; the tests execute them
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # in the docstrings, with shapes
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

generated_pages.write(HERE)


def setup(app: Any) -> None:
    """Leaves out what named tuples and dataclasses say of their fields, which docstrings say."""
    app.connect("autodoc-skip-member", generated_pages.is_a_field)
