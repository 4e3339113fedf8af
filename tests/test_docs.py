"""README and docs name existing files and modules, and describe the layout of the package."""

import pathlib
import re
import tomllib

import pytest
import test_imports

import msllm

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [page for page in (ROOT / "docs").rglob("*.md") if "api" not in page.parts]

# A path in the repository. Users' files on the pages have no folder.
PATH = re.compile(r"(?<![\w./-])(?:msllm|docs|tests|configs|launch|notebooks|\.ci)/[\w./*-]*")
WRITTEN = {"configs/mine.py"}  # by `msllm init mine`, on several pages
LINK = re.compile(r"\]\(([^)#:]+)(?:#[\w-]*)?\)")
MODULE = re.compile(r"(?<![\w./-])msllm(?:\.[A-Za-z]\w*)+")
# As in: `visible()` in `msllm/streams.py`.
DEFINED = re.compile(r"`(\w+)(?:\(\))?` in `(msllm/[\w/]+\.py)`")


def missing_paths(text: str, folder: pathlib.Path) -> list[str]:
    """Paths in the repository and link targets on a page in `folder` that do not exist."""
    paths = {path.rstrip(".") for path in PATH.findall(text)} - WRITTEN
    missing = [path for path in paths if not any(ROOT.glob(path))]
    return missing + [link for link in LINK.findall(text) if not (folder / link).exists()]


def missing_names(text: str) -> list[str]:
    """Names such as `msllm.a.b`, and names "in" a file of msllm, that are not defined."""
    named = [(name, name.split(".")[1:]) for name in MODULE.findall(text)]
    named += [
        (name, [*pathlib.Path(path).with_suffix("").parts[1:], name])
        for name, path in DEFINED.findall(text)
    ]
    return sorted({name for name, parts in named if not is_defined(parts)})


def is_defined(parts: list[str]) -> bool:
    """Whether msllm defines a name, given as its parts below `msllm`."""
    path = ROOT / "msllm"
    for place, part in enumerate(parts):
        if (path / part).is_dir():
            path /= part
        elif (path / f"{part}.py").is_file():
            path /= f"{part}.py"
        elif path == ROOT / "msllm":
            return part in dir(msllm)
        else:
            source = path / "__init__.py" if path.is_dir() else path
            return all(re.search(rf"\b{name}\b", source.read_text()) for name in parts[place:])
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_modules_exist(page):
    text = page.read_text()
    assert not missing_paths(text, page.parent)
    assert not missing_names(text)


def test_missing_files_and_names_are_found():
    text = "`msllm/gone.py` [gone](gone.md) `configs/gone_*.py` msllm.gone msllm.streams.gone"
    text += " `gone()` in `msllm/loss.py`"
    assert sorted(missing_paths(text, ROOT)) == ["configs/gone_*.py", "gone.md", "msllm/gone.py"]
    assert missing_names(text) == ["gone", "msllm.gone", "msllm.streams.gone"]
    text = "msllm/streams.py [here](docs/data.md#batches) `configs/8b_*.py` msllm.streams.visible"
    text += " `visible()` in `msllm/streams.py`"
    assert not missing_paths(text, ROOT) and not missing_names(text)


def top_level() -> set[str]:
    """Names of the modules and packages directly in `msllm`: `streams.py`, `data`."""
    paths = (ROOT / "msllm").iterdir()
    return {p.name for p in paths if (p.is_dir() or p.suffix == ".py") and p.name[0] != "_"}


def test_the_tree_in_the_readme_lists_the_package():
    tree = re.search(r"```\n(msllm/\n.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1]
    folders, named = [], []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = [*folders[: len(indent) // 2], name]
        named.append("".join(folders))
    assert not [path for path in named if not (ROOT / path).exists()]
    assert {path.split("/")[1] for path in named if path.startswith("msllm/")} - {""} == top_level()


def test_the_architecture_page_lists_the_layers():
    page = (ROOT / "docs/architecture.md").read_text()
    assert f"```\n{test_imports.LAYERS.strip()}\n```" in page


def test_the_api_page_lists_every_module_and_public_name():
    page = (ROOT / "docs/api.md").read_text()
    modules = {f"{name}.py" for name in re.findall(r"^   msllm\.(\w+)$", page, flags=re.M)}
    documented = {name if name in top_level() else name.removesuffix(".py") for name in modules}
    assert documented == top_level() - {"bench", "cli"}
    assert sorted(re.findall(r"^   ~msllm\..*\.(\w+)$", page, flags=re.M)) == sorted(dir(msllm))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["getting_started", "decoding", "training"])
def test_examples_run(page, loaded, monkeypatch, capsys):
    """Runs a page's Python blocks that load a model, with a model that has the same streams."""
    monkeypatch.setattr(msllm, "load", lambda path: loaded, raising=False)
    monkeypatch.setattr(msllm, "configure_jax", lambda: None, raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), flags=re.S)
    blocks = [block for block in blocks if "msllm.load(" in block]
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_site_shows_every_notebook():
    """The notebooks in docs/ are those beside it, so that their relative paths are the same."""
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert (ROOT / "docs/notebooks").resolve() == ROOT / "notebooks"
    page = (ROOT / "docs/index.md").read_text()
    assert sorted(re.findall(r"^notebooks/(\w+).ipynb$", page, flags=re.M)) == names


def test_the_page_lists_every_notebook_and_extra():
    page = (ROOT / "docs/getting_started.md").read_text()
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"^\| `(\w+\.ipynb)` \|", page, flags=re.M)) == notebooks
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page.partition("## The quick")[0], flags=re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == project["optional-dependencies"].keys()


def test_the_extra_of_the_notebooks_is_enough():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    def packages(extra):
        nested = [re.fullmatch(r"msllm\[(\w+)\]", entry) for entry in extras[extra]]
        found = {re.split("[<>=]", entry)[0] for entry in extras[extra]}
        return found.union(*(packages(match[1]) for match in nested if match))

    needed = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        assert set(re.findall(r"pip install -e [\\\"]+\.\[(.+?)\]", text)) <= {"notebooks"}
        for module in re.findall(r"from (msllm\.[\w.]+) import", text):
            file = (ROOT / module.replace(".", "/")).with_suffix(".py")
            if file.exists():  # a module names the extras that its functions need
                for extra in re.findall(r"msllm\[(\w+)\]", file.read_text()):
                    needed[extra] = path.name
    assert "monitor" in needed
    for extra, name in needed.items():
        assert packages(extra) <= packages("notebooks"), (name, extra)


def test_extras_that_texts_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    files = [*PAGES, *(ROOT / "msllm").rglob("*.py"), *(ROOT / "launch").glob("*.*")]
    named = {}
    for path in [*files, *(ROOT / "notebooks").glob("*.ipynb")]:
        for found in re.findall(r"""(?:msllm|["' ]\.)\[([a-z,]+)\]""", path.read_text()):
            named |= dict.fromkeys(found.split(","), path.name)
    assert {"data", "notebooks", "tensorboard"} <= named.keys()
    assert not {name: path for name, path in named.items() if name not in extras}
    assert any(entry.startswith("jupyterlab") for entry in extras["notebooks"])
    assert any(entry.startswith("tensorboard>") for entry in extras["tensorboard"])
