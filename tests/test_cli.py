"""The command `msllm`: help, flags, errors in one line, exit statuses."""

import ast
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import warnings

import hypothesis
import jax
import pytest
from hypothesis import strategies as st
from runs import settings

import msllm
from msllm.cli import base
from msllm.cli.main import COMMANDS, load_command, main, parser_of
from msllm.config import Config, default_config
from msllm.errors import RunError, UserError
from msllm.runtime import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    # If this is set, `main` leaves the settings of this process alone.
    monkeypatch.setenv("PJRT_NPROC", "1")


def output_of(capsys, *arguments):
    """(status, stdout, stderr) of a command line that ends before it imports jax."""
    try:
        status = main(arguments)
    except SystemExit as end:  # --help
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_overview_has_a_line_for_each_command(capsys, arguments):
    status, text, _ = output_of(capsys, *arguments)
    assert status == 0
    listed = re.findall(r"^  ([a-z]+) +([A-Z].*\.)$", text, re.M)
    assert [name for name, _ in listed] == list(COMMANDS)
    assert all(len(line) < 90 for line in text.splitlines())


def test_help_does_not_import_slow_modules():
    code = "import sys; from msllm.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "msllm.cli.bench" in loaded
    assert not {"jax", "numpy", "ml_collections"} & loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys, name):
    status, text, _ = output_of(capsys, name, "--help")
    assert status == 0
    usage, sentence, *_ = text.split("\n\n")
    assert usage.startswith(f"usage: msllm {name} ") and re.fullmatch(r"[A-Z][^\n]*\.", sentence)
    body, examples = text.split("\nexamples:\n")
    assert all(len(line) <= 80 for line in body.splitlines())
    for action in parser_of(name)._actions:
        assert re.search(r"[.)]$", action.help), f"the help of {action.dest} is not a sentence"
        if action.required and action.option_strings:
            assert f"{action.option_strings[0]}=" in usage
    # Examples parse.
    lines = examples.strip().splitlines()
    assert 1 <= len(lines) <= 4
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert (program, command) == ("msllm", name)
        parser_of(name).parse(arguments)


def test_defaults_are_shown(capsys):
    _, text, _ = output_of(capsys, "evaluate", "--help")
    assert re.search(r"--examples=N .*Default:\s+500\.", text, re.S)
    _, text, _ = output_of(capsys, "bench", "--help")
    assert "Default: 256 (train, serve), 512 (decode)." in " ".join(text.split())
    for name in COMMANDS:
        _, text, _ = output_of(capsys, name, "--help")
        for entry in re.split(r"\n  --", text):
            shown = re.findall(r"Default: (\S+)", entry)
            assert len(shown) == len(set(shown)), f"{name}: {entry}"
            assert not any(value.startswith(("(", "[", "{", "<")) for value in shown), entry


@pytest.mark.parametrize(
    "line, message",
    [
        ("trian", "unknown command 'trian': did you mean train?"),
        ("xyz", "unknown command 'xyz' (msllm --help lists the commands)"),
        ("train --workdirr=x", "unknown flag --workdirr: did you mean --workdir?"),
        ("train", "--config, --workdir must be given (see msllm train --help)"),
        ("train x --config=configs/quickstart.py --workdir=y", "unexpected argument 'x'"),
        (
            "train --config=configs/quickstrat.py --workdir=x",
            "'configs/quickstrat.py': there is no such file (configs holds quickstart.py",
        ),
        ("train --config=configs --workdir=x", "'configs': a folder, not a file (configs holds "),
        (
            "train --config=configs/quickstart --workdir=x",
            "'configs/quickstart': there is no such file (configs holds quickstart.py",
        ),
        ("train --config=configs/quickstart.py --workdir=", "--workdir is empty: give a path"),
        ("generate --checkpoint=", "--checkpoint is empty: give a path"),
        ("inspect ''", "DIR is empty: give a path"),
        ("inspect configs/gsm8k.py", "configs/gsm8k.py is a file, not a folder of prepared data"),
        ("prepare configs/gsm8k.py", "--config must be given: did you mean --config=configs/gsm8k"),
        ("generate --rows 5 runs/x", "must be given: did you mean --checkpoint=runs/x? (see"),
        ("generate --rows 5", "--checkpoint must be given (see msllm generate --help)"),
        ("generate --rows 5 'a\nb'", "--checkpoint must be given (see msllm generate --help)"),
        ("train --steps=5", "unknown flag --steps: did you mean --config.steps? (msllm"),
        ("train --lr=1e-3", "unknown flag --lr: did you mean --config.optim.lr? (msllm"),
        ("generate --steps=5", "unknown flag --steps"),
        ("help trian", "unknown command 'trian': did you mean train?"),
        ("generate --checkpoint=x --rows=0", "--rows is 0: must be at least 1"),
        ("generate --checkpoint=x --rows=-1", "--rows is -1: must be at least 1"),
        ("generate --checkpoint=x --rows=many", "--rows is 'many': must be a whole number"),
        ("score --checkpoint=x --tables=y --out=none/z.npz", "there is no directory none"),
        ("likelihood --checkpoint=x --visibility=same", "--visibility: invalid choice: 'same'"),
        ("convert from_hf a b --dtype=float16", "from_hf takes no --dtype: it takes --streams,"),
        ("bench prepare --rows=4", "bench prepare takes no --rows: it takes --size_mb,"),
        ("bench train --rows=4,x", "--rows is 'x': must be a whole number"),
        ("inspect", "DIR must be given"),
        ("aot --config=configs/quickstart.py --topology=v5e:2x2 --write_budget", "needs --budget"),
    ],
)
def test_bad_command_lines_end_with_one_line(capsys, line, message):
    status, out, error = output_of(capsys, *shlex.split(line))
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optim.lrr=1", "unknown config key config.optim.lrr: did you mean config.optim"),
        ("--config.optm.lr=1", "unknown config key config.optm: did you mean config.optim?"),
        ("--config.optim.lr.x=1", "config.optim.lr is not a section"),
        ("--config.data.options.examples.x=1", "config.data.options.examples is 12000, not a"),
        ("--config.steps=many", "flag --config.steps=many: must be a whole number"),
        ("--config.optim.lr=high", "flag --config.optim.lr=high: must be a number"),
        ("--config.steps=-1", "config.steps"),
    ],
)
def test_invalid_overrides_are_refused(override, message):
    with pytest.raises(UserError) as error:
        parser_of("prepare").parse(["--config=configs/quickstart.py", override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.optim.lrr = 1", "line 4: unknown key lrr: did you mean lr?"),
        ("config.zzz = 1", "line 4: unknown key zzz (msllm/config.py lists all settings)"),
        ("config.steps = missing", "line 4: NameError: name 'missing' is not defined"),
        ("config.steps = = 1", "invalid syntax (config.py, line 4)"),
    ],
)
def test_mistakes_in_a_config_file_are_located(tmp_path, line, message):
    file = tmp_path / "config.py"
    begin = (
        "from msllm.config import default_config\ndef get_config():\n  config = default_config()\n"
    )
    file.write_text(f"{begin}  {line}\n  return config\n")
    with pytest.raises(UserError, match=re.escape(f"--config={file}: {message}")):
        parser_of("prepare").parse([f"--config={file}"])


# Values that a shell, a template or a slip of the hand may produce.
JUNK = (
    *("", "x", "-1", "0", "1", "1.5", "1e400", "nan", "inf", "0x10", "1_000"),
    *("1" * 400, "9" * 5000),
    *("[1,2", "(1,", "[]", "()", "{'a':1}", "((0,(1.0,)),)", "1,2,3", "a,b", "'a','b'", "a=b"),
    *("None", "True", "lambda: 1", "__import__('os')", "(" * 300, "-" * 50, "*", "[", '"', "'"),
    *("~", "~nobody/x", "$HOME", "..", "/", "\x00", "\ud800", "é", "a b", "\n"),
)


def keys(settings, prefix=""):
    """The dotted names of all settings and sections."""
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


@hypothesis.given(seed=st.integers(0, 1 << 32), name=st.sampled_from(list(COMMANDS)))
@hypothesis.settings(max_examples=400)
def test_any_command_line_is_parsed_or_refused_in_one_line(seed, name):
    draw, parser = random.Random(seed), parser_of(name)
    options = [text for action in parser._actions for text in action.option_strings]
    names = list(keys(default_config().to_dict()))
    arguments = []
    if parser._takes_config:
        files = ("configs/quickstart.py",) * 4 + (draw.choice(JUNK),)
        arguments = [f"--config={draw.choice(files)}"]
    for _ in range(draw.randrange(1, 4)):
        key, value, flag = draw.choice(names), draw.choice(JUNK), draw.choice(options)
        key = draw.choice((key, key, key, key[:-1], f"{key}.a", f"{key}."))
        lines = (f"--config.{key}={value}", f"{flag}={value}", f"--config.{key}", value)
        arguments.append(draw.choices(lines, (6, 3, 1, 1))[0])
    try:
        parser.parse([text for text in arguments if text not in ("--help", "-h")])
    except UserError as error:
        assert "\n" not in str(error)


def test_overrides_of_a_config():
    arguments = ["--config=configs/quickstart.py", "--config.optim.lr=0.5", "--processes=3"]
    lag = "--config.streams.lags=(('output', 'user', '3'),)"
    flags = parser_of("prepare").parse([*arguments, lag, "--config.steps", "7"])
    assert isinstance(flags.config, Config) and flags.config_file == "configs/quickstart.py"
    assert (flags.config.optim.lr, flags.config.steps, flags.processes) == (0.5, 7, 3)
    assert flags.config.streams.lags == (("output", "user", "3"),)
    assert flags.config.model.d_model != settings().model.d_model  # set in the config file


@pytest.mark.parametrize("text", ["norm,head", "norm, head,", "('norm','head')", "['norm','head']"])
def test_a_tuple_of_strings_may_be_written_without_quotes(text):
    given = ["--config=configs/quickstart.py", f"--config.optim.no_decay={text}"]
    assert parser_of("prepare").parse(given).config.optim.no_decay == ("norm", "head")


@pytest.mark.parametrize(
    "text, value",
    [
        ("roles.assistant=output", {"roles": {"assistant": "output"}}),
        ("k=[1, 2]", {"k": [1, 2]}),
        ("k=1.5", {"k": 1.5}),
        ("spoken=true", {"spoken": True}),
        ("name=a,b", {"name": "a,b"}),
        ("name='5'", {"name": "5"}),
    ],
)
def test_free_form_options_may_have_any_key_and_value(text, value):
    given = ["--config=configs/quickstart.py", f"--config.data.options.{text}"]
    options = parser_of("prepare").parse(given).config.data.options
    assert value.items() <= options.items() and "examples" in options  # of the config file


def test_an_option_that_is_a_string_stays_one(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from msllm.config import default_config\ndef get_config():\n  config = default_config()\n"
        "  config.data.options = {'name': 'x'}\n  return config\n"
    )
    given = [f"--config={file}", "--config.data.options.name=5"]
    assert parser_of("prepare").parse(given).config.data.options == {"name": "5"}


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text("from msllm.config import default_config as get_config\n")
    given = ["--config=~/c.py", "--workdir=~/run", "--config.data.path=~/x.jsonl"]
    flags = parser_of("train").parse(
        [*given, "--config.data.mixture.dirs=~/a,b", "--config.data.mixture.weights=(1.0,1.0)"]
    )
    assert (flags.workdir, flags.config.data.path) == (f"{tmp_path}/run", f"{tmp_path}/x.jsonl")
    assert flags.config.data.mixture.dirs == (f"{tmp_path}/a", "b")
    flags = parser_of("evaluate").parse(["--checkpoint=~/run", "--json=~/out.json"])
    assert flags.checkpoint == f"{tmp_path}/run" and flags.json == tmp_path / "out.json"


@pytest.mark.parametrize(
    "given, value",
    [
        ([], None),
        (["--skip_silence"], True),
        (["--noskip_silence"], False),
        (["--skip_silence=true"], True),
        (["--skip_silence=False"], False),
    ],
)
def test_switches(given, value):
    flags = parser_of("score").parse(["--checkpoint=a", "--tables=b", "--out=c", *given])
    assert flags.skip_silence is value


def test_flags_are_given_with_or_without_an_equals_sign():
    line = "--checkpoint DIR --input user=a=b --input=tool=c --temperature=output=0.7 --seed -1"
    flags = parser_of("generate").parse(shlex.split(line))
    assert (flags.checkpoint, flags.input, flags.seed) == ("DIR", ["user=a=b", "tool=c"], -1)
    assert flags.temperature == ["output=0.7"]


@pytest.mark.parametrize(
    "result, status", [(None, 0), (75, 75), (UserError("bad"), 2), (RunError("gone"), 1)]
)
def test_exit_statuses(capsys, result, status):
    def command():
        if isinstance(result, Exception):
            raise result
        return result

    assert base.execute(command) == status
    assert capsys.readouterr().err == (
        f"error: {result}\n" if isinstance(result, Exception) else ""
    )


def test_ctrl_c_ends_a_command_in_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert base.execute(interrupted) == base.EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_table_without_a_reader_ends_as_other_output_does():
    code = (
        "import sys; from msllm.cli import base; from msllm.view import cells\n"
        "def show():\n"
        "    for i in range(100_000): cells.console().print(i)\n"
        "sys.exit(base.execute(show))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == base.EXIT_BROKEN_PIPE


def test_help_takes_the_name_of_a_command(capsys):
    assert output_of(capsys, "help", "train") == output_of(capsys, "train", "--help")


def test_training_where_jax_runs_says_what_to_do(capsys, tmp_path):
    jax.devices()
    arguments = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "jax has already started" in error and "give --num_processes=1" in error


def test_a_command_in_a_process_where_jax_runs_does_not_warn(monkeypatch, capsys):
    jax.devices()
    monkeypatch.setattr(environment, "_settings", lambda: {"PJRT_NPROC": "128"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["inspect", "nowhere"]) == 2  # as far as the command itself
    assert "error: nowhere does not exist" in capsys.readouterr().err
    with pytest.warns(RuntimeWarning, match="PJRT_NPROC cannot be set any more"):
        msllm.configure_jax()


def test_64_bits_are_refused_before_anything_else():
    command = [sys.executable, "-m", "msllm", "generate", "--checkpoint=none"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_ENABLE_X64": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_ENABLE_X64 is on: ")
    assert done.stderr.count("\n") == 1


def test_characters_that_the_output_cannot_show_are_replaced():
    code = "from msllm.cli import base; base.execute(lambda: print('a\u2423b'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("a?b\n", "")


def test_a_reader_that_leaves_early_sees_no_traceback():
    command = [sys.executable, "-m", "msllm", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in (0, base.EXIT_BROKEN_PIPE)


def test_version():
    command = [sys.executable, "-m", "msllm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"msllm {msllm.__version__}\n"


def test_only_the_cli_parses_arguments():
    for path in (ROOT / "msllm").rglob("*.py"):
        if "cli" in path.parts or path.name == "__main__.py":
            continue
        tree = ast.parse(path.read_text())
        for node in tree.body:
            assert not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)), path
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in modules if m.startswith(("absl", "argparse", "msllm.cli"))], path


def test_documented_command_lines_use_existing_flags():
    patterns = ("*.md", "docs/**/*.md", "configs/**/*.py", "notebooks/*.ipynb", "launch/**/*.sh")
    command_line = re.compile(rf"\bmsllm ({'|'.join(COMMANDS)}) ([^`\n|;&#]*)")
    checked = 0
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        for name, arguments in command_line.findall(path.read_text().replace("\\\n", " ")):
            flags = re.findall(r"(?<!\S)\[?(--?[a-zA-Z][\w.]*)", arguments)
            try:
                parser_of(name)._refuse_unknown(flags)
            except UserError as error:
                pytest.fail(f"{path}: {error}")
            checked += len(flags)
    assert checked > 100


def test_each_command_has_a_module():
    modules = {load_command(name) for name in COMMANDS}
    files = {path.stem for path in (ROOT / "msllm" / "cli").glob("*.py")}
    assert len(modules) == len(COMMANDS)
    assert files - {"__init__", "base", "main"} == set(COMMANDS.values())
