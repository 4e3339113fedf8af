"""Preparation in portions: results do not depend on processes; a stopped run continues."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import replace, write_config_file
from test_prepare import examples

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import build, duplicates, files, job, sources
from msllm.data.converters import input_portions, texts
from msllm.data.duplicates import Ids, count_distinct, ranges, sum_duplicates
from msllm.data.prepare import prepare
from msllm.data.report import describe
from msllm.errors import RunError, UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer, train

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = TokenizerConfig(model_type="word", vocab_size=2048)
RECORDS = [
    {"source": f"w{i} w{i % 7} and w{i % 11}", "target": f"so w{i} it is"} for i in range(500)
]
# A user's converter that waits or dies at one record.
USER_CONVERTER = """
import os, time

def convert(layout, record):
    source, target = record.text("source"), record.text("target")
    if source.startswith(os.environ.get("DIE_AT", "-")):
        os.kill(os.getpid(), 9)
    wait = source.startswith(os.environ.get("WAIT_AT", "-"))
    while wait and os.path.exists(os.environ.get("WAIT_WHILE", "/")):
        time.sleep(0.05)
    yield layout.table([layout.say("user", 0, source), layout.say("output", 1, target)], source)
"""


def write(path, records=RECORDS):
    """Writes records as JSON lines and returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def small_portions(monkeypatch):
    """Cuts RECORDS into five portions."""
    monkeypatch.setattr(sources, "PORTION_BYTES", 6 << 10)


@pytest.fixture
def config(tmp_path, small_portions, monkeypatch):
    """A config with USER_CONVERTER, and RECORDS in five portions."""
    (tmp_path / "user_words.py").write_text(USER_CONVERTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_words", raising=False)  # from another test
    tokenizer = train([text for record in RECORDS for text in record.values()], WORDS)
    (tmp_path / "t.model").write_bytes(tokenizer.to_bytes())
    return config_with_user_converter(tmp_path)


def config_with_user_converter(tmp_path):
    # With a ready tokenizer, since training one would read all records in the first process.
    ready = TokenizerConfig(path=str(tmp_path / "t.model"))
    return make_config(tmp_path, converter="user_words:convert", tokenizer=ready)


def make_config(tmp_path, **data):
    """A config for RECORDS, with changes to its `data` section."""
    defaults = {
        "converter": "wait_k",
        "path": write(tmp_path / "a.jsonl"),
        "tokenizer": WORDS,
        "rows": 32,
        "eval_percent": 10.0,
    }
    return Config(data=DataConfig(**(defaults | data)))


def contents(folder):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_do_not_depend_on_the_number_of_processes(config, tmp_path):
    manifest = prepare(config, tmp_path / "one")
    assert prepare(config, tmp_path / "three", processes=3) == manifest
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    shards = [shard["file"] for shard in manifest["splits"]["train"]["shards"]]
    # One for each portion, instead of config.data.shards = 4.
    assert shards == [f"train-{i:05d}-of-00005.array_record" for i in range(5)]
    assert "unfinished" not in os.listdir(tmp_path / "three")
    train_set, held = (examples(config, tmp_path / "three", split)[0] for split in build.SPLITS)
    assert len(train_set) + len(held) == len(RECORDS) and 20 < len(held) < 90


def test_the_bytes_do_not_depend_on_the_executor(config, tmp_path):
    manifest = prepare(config, tmp_path / "one")
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        assert prepare(config, tmp_path / "threads", executor=executor) == manifest
        assert prepare(config, tmp_path / "threads", executor=executor) == manifest  # is finished
    assert contents(tmp_path / "threads") == contents(tmp_path / "one")


def test_relative_paths_reach_workers_in_another_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), os.chdir, ("/",)
    ) as executor:
        manifest = prepare(replace(config, "data", path="a.jsonl"), "out", executor=executor)
    assert prepare(config, tmp_path / "one") == manifest


def test_a_worker_of_another_version_is_refused(config, tmp_path, monkeypatch):
    def versions(data):
        first = threading.current_thread() is threading.main_thread()
        return {"msllm": "1" if first else "2"}

    monkeypatch.setattr("msllm.data.identity.code_versions", versions)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        with pytest.raises(UserError, match="the worker on .* has msllm 2, .* started with 1"):
            prepare(config, tmp_path / "out", executor=executor)


def test_a_worker_that_does_not_share_the_folder_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SHARED_SECONDS", 0.1)
    monkeypatch.setattr(job.Job, "build", build_elsewhere)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        with pytest.raises(UserError, match="elsewhere/unfinished/state.json is not there.*share"):
            prepare(config, tmp_path / "out", executor=executor)


def build_elsewhere(self, portion, build=job.Job.build):
    return build(dataclasses.replace(self, out=f"{self.out}/elsewhere"), portion)


def test_a_worker_that_outlives_its_run_changes_nothing(config, tmp_path):
    prepare(config, tmp_path / "out")
    before = contents(tmp_path / "out")
    spec, portions = StreamSpec.from_config(config.streams), build.divide(config)
    tokenizer = Tokenizer.load(config.data.tokenizer.path)
    (tmp_path / "out/unfinished").mkdir()  # of the next run
    changed = replace(config, "data", rows=16)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="has ended, so this worker discards its work"):
        list(
            build.build(changed, spec, tokenizer, out, portions[0], lambda: job.check_run(out, "a"))
        )
    assert not list(tmp_path.glob("out/unfinished/*"))
    (tmp_path / "out/unfinished").rmdir()
    assert contents(out) == before


def test_input_files_are_hashed_once(config, tmp_path, monkeypatch):
    path, out, hashed = tmp_path / "a.jsonl", tmp_path / "out", []
    for name in ("file_hash", "hash_and_lines_before"):
        monkeypatch.setattr(files, name, noting(getattr(files, name), hashed))
    monkeypatch.setattr("msllm.data.records.write_manifest", interrupt)

    def interrupted():
        """Returns the times of change of all portions, and how often the input was hashed."""
        hashed.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out)
        reports = out.glob("unfinished/portion-*.json")
        return {report.name: report.stat().st_mtime_ns for report in reports}, len(hashed)

    portions, count = interrupted()
    assert len(portions) == 5 and count == 1
    assert interrupted() == (portions, 0)
    os.utime(path, ns=(1, 1))
    assert interrupted() == (portions, 1)
    path.write_text(path.read_text().replace("w1 ", "v1 "))
    os.utime(path, ns=(2, 2))
    with pytest.raises(UserError, match="holds an unfinished run with other settings .inputs"):
        prepare(config, out)


def noting(function, calls):
    """Returns a function that also appends the files a.jsonl with which it is called to `calls`."""

    def call(file, *arguments):
        if str(file).endswith("a.jsonl"):
            calls.append(file)
        return function(file, *arguments)

    return call


@pytest.mark.parametrize("end", ["finish", signal.SIGKILL])
def test_a_second_prepare_waits_for_the_first(config, tmp_path, end):
    out = tmp_path / "out"
    wait = tmp_path / "wait"
    wait.touch()
    first = start(tmp_path, out, WAIT_AT="w350 ", WAIT_WHILE=str(wait))
    wait_for(lambda: len(list(out.glob("unfinished/portion-*.json"))) == 4, first)
    second = start(tmp_path, out, second=True)
    line = second.stderr.readline()
    assert (
        line
        == f"process {first.pid} on {socket.gethostname()} is preparing {out}: waiting for it\n"
    )
    if end == "finish":
        wait.unlink()
        assert first.wait(60) == 0
    else:
        first.kill()
    stdout, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert ("already holds this data" in stdout) == (end == "finish")
    prepare(config, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_worker_processes_end_with_a_killed_parent(config, tmp_path):
    process = start(tmp_path, tmp_path / "out", WAIT_AT="w350 ")
    wait_for(lambda: len(list(tmp_path.glob("out/unfinished/portion-*.json"))) == 4, process)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(is_alive(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "data", [{"split": "tail"}, {"max_examples": 230}, {"split": "tail", "max_examples": 230}, {}]
)
def test_portions_give_the_same_examples_as_one_pass(tmp_path, monkeypatch, data):
    plain = make_config(tmp_path, **data)
    found = {}
    for name, size in (("whole", 1 << 20), ("portions", 6 << 10)):
        monkeypatch.setattr(sources, "PORTION_BYTES", size)
        prepare(plain, tmp_path / name)
        found[name] = [set(examples(plain, tmp_path / name, split)[0]) for split in build.SPLITS]
    assert found["whole"] == found["portions"]
    assert sum(map(len, found["whole"])) == data.get("max_examples", 500)
    shards = list((tmp_path / "portions").glob("train*"))
    assert len(shards) == (3 if "max_examples" in data else 5)  # the other portions are not read
    held_out = list((tmp_path / "portions").glob("eval*"))
    assert len(held_out) == (1 if "split" in data else len(shards))
    if len(data) == 2:  # several processes also stop at max_examples
        prepare(plain, tmp_path / "processes", processes=2)
        assert contents(tmp_path / "portions") == contents(tmp_path / "processes")


def test_eval_path_gives_the_held_out_examples(tmp_path, small_portions):
    config = make_config(
        tmp_path, eval_path=write(tmp_path / "b.jsonl", RECORDS[300:] + [RECORDS[300]])
    )
    manifest = prepare(config, tmp_path / "out", processes=2)
    # A shard for each portion of the training file, and config.data.shards = 4 for held-out data.
    assert [len(part["shards"]) for part in manifest["splits"].values()] == [5, 4]
    assert [part["examples"] for part in manifest["splits"].values()] == [500, 201]
    assert manifest["duplicates"] == {"train": 0, "eval": 1, "train_and_eval": 200}
    assert (
        "duplicates: 0 examples of train and 1 examples of eval repeat earlier ones; 200 are in"
        " both splits" in describe(manifest)
    )


def start(tmp_path, out, second=False, **environment):
    """Starts `msllm prepare` with two processes and small portions, in its own process group."""
    path = tmp_path / f"config{second:d}.py"
    config = write_config_file(path, config_with_user_converter(tmp_path))
    small = "from msllm.data import sources; sources.PORTION_BYTES = 6 << 10"
    code = f"import sys; from msllm.cli.main import main; {small}; sys.exit(main(sys.argv[1:]))"
    flags = [f"--config={config}", f"--out={out}", "--processes=2"]
    return subprocess.Popen(
        [sys.executable, "-c", code, "prepare", *flags],
        env=os.environ | environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process, seconds=120):
    """Waits until a condition holds; fails if it takes too long or the process ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_continues(config, tmp_path, stop):
    out = tmp_path / "out"
    process = start(tmp_path, out, WAIT_AT="w350 ")  # in the fourth portion
    wait_for(lambda: len(list(out.glob("unfinished/portion-*.json"))) == 4, process)
    os.killpg(process.pid, stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if stop == signal.SIGKILL else 1), errors
    assert stop == signal.SIGKILL or errors.endswith(
        "stopped: finished work is kept; run the same command again to continue\n"
    )
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert len(before) == 8 and not (out / "manifest.json").exists()

    changed = replace(config, "data", rows=33)
    with pytest.raises(
        UserError, match=r"an unfinished run with other settings \(rows \(was .*, now .*\) differ\)"
    ):
        prepare(changed, out)
    manifest = prepare(config, out)
    assert prepare(config, tmp_path / "whole") == manifest
    assert contents(out) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_damaged_shard_of_an_unfinished_run_is_written_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr("msllm.data.records.write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(sources, "PORTION_BYTES", 6 << 10)
    monkeypatch.syspath_prepend(tmp_path)
    shard = tmp_path / "out/train-00002-of-00005.array_record"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    prepare(config, tmp_path / "out")
    prepare(config, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_process_that_dies_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DIE_AT", "w350 ")
    message = (
        "a worker process was killed while it worked on .*portion 4 of 5, .*a.jsonl"
        ".*fewer --processes.*the same command continues"
    )
    with pytest.raises(RunError, match=message):
        prepare(config, tmp_path / "out", processes=2)
    monkeypatch.delenv("DIE_AT")
    prepare(config, tmp_path / "out", processes=2)
    prepare(config, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_in_a_worker_is_raised_by_prepare(config, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [*RECORDS[:400], {"source": "no target"}, *RECORDS[401:]])
    with pytest.raises(UserError, match="a.jsonl:401: there is no 'target'"):
        prepare(config, tmp_path / "out", processes=2)
    write(tmp_path / "a.jsonl")
    (tmp_path / "user_words.py").write_text(
        "def convert(layout, record):\n    yield layout.say('user', 0, None)\n"
    )
    monkeypatch.delitem(sys.modules, "user_words")
    with pytest.raises(TypeError) as failure:
        prepare(config, tmp_path / "crash", processes=2)
    notes = "\n".join(failure.value.__notes__)
    assert f"in {tmp_path}/a.jsonl:" in notes and "user_words.py" in notes


BAD = [{"sauce": "x"} if i % 100 == 7 else record for i, record in enumerate(RECORDS)]


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_records_over_several_portions(tmp_path, small_portions, capsys, processes):
    config = make_config(tmp_path, path=write(tmp_path / "bad.jsonl", BAD), bad_percent=1.0)
    manifest = prepare(config, tmp_path / "out", processes)
    assert manifest["bad"]["records"] == 500 and manifest["bad"]["bad"] == 5
    lines = [f"bad.jsonl:{number}: there is no 'source'" for number in (8, 108, 208, 308, 408)]
    shown = manifest["bad"]["shown"]
    assert [message[: len(line)] for message, line in zip(shown, lines, strict=True)] == lines
    prefix = f"left out: {tmp_path}/"
    printed = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert sorted(printed) == sorted(prefix + message for message in shown)
    write(tmp_path / "bad.jsonl", [{"sauce": "y"}, *BAD])
    with pytest.raises(
        UserError, match=r"6 of 501 records are bad, .*bad_percent=1.0 .*bad.jsonl:1: .*bad.jsonl:9"
    ):
        prepare(config, tmp_path / "more", processes)


def test_too_many_bad_records_stop_the_run_before_its_end(config, tmp_path):
    write(tmp_path / "a.jsonl", [{"sauce": "x"}] * 11 + RECORDS)
    with pytest.raises(UserError, match="11 of 11 records are bad"):
        prepare(replace(config, "data", bad_percent=1.0), tmp_path / "out")


def test_records_without_a_table_are_counted(tmp_path, small_portions):
    records = [
        {"messages": [] if i % 50 == 0 else [{"role": "user", "content": f"w{i} w1"}]}
        for i in range(500)
    ]
    config = make_config(tmp_path, converter="chat", path=write(tmp_path / "chat.jsonl", records))
    manifest = prepare(config, tmp_path / "out")
    assert len(build.divide(config)) > 1 and manifest["empty"]["records"] == 10
    assert "gave no table: 10 records (nothing in them to make a table of)" in describe(manifest)
    one = StreamsConfig(names=("text",), kinds=("output",))
    documents = [{"text": "w1" if i % 50 == 0 else f"w1 w{i}"} for i in range(500)]
    config = make_config(
        tmp_path, converter="single", path=write(tmp_path / "text.jsonl", documents)
    )
    manifest = prepare(dataclasses.replace(config, streams=one), tmp_path / "texts")
    assert manifest["empty"]["records"] == 10  # one token leaves nothing to predict


def test_empty_turns_are_counted_and_the_first_is_named(tmp_path, small_portions):
    def chat(i):
        said = (f"w{i % 7} w1", " \n" if i % 50 == 3 else "w2", "" if i == 401 else "w3", "w4")
        roles = ("user", "output", "user", "output")
        return {"messages": [{"role": r, "content": text} for r, text in zip(roles, said)]}

    path = write(tmp_path / "chat.jsonl", [chat(i) for i in range(500)])
    config = make_config(tmp_path, converter="chat", path=path)
    manifest = prepare(config, tmp_path / "out")
    assert len(build.divide(config)) > 1
    assert manifest["empty_turns"] == {
        "output": {"turns": 1000, "empty": 10, "first": "chat.jsonl:4, message 1"},
        "user": {"turns": 1000, "empty": 1, "first": "chat.jsonl:402, message 2"},
    }
    warned = [line for line in describe(manifest).splitlines() if "turns" in line]
    assert warned == [
        "WARNING: 1 of 1,000 turns of user are empty, the first at chat.jsonl:402, message 2: the"
        " model answers silence there; remove them if this is not what you want",
        "WARNING: 10 of 1,000 turns of output are empty, the first at chat.jsonl:4, message 1: the"
        " model learns to say nothing there; remove them if this is not what you want",
    ]
    full = write(tmp_path / "full.jsonl", [chat(i) for i in range(500) if i % 50 != 3 and i != 401])
    manifest = prepare(make_config(tmp_path, converter="chat", path=full), tmp_path / "full")
    assert "empty_turns" not in manifest and "turns" not in describe(manifest)


@pytest.mark.parametrize("converter", ["wait_k", "roles", "tools"])
def test_empty_turns_of_other_converters(tmp_path, converter):
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    if converter == "wait_k":
        records = [{"source": f"w{i}", "target": ""} for i in range(30)]
    else:
        records = [
            {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "output", "content": ""}]}
            for i in range(30)
        ]
    streams, options = StreamsConfig(names=("user", "output"), kinds=("input", "output")), {}
    if converter == "tools":
        # What a message says beside calls, and what a call gives back, may be empty.
        made = [
            {"role": "output", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": ""},
        ]
        records = [{"messages": record["messages"] + made} for record in records]
        options = {"calls": ["call"], "results": ["result"]}
        streams = StreamsConfig(
            names=("user", "result", "call", "output"),
            kinds=("input", "input", "output", "output"),
        )
    path = write(tmp_path / "in.jsonl", records)
    config = make_config(tmp_path, converter=converter, path=path, options=options)
    manifest = prepare(dataclasses.replace(config, streams=streams), tmp_path / "out")
    where = "in.jsonl:1" if converter == "wait_k" else "in.jsonl:1, message 1"
    expected = {"output": {"turns": 30, "empty": 30, "first": where}}
    assert manifest["empty_turns"] == expected


def test_small_files_share_a_portion_and_large_ones_are_cut(tmp_path, monkeypatch):
    for i, size in enumerate([10, 10, 300, 2000, 0, 10]):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(f'{{"n": {n:2d}}}\n' for n in range(size // 10))
        )
    (tmp_path / "6.json").write_text("[" + "1, " * 300 + "1]")
    monkeypatch.setattr(sources, "PORTION_BYTES", 500)
    portions = sources.portions(str(tmp_path / "*.json*"))
    found = [
        [(part.file[len(str(tmp_path)) + 1], part.index, part.count) for part in portion]
        for portion in portions
    ]
    assert all(found) and sum(found, []) == sorted(sum(found, []))
    assert [item for portion in found for item in portion if item[0] == "3"] == [
        ("3", i, 4) for i in range(4)
    ]
    assert len(found) < 8 and max(map(len, found)) >= 3
    monkeypatch.setattr(sources, "MAX_PORTIONS", 2)
    assert len(sources.portions(str(tmp_path / "*.json*"))) == 2


def test_the_tokenizer_is_trained_on_all_portions(tmp_path, small_portions):
    config = make_config(tmp_path)
    spec, portions = StreamSpec.from_config(config.streams), input_portions(config)
    assert len(portions) == 5
    everything = list(texts(config, spec))
    assert list(texts(config, spec, portions, 1e9)) == everything
    some = list(texts(config, spec, portions, 1000))
    assert some == list(texts(config, spec, portions, 1000)) and 1000 < sum(map(len, some)) < 1200
    places = [everything.index(text) for text in some if text.startswith("so")]
    assert places == sorted(places)
    shares = [
        sum(len(everything) * i // 5 <= n < len(everything) * (i + 1) // 5 for n in places)
        for i in range(5)
    ]
    assert min(shares) > 3 and max(shares) - min(shares) <= 3
    first = replace(config, "data", max_examples=3)
    assert list(texts(first, spec, portions)) == everything[:6]


NUMBERS = st.lists(st.integers(0, 30), max_size=40)


@given(NUMBERS, NUMBERS, st.integers(1, 8), st.integers(1, 9))
def test_duplicates_are_counted_in_blocks(tmp_path_factory, trained, held, block, size):
    folder = tmp_path_factory.mktemp("ids")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "RANGE_IDS", block)
        patch.setattr(duplicates, "FILE_IDS", size)
        for split, numbers in (("train", trained), ("eval", held)):
            ids = Ids(folder, split)
            for number in numbers:
                ids.add([f"{number * (2**64 - 1) // 30:016x}"])
            ids.close()
        files = {split: sorted(folder.glob(f"{split}.*.npy")) for split in build.SPLITS}
        counts = [count_distinct(files, ids) for ids in ranges(len(trained) + len(held))]
        found = sum_duplicates(counts, {"train": len(trained), "eval": len(held)})
    assert found == {
        "train": len(trained) - len(set(trained)),
        "eval": len(held) - len(set(held)),
        "train_and_eval": len(set(trained) & set(held)),
    }


def test_a_worker_does_not_import_jax():
    line = "import sys, msllm.data.job, msllm.data.executors; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"jax", "flax", "orbax.checkpoint", "grain"} & set(loaded)
