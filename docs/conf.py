"""Sphinx settings. Build with `sphinx-build -W --keep-going docs build/docs`."""

import pathlib
import shutil

import msllm

# autosummary writes a page per module here and does not remove pages of deleted modules.
shutil.rmtree(pathlib.Path(__file__).with_name("api"), ignore_errors=True)

project = "msllm"
author = "the msllm authors"
copyright = author
release = version = msllm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name` for code, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["gguf", "textual", "torch", "transformers", "wandb"]  # optional
autosummary_generate = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # describes each field of a NamedTuple only once
suppress_warnings = ["ref.python"]  # several modules may define the name in an annotation

html_theme = "furo"
html_title = "msllm"
