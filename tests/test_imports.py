"""The import direction, the size of the core, and what an import costs."""

import ast
import os
import pathlib
import subprocess
import sys

import msllm

PACKAGE = pathlib.Path(msllm.__file__).parent
# A module imports only modules of lines above its own, or of its own line those to its left.
ORDER = """
errors shapes workers progress timing native
config
rope
streams
compiler cluster
sharding
attention.case attention.blocks attention.reference attention.chunked attention.gpu attention.splash
attention.native
attention.ring attention
layers
model
loss
optim
tokenizer
cells
data data.sources data.corpora data.dictation data.tables data.packing data.records data.mixture data.loader
data.converters.layout data.converters.vary
data.converters.chat data.converters.wait_k data.converters.timed data.converters.tools data.converters.aligned
data.converters.single data.converters.parallel_documents data.converters.gsm8k data.converters.tables
data.converters.dictation data.converters data.duplicates data.build
code
step
kept
checkpoint
initial trained
metrics flops
hardware goodput meter
hlo roofline markup page
atomic hf gguf_file
load
sampling cache decode_program session decode
train prepare drawing inspect convert score generate evaluate interruptions likelihood
recording live screen chat
attention_map plots
bench_torch bench_attention bench_decode bench_loader bench_prepare bench
aot
""".split()
# Imports inside functions, by (module, imported module), with the reason.
NESTED = {
    ("load", "trained"): "orbax is slow to import, and a Hugging Face folder needs none of it",
    ("train", "checkpoint"): "orbax is slow to import, and not every use of this module needs it",
    ("train", "initial"): "the same",
    ("chat", "screen"): "textual is installed only where it is asked for",
    ("bench_decode", "bench_torch"): "torch is installed only where it is asked for",
    ("bench", "*"): "each case is measured in a process of its own: the first one needs none of this",
}
CORE = (
    *("config", "streams", "sharding", "layers", "model", "loss", "optim", "step", "train", "checkpoint"),
    *("attention", "data"),
)
# For one kind of hardware, of mesh or of data each, what makes data ahead of all training, and the turns of several sources: nobody
# needs them to follow a step.
OUTSIDE = (
    *("attention.blocks", "attention.gpu", "attention.native", "attention.splash", "attention.ring"),
    *("data.sources", "data.corpora", "data.converters", "data.dictation", "data.packing", "data.duplicates", "data.build"),
    "data.mixture",
)


def modules():
    """{dotted name without the package: path}."""
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}


def imports(path):
    """(module of this package, whether inside a function) of every import in a file."""
    tree = ast.parse(path.read_text())
    inside = {node for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    known = modules()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("msllm.") in known else node.module for name in inner]
        for name in names:
            if name.startswith("msllm."):
                yield name.removeprefix("msllm."), node in inside


def test_every_module_has_its_place():
    assert set(modules()) <= set(ORDER)


def test_imports_go_one_way():
    count = 0
    for name, path in modules().items():
        for imported, _ in imports(path):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"
            count += 1
    assert count > 50


def test_nested_imports_have_a_reason():
    command_line = {"errors", "config"}  # what only a module's command needs
    nested = {(name, imported) for name, path in modules().items() for imported, inside in imports(path) if inside}
    whole = {name for name, imported in NESTED if imported == "*"}
    assert whole <= {name for name, _ in nested}
    expected = {(name, imported) for name, imported in NESTED if imported != "*"}
    assert {pair for pair in nested if pair[1] not in command_line and pair[0] not in whole} == expected


def test_the_core_is_small():
    paths = [path for name, path in modules().items() if name.split(".")[0] in CORE and not name.startswith(OUTSIDE)]
    assert len(paths) > 17
    assert sum(len(path.read_text().splitlines()) for path in paths) < 3000


def test_data_and_model_import_no_slow_library():
    def loaded(names):
        line = [sys.executable, "-c", f"import sys, {names}; print(*sys.modules)"]
        return set(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())

    core = loaded("msllm.step, msllm.data.converters, msllm.data.records")
    assert "flax" in core and not {"orbax.checkpoint", "tensorboardX", "grain", "pyarrow"} & core
    # grain, which the loader needs, imports orbax where it is installed.
    train = loaded("msllm.train")
    assert "grain" in train and not {"tensorboardX", "msllm.checkpoint"} & train


def test_virtual_devices_get_threads_enough_to_wait_for_each_other():
    def threads(**environment):
        code = "import msllm, os; print(os.environ.get('PJRT_NPROC'))"
        clean = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PJRT_NPROC")}
        run = [sys.executable, "-c", code]
        return subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True).stdout.strip()

    eight = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"}
    assert threads() == threads(XLA_FLAGS="--xla_a=1") == "None"
    assert int(threads(**eight)) >= 128
    assert threads(PJRT_NPROC="3", **eight) == "3"
