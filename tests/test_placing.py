"""Converters that place text in time: chat, wait_k, timed, tools, aligned, parallel_documents.

They lose no word, keep the order within a stream, and place nothing before its cause. The words of
an example are all different, so that a test can find the cell of each word.
"""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.converters import convert
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import train

WORDS = [f"w{i}" for i in range(250)]
TOKENIZER = train([" ".join(WORDS)], TokenizerConfig(model_type="word", vocab_size=300))
CHARACTERS = train([" ".join(WORDS)], TokenizerConfig(model_type="char", vocab_size=64))
THREE = StreamsConfig()
LENGTHS = st.integers(1, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function run(converter, records, streams, tokenizer, **data) that returns tables.

    It has module scope because hypothesis runs a test many times.
    """
    folder = tmp_path_factory.mktemp("data")

    def run(converter, records, streams=THREE, tokenizer=TOKENIZER, **data):
        path = folder / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = Config(
            streams=streams, data=DataConfig(converter=converter, path=str(path), **data)
        )
        return list(convert(config, StreamSpec.from_config(streams), tokenizer))

    return run


def text(words, length):
    """The next words of an iterator as a text."""
    return " ".join(itertools.islice(words, length))


def cells(table):
    """{word: (row, stream)}. Fails if a word occurs twice."""
    found = {}
    for row, stream in zip(*np.nonzero(table.present & (table.tokens != TOKENIZER.silence_id))):
        word = TOKENIZER.decode([table.tokens[row, stream]])
        assert word not in found
        found[word] = int(row), int(stream)
    return found


def span(found, text, stream):
    """(first row, row after the last) of a text. Fails unless it is in `stream` and in order."""
    rows = [found[word][0] for word in text.split()]
    assert {found[word][1] for word in text.split()} == {stream} and rows == sorted(rows)
    return rows[0], rows[-1] + 1


def assert_complete(found, texts):
    """Asserts that the words in a table are those of the texts."""
    assert sorted(found) == sorted(word for text in texts for word in text.split())


# chat


@settings(max_examples=100)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "thought", "output"]), LENGTHS), min_size=1, max_size=8
    ),
    overlap=st.integers(0, 3),
    wait=st.integers(-1, 4),
    thoughts=st.sampled_from(["before", "beside"]),
)
def test_chat_places_turns_after_what_they_follow(run, turns, overlap, wait, thoughts):
    words = iter(WORDS)
    messages = [{"role": role, "content": text(words, length)} for role, length in turns]
    options = {"overlap": overlap, "wait": wait, "thoughts": thoughts}
    (table,) = run("chat", [{"messages": messages}], options=options)
    found, spans = cells(table), []
    followed, from_user = None, False  # the span that the next turn follows
    assert_complete(found, [message["content"] for message in messages])
    for message in messages:
        stream = THREE.names.index(message["role"])
        start, end = span(found, message["content"], stream)
        earlier = [last for _, last in spans]
        own = [last for last, other in zip(earlier, messages) if other["role"] == message["role"]]
        if message["role"] == "user":
            assert start == max(earlier, default=0)
        elif followed is None:
            assert start == max(own, default=0)
        else:
            first, last = followed
            if from_user and wait >= 0:
                earliest = min(first + wait, last)
            else:
                earliest = max(last - overlap, first)
            assert start == max([earliest, *own])
            assert end - start == len(message["content"].split())
        spans.append((start, end))
        if message["role"] != "thought" or thoughts == "before":
            followed, from_user = (start, end), message["role"] == "user"


def test_chat_is_silent_before_turns_of_inputs_and_after_the_last_turn(run):
    words = iter(WORDS)
    texts = [text(words, 2) for _ in range(4)]
    messages = [{"role": r, "content": t} for r, t in zip(("user", "output") * 2, texts)]
    record = {"messages": messages}
    for silence in (0, 5):
        (table,) = run("chat", [record], options={"silence": silence, "overlap": 0})
        starts = [
            span(cells(table), said, 0 if i % 2 == 0 else 2)[0] for i, said in enumerate(texts)
        ]
        assert starts == [silence, silence + 2, 2 * silence + 4, 2 * silence + 6]
        assert 1 <= len(table.tokens) - (3 * silence + 8) <= 3
    # Every silence draws its own length.
    records = [
        {"messages": [{**m, "content": f"{m['content']} w2{i}"} for m in messages]}
        for i in range(10, 40)
    ]
    tables = run("chat", records, options={"silence": [0, 7], "overlap": 0}, rows=64)
    drawn = set()
    for table in tables:
        rows = np.nonzero((table.tokens != TOKENIZER.silence_id).any(axis=1))[0]
        gaps = np.diff(rows) - 1
        assert set(gaps) <= {0, 7} and len(rows) == 12
        end = len(table.tokens) - rows[-1] - 1
        drawn.add((int(rows[0]), int(gaps.max()), end > 3))
    assert drawn == {(a, b, c) for a in (0, 7) for b in (0, 7) for c in (False, True)}


def test_chat_maps_roles_and_checks_its_options(run):
    messages = [{"role": "user", "content": "w1 w2 w3"}, {"role": "bot", "content": "w4"}]
    (table,) = run("chat", [{"messages": messages}], options={"roles": {"*": "output"}})
    assert cells(table)["w4"] == (4, 2)  # a row lies between turns
    with pytest.raises(UserError, match="thoughts is 'after': must be before or beside"):
        run("chat", [{"messages": messages}], options={"thoughts": "after"})


# wait_k


@given(source=LENGTHS, target=LENGTHS, k=st.integers(-1, 6))
def test_wait_k_starts_after_k_tokens(run, source, target, k):
    words = iter(WORDS)
    pair = {"source": text(words, source), "target": text(words, target)}
    (table,) = run("wait_k", [pair], options={"k": k})
    found = cells(table)
    assert_complete(found, pair.values())
    assert span(found, pair["source"], 0) == (0, source)
    start = source if k < 0 else min(k, source)
    assert span(found, pair["target"], 2) == (start, start + target)


SENTENCE = st.lists(LENGTHS, min_size=1, max_size=5)


@given(source=SENTENCE, target=SENTENCE, k=st.integers(-1, 6))
def test_wait_k_starts_words_after_k_words(run, source, target, k):
    """A token is a character here, and a word has several."""
    texts = [" ".join("w" * n for n in lengths) for lengths in (source, target)]
    pair = dict(zip(("source", "target"), texts))
    (table,) = run("wait_k", [pair], tokenizer=CHARACTERS, options={"k": k, "unit": "word"})
    silent = table.tokens == CHARACTERS.silence_id
    rows = [np.flatnonzero(~silent[:, stream]).tolist() for stream in (0, 2)]
    assert [CHARACTERS.decode(table.tokens[r, s]) for r, s in zip(rows, (0, 2))] == texts
    # The number of characters in the first 0, 1, ... words. A space belongs to the word after it.
    source_ends, target_ends = (
        np.cumsum([0, lengths[0], *(n + 1 for n in lengths[1:])]) for lengths in (source, target)
    )
    for j, (first, last) in enumerate(zip(target_ends, target_ends[1:])):
        words_read = len(source) if k < 0 else min(j + k, len(source))
        free = rows[1][first - 1] + 1 if first else 0
        assert rows[1][first] == max(free, source_ends[words_read])
        assert rows[1][last - 1] - rows[1][first] == last - first - 1  # no silence inside a word


def test_options_drawn_from_a_list_depend_on_the_record_only(run):
    pairs = [
        {"source": f"{a} {b} w0", "target": "w1"} for a, b in itertools.permutations(WORDS[2:10], 2)
    ]
    tables = run("wait_k", pairs, options={"k": [0, 2, -1]})
    starts = [cells(table)["w1"][0] for table in tables]
    assert all(starts.count(k) > 8 for k in (0, 2, 3)) and len(starts) == len(pairs)
    again = run("wait_k", pairs[::-1], options={"k": [0, 2, -1]})
    assert [cells(table)["w1"][0] for table in again][::-1] == starts
    with pytest.raises(UserError, match=r"options.k is \[1, -2\]: must be at least -1"):
        run("wait_k", pairs, options={"k": (1, -2)})
    with pytest.raises(UserError, match=r"options.k is \[\]: expected int, or a list"):
        run("wait_k", pairs, options={"k": []})


# timed

UTTERANCES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12), st.sampled_from(["A", "B", "C"]), LENGTHS),
    min_size=1,
    max_size=8,
)
SPEAKERS = {"A": "user", "B": "output", "C": "output"}


def recording(utterances):
    words = iter(WORDS)
    return [
        {
            "start": start / 4,
            "end": (start + length) / 4,
            "speaker": speaker,
            "text": text(words, count),
        }
        for start, length, speaker, count in utterances
    ]


@given(utterances=UTTERANCES, row=st.sampled_from([0.25, 0.5, 1]))
def test_timed_places_words_at_their_times(run, utterances, row):
    said = recording(utterances)
    (table,) = run("timed", [{"utterances": said}], options={"row_seconds": row, "roles": SPEAKERS})
    found = cells(table)
    assert_complete(found, [utterance["text"] for utterance in said])
    first, free = min(utterance["start"] for utterance in said), {"user": 0, "output": 0}
    for utterance in sorted(said, key=lambda u: (u["start"], u["end"])):
        name, words = SPEAKERS[utterance["speaker"]], utterance["text"].split()
        for number, word in enumerate(words, 1):
            duration = utterance["end"] - utterance["start"]
            end_of_word = utterance["start"] - first + duration * number / len(words)
            place, stream = found[word]
            assert stream == THREE.names.index(name)
            assert (place + 1) * row >= end_of_word - 1e-9  # not before the word was said
            # Not later than necessary.
            assert place == free[name] or place * row <= end_of_word + 1e-9
            assert place >= free[name]
            free[name] = place + 1
    assert (table.tokens[:, 1] == TOKENIZER.silence_id).all() and table.present.all()


@given(utterances=UTTERANCES, longest=st.integers(1, 3))
def test_timed_shortens_long_silences(run, utterances, longest):
    record, options = {"utterances": recording(utterances)}, {"roles": SPEAKERS}
    (whole,) = run("timed", [record], options=options)
    (short,) = run("timed", [record], options=options | {"longest_silence": longest})
    before, after = cells(whole), cells(short)
    streams, streams_after = (
        {word: stream for word, (_, stream) in places.items()} for places in (before, after)
    )
    assert streams == streams_after
    # Words of one row stay in one row, and rows keep their order.
    moved = sorted({(before[word][0], after[word][0]) for word in before})
    assert len(moved) == len({old for old, _ in moved}) == len({new for _, new in moved})
    for (old, new), (next_old, next_new) in zip([(-1, -1), *moved], moved):
        assert next_new - new - 1 == min(next_old - old - 1, longest)


def test_timed_recordings_continue_in_the_next_table(run):
    said = [{"start": i, "end": i + 1, "speaker": "AB"[i % 2], "text": WORDS[i]} for i in range(40)]
    options = {"roles": SPEAKERS, "row_seconds": 1.0}
    (whole,) = run("timed", [{"utterances": said}], options=options, rows=100)
    delayed = StreamsConfig(delays=(0, 0, 3))
    parts = run("timed", [{"utterances": said}], options=options, rows=16, streams=delayed)
    assert max(len(part.tokens) for part in parts) == 16  # with the rows that delays add
    assert len(parts) > 3
    assert {part.example[:12] for part in parts} == {whole.example[:12]}
    assert len({part.example for part in parts}) == len(parts)
    for stream, delay in enumerate((0, 0, 3)):
        columns = [
            part.tokens[delay : len(part.tokens) - 3 + delay, stream].tolist() for part in parts
        ]
        assert all(a[-1] == b[0] for a, b in zip(columns, columns[1:]))
        joined = columns[0] + [token for column in columns[1:] for token in column[1:]]
        assert joined == whole.tokens[:, stream].tolist()


def test_timed_drops_ignored_texts_and_empty_recordings(run):
    said = [{"start": 0, "end": 1, "speaker": "A", "text": t} for t in ("[silence]", "w1")]
    options = {"roles": SPEAKERS, "ignored": ["[silence]"]}
    (table,) = run("timed", [{"utterances": said}, {"utterances": []}], options=options)
    assert list(cells(table)) == ["w1"]


# tools

TOOLS = StreamsConfig(
    names=("user", "call_1", "call_2", "result_1", "result_2", "output"),
    kinds=("input", "output", "output", "input", "input", "output"),
)
ROUNDS = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.lists(st.tuples(LENGTHS, st.integers(0, 3)), max_size=4),
        *[st.booleans()] * 2,
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100)
@given(rounds=ROUNDS, latency=st.integers(0, 2), after=st.integers(-1, 3))
def test_tools_places_calls_and_results(run, rounds, latency, after):
    words, messages = iter(WORDS), []
    for asked, calls, speaks, backwards in rounds:
        messages += [{"role": "user", "content": text(words, asked)}] * (asked > 0)
        called = [{"name": next(words), "arguments": text(words, length)} for length, _ in calls]
        made = [
            {"id": str(len(messages) + i), "function": function}
            for i, function in enumerate(called)
        ]
        content = text(words, 2) if speaks or not made else None
        messages.append({"role": "assistant", "content": content, "tool_calls": made})
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": text(words, length)}
            for call, (_, length) in zip(made, calls)
            if length
        ]
        messages += results[::-1] if backwards else results
    options = {"roles": {"assistant": "output"}, "latency": latency, "call_after": after}
    streams = {"calls": ["call_1", "call_2"], "results": ["result_1", "result_2"]}
    (table,) = run("tools", [{"messages": messages}], TOOLS, options=options | streams)
    found = cells(table)

    def said(call):
        return f"{call['function']['name']} {call['function']['arguments']}"

    everything = [m["content"] for m in messages if m["content"]]
    everything += [said(call) for m in messages for call in m.get("tool_calls", ())]
    assert_complete(found, everything)

    last = 0  # the row after all messages so far
    known = 0  # the row after all results so far
    question = 0  # the row at which the last question begins
    calls = {}  # (stream, row after the call) by id
    for message in messages:
        now = last
        if message["role"] == "tool":
            stream, end = calls[message["tool_call_id"]]
            start, stop = span(found, message["content"], stream + 2)
            assert start >= end + latency
            known, last = max(known, stop), max(last, stop)
            continue
        if message["content"]:
            start, stop = span(found, message["content"], 0 if message["role"] == "user" else 5)
            assert start == now  # a message starts as soon as all before it have ended
            last = max(last, stop)
        if message["role"] == "user":
            question = start
        starts = []
        for call in message.get("tool_calls", ()):
            stream = found[call["function"]["name"]][1]
            start, stop = span(found, said(call), stream)
            calls[call["id"]], last = (stream, stop), max(last, stop)
            starts.append(start)
        earliest = now if after < 0 else min(now, max(question + after, known))
        assert all(start >= earliest for start in starts)
        # Two calls start at once, because there are two streams for them.
        assert all(start == earliest for start in starts[:2])


def test_tools_accepts_arguments_as_an_object_and_calls_without_ids(run):
    said = 'f {"a": "ü"}'
    tokenizer = train([said], TokenizerConfig(model_type="char", vocab_size=64))
    call = {"function": {"name": "f", "arguments": {"a": "ü"}}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "a"}]
    options = {"calls": ["call_1"], "results": ["result_1"]}
    (table,) = run("tools", [{"messages": messages}], TOOLS, tokenizer, options=options)
    assert tokenizer.decode(table.tokens[:, 1]) == said
    assert np.flatnonzero(table.tokens[:, 3] != tokenizer.silence_id).tolist() == [len(said)]


# Bad input

TALK = {"speaker": "A", "text": "w1", "start": 0, "end": 1}
BAD = [
    ("wait_k", {"source": "w1"}, "1: there is no 'target'"),
    ("timed", {"utterances": "w1"}, r"1: must be \{\"utterances\""),
    (
        "timed",
        {"utterances": [TALK | {"end": None}]},
        "1, utterance 0: 'end' is None: must be a time",
    ),
    (
        "timed",
        {"utterances": [TALK | {"start": 2}]},
        "1, utterance 0: ends at 1, before it starts at 2",
    ),
    (
        "timed",
        {"utterances": [TALK, TALK | {"speaker": "Z"}]},
        "1, utterance 1: role 'Z' is none of",
    ),
    ("tools", {"messages": [{"content": "w1"}]}, "1, message 0: there is no 'role'"),
    (
        "tools",
        {"messages": [{"role": "tool", "content": "w1", "tool_call_id": 7}]},
        "1, message 0: 'tool_call_id' is",
    ),
    (
        "tools",
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "1, message 0: there is no 'name'",
    ),
    ("aligned", {"rows": [[1, 2]]}, "1: 'rows' must be a list of rows, each a list of 3 items"),
    ("aligned", {"rows": [[1, {}, "w1"]]}, "1, user, row 0: '1' is"),
    ("aligned", {"rows": [["w1", {}, "w1"]]}, "1, thought, row 0: {} is no cell"),
]
OPTIONS = {"timed": {"roles": SPEAKERS}, "tools": {"calls": ["output"], "results": ["user"]}}


@pytest.mark.parametrize("converter, record, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_records_are_named(run, converter, record, message):
    with pytest.raises(UserError, match=f"records.jsonl:{message}"):
        run(converter, [record], options=OPTIONS.get(converter, {}))


@pytest.mark.parametrize(
    "converter, options, message",
    [
        ("wait_k", {"unit": "letter"}, "unit is 'letter': must be token or word"),
        ("wait_k", {"target_stream": "speech"}, "names 'speech', which is none of"),
        ("timed", {"row_seconds": 0}, "row_seconds is 0.0: must be positive"),
        ("tools", {"calls": ["output"], "results": []}, "both must have the same number"),
        ("tools", {}, "names 'call', which is none of"),
    ],
)
def test_bad_options_are_named(run, converter, options, message):
    record = {"source": "w1", "target": "w2", "utterances": [], "messages": []}
    with pytest.raises(UserError, match=message):
        run(converter, [record], options=options)


# aligned and parallel_documents


@given(
    rows=st.lists(
        st.tuples(*[st.sampled_from(["w1", "w2", "", None, -1, -7])] * 3), min_size=2, max_size=20
    ),
    size=st.integers(2, 9),
)
def test_aligned_keeps_every_cell(run, rows, size):
    """A part begins with the last row of the part before it."""
    parts = run("aligned", [{"rows": rows}], options={"silence": [-1, -7]}, rows=size)
    assert all(len(part.tokens) <= size for part in parts)
    tokens = np.concatenate([parts[0].tokens, *(part.tokens[1:] for part in parts[1:])])
    present = np.concatenate([parts[0].present, *(part.present[1:] for part in parts[1:])])
    ids = {"w1": TOKENIZER.encode("w1")[0], "w2": TOKENIZER.encode("w2")[0], None: 0}
    expected = [[ids.get(item, TOKENIZER.silence_id) for item in row] for row in rows]
    assert tokens.tolist() == expected
    assert present.tolist() == [[item is not None for item in row] for row in rows]


@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    size=st.integers(2, 7),
    streams=st.integers(1, 3),
    shuffle=st.integers(0, 5),
)
def test_parallel_documents_keep_every_pair_of_words(run, lengths, size, streams, shuffle):
    """Every word but the last of a document is followed by the next one, in the same table."""
    words = iter(WORDS)
    documents = [text(words, length) for length in lengths]
    spec = StreamsConfig(names=tuple("abc"[:streams]), kinds=("output",) * streams)
    records = [{"text": document} for document in documents]
    tables = run("parallel_documents", records, spec, rows=size, options={"shuffle": shuffle})
    pairs, ends = [], 0
    for table in tables:
        assert len(table.tokens) <= size
        for column, present in zip(table.tokens.T, table.present.T):
            assert not present[int(present.sum()) :].any()  # only the end of a column is absent
            said = [TOKENIZER.decode([token]) for token in column[present]]
            pairs += [pair for pair in zip(said, said[1:]) if all(pair)]
            ends += said.count("")
    split = [document.split() for document in documents]
    assert sorted(pairs) == sorted(
        pair for document in split for pair in zip(document, document[1:])
    )
    assert ends <= sum(length > 1 for length in lengths)


def test_shuffling_documents_is_reproducible_and_separates_neighbours(run):
    documents = [{"text": f"w{2 * i} w{2 * i + 1}"} for i in range(100)]
    spec = StreamsConfig(names=("a", "b"), kinds=("output",) * 2)

    def firsts(**options):
        return [
            [int(TOKENIZER.decode([token])[1:]) // 2 for token in table.tokens[0]]
            for table in run("parallel_documents", documents, spec, rows=2, options=options)
        ]

    def neighbours(tables):
        return sum(abs(a - b) == 1 for a, b in tables)

    assert neighbours(firsts()) == 50 and firsts(shuffle=0) == firsts()
    assert neighbours(firsts(shuffle=40)) < 10 and firsts(shuffle=40) == firsts(shuffle=40)
    assert sorted(sum(firsts(shuffle=40), [])) == list(range(100))


def test_parallel_documents_fill_the_fullest_stream(run):
    words = iter(WORDS)
    documents = [{"text": text(words, length)} for length in (5, 6, 2, 3)]
    spec = StreamsConfig(names=("a", "b"), kinds=("output",) * 2)
    (table,) = run("parallel_documents", documents, spec, rows=9)
    assert cells(table)["w11"] == (7, 1) and cells(table)["w13"] == (6, 0)
    assert table.present[:, 0].all() and table.present.sum() == 18
