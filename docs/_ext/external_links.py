"""Where the types of other projects, which our signatures name, are documented.

A table instead of `sphinx.ext.intersphinx`: that reads inventories from the network whenever the
pages are built, which has to work without one.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes

_OPTAX = "https://optax.readthedocs.io/en/latest/api"
_JAX = "https://docs.jax.dev/en/latest/_autosummary"
_PYTHON = "https://docs.python.org/3/library"

ADDRESSES = {
    **{
        f"optax.{name}": f"{_OPTAX}/transformations.html#optax.{name}"
        for name in (
            *("GradientTransformation", "GradientTransformationExtraArgs", "OptState", "Params"),
            *("ScaleByAdamState", "Updates"),
        )
    },
    **{f"jax.{name}": f"{_JAX}/jax.{name}.html" for name in ("Array", "ShapeDtypeStruct")},
    **{
        f"chex.{name}": "https://chex.readthedocs.io/en/latest/api.html#pytypes"
        for name in ("Array", "ArrayTree", "Numeric", "PRNGKey", "Scalar")
    },
    "numpy.ndarray": "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html",
    **{
        f"collections.abc.{name}": f"{_PYTHON}/collections.abc.html#collections.abc.{name}"
        for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
    },
}


def resolve(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Leads a reference that has no page here to that of the other project, if it has one."""
    del app, env
    if node.get("refdomain") != "py" or (target := node.get("reftarget")) not in ADDRESSES:
        return None
    link = nodes.reference("", "", internal=False, refuri=ADDRESSES[target], reftitle=target)
    link.append(text)
    return link
