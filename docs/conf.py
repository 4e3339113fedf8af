"""Sphinx settings. Build with `sphinx-build -W --keep-going docs build/docs`.

The build runs the notebooks, so that their pages show outputs and pictures. This takes some minutes
the first time; build/notebooks keeps the results. `-D nb_execution_mode=off` leaves the outputs
out, as CI does, because the tests run the notebooks.
"""

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
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# notebooks/ is a link to the folder beside docs/, in which the notebooks run.
nb_execution_mode = "cache"
nb_execution_cache_path = str(pathlib.Path(__file__).parents[1] / "build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

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
