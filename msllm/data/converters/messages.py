"""Chats in the forms that people have, as a list of turns.

Forms of a record:

- {"messages": [{"role", "content"}, ...]}, as in chat APIs.
- {"conversations": [{"from", "value"}, ...]} (ShareGPT): human is the role user, gpt the role
  assistant, observation the role tool.
- {"instruction", "input", "output"} (Alpaca), {"prompt", "completion"}, {"question", "answer"}, and
  similar pairs, such as the rows of a table.

The messages may also be a JSON text, or an object with a list for each key. A content may be a list
of parts with texts. Whatever else a record holds is read, known not to matter, or makes it a
BadRecord.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.data.converters.layout import Layout, check_keys, check_weight
from msllm.data.sources import BadRecord, Record, text_of

LISTS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("train", "trainable", "loss")
_WEIGHTS = ("weight", "loss_weight", *_FLAGS)
_CALLS = ("tool_calls", "function_call")
_RESULTS = ("tool", "function")  # roles of messages with the result of a call
# Roles of ShareGPT. A role that is mapped by the option `roles` keeps its name.
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_QUESTIONS = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response", "answer"),
    "question": ("answer", "response"),
    "query": ("answer", "response"),
    "input": ("output",),
}
_INPUTS = ("input", "context")
_TO_KEY = json.JSONEncoder(sort_keys=True, default=str).encode
_PARTS = ("text", "input_text", "output_text")
_HINTS = {
    "tool_calls": "the converter 'tools' reads calls",
    "function_call": "the converter 'tools' reads calls",
    **dict.fromkeys(
        _REASONING, "map the role 'reasoning' to a stream by config.data.options.roles to read it"
    ),
    **dict.fromkeys(
        _TOOLS, "map the role 'tools' to a stream by config.data.options.roles to read them"
    ),
    **dict.fromkeys(_WEIGHTS, "loss weights belong into the single messages"),
}


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    identity: str  # "": the message gives it none
    arguments: str


class Turn(NamedTuple):
    """What one role says, or the calls that it makes, or the result of a call."""

    role: str
    text: str | None  # None: nothing, beside calls
    where: str  # the place of the message, for messages
    calls: Sequence[Call] = ()
    is_result: bool = False
    identity: str = ""  # of the call whose result this is; "": the message does not say
    name: str = ""  # of the tool whose result this is; "": the message does not say
    weight: float = 1.0  # the loss weight of what is said


class Chat(NamedTuple):
    """The turns of a record, and what identifies it."""

    turns: list[Turn]
    key: str


def read_chat(layout: Layout, record: Record, calls: bool = False) -> Chat:
    """Returns the turns of a record, without those of roles that are left out.

    Args:
      layout: has the options `roles` and `ignored_keys`.
      record: the record, in one of the forms above.
      calls: read the calls of tools and their results. Otherwise calls make a record bad, and
        results are turns like any other.

    Raises BadRecord.
    """
    name, messages = _messages_of(record)
    added = list(_added_turns(layout, record, name)) if len(record.value) > 1 else []
    turns = [turn for turn in added if not _is_first(turn, messages)]
    place = record.where
    for number, message in enumerate(messages):
        where = f"{place}, message {number}"
        role, content = message.get("role"), message.get("content")
        if len(message) == 2 and isinstance(role, str) and isinstance(content, str):
            # Most messages have this form. `_turns` takes four times as long.
            turn = Turn(role, content, where)
            if calls and _gives_result(layout, role):
                turn = turn._replace(is_result=True)
            turns.append(turn)
        else:
            turns += _turns(layout, message, where, calls)
    if len(record.value) > 1:
        _check_record(layout, record, name, turns)
    key = _TO_KEY(messages)
    if added:
        key += json.dumps([turn[:2] for turn in added])
    if None in layout.options["roles"].values():
        turns = [turn for turn in turns if not layout.leaves_out(turn.role)]
    return Chat(turns, key)


def _check_record(layout: Layout, record: Record, name: str, turns: Sequence[Turn]) -> None:
    """Raises BadRecord if nothing reads a key of a record, and it is none of its texts again."""
    texts = {turn.text for turn in turns}
    read = {key for key, value in record.value.items() if isinstance(value, str) and value in texts}
    read.update(_keys_of_form(record, name), _SYSTEM)
    if layout.maps("tools"):
        read.update(_TOOLS)
    check_keys(layout, record.value, read, record.where, _HINTS)


def pair_of(record: Record) -> tuple[str, str] | None:
    """Returns the keys of question and answer of a record that is a pair; None for other forms."""
    if any(record.get(name) is not None for name in LISTS):
        return None
    for question, answers in _QUESTIONS.items():
        for answer in answers:
            if record.get(question) is not None and record.get(answer) is not None:
                return question, answer
    return None


def _messages_of(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """Returns the name of the form, and the messages as objects. Raises BadRecord."""
    messages = record.get(LISTS[0])
    if type(messages) is list and {dict}.issuperset(map(type, messages)):
        return LISTS[0], messages  # what follows gives the same, but takes longer
    for name in LISTS:
        if record.get(name) is not None:
            return name, _list_of(record.get(name), name, record.where)
    if pair := pair_of(record):
        return " ".join(pair), _pair(record, *pair)
    keys = f"the record has the keys {sorted(record.value)}"
    if not isinstance(record.value, dict):
        keys = f"the record is {record.value!r:.40}"
    raise BadRecord(
        f'{record.where}: {keys}: it must have "messages" ([{{"role": ..., "content": ...}}, ...]),'
        ' "conversations" ([{"from": ..., "value": ...}, ...]), "instruction" and "output",'
        ' "prompt" and "completion", or "question" and "answer"'
    )


def _keys_of_form(record: Record, name: str) -> list[str]:
    keys = name.split()
    if "instruction" in keys:
        keys += [*_INPUTS, "history"]
        text = record.get("text")
        if isinstance(text, str) and all(str(record.get(key)) in text for key in keys[:2]):
            keys.append("text")  # Alpaca's instruction and output once more, in its template
    return keys


def _list_of(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Returns a list of messages as objects, whatever its form. Raises BadRecord."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRecord(
                f"{where}: {name!r} is a text, but no JSON ({error}): give a list of messages"
            ) from error
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {key: len(column) for key, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise BadRecord(f"{where}: the lists of {name!r} have the lengths {lengths}")
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    what = "a list that holds other things" if isinstance(value, list) else type(value).__name__
    raise BadRecord(
        f'{where}: {name!r} is {what}: must be a list of messages ({{"role": ..., "content": ...}}'
        ' or {"from": ..., "value": ...})'
    )


def _pair(record: Record, question: str, answer: str) -> list[dict[str, Any]]:
    """Returns the messages of a question and its answer, either texts or lists of messages."""
    asked, answered, where = record.get(question), record.get(answer), record.where
    if isinstance(asked, list) and isinstance(answered, list):
        return _list_of(asked, question, where) + _list_of(answered, answer, where)
    messages = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"{where}: 'history' holds {pair!r}: must be [question, answer]")
        messages += _exchange(*pair)
    texts = [record.text(question)]
    if question == "instruction":
        texts += [record.text(key) for key in _INPUTS if record.get(key)]
    return messages + _exchange("\n".join(texts), record.text(answer))


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _added_turns(layout: Layout, record: Record, name: str) -> Iterator[Turn]:
    """Yields the turns that a record has beside its messages: a system prompt and the tools."""
    ignored = layout.options["ignored_keys"]
    for key in _SYSTEM:
        if record.get(key) and key not in (*ignored, *name.split()):
            yield Turn("system", record.text(key), record.where)
    for key in _TOOLS:
        tools = record.get(key)
        if tools and key not in ignored and layout.maps("tools"):
            text = (
                tools
                if isinstance(tools, str)
                else json.dumps(tools, ensure_ascii=False, default=str)
            )
            yield Turn("tools", text, record.where)


def _is_first(turn: Turn, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether a turn is also the first message."""
    first = messages[0] if messages else {}
    return turn.role == first.get("role", first.get("from")) and turn.text == first.get(
        "content", first.get("value")
    )


def _turns(
    layout: Layout, message: Mapping[str, Any], where: str, read_calls: bool
) -> Iterator[Turn]:
    """Yields the turns of one message. Raises BadRecord."""
    if message.get("role") is None and message.get("from") is not None:
        names = ("from", "value")
        role = text_of(message, "from", where)
        if not layout.maps(role):
            role = _ALIASES.get(role, role)
            if role == "function_call":
                content = _list_or_one(_json_of(message.get("value"), where))
                others = {key: message[key] for key in message if key not in names}
                message = {**others, "role": "assistant", "content": None, "tool_calls": content}
                names, role = ("role", "content"), "assistant"
    else:
        names = ("role", "content")
        role = text_of(message, "role", where)
    is_result = read_calls and _gives_result(layout, role)
    weight = 1.0
    if len(message) > 2:  # it has other keys
        _check_message(layout, message, role, names, where, read_calls)
        weight = _weight_of(layout, message, where)
    if len(message) > 2 and layout.maps("reasoning"):
        for key in _REASONING:
            if message.get(key) and key not in layout.options["ignored_keys"]:
                yield Turn("reasoning", text_of(message, key, where), where, weight=weight)
    calls = list(_calls_of(message, where)) if read_calls else []
    text = _content_of(message, names[1], where, optional=bool(calls))
    identity, name = message.get("tool_call_id"), message.get("name")
    yield Turn(role, text, where, calls, is_result, _word(identity), _word(name), weight)


def _gives_result(layout: Layout, role: str) -> bool:
    return role == "tool" or (role == "function" and not layout.maps(role))


def _word(value: Any) -> str:
    return "" if value is None else str(value)


def _check_message(
    layout: Layout,
    message: Mapping[str, Any],
    role: str,
    names: tuple[str, str],
    where: str,
    read_calls: bool,
) -> None:
    """Raises BadRecord if nothing reads a key of a message."""
    read = {*names, *_WEIGHTS}
    if role in _RESULTS:
        read |= {"name", "tool_call_id"}
    if read_calls:
        read |= set(_CALLS)
    if layout.maps("reasoning"):
        read |= set(_REASONING)
    check_keys(layout, message, read, where, _HINTS)


def _weight_of(layout: Layout, message: Mapping[str, Any], where: str) -> float:
    """Returns the loss weight of a message; 1 if it has none. Raises BadRecord."""
    ignored = layout.options["ignored_keys"]
    found = {
        key: message[key] for key in _WEIGHTS if message.get(key) is not None and key not in ignored
    }
    for key, value in found.items():
        if key in _FLAGS and not (isinstance(value, (bool, int, float)) and value in (0, 1)):
            raise BadRecord(f"{where}: {key!r} is {value!r:.40}: must be true or false")
        check_weight(value, f"{where}: {key!r}")
    if len(set(found.values())) > 1:
        raise BadRecord(f"{where}: the loss weights {found} differ: give one")
    return float(next(iter(found.values()), 1.0))


def _content_of(message: Mapping[str, Any], name: str, where: str, optional: bool) -> str | None:
    """Returns the text that a message holds under `name`. Raises BadRecord."""
    value = message.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return None
    if name not in message:
        raise BadRecord(
            f"{where}: there is no {name!r}, only {sorted(message)}: must be a text or a list of"
            " texts"
        )
    if not isinstance(value, list):
        shown = "null" if value is None else f"{value!r:.60}"
        raise BadRecord(f"{where}: {name!r} is {shown}: must be a text or a list of texts")
    return "".join(part if isinstance(part, str) else _part(part, where) for part in value)


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in _PARTS:
        raise BadRecord(
            f"{where}: the content has a part of type {kind!r}: only parts with a text are read"
        )
    others = [key for key, value in part.items() if value and key not in ("type", "text")]
    if others:
        raise BadRecord(f"{where}: nothing reads the key {others[0]!r} of a part of the content")
    return text_of(part, "text", where)


def _calls_of(message: Mapping[str, Any], where: str) -> Iterator[Call]:
    """Yields the calls of a message. Raises BadRecord."""
    calls = _json_of(message.get("tool_calls") or [], where)
    if not isinstance(calls, list):
        raise BadRecord(f"{where}: 'tool_calls' is {calls!r}: must be a list")
    if message.get("function_call"):
        calls = [*calls, {"function": _json_of(message["function_call"], where)}]
    named: set[str] = set()
    for call in calls:
        function: Any = call.get("function") or call if isinstance(call, dict) else None
        name, arguments = text_of(function, "name", where), function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False, default=str)
        identity = _word(call.get("id"))
        if identity and identity in named:
            raise BadRecord(f"{where}: two calls have the id {identity!r}: give each its own")
        named.add(identity)
        yield Call(name, identity, arguments)


def _json_of(value: Any, where: str) -> Any:
    """Returns a JSON value that may be given as its text. Raises BadRecord."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: a call is {value!r:.60}: no JSON ({error})") from error


def _list_or_one(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
