"""Configuration of Sphinx: `make docs` builds the pages of this folder."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import external_links  # noqa: E402  (in the folder that was just added)
import generated_pages  # noqa: E402

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

# Every reference has to lead to a page. Types of other projects that `external_links` does not know
# have none, and neither has the type of the elements of `Description`, which nobody makes.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|chex|numpy|optax|collections)\..*"),
    ("py:class", r"optax_accel\.description\.Element"),
]

generated_pages.write(HERE)


def _find_by_last_part(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Leads a reference to the public name that has the same last part: docstrings are short."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or ("." in target and not target.startswith(project)):
        return None
    end = "." + target.rpartition(".")[2]
    domain = env.get_domain("py")
    found = [name for name in domain.objects if name.startswith(project) and name.endswith(end)]
    if not found:
        return None
    shortest, kind, page = min(found, key=len), node["reftype"], node["refdoc"]
    return domain.resolve_xref(env, page, app.builder, kind, shortest, node, text)


def setup(app: Any) -> None:
    """Leaves out what docstrings say of fields already, and finds names without their module."""
    app.connect("autodoc-skip-member", generated_pages.is_a_field)
    app.connect("missing-reference", external_links.resolve)
    app.connect("missing-reference", _find_by_last_part)
