"""Formulas as MathML, which browsers draw by themselves: pages need no network for them."""

from __future__ import annotations

from typing import Any

import latex2mathml.converter
from docutils import nodes


def setup(app: Any) -> dict[str, bool]:
    """Adds the renderer `mathml` to Sphinx."""
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_block, None))
    return {"parallel_read_safe": True}


def _visit_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def _visit_block(writer: Any, node: nodes.math_block) -> None:
    source = node.astext()
    if r"\\" in source or "&" in source:
        source = rf"\begin{{align*}}{source}\end{{align*}}"
    formula = latex2mathml.converter.convert(source, display="block")
    writer.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode
