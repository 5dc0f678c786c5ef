"""Sphinx reads this: `make docs` builds the pages of this folder into output/docs."""

import dataclasses
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import adasplash2

project = "adasplash2"
author = "the adasplash2 authors"
release = adasplash2.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["figures/README.md"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# A link inside the documentation that leads nowhere is a warning, and so an error. torch's and
# Python's own pages are elsewhere: their names are not looked up, so that no build needs a network.
nitpicky = True
# What only who works on the library needs has no page either.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|collections|typing|nn)\..*"),
    (r"py:.*", r"adasplash2\.(problem|dispatch|records)(\..*)?"),
    (r"py:class", r"Tensor|PreTrainedModel|Config|Observer|Inputs|Problem|RowProblem|Answer"),
]

# Docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_custom_sections = ["Sources"]
napoleon_use_rtype = False
add_module_names = False

# Pages
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"adasplash2 {release}"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"footer_icons": [], "navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def without_constructor(
    app: Any, what: str, name: str, thing: Any, *_: Any
) -> tuple[str, None] | None:
    """Of what users are given and never make."""
    given = dataclasses.is_dataclass(thing) or (what == "exception")
    return ("", None) if given else None


def write_formula(translator: Any, node: Any) -> None:
    """As MathML, which browsers draw themselves: a page needs no script of another site."""
    is_block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("autodoc-process-signature", without_constructor)
