"""Sphinx configuration; built with warnings as errors."""

import adaptive

project = "adaptive"
author = "The adaptive-control maintainers"
project_copyright = f"2026, {author}"
version = release = adaptive.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "numpydoc",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"adaptive {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
default_role = "code"
