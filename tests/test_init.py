"""`msllm init`: what it finds in data, the config that it writes, and the way to a model."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys

import jax
import pytest

import msllm
from msllm.bench.texts import orders
from msllm.cli.base import _read_config
from msllm.cli.main import main
from msllm.data.executors import available_cores
from msllm.data.prepare import prepare
from msllm.starter import plan as plan_lib
from msllm.starter.survey import survey
from msllm.training import train

CHAT = [{"role": "user", "content": "one tea"}, {"role": "assistant", "content": "tea x 1"}]
TWO = {"user": "input", "output": "output"}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder in which the commands run. The steps of all models take 10 ms."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_lib, "measure_step", lambda config, tokenizer: 0.01)
    return tmp_path


def config_of(name):
    config, rest = _read_config(f"configs/{name}.py", [])
    assert not rest
    return config


FORMS = {
    "chat": ([{"messages": CHAT}], "chat", TWO, {"roles": {"assistant": "output"}}),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}],
        "chat",
        TWO,
        {"roles": {"assistant": "output"}},
    ),
    "alpaca": (
        [{"instruction": "add", "input": "2 3", "output": "5", "system": "be brief"}],
        "chat",
        {"system": "input", **TWO},
        {"roles": {"assistant": "output"}},
    ),
    "reasoning and other keys": (
        [
            {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "one", "mood": "calm"}]},
            {"messages": CHAT, "shop": "north"},
        ],
        "chat",
        {"user": "input", "thought": "thought", "output": "output"},
        {
            "roles": {"assistant": "output", "reasoning": "thought"},
            "ignored_keys": ["mood", "shop"],
        },
    ),
    "names of people": (
        [{"messages": [{"role": "Ann B.", "content": "hi"}, {"role": "Bo", "content": "yes"}]}],
        "chat",
        {"ann_b": "input", "output": "output"},
        {"roles": {"Bo": "output", "*": "ann_b"}},
    ),
    "calls": (
        [
            {
                "messages": [
                    CHAT[0],
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": i, "function": {"name": "get", "arguments": i}} for i in "ab"
                        ],
                    },
                    {"role": "tool", "tool_call_id": "b", "content": "sun"},
                    {"role": "tool", "tool_call_id": "a", "content": "rain"},
                    {"role": "assistant", "content": "sun and rain"},
                ]
            }
        ],
        "tools",
        {
            "user": "input",
            "result_1": "input",
            "result_2": "input",
            "call_1": "output",
            "call_2": "output",
            "output": "output",
        },
        {"calls": ["call_1", "call_2"], "results": ["result_1", "result_2"]},
    ),
    "calls of ShareGPT": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "weather ?"},
                    {"from": "function_call", "value": '{"name": "get", "arguments": "Rome"}'},
                    {"from": "observation", "value": "sun"},
                    {"from": "gpt", "value": "it is sunny"},
                ]
            },
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        ],
        "tools",
        {"user": "input", "result": "input", "call": "output", "output": "output"},
        {"roles": {"assistant": "output"}, "calls": ["call"], "results": ["result"]},
    ),
    "questions and answers": (
        [{"question": "how far ?", "answer": "ten metres", "grade": 3}],
        "chat",
        TWO,
        {
            "roles": {"assistant": "output"},
            "silence": [0, 0, 1, 2, 4, 8, 16, 32, 64],
            "ignored_keys": ["grade"],
        },
    ),
    "pairs": (
        [{"source": "how far ?", "target": "wie weit ?", "grade": 3}],
        "wait_k",
        TWO,
        {"k": 3, "ignored_keys": ["grade"]},
    ),
    "texts": ([{"body": "a b c d e"}], "single", {"text": "output"}, {"key": "body"}),
    "recordings": (
        [
            {
                "utterances": [
                    {"start": 0, "end": 2, "speaker": "A", "text": "do you have a dog"},
                    {"start": 1.5, "end": 2, "speaker": "B", "text": "yes", "sure": 1},
                ]
            }
        ],
        "timed",
        {"b": "input", "output": "output"},
        {"roles": {"A": "output", "B": "b"}, "ignored_keys": ["sure"]},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_config_fits_the_form_of_the_records(here, capsys, name):
    records, converter, streams, options = FORMS[name]
    write(here / "my.jsonl", records * 30)
    assert main(["init", "mine", "--from=my.jsonl"]) == 0, capsys.readouterr().err
    config = config_of("mine")
    assert config.data.converter == converter
    assert dict(zip(config.streams.names, config.streams.kinds)) == streams
    assert {key: config.data.options.get(key) for key in options} == options
    manifest = prepare(config, here / "out")
    parts = manifest["splits"].values()
    assert sum(part["examples"] for part in parts) >= 30 or converter == "single"
    assert not any(part["cut"]["examples"] for part in parts)
    output = "text" if converter == "single" else "output"
    assert manifest["splits"]["train"]["tokens"][output] > 0


@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "jsonl.gz", "vtt", "txt", "md"])
def test_files_are_read_as_prepare_reads_them(here, capsys, ending):
    path = here / f"my.{ending}"
    if ending == "csv":
        path.write_text("question,answer\n" + 'how far ?,"ten, or so"\n' * 40)
    elif ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}] * 40), path)
    elif ending == "json":
        path.write_text(json.dumps([{"messages": CHAT}] * 40))
    elif ending == "jsonl.gz":
        import gzip

        with gzip.open(path, "wt") as file:
            file.write(json.dumps({"messages": CHAT}) + "\n")
            file.write((json.dumps({"messages": CHAT}) + "\n") * 39)
    elif ending == "vtt":
        pytest.importorskip("webvtt")
        path.write_text(
            "WEBVTT\n\n00:00.000 --> 00:02.000\n<v Ann>do you have a dog\n\n"
            "00:01.500 --> 00:02.000\n<v Bo>yes\n"
        )
    else:
        path.write_text("to be or not to be, that is the question\n" * 60)
    assert main(["init", "mine", f"--from={path}"]) == 0, capsys.readouterr().err
    manifest = prepare(config_of("mine"), here / "out")
    assert manifest["splits"]["train"]["tables"] > 0


def test_the_config_says_what_was_chosen_and_is_not_overwritten(here, capsys):
    write(here / "my.jsonl", orders(150))
    assert main(["init", "mine", "--from=my.jsonl"]) == 0
    said = capsys.readouterr().out
    text = (here / "configs/mine.py").read_text()
    assert "150 examples" in said and "roles and their streams: user" in said
    assert "tokens per word" in said and "epochs of about" in said
    for line in re.findall(r"^    (msllm .*)$", text, flags=re.M):
        assert line in said
    assert all(len(line) <= 100 for line in text.splitlines())
    assert main(["init", "mine", "--from=my.jsonl"]) == 2
    assert "configs/mine.py exists" in capsys.readouterr().err
    (here / "configs/mine.py").write_text("mine")
    assert main(["init", "mine", "--from=my.jsonl", "--force"]) == 0
    assert (here / "configs/mine.py").read_text() == text
    assert main(["init", "sub/other.py", "--from=my.jsonl"]) == 0
    assert (here / "sub/other.py").exists()


def test_pairs_in_csv_become_chats_and_say_so(here, capsys):
    rows = "".join(f'"how far, {i} ?",ten\n' for i in range(40))
    (here / "my.csv").write_text(f"\ufeffquestion,answer\n{rows}why ?,\n", encoding="utf-8")
    assert main(["init", "mine", "--from=my.csv"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "Data: pairs of question and answer; 41 examples" in said
    assert "a pair is a chat of two turns" in said and "use the converter wait_k" in said
    assert "silences of drawn lengths" in said
    assert "WARNING: empty question or answer in 1 of 41 pairs, the first at my.csv:42" in said
    write(here / "my.jsonl", [{"source": "one", "target": "eins"}] * 30)
    assert main(["init", "other", "--from=my.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "there are no silences before and after a pair" in said
    assert "name source question and target answer" in said


def test_empty_turns_are_counted_and_the_first_is_named(here, capsys):
    write(here / "full.jsonl", orders(30))
    assert main(["init", "full", "--from=full.jsonl"]) == 0
    assert "WARNING" not in capsys.readouterr().out
    chats = list(orders(30))
    turns = sum(len(chat["messages"]) for chat in chats)
    chats[4]["messages"][1]["content"] = chats[9]["messages"][1]["content"] = " "
    write(here / "my.jsonl", chats)
    assert main(["init", "mine", "--from=my.jsonl"]) == 0
    said = capsys.readouterr().out
    assert f"WARNING: 2 of {turns} turns are empty, the first (of assistant) at my.jsonl:5" in said


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_may_have_other_marks_than_commas(here, capsys, mark):
    rows = "".join(f'"how far{mark} {i} ?"{mark}ten, or so\n' for i in range(40))
    (here / "my.csv").write_text(f"question{mark}answer\n{rows}")
    assert main(["init", "mine", "--from=my.csv"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "pairs of question and answer; 40 examples" in text
    assert f"user=how far{mark} 0 ?" in text


def test_a_folder_and_unknown_columns_are_named_with_their_remedy(here, capsys):
    (here / "books").mkdir()
    for name in ("a.txt", "b.txt", "readme.md"):
        (here / "books" / name).write_text("to be or not to be, that is the question\n" * 60)
    (here / "books/inner.txt").mkdir()
    assert main(["init", "mine", "--from=books"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: --from is 'books': a folder: name files in it by a glob, for example"
        " 'books/*.txt'\n"
    )
    assert main(["init", "mine", "--from=books/*.txt"]) == 0  # the folder in it is no file
    capsys.readouterr()
    assert main(["prepare", "--config=configs/mine.py", "--config.data.path=books"]) == 2
    assert "config.data.path is 'books': a folder" in capsys.readouterr().err
    (here / "my.csv").write_text("how far ?,ten\nhow high ?,two\n")
    assert main(["init", "other", "--from=my.csv"]) == 2
    assert "the first row of the file must name the columns" in capsys.readouterr().err


def test_a_large_text_is_looked_at_in_part(here, monkeypatch):
    monkeypatch.setattr(plan_lib, "_TEXT_CHARACTERS", 50_000)
    (here / "my.txt").write_text("to be or not to be, that is the question\n" * 100_000)
    plan = plan_lib.make_plan(survey("my.txt"), "data/x")
    assert plan.facts["tokens"] == pytest.approx(100_000 * 12, rel=0.2)
    write(here / "my.jsonl", [{"text": "to be or not to be"}] * 20_000)
    plan = plan_lib.make_plan(survey("my.jsonl"), "data/x")
    assert plan.facts["tokens"] == pytest.approx(20_000 * 6, rel=0.2)


def test_long_chats_get_short_silences(here):
    turns = [message for chat in orders(20) for message in chat["messages"]]
    write(here / "my.jsonl", [{"messages": turns}] * 30)
    plan = plan_lib.make_plan(survey("my.jsonl"), "data/x")
    assert plan.config.data.rows == 512 and max(plan.config.data.options["silence"]) == 8
    assert "lose their ends" in plan.reasons["data.rows"]


def test_few_examples_do_not_get_endless_epochs(here):
    path = write(here / "my.jsonl", orders(9))
    plan = plan_lib.make_plan(survey(path), "data/x")
    steps = plan.config.steps
    assert (
        20 <= steps <= 200
        and f"{steps * plan.config.data.batch_size / plan.facts['tables']:,.1f} epochs"
        in plan.reasons["steps"]
    )


def test_numbers_follow_the_data(here, monkeypatch):
    monkeypatch.setattr(plan_lib, "measure_step", lambda config, tokenizer: 0.1)
    few = write(here / "few.jsonl", orders(50))
    many = write(here / "many.jsonl", orders(4000))
    small, large = (plan_lib.make_plan(survey(path), "data/x") for path in (few, many))
    assert small.config.data.eval_percent == 10.0 > large.config.data.eval_percent > 0
    assert small.config.model.d_model < large.config.model.d_model
    assert small.minutes <= 4.0 and large.minutes <= 4.0
    shorter = plan_lib.make_plan(survey(many), "data/x", minutes=0.6)
    assert shorter.minutes <= 0.6 < large.minutes
    for plan in (small, large, shorter):
        assert plan.config.data.batch_size % jax.device_count() == 0


def test_a_large_input_is_looked_at_in_several_places(here, monkeypatch):
    monkeypatch.setattr("msllm.starter.survey.SAMPLE_BYTES", 100_000)
    monkeypatch.setattr("msllm.data.sources.PORTION_BYTES", 200_000)
    chats = list(orders(6000))
    chats[-1]["messages"][0]["role"] = "guest"
    path = write(here / "many.jsonl", chats)
    found = survey(path)
    assert 0.02 < found.share < 0.2 and len({part.index for part, _ in found.parts}) >= 4
    plan = plan_lib.make_plan(found, "data/x")
    assert plan.facts["examples"] == pytest.approx(6000, rel=0.1)


@pytest.mark.parametrize(
    "name, records, message",
    [
        ("mine", [], "there is no record in it"),
        ("mine", [{"weather": "sunny"}], "the record has the keys ['weather']: init knows chats"),
        ("mine", [{"messages": "x"}], "my.jsonl:1: 'messages' is a text, but no JSON"),
        ("mine", [{"messages": [CHAT[0], 5]}], "my.jsonl:1: 'messages' is a list that holds other"),
        ("a/b", [{"messages": CHAT}], "NAME is 'a/b'"),
        ("a b", [{"messages": CHAT}], "NAME is 'a b'"),
        ("mine", [{"text": ""}], "there is no text in its records"),
        (
            "mine",
            [{"messages": [{"role": f"Dr. {i}", "content": "x"} for i in range(3)]}],
            "have dots in their names",
        ),
        (
            "mine",
            [{"messages": [{"role": f"r{i}", "content": "x"} for i in range(13)]}],
            "have 13 roles or speakers (r0,",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(here, capsys, name, records, message):
    write(here / "my.jsonl", records)
    assert main(["init", name, "--from=my.jsonl"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (here / "configs").exists()


def test_a_missing_file_and_bad_minutes(here, capsys):
    for flags, message in (
        (["--from=none.jsonl"], "--from is 'none.jsonl': there is no such file"),
        (["--from=my.jsonl", "--minutes=-1"], "--minutes is -1: must be in (0, 1000000]"),
        (["--from=my.jsonl", "--minutes=x"], "--minutes is 'x': must be a number of minutes"),
        ([], "--from must be given"),
    ):
        assert main(["init", "mine", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_strange_names_give_a_config_that_can_be_read(here, capsys):
    path = here / 'my "best" \\ chats\'s """.jsonl'
    write(path, [{"messages": CHAT}] * 30)
    assert main(["init", "mine", f"--from={path.name}"]) == 0, capsys.readouterr().err
    assert config_of("mine").data.path == path.name


def commands_of(printed):
    """Returns the arguments of the commands that `init` prints."""
    return [shlex.split(line)[1:] for line in re.findall("^    (msllm .*)$", printed, flags=re.M)]


def test_from_chats_to_a_model_in_a_small_form(here, capsys, compile_fast):
    write(here / "my.jsonl", orders(60))
    assert main(["init", "mine", "--from=my.jsonl"]) == 0
    commands = commands_of(capsys.readouterr().out)
    assert [command[0] for command in commands] == "prepare inspect train generate chat".split()
    assert main(commands[0]) == 0
    _, given, workdir = commands[2]
    smaller = ["--config.steps=10", "--config.eval_every=0", "--config.model.num_layers=1"]
    config, _ = _read_config(given.removeprefix("--config="), smaller)
    train(config, workdir.removeprefix("--workdir="))
    out = capsys.readouterr().out
    tables = json.loads((here / "data/mine/manifest.json").read_text())["splits"]["train"]
    assert re.search(r"^model: \d+,\d{3} parameters, \d+ pieces, streams user, output$", out, re.M)
    assert f"data: {tables['tables']} tables of" in out and "epochs" in out
    assert re.search(r"^memory: [\d.]+ MiB for parameters and optimizer, [\d.]+ MiB", out, re.M)
    assert re.search(r"^time: about [\d:]+ for the \d steps that are left, at [\d.]+ s", out, re.M)
    *asked, rows = commands[3]
    assert main([*asked, "--rows=4"]) == 0 and rows.startswith("--rows=")
    assert "output" in capsys.readouterr().out


def run(*arguments, cwd):
    line = [sys.executable, "-m", "msllm", *arguments]
    # The tests' flags make eight devices of the CPU and their programs slow.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_150_chats_give_a_model_that_answers_in_their_format(tmp_path):
    """All commands together take less than 5 CPU-minutes, unless the machine is very busy.

    Then threads that wait for each other take several times the CPU time. `init` would also choose
    fewer steps, so it gets more minutes than the quiet machine needs.
    """
    write(tmp_path / "my.jsonl", orders(150))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = os.getloadavg()[0] > 2 * available_cores()
    out = run("init", "mine", "--from=my.jsonl", "--minutes=30", cwd=tmp_path)
    commands = commands_of(out)
    run(*commands[0], cwd=tmp_path)
    run(*commands[2], cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert seconds < 300 or busy or os.getloadavg()[0] > 2 * available_cores()
    model = msllm.load(tmp_path / "runs/mine")
    in_format = right = asked = 0
    for idle in (0, 100, 300):
        answers = ask(model, list(orders(40, seed=1)), idle)
        for answer, wanted in answers:
            asked += 1
            right += answer == wanted
            in_format += bool(
                re.fullmatch(r"order : \w+ x \d \| (small|medium|large) \| (to go|here)", answer)
            )
    assert asked >= 120 and in_format >= 0.98 * asked and right >= 0.95 * asked


def ask(model, chats, idle):
    """Returns (answer, right answer) of all questions of chats, each after `idle` silent rows.

    The second question follows after 100 rows at most: it refers to the first one, which must still
    be in the window.
    """
    window = model.run_config.data.rows
    engine = msllm.Engine(model, sessions=len(chats), window=window)
    sessions = [engine.open(msllm.DecodeOptions()) for _ in chats]
    found = []
    for turn in (0, 2):
        for _ in range(min(idle, 100) if turn else idle):
            engine.step()
        for session, chat in zip(sessions, chats):
            if turn < len(chat["messages"]):
                session.feed("user", chat["messages"][turn]["content"])
        for _ in range(40):
            engine.step()
        for session, chat in zip(sessions, chats):
            if turn < len(chat["messages"]):
                said = session.transcript(40).tokens[:, model.streams.index("output")]
                answer = model.tokenizer.decode(said).strip()
                found.append((answer, chat["messages"][turn + 1]["content"]))
    return found
