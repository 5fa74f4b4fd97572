# Configuration of the documentation: sphinx-build -W -b html docs docs/_build/html

import importlib.util
import os
import re
import sys
from pathlib import Path

from plotly.offline import get_plotlyjs

from lightning_dtda.version import __version__

project = "lightning-dtda"
author = "the authors of lightning-dtda"
version = release = __version__

sys.path.insert(0, str(Path(__file__).parent))
extensions = [
    "reference",  # reference.py, beside this file
    "myst_nb",  # Markdown pages as myst_parser does, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
# commands.md is included in cli.md; of Python files, only those in notebooks are pages
exclude_patterns = ["_build", "commands.md", "conf.py", "reference.py"]
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Notebooks are Python files (jupytext), run each time they or this file change, so that what they show is what this
# version does. An error in a cell ends the build. "sphinx-build -D nb_execution_mode=off" leaves their outputs out.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress
os.environ["PLOTLY_RENDERER"] = "notebook_connected"  # figures without a copy of plotly.js in each
os.environ["WANDB_MODE"] = "offline"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # the hooks of Lightning's callbacks are no part of this reference
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"lightning-dtda {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

# MathJax comes from a CDN. Where sphinx-mathjax-offline is installed, its copy goes into the built pages instead.
mathjax_package = importlib.util.find_spec("sphinx-mathjax-offline")
if mathjax_package is not None and mathjax_package.origin is not None:
    html_static_path.append(str(Path(mathjax_package.origin).parent / "static"))
    mathjax_path = "mathjax/tex-chtml.js"

# Links into the documentation of others need a network while building.
if os.environ.get("DTDA_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "xarray": ("https://docs.xarray.dev/en/stable", None),
    }


def _own_plotly(app, page, template, context, doctree):
    """Let figures take plotly.js from the built pages, where it was put beside them, instead of from a CDN."""
    if "body" in context:
        local = f'<script src="{"../" * page.count("/")}_static/plotly.min.js"></script>'
        body = re.sub(r'<script[^>]*src="https://cdn\.plot\.ly/[^"]*"[^>]*></script>', local, context["body"])
        context["body"] = re.sub(r'<script type="module">import "https://cdn\.plot\.ly/[^"]*"</script>', "", body)


def _copy_plotly(app, error):
    """Put plotly.js beside the pages."""
    if error is None and app.builder.format == "html":
        Path(app.outdir, "_static", "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")


def setup(app):
    """Called by Sphinx."""
    app.connect("html-page-context", _own_plotly)
    app.connect("build-finished", _copy_plotly)
