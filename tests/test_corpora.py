"""Readers of public corpora, on a few lines of each format and on the corpora if available."""

import json

import golden_cases
import numpy as np
import pytest

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import corpora
from msllm.data.converters import convert, texts
from msllm.data.sources import parts, read
from msllm.streams import StreamSpec
from msllm.tokenizer import train


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_switchboard(tmp_path):
    a = "0.0 1.5 hi there\n1.5 3.0 [silence] \n2.0 3.0 [silence] \n"
    b = "0.0 1.0 [silence]\n1.0 3.0 hello\n"
    path = write(tmp_path / "calls", f"{a}\n{b}")
    (call,) = corpora.switchboard(path)
    assert call["utterances"] == [
        {"start": 0.0, "end": 1.5, "speaker": "A", "text": "hi there"},
        {"start": 1.0, "end": 3.0, "speaker": "B", "text": "hello"},
    ]


def test_apollo13(tmp_path):
    def utterance(start, text):
        return {"id": 1, "start": start, "end": 9, "source": "CDR", "message": text}

    write(tmp_path / "b-loop.json", [utterance(3, "two")])
    path = write(tmp_path / "a-loop.json", [utterance(2, "one"), utterance(None, "lost")])
    (recording,) = corpora.apollo13(path)
    assert [(u["speaker"], u["start"], u["text"]) for u in recording["utterances"]] == [
        ("a/CDR", 2, "one"),
        ("b/CDR", 3, "two"),
    ]


def test_taskmaster4(tmp_path):
    def note(name, value, context):
        return {"name": name, "value": value, "context": context}

    notes = [note("api_call", "get", "api_call_0"), note("request", "{1}", "api_call_0")]
    notes += [
        note("api_response", "get", "api_response_0"),
        note("response", "{2}", "api_response_0"),
    ]
    turns = [
        {"speaker": "user", "text": "a", "annotations": notes},
        {"speaker": "assistant", "text": "b"},
    ]
    (dialogue,) = corpora.taskmaster4(write(tmp_path / "d.json", [{"utterances": turns}]))
    call = {"id": "0", "function": {"name": "get", "arguments": "{1}"}}
    assert dialogue["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "0", "content": "{2}"},
        {"role": "assistant", "content": "b"},
    ]


def test_bfcl(tmp_path):
    question = {
        "id": "x",
        "question": [[{"role": "user", "content": "q"}]],
        "function": [{"name": "f"}],
    }
    calls = [{"f": {"a": [1, 2], "b": ["", 3]}}, {"g": {}}]
    path = write(tmp_path / "BFCL.json", question)
    write(tmp_path / "answer_BFCL.json", {"id": "x", "ground_truth": calls})
    (record,) = corpora.bfcl(path)
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    found = [call["function"] for call in record["messages"][-1]["tool_calls"]]
    assert found == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]


def count_pairs(record):
    return 1


def count_utterances(record):
    return len(record["utterances"])


def count_rows(record):
    return len(record["rows"])


def count_calls(record):
    return sum(len(message.get("tool_calls") or ()) for message in record["messages"])


CHORALES = "jsb_chorales/Jsb16thSeparated.json"
# reader: (path, number of records, number of items, items of a record). The numbers were counted
# without these readers.
WHOLE = {
    "switchboard": (
        "timed_switchboard_sample/timed-transcript",
        36,
        8881 - 2944,
        count_utterances,
    ),
    "apollo13": ("apollo13_loops/air-ground-loop.json", 1, 4172 + 1104, count_utterances),
    "tatoeba": ("translation_tatoeba/eng-swe.txt", 25286, 25286, count_pairs),
    "chorales_train": (CHORALES, 229, 55228, count_rows),
    "chorales_valid": (CHORALES, 76, 18408, count_rows),
    "chorales_test": (CHORALES, 77, 18900, count_rows),
    "quarter_chorales_test": (CHORALES, 77, 4725, count_rows),
    "taskmaster4": ("dialogue_taskmaster4/data_0[67].json", 710, 2873, count_calls),
    "bfcl": ("tools_bfcl/BFCL_v4_parallel.json", 200, 540, count_calls),
}
# reader: (converter, names of streams, options)
CONVERTERS = {
    "switchboard": ("timed", ("A", "B"), {}),
    "apollo13": (
        "timed",
        ("air-ground", "flight"),
        {"roles": {"*": "flight"}, "row_seconds": 1, "longest_silence": 4},
    ),
    "tatoeba": ("wait_k", ("user", "output"), {"k": [1, 3, -1], "unit": "word"}),
    "chorales_test": ("aligned", ("soprano", "alto", "tenor", "bass"), {}),
    "taskmaster4": ("tools", ("user", "assistant", "call", "result"), {}),
    "bfcl": (
        "tools",
        ("system", "user", "c", "d", "r"),
        {"calls": ["c", "d"], "results": ["r", "r"]},
    ),
}


def whole(name):
    """The path of a corpus; skips the test if it is missing."""
    path = golden_cases.shared_folder() / "data" / WHOLE[name][0]
    if not path.parent.is_dir():
        pytest.skip(f"{path.parent} is missing: set MSLLM_SHARED")
    return str(path)


@pytest.mark.parametrize("name", WHOLE)
def test_readers_find_all_records(name):
    _, records, items, count = WHOLE[name]
    found = [
        record.value
        for part in parts(whole(name), f"msllm.data.corpora:{name}")
        for record in read(part)
    ]
    assert len(found) == records and sum(map(count, found)) == items


@pytest.mark.parametrize("name", CONVERTERS)
def test_converters_keep_all_tokens_of_corpora(name):
    """The tables hold as many tokens as the tokenizer makes of the texts."""
    converter, names, options = CONVERTERS[name]
    streams = StreamsConfig(names=names, kinds=("output",) * len(names))
    data = DataConfig(
        converter=converter,
        path=whole(name),
        format=f"msllm.data.corpora:{name}",
        options=options,
        rows=1 << 20,
        max_examples=300,
    )
    config, spec = Config(streams=streams, data=data), StreamSpec.from_config(streams)
    all_texts = list(texts(config, spec))
    kind = "char" if name in ("tatoeba", "bfcl") else "word"
    tokenizer = train(all_texts, TokenizerConfig(model_type=kind, vocab_size=30000))
    tables = list(convert(config, spec, tokenizer))
    placed = sum(
        int((table.present & (table.tokens != tokenizer.silence_id)).sum()) for table in tables
    )
    if converter == "aligned":  # its texts hold each distinct item once
        songs = corpora.chorales_test(data.path)
        items = [item for song in songs for row in song["rows"] for item in row]
        assert placed == sum(item != -1 for item in items)
    else:
        assert placed == sum(len(tokenizer.encode(text)) for text in all_texts) > 5000


def test_transposed_chorales_keep_every_interval():
    file = whole("chorales_train")
    original = {json.dumps(song["rows"]) for song in corpora.quarter_chorales_train(file)}
    transposed = [
        np.array(song["rows"]) for song in corpora.quarter_chorales_train_transposed(file)
    ]
    assert {json.dumps(song.tolist()) for song in transposed} >= original
    assert len(transposed) > 9 * len(original)

    def intervals(song):
        """Pitches relative to the lowest; -1 stays -1."""
        return np.where(song == -1, -1, song - song[song >= 0].min())

    known = {json.dumps(intervals(np.array(json.loads(song))).tolist()) for song in original}
    assert all(json.dumps(intervals(song).tolist()) in known for song in transposed)
    pitches = np.concatenate(transposed)
    assert pitches[pitches >= 0].min() == corpora.LOWEST and pitches.max() == corpora.HIGHEST
