"""Prompts of several roles for any model, and what the model answers.

A prompt is a list of parts: what the system says, the data, and the turn of the model. `Roles` says
in which stream each role speaks and how its turns are set apart. `roles_of` finds them for a
checkpoint: from the converter `roles` that made its data, from the names and kinds of its streams,
or, for one stream, as a chat text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.data.converters import get_converter
from msllm.data.converters.roles import (
    Turn,
    encode_unfiltered,
    mark_of,
    place,
    said_by_model,
)
from msllm.decode.engine import FREE, generate
from msllm.errors import UserError
from msllm.evals.score import likelihood, score_batches
from msllm.tokenizer import Tokenizer
from msllm.weights.load import LoadedModel

BATCH = 128  # prompts that are answered together
SYSTEM, DATA, OUTPUT = "system", "data", "output"
# Streams that may speak for a role, in the order in which they are tried.
_NAMES = {
    SYSTEM: ("system", "instruction", "user"),
    DATA: ("data", "tool", "observer", "document", "context", "user"),
    OUTPUT: ("output", "assistant"),
}
_CHATML = {
    SYSTEM: "<|im_start|>system\n{}<|im_end|>\n",
    DATA: "<|im_start|>user\n{}<|im_end|>\n",
    OUTPUT: "<|im_start|>assistant\n{}",
}
_PLAIN = {SYSTEM: "{}\n\n", DATA: "{}\n\n", OUTPUT: "{}"}


class Part(NamedTuple):
    """What a role says in a prompt.

    Attributes:
      role: the role.
      text: the text; None: the model says it.
      unfiltered: whether control pieces that are spelled out in the text become control tokens, as
        in an application that does not filter them.
    """

    role: str
    text: str | None
    unfiltered: bool = False


@dataclasses.dataclass(frozen=True)
class Roles:
    """How the roles of a prompt are laid out in the streams of a model.

    Attributes:
      streams: {role: stream}.
      order: the roles of a prompt, in order.
      said: the roles that the model says.
      options: the options `beside`, `marks` and `rows` of the converter `roles`.
      templates: {role: text with {}} around the text of a turn; its control pieces are control
        tokens.
      waits: whether the model's streams are silent before their turn. Otherwise the model decides
        when to speak.
    """

    streams: Mapping[str, int]
    order: tuple[str, ...]
    said: tuple[str, ...]
    options: Mapping[str, Any]
    templates: Mapping[str, str]
    waits: bool

    def prompt(self, texts: Mapping[str, str | Part]) -> list[Part]:
        """The parts of a prompt, from the texts of the roles that are not the model's."""
        parts = []
        for role in self.order:
            given = texts.get(role)
            if role in self.said:
                parts.append(Part(role, None))
            elif isinstance(given, Part):
                parts.append(given)
            elif given is not None:
                parts.append(Part(role, given))
        return parts


def roles_of(
    model: LoadedModel, given: Mapping[str, str] | None = None, template: str = ""
) -> Roles:
    """The roles of a model.

    Args:
      model: a model with a tokenizer.
      given: {role: stream} for the roles system, data and output, in place of the default.
      template: of a model of one stream: chatml, plain, or a text with {system} and {data}, such as
        "Instruction: {system} Input: {data} Answer:". Empty: as in its training data; chatml if the
        tokenizer has ``<|im_start|>``; otherwise plain.

    Raises UserError if no stream speaks for a role.
    """
    config = model.run_config
    if not given and not template and config and config.data.converter == "roles":
        return _roles_of_data(model)
    options: dict[str, Any] = {"beside": [], "marks": {}, "rows": {}}
    if model.streams.size == 1:
        streams = dict.fromkeys((SYSTEM, DATA, OUTPUT), 0)
        templates, order = _templates(template, model.require_tokenizer())
        return Roles(streams, order, (OUTPUT,), options, templates, True)
    if template:
        raise UserError("--template is for a model of one stream: use --roles")
    streams = {role: _stream_of(role, model, dict(given or {})) for role in _NAMES}
    return Roles(streams, tuple(_NAMES), (OUTPUT,), options, {}, False)


def _roles_of_data(model: LoadedModel) -> Roles:
    """The roles of a model whose data was made by the converter `roles`."""
    assert model.run_config is not None
    _, options = get_converter("roles", model.run_config.data.options)
    spec = model.streams
    streams = {name: s for s, name in enumerate(spec.names)}
    for role, name in options["roles"].items():
        streams.pop(role, None)
        if name is not None:
            streams[role] = spec.index(name)
    for role in (SYSTEM, DATA):
        if role not in streams:
            raise UserError(
                f"no stream of {', '.join(spec.names)} has the role {role!r}: name the streams by"
                " --roles=system=NAME,data=NAME,output=NAME"
            )
    said = tuple(r for r, s in streams.items() if said_by_model(r, s, spec.kinds, options["said"]))
    thoughts = tuple(role for role in said if spec.kinds[streams[role]] == "thought")
    # Roles that say the answer together, such as an action and its arguments, are one turn.
    answers = [role for role in said if role not in thoughts]
    marked = [role for role in answers if role in options["marks"]] or answers
    return Roles(
        streams, (SYSTEM, *thoughts, DATA, marked[0]), (*thoughts, marked[0]), options, {}, True
    )


def _templates(template: str, tokenizer: Tokenizer) -> tuple[dict[str, str], tuple[str, ...]]:
    """The template of each role, and the order of the roles."""
    if not template:
        template = "chatml" if "<|im_start|>" in tokenizer.control else "plain"
    if template in ("chatml", "plain"):
        return _CHATML if template == "chatml" else _PLAIN, (SYSTEM, DATA, OUTPUT)
    places = {role: template.find(f"{{{role}}}") for role in (SYSTEM, DATA)}
    if min(places.values()) < 0:
        raise UserError(
            f"--template={template!r}: must be chatml, plain, or a text with {{system}} and"
            " {data}"
        )
    first, second = sorted(places, key=places.__getitem__)
    start, rest = template.split(f"{{{first}}}", 1)
    middle, end = rest.split(f"{{{second}}}", 1)
    templates = {first: start + "{}" + middle, second: "{}", OUTPUT: end + "{}"}
    return templates, (first, second, OUTPUT)


def _stream_of(role: str, model: LoadedModel, given: dict[str, str]) -> int:
    """The stream that speaks for a role. Raises UserError."""
    spec = model.streams
    unknown = [name for name in given if name not in _NAMES]
    if unknown:
        raise UserError(f"--roles names the role {unknown[0]!r}: must be {', '.join(_NAMES)}")
    if role in given:
        return spec.index(given[role])
    taken = {spec.index(name) for name in given.values()}
    named = [spec.names.index(name) for name in _NAMES[role] if name in spec.names]
    kind = "output" if role == OUTPUT else "input"
    free = [s for s in range(spec.size) if spec.kinds[s] == kind and s not in taken]
    if role == DATA and not named[:-1] and SYSTEM not in given and "system" not in spec.names:
        named = []  # the only input is the system's
    found = [s for s in named if s in free] or (free if role == OUTPUT else [])
    if not found:
        raise UserError(
            f"no stream of {', '.join(spec.names)} speaks for the role {role!r}: name one of each"
            " role by --roles=system=NAME,data=NAME,output=NAME (two roles may share a stream)"
        )
    return found[0]


def encode(part: Part, roles: Roles, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a part, without the mark of its role."""
    template = roles.templates.get(part.role, "{}")
    before, _, after = template.partition("{}")
    tokens = encode_unfiltered(before, tokenizer)
    if part.text is not None:
        tokens += (
            encode_unfiltered(part.text, tokenizer)
            if part.unfiltered
            else tokenizer.encode(part.text)
        )
        tokens += encode_unfiltered(after, tokenizer)
    return tokens


class Laid(NamedTuple):
    """A prompt in rows.

    Attributes:
      tokens: [P, S] int32; FREE where the model samples. The answer follows the last row.
      spans: {role: (stream, first row, row after the last)} of the turns that the model says, or
        that are given in its place; the last turn has no end, -1, if the model says it.
      starts: the row of the first token of each part.
    """

    tokens: np.ndarray
    spans: dict[str, tuple[int, int, int]]
    starts: list[int]


def lay(parts: Sequence[Part], roles: Roles, model: LoadedModel) -> Laid:
    """Lays out the parts of a prompt. The last part is the answer."""
    tokenizer, spec = model.require_tokenizer(), model.streams
    turns = []
    for part in parts:
        if part.role not in roles.streams:
            raise UserError(
                f"the prompt has the role {part.role!r}: the model's are {', '.join(roles.streams)}"
            )
        stream = roles.streams[part.role]
        mark = mark_of(part.role, roles.options["marks"], tokenizer)
        turns.append(Turn(part.role, stream, encode(part, roles, tokenizer), mark))
    placed = place(turns, spec.kinds, roles.options)
    rows = max(one.end for one in placed)
    tokens = np.full((rows, spec.size), tokenizer.silence_id, np.int32)
    if not roles.waits:
        tokens[1:, [s for s in range(spec.size) if spec.kinds[s] != "input"]] = FREE
    spans = {}
    for number, (part, one) in enumerate(zip(parts, placed)):
        stream, last = one.turn.stream, one.first + len(one.turn.tokens)
        tokens[one.start : one.first, stream] = one.turn.mark
        tokens[one.first : last, stream] = one.turn.tokens
        if part.role not in roles.said:
            continue
        before, _, _ = roles.templates.get(part.role, "").partition("{}")
        first = one.first + (len(encode_unfiltered(before, tokenizer)) if before else 0)
        if part.text is not None:
            spans[part.role] = (stream, first, last)
        elif number + 1 == len(parts):
            spans[part.role] = (stream, first, -1)
        else:
            tokens[first : one.end, stream] = FREE
            spans[part.role] = (stream, first, one.end)
    return Laid(tokens, spans, [one.first for one in placed])


def answer(
    model: LoadedModel,
    prompts: Sequence[Laid],
    roles: Roles,
    rows: int,
    batch: int = BATCH,
) -> list[dict[str, list[int]]]:
    """Lets the model answer prompts, with the most likely token in every free cell.

    Args:
      model: a model with a tokenizer.
      prompts: from `lay`; the last turn is the model's.
      roles: of the model.
      rows: of the answer.
      batch: the number of prompts that are answered together.

    Returns: for each prompt, the tokens of each role that the model says, up to silence or another
      control token.
    """
    found: list[dict[str, list[int]]] = [{} for _ in prompts]
    # Prompts of similar length go together.
    order = sorted(range(len(prompts)), key=lambda i: _free_row(prompts[i]))
    size = min(batch, len(prompts))
    for start in range(0, len(order), max(size, 1)):
        numbers = order[start : start + size]
        filled = numbers + numbers[:1] * (size - len(numbers))
        tables, offsets = _generate(model, [prompts[i] for i in filled], roles, rows)
        for number, table, offset in zip(numbers, tables, offsets):
            found[number] = _said(model, prompts[number], roles, table[offset:])
    return found


def _free_row(prompt: Laid) -> int:
    """The first row with a free cell; the row after the prompt if it has none."""
    free = np.flatnonzero((prompt.tokens == FREE).any(1))
    return max(int(free[0]) if len(free) else len(prompt.tokens), 1)


def _generate(
    model: LoadedModel, prompts: Sequence[Laid], roles: Roles, rows: int
) -> tuple[np.ndarray, list[int]]:
    """The tables [B, R, S] with the prompts and their answers, and the row where each begins.

    The rows before the first free cell are read at once. They are absent above the shorter prompts.
    """
    spec, silence = model.streams, model.require_tokenizer().silence_id
    starts = [_free_row(prompt) for prompt in prompts]
    read = max(1 << (max(starts) - 1).bit_length(), 16)  # few lengths, so that few are compiled
    more = max(len(p.tokens) - start for p, start in zip(prompts, starts)) + rows
    more = _rounded(more)
    prefill = np.full((len(prompts), read, spec.size), silence, np.int32)
    present = np.zeros(prefill.shape, bool)
    forced = np.full((len(prompts), more, spec.size), silence, np.int32)
    speaking = [s for s in range(spec.size) if spec.kinds[s] != "input"]
    for b, (prompt, start) in enumerate(zip(prompts, starts)):
        prefill[b, read - start :] = prompt.tokens[:start]
        present[b, read - start :] = True
        rest = len(prompt.tokens) - start
        forced[b, :rest] = prompt.tokens[start:]
        answering = [roles.streams[role] for role in roles.said[-1:]] if roles.waits else speaking
        forced[b, rest:, answering] = FREE
    generated = generate(model, more, prefill=prefill, present=present, forced=forced)
    return generated.shown, [read - start for start in starts]


def _rounded(number: int, step: int = 16) -> int:
    """The next multiple of `step`, so that few shapes are compiled."""
    return -(-number // step) * step


def _said(
    model: LoadedModel, prompt: Laid, roles: Roles, tokens: np.ndarray
) -> dict[str, list[int]]:
    """The tokens of each role that the model says, from a table [R, S]."""
    tokenizer = model.require_tokenizer()
    control = set(tokenizer.control.values())
    found = {}
    for role, (stream, first, end) in prompt.spans.items():
        column = tokens[first : end if end >= 0 else None, stream].tolist()
        if not roles.waits:
            column = [token for token in tokens[:, stream].tolist() if token not in control]
        stops = [i for i, token in enumerate(column) if token in control]
        found[role] = column[: stops[0]] if stops else column
    return found


def answer_logprob(model: LoadedModel, prompts: Sequence[Laid], role: str) -> np.ndarray:
    """The log-probability of the given answers, [N] float64 in nats.

    Args:
      model: a model with a tokenizer.
      prompts: from `lay`, with the text of `role`.
      role: whose turn is scored.
    """
    tokens, present = _as_tables(model, prompts)
    # Inputs have a loss weight of 0, and so may the answer's stream; all cells count here.
    scored = model.with_streams(loss_weights=(1.0,) * model.streams.size)
    logprob = likelihood(scored, {"tokens": tokens, "present": present}).logprob
    sums = []
    for b, prompt in enumerate(prompts):
        stream, first, end = prompt.spans[role]
        sums.append(float(np.sum(logprob[b, first - 1 : end - 1, stream], dtype=np.float64)))
    return np.array(sums)


def same_logits(
    model: LoadedModel, prompts: Sequence[Laid], others: Sequence[Laid], role: str
) -> list[bool]:
    """Whether two prompts give the same logits, bit for bit, wherever a role speaks.

    Args:
      model: a model with a tokenizer.
      prompts, others: pairs of prompts. Their turns of `role` are in the same rows; free cells in
        them hold silence.
      role: a role that the model says.

    Raises UserError if the turns of a pair are in different rows.
    """
    tables = []
    for one, other in zip(prompts, others, strict=True):
        if one.spans[role] != other.spans[role]:
            raise UserError(
                f"two prompts have the role {role!r} in {one.spans[role]} and {other.spans[role]}:"
                " only equal rows can be compared"
            )
        tables += [one, other]
    tokens, present = _as_tables(model, tables)
    logits: list[np.ndarray] = []
    for part in score_batches(model, {"tokens": tokens, "present": present}):
        for table in part.logits:
            stream, first, end = tables[len(logits)].spans[role]
            last = len(tables[len(logits)].tokens) if end < 0 else end
            logits.append(table[max(first - 1, 0) : last, stream])
    return [bool((a == b).all()) for a, b in zip(logits[::2], logits[1::2])]


def _as_tables(model: LoadedModel, prompts: Sequence[Laid]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and presence [N, R, S] of prompts. Free cells hold silence."""
    rows = _rounded(max(len(prompt.tokens) for prompt in prompts))
    shape = len(prompts), rows, model.streams.size
    tokens, present = np.zeros(shape, np.int32), np.zeros(shape, bool)
    silence = model.require_tokenizer().silence_id
    for b, prompt in enumerate(prompts):
        given = np.where(prompt.tokens == FREE, silence, prompt.tokens)
        tokens[b, : len(given)], present[b, : len(given)] = given, True
    return tokens, present


def texts_of(
    found: Iterable[Mapping[str, Sequence[int]]], role: str, model: LoadedModel
) -> list[str]:
    """The answers of a role as texts."""
    decode = model.require_tokenizer().decode
    return [decode(one.get(role, [])) for one in found]
