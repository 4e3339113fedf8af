"""Every notebook runs as it is in the repository, quickly, and is stored without its outputs."""

import pathlib
import resource

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extras `test` and `notebooks`)")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extras `test` and `notebooks`)")

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
CPU_SECONDS = 60


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_notebook_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's own settings
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in codes), "stored with outputs: clear them"

    def cpu_seconds():  # of processes that have ended
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert 0 < cpu_seconds() - before < CPU_SECONDS


def test_there_are_notebooks():
    assert (FOLDER / "data.ipynb").is_file()
