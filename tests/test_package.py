"""The wheel: its contents and metadata, and whether it requires what the package imports."""

import ast
import email
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import msllm

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = {".py", ".typed", ".cc", ".h", ".html"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel. It is built from a copy, because a build leaves files in its source folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "msllm", source / "msllm", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as file:
        yield file


def test_the_wheel_holds_the_package_only(wheel):
    names = set(wheel.namelist())
    info = f"msllm-{msllm.__version__}.dist-info"
    package = {name for name in names if not name.startswith(info)}
    files = [path for path in (ROOT / "msllm").rglob("*") if path.suffix in DATA]
    assert package == {str(path.relative_to(ROOT)) for path in files}
    assert {"msllm/py.typed", "msllm/kernels/cpu/simd.h", "msllm/view/page.html"} <= package
    assert f"{info}/licenses/LICENSE" in names


def test_metadata_and_entry_point_of_the_wheel(wheel):
    info = f"msllm-{msllm.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Name"] == "msllm" and metadata["Version"] == msllm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) >= {"tpu", "cuda", "gcs", "data", "chat"}
    assert b"msllm = msllm.cli.main:main" in wheel.read(f"{info}/entry_points.txt")


def test_dependencies_state_their_lowest_versions():
    """`.ci/floors` tests with these versions. The tools of developers are the newest."""
    extras = PROJECT["optional-dependencies"]
    groups = [extras[name] for name in extras.keys() - {"dev", "docs", "test"}]
    entries = [entry for group in (PROJECT["dependencies"], *groups) for entry in group]
    unstated = [entry for entry in entries if not re.search(r">=|==|^msllm\[", entry)]
    assert len(entries) > 20 and not unstated


def test_imported_packages_are_required():
    """Checks imports at the top of modules. Functions may import packages of an extra."""

    def canonical(name):
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", name)[0]).lower()

    required = {canonical(name) for name in PROJECT["dependencies"]}
    # Of modules that need an extra.
    optional = {"matplotlib", "textual", "torch", "transformers"}
    optional |= {"msgspec", "prometheus_client", "starlette", "uvicorn"}
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for path in (ROOT / "msllm").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported -= sys.stdlib_module_names | {"msllm", "jaxlib"}  # jax requires jaxlib
    assert len(imported) > 10
    for name in imported - optional:
        found = {canonical(distribution) for distribution in distributions.get(name, [])}
        assert found & required, f"{name} is imported, but none of {found} is required"
