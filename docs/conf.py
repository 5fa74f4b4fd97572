# Configuration of the documentation: sphinx-build -W -b html docs docs/_build/html

import importlib.util
import os
import sys
from pathlib import Path

from lightning_dtda.version import __version__

project = "lightning-dtda"
author = "the authors of lightning-dtda"
version = release = __version__

sys.path.insert(0, str(Path(__file__).parent))
extensions = [
    "reference",  # reference.py, beside this file
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build", "commands.md"]  # commands.md is included in cli.md
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

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
