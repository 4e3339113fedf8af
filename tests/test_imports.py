"""The import direction between packages, the cost of imports, and `configure_jax`."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys
import warnings

import jax
import pytest

import msllm

PACKAGE = pathlib.Path(msllm.__file__).parent
# A package (or top-level module) imports only from its own line and the lines above it.
# docs/architecture.md has the same list.
LAYERS = """
errors presets kernels
runtime.files groups
config mail combine
streams tokenizer optim sharding
model.attention loss runtime flow
model data
step metrics
checkpoint monitor
weights
decode hooks
training
evals view
pod chat starter study
serve
bench
cli
"""
LEVEL = {name: level for level, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def layer_of(module: str) -> str:
    """The entry of LAYERS for a module, given as a dotted name without `msllm`."""
    fits = [name for name in LEVEL if module == name or module.startswith(f"{name}.")]
    assert fits, f"msllm.{module} has no place in LAYERS"
    return max(fits, key=len)


def imports_of(path: pathlib.Path, modules: set[str]) -> set[str]:
    """The modules of this package that a file imports, including imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:  # a module of a package, or else a name in a module
                full = f"{node.module}.{alias.name}"
                found.add(full if full.removeprefix("msllm.") in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("msllm.") for name in found if name.startswith("msllm.")}


def test_imports_point_downward():
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name not in ("__init__", "__main__"):
            paths[name.removesuffix(".__init__")] = path
    graph = {name: imports_of(path, set(paths)) for name, path in paths.items()}
    for name, imported in graph.items():
        for other in imported:
            here, there = layer_of(name), layer_of(other)
            assert here == there or LEVEL[there] < LEVEL[here], f"{name} imports {other}"
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the cycle
    assert sum(map(len, graph.values())) > 100  # `imports_of` does find imports


def test_no_module_shadows_the_standard_library():
    for folder in (PACKAGE, *filter(pathlib.Path.is_dir, PACKAGE.rglob("*"))):
        names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        names = {name for name in names if not name.startswith("__")}
        assert not names & sys.stdlib_module_names, folder


def test_data_and_model_do_not_import_slow_libraries():
    def loaded(names):
        line = [sys.executable, "-c", f"import sys, {names}; print(*sys.modules)"]
        return set(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())

    core = loaded("msllm.step, msllm.data.converters, msllm.data.records")
    assert "flax" in core and not {"orbax.checkpoint", "tensorboardX", "grain", "pyarrow"} & core
    # The loader needs grain, and grain imports orbax if it is installed.
    train = loaded("msllm.training")
    assert "grain" in train and "tensorboardX" not in train


def python(code, **environment):
    """The output of code in a new process that does not inherit this process's XLA settings."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=clean | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_has_no_side_effects_and_is_quick():
    code = """
import gc, os, sys, time
environment, begin = dict(os.environ), time.process_time()
import msllm
seconds = time.process_time() - begin
assert dict(os.environ) == environment and gc.isenabled()
assert not {"jax", "numpy", "msllm.config"} & sys.modules.keys()
print(seconds)
"""
    assert float(python(code)) < 0.1


def test_public_names_are_documented_and_declared_for_type_checkers():
    assert dir(msllm) == sorted(msllm.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    declared = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msllm.")
        for alias in node.names
    }
    loaded = {name: f"msllm.{module}" for module, names in msllm._MODULES.items() for name in names}
    assert declared == loaded and set(declared) == set(msllm.__all__)
    for name in msllm.__all__:
        assert getattr(msllm, name).__doc__
    assert callable(msllm.train)  # the function, not a module
    with pytest.raises(AttributeError, match="module 'msllm' has no attribute 'trian'"):
        msllm.trian  # noqa: B018


def test_virtual_devices_get_enough_threads_to_wait_for_each_other():
    def threads(**environment):
        code = "import msllm, os; msllm.configure_jax(); print(os.environ.get('PJRT_NPROC'))"
        return python(code, **environment)

    eight = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"}
    assert threads() == threads(XLA_FLAGS="--xla_a=1") == "None"
    assert int(threads(**eight)) >= 128
    assert threads(PJRT_NPROC="3", **eight) == "3"


def test_settings_after_jax_has_started_are_reported(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    jax.devices()
    with pytest.warns(RuntimeWarning, match="XLA_FLAGS cannot be set any more"):
        msllm.configure_jax()
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        msllm.configure_jax()  # nothing to set
