"""Tokenizers: sentencepiece models and files of the `tokenizers` library.

Sentencepiece models can be trained here. Silence ("this stream says nothing now") is a control
symbol: no text encodes to it, and decoding drops it. A vocabulary may have further control symbols
for other uses.

A text should come back from its tokens. `encode` makes it so where the vocabulary allows it, and
`Tokenizer.compare` says what became of a text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from msllm.config import Config, TokenizerConfig
from msllm.errors import UserError

FILE_NAMES = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
# Callers of `train` should give it at most this much text: sentencepiece holds it in memory.
TRAINING_CHARACTERS = 20_000_000
CACHED_WORDS = 1 << 16
# sentencepiece silently skips lines of more than max_sentence_length bytes, so `train` cuts them.
LINE_CHARACTERS = 1000
SPACE = "\u2581"  # sentencepiece's mark for a space
# Parts of a text in which a BPE model of `train` merges: no piece has a space after another
# character, and a line break is a piece by itself.
_PART = re.compile(r"\n| *[^ \n]+| +")
_CACHED_CHARACTERS = 64  # of a part; longer ones are unlikely to recur
# Without a `vocab_size`, a BPE or unigram model gets its bytes and characters, and one more piece
# for every CHARACTERS_PER_PIECE of the corpus. Rarer pieces are too rare to learn from.
CHARACTERS_PER_PIECE = 100
LEAST_PIECES, MOST_PIECES = 256, 4096
_ROUND = 64  # the vocabulary should divide evenly over devices
_RESERVED = "\u2585"  # sentencepiece silently skips a line of training text that has it


class TextError(UserError):
    """A text that cannot be encoded, or that its tokens do not give back."""


class Tokenizer:
    """A vocabulary of V pieces, one of which is silence.

    Attributes:
      kind: "sentencepiece" or "tokenizers".
      silence: the piece that means silence.
      silence_id: the id of silence.
      control: {piece: id} of all pieces that no text encodes to, including silence.
      vocab_size: V.
      unknown_id: the id of text that the vocabulary does not cover, or None.
      lossless: any text comes back from its tokens, by construction: the pieces of a text are the
        text, and bytes express what the vocabulary lacks.
      hash: the sha256 (hex) of the bytes of the tokenizer file.
    """

    def __init__(self, kind: str, data: bytes, silence: str, source: str = "the tokenizer"):
        """Parses a tokenizer file.

        Args:
          kind: "sentencepiece" or "tokenizers".
          data: the content of the file.
          silence: the control symbol that means silence.
          source: where the file comes from, for messages.

        Raises UserError if `data` cannot be parsed, or if it lacks the control symbol.
        """
        self.kind, self.silence, self._data = kind, silence, data
        self.hash = hashlib.sha256(data).hexdigest()
        model: _SentencePiece | _Tokenizers
        try:
            model = _SentencePiece(data) if kind == "sentencepiece" else _Tokenizers(data)
        except Exception as error:  # the libraries raise many types of errors
            raise UserError(
                f"{source} is not a {kind} file ({error}): give a .model or .json tokenizer"
            ) from error
        # A piece that is not a control symbol could come from text.
        if silence not in model.control:
            raise UserError(
                f"{source} has no control (special) symbol {silence!r} for silence: add it, or set"
                " config.data.tokenizer.silence to an unused one (it has:"
                f" {', '.join(sorted(model.control)) or 'none'})"
            )
        self._model = model
        self._pieces, self._decode = model.pieces, model.decode
        self._encode_word = functools.lru_cache(CACHED_WORDS)(self.encode)
        self._encode_next = functools.lru_cache(CACHED_WORDS)(self.encode_next)
        self.unknown_id, self.lossless = model.unknown_id, model.lossless
        self.vocab_size = len(model.pieces)
        self.control = {piece: model.pieces.index(piece) for piece in sorted(model.control)}
        self.silence_id = self.control[silence]

    @classmethod
    def load(cls, path: str | os.PathLike, silence: str = TokenizerConfig.silence) -> Tokenizer:
        """Reads a sentencepiece `.model` or a `.json` file of the `tokenizers` library.

        Raises UserError if there is no such file, or if it cannot be used.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(
                f"there is no tokenizer file {path}: correct config.data.tokenizer.path, or leave"
                " it empty"
            )
        return cls(kind_of_file(path), path.read_bytes(), silence, str(path))

    @classmethod
    def from_bytes(cls, kind: str, data: bytes, silence: str) -> Tokenizer:
        """The tokenizer whose file has the content `data`. Raises UserError as the constructor."""
        return cls(kind, data, silence)

    def to_bytes(self) -> bytes:
        """The content of the tokenizer file."""
        return self._data

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, bytes, str]]:
        """Makes tokenizers picklable, to send them to other processes."""
        return Tokenizer, (self.kind, self._data, self.silence)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. They never include silence.

        Raises TextError if the text holds half of a surrogate pair, which no encoding can express.
        """
        try:
            return self._model.encode(text)
        except (RuntimeError, TypeError, ValueError):
            check_text(text)
            raise

    def encode_next(self, text: str) -> list[int]:
        """The ids of a text that continues another one, such as its second word.

        The vocabularies of some imported models begin every text with a space. `encode_next` does
        not add this space. Raises TextError, as `encode` does.
        """
        try:
            return self._model.encode_next(text)
        except (RuntimeError, TypeError, ValueError):
            check_text(text)
            raise

    def encode_word(self, word: str, first: bool = True) -> Sequence[int]:
        """Like `encode`, but cached, for text that is likely to recur. Do not modify the result.

        The cache makes a repeated word seven times as fast. With `first=False`, the result is that
        of `encode_next`.
        """
        return self._encode_word(word) if first else self._encode_next(word)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that hold `unknown_id`: the model cannot tell them from one another.

        Words are what spaces separate, and each is listed once. Raises TextError, as `encode` does.
        """
        if self.unknown_id is None or self.unknown_id not in self.encode(text):
            return []
        words = filter(None, dict.fromkeys(text.split(" ")))
        return [word for word in words if self.unknown_id in self.encode(word)] or [text]

    def token(self, text: str) -> int:
        """The id of a text that is one token, or of a piece in the vocabulary's spelling.

        Raises TextError if the text is several tokens, or unknown.
        """
        if text in self.control:
            return self.control[text]
        ids = self.encode(text)
        if len(ids) == 1 and ids[0] != self.unknown_id:
            return ids[0]
        if text in self._pieces:
            return self._pieces.index(text)
        if self.unknown_id in ids:
            raise TextError(f"{text!r} is not in the vocabulary: give another text")
        pieces = ", ".join(repr(self.piece(i)) for i in ids[:5]) + (", ..." if ids[5:] else "")
        raise TextError(
            f"{text!r} is {len(ids)} tokens ({pieces}): give texts that are one token each"
        )

    def compare(self, text: str, ids: Sequence[int]) -> str:
        """Compares a text with the text that `ids` decode to.

        Returns:
          "same"; "unknown" if the ids include `unknown_id`; "changed" if the texts differ in white
          space only, or as the tokenizer's own normalizer changes texts.

        Raises TextError, naming the first difference, if anything else is lost or changed.
        """
        joined, content = self._model.join(ids), text.encode()
        if joined == content or (self._model.prefix and joined == b" " + content):
            return "same"
        decoded = self.decode(ids)
        if decoded == text:
            return "same"
        if self.unknown_id in ids:
            return "unknown"
        same = {_without_spaces(text)}
        if decoded.count(SPACE) == text.count(SPACE):
            same.add(_without_spaces(self._model.normalize(text)))
        if _without_spaces(decoded) in same:
            return "changed"
        raise TextError(
            f"the text does not survive the tokenizer: {_first_difference(text, decoded)}; correct"
            " the text, or use a tokenizer that covers it (config.data.tokenizer)"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Silence is dropped.

        A model may have more ids than the tokenizer. These are spelled by number, such as `<id
        4000>`.
        """
        ids = [int(i) for i in ids if i != self.silence_id]
        if not ids or max(ids) < self.vocab_size:
            return self._decode(ids)
        runs = itertools.groupby(ids, lambda i: i < self.vocab_size)
        return "".join(
            self._decode(list(run)) if known else "".join(map(self.piece, run))
            for known, run in runs
        )

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray:
        """[V] int32, the UTF-8 bytes of text that each id stands for.

        0 for control symbols and for `unknown_id`. The bytes of the ids of a text add up to those
        of the text, and one more if the vocabulary begins every text with a space.
        """
        counts = np.zeros(self.vocab_size, np.int32)
        for token, piece in enumerate(self._pieces):
            if token != self.unknown_id and piece not in self.control:
                content = self._model.join([token])
                if content is None:
                    is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
                    content = b"." if is_byte else piece.replace(SPACE, " ").encode()
                counts[token] = len(content)
        return counts

    def piece(self, token: int) -> str:
        """The vocabulary's spelling of one id; `<id N>` for ids that the tokenizer lacks."""
        return self._pieces[token] if token < self.vocab_size else f"<id {token}>"


def resolve_token_sets(config: Config, tokenizer: Tokenizer) -> Config:
    """Replaces the texts in `config.streams.token_sets` by the ids of their tokens.

    Silence is left out, because it always passes. Checkpoints hold the resolved config.

    Raises UserError if a text is not one token.
    """
    sets = {}
    for name, tokens in config.streams.token_sets.items():
        try:
            ids = {tokenizer.token(x) if isinstance(x, str) else x for x in tokens}
        except TextError as error:
            raise UserError(f"config.streams.token_sets[{name!r}]: {error}") from error
        sets[name] = tuple(sorted(ids - {tokenizer.silence_id})) or (tokenizer.silence_id,)
    streams = dataclasses.replace(config.streams, token_sets=sets)
    return dataclasses.replace(config, streams=streams)


def list_words(words: Sequence[str], most: int = 5) -> str:
    """Quotes the first words of a list, as in "'a', 'b' and 3 more"."""
    shown = ", ".join(repr(word) for word in words[:most])
    return f"{shown} and {len(words) - most:,} more" if len(words) > most else shown


def check_text(text: str) -> None:
    """Raises TextError if a text holds half of a surrogate pair, as a cut JSON escape gives it.

    Raises TypeError if it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"a text is {text!r:.40}: must be a string")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate"
            f" pair: {_excerpt(text, error.start)} was cut inside a character; correct it"
        ) from None


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _first_difference(text: str, decoded: str) -> str:
    same = len(os.path.commonprefix([text, decoded]))
    return f"{_excerpt(text, same)} comes back as {_excerpt(decoded, same)}"


def _excerpt(text: str, place: int) -> str:
    """Returns the characters around a place of a text, quoted."""
    return repr(text[max(place - 10, 0) : place + 20])


class _Model(Protocol):
    """A parsed tokenizer file."""

    pieces: list[str]  # index: id
    control: set[str]  # pieces that no text encodes to
    unknown_id: int | None
    prefix: bool  # decoding drops a space that encoding puts before a text
    lossless: bool

    def encode(self, text: str) -> list[int]: ...
    def encode_next(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def normalize(self, text: str) -> str: ...

    def join(self, ids: Sequence[int]) -> bytes | None:
        """The UTF-8 bytes of the pieces of ids, where that is simple and fast."""
        ...


_USER_DEFINED = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED


class _SentencePiece:
    def __init__(self, data: bytes):
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        self.control = {piece for i, piece in enumerate(self.pieces) if model.is_control(i)}
        self.unknown_id: int | None = model.unk_id()
        self._model = self._next = model
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        rules = proto.normalizer_spec
        self.prefix = rules.add_dummy_prefix
        self.lossless = not (
            (self.prefix and SPACE not in self.pieces)  # the prefix would be spelled by bytes
            or proto.trainer_spec.treat_whitespace_as_suffix
            or rules.remove_extra_whitespaces
            or rules.precompiled_charsmap
            or proto.denormalizer_spec.precompiled_charsmap
            or sum(map(model.is_byte, range(len(self.pieces)))) < 256
        )
        if self.prefix:
            proto.normalizer_spec.add_dummy_prefix = False
            content = proto.SerializeToString()
            self._next = sentencepiece.SentencePieceProcessor(model_proto=content)
        # Sentencepiece gives neighbouring unknown words or characters one token together. These
        # expressions find the parts that should have a token each.
        trainer = proto.trainer_spec
        parts = {trainer.WORD: "[^ ]+", trainer.CHAR: "(?s)."}
        part = parts.get(trainer.model_type)
        self._part = re.compile(part) if part else None
        # Sentencepiece encodes the mark for a space as a space. Where there are bytes, they express
        # the mark itself; and a space, if the vocabulary has no piece with one.
        self._by_bytes: dict[str, list[int]] = {}
        self._lacks_space = SPACE not in self.pieces
        if any(map(model.is_byte, range(len(self.pieces)))):
            self._by_bytes[SPACE] = self._bytes(SPACE)
            if self._lacks_space:
                self._by_bytes[" "] = self._bytes(" ")
        self._split = re.compile(f"([{''.join(self._by_bytes)}])") if self._by_bytes else None
        is_bpe = trainer.model_type == trainer.BPE
        self._merges_in_parts = is_bpe and self.lossless and not self.prefix
        if self._merges_in_parts:
            number = self.pieces.index("\n") if "\n" in self.pieces else None
            is_symbol = number is not None and proto.pieces[number].type == _USER_DEFINED
            crosses = any(SPACE in piece.lstrip(SPACE) or " " in piece for piece in self.pieces)
            self._merges_in_parts = is_symbol and not crosses
        self._encode_part = functools.lru_cache(CACHED_WORDS)(model.encode)

    @functools.cached_property
    def _contents(self) -> list[bytes | None]:
        return [self._content(i, piece) for i, piece in enumerate(self.pieces)]

    def _content(self, number: int, piece: str) -> bytes | None:
        """Returns the bytes of a piece; None if it stands for something else than its text."""
        model = self._model
        if model.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        if model.is_control(number) or model.is_unknown(number) or model.is_unused(number):
            return None
        return piece.replace(SPACE, " ").encode()

    def _bytes(self, character: str) -> list[int]:
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]

    def encode(self, text: str) -> list[int]:
        return self._encode(self._model, text)

    def encode_next(self, text: str) -> list[int]:
        return self._encode(self._next, text)

    def _encode(self, model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
        if self._split is not None and (SPACE in text or (self._lacks_space and " " in text)):
            ids: list[int] = []
            for part in self._split.split(text):
                if part:
                    ids += self._by_bytes.get(part) or model.encode(part)
                    model = self._next
            return ids
        if self._merges_in_parts:
            return self._encode_parts(text)
        ids = model.encode(text)
        if self._part is not None and self.unknown_id in ids:
            return [i for part in self._part.findall(text) for i in model.encode(part)]
        return ids

    def _encode_parts(self, text: str) -> list[int]:
        """Returns the same as `model.encode(text)`, four times as fast on text with spaces."""
        ids: list[int] = []
        for part in _PART.findall(text):
            cached = len(part) <= _CACHED_CHARACTERS
            ids += self._encode_part(part) if cached else self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def normalize(self, text: str) -> str:
        return self._model.normalize(text).replace(SPACE, " ")

    def join(self, ids: Sequence[int]) -> bytes | None:
        try:
            return _join(self._contents, ids)
        except TypeError:  # a None among them
            return None


class _Tokenizers:
    prefix = False

    def __init__(self, data: bytes):
        self._model = model = tokenizers.Tokenizer.from_str(data.decode())
        model.encode_special_tokens = True  # a special token spelled out in text is text
        ids = range(max(model.get_vocab().values()) + 1)
        self.pieces = [model.id_to_token(i) or "" for i in ids]
        added = model.get_added_tokens_decoder().values()
        self.control = {token.content for token in added if token.special}
        self.unknown_id = model.token_to_id(getattr(model.model, "unk_token", None) or "")
        settings = json.loads(data)
        without = _without_prefix(settings)
        self._next = model
        if without != settings:
            self._next = tokenizers.Tokenizer.from_str(json.dumps(without))
            self._next.encode_special_tokens = True
        for one in (model, self._next):
            one.no_truncation()
            one.no_padding()
        decoder = (settings.get("decoder") or {}).get("type")
        self._contents: list[bytes] | None = None
        if decoder == "ByteLevel":
            alphabet = _byte_alphabet()
            self._contents = [_bytes_of(piece, alphabet) for piece in self.pieces]
        self.lossless = _is_lossless(settings, model.get_vocab().keys())

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_next(self, text: str) -> list[int]:
        return self._next.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def normalize(self, text: str) -> str:
        normalizer = self._model.normalizer
        return normalizer.normalize_str(text).replace(SPACE, " ") if normalizer else text

    def join(self, ids: Sequence[int]) -> bytes | None:
        if self._contents is None:
            return None
        return _join(self._contents, ids)


def _join(contents: Sequence[Any], ids: Sequence[int]) -> bytes:
    """Returns the contents of ids in a row. Raises TypeError if one is None."""
    # One call of `itemgetter` takes three quarters of the time of a call for each id.
    if len(ids) > 1:
        return b"".join(operator.itemgetter(*ids)(contents))
    return b"".join([contents[i] for i in ids])


def _bytes_of(piece: str, alphabet: dict[int, int]) -> bytes:
    """Returns the bytes of a byte-level piece; of an added token with other characters, b""."""
    try:
        return piece.translate(alphabet).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def _is_lossless(settings: Any, pieces: Set[str]) -> bool:
    """Returns whether a tokenizer.json gives back any text by construction.

    It does if it divides the bytes of a text, without dropping or adding any, and all bytes are
    pieces. False stands for "unknown".
    """
    model, decoder = settings["model"], settings.get("decoder") or {}
    steps = _steps(settings.get("pre_tokenizer"))
    return (
        settings.get("normalizer") is None
        and decoder.get("type") == "ByteLevel"
        and model.get("type") == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("dropout")
        and all(chr(character) in pieces for character in _byte_alphabet())
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(map(_keeps_text, steps))
        and all(map(_stands_for_itself, settings.get("added_tokens") or []))
    )


def _steps(step: Any) -> list[dict[str, Any]]:
    """Returns the parts of a pre-tokenizer."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [part for one in step["pretokenizers"] for part in _steps(one)]
    return [step]


def _keeps_text(step: Mapping[str, Any]) -> bool:
    """Returns whether a pre-tokenizer only divides a text, or maps its bytes to characters."""
    kind = step.get("type")
    if kind == "Split":
        return step.get("behavior") != "Removed"
    if kind == "ByteLevel":
        return not step.get("add_prefix_space")
    return kind == "Digits"


def _stands_for_itself(token: Mapping[str, Any]) -> bool:
    """Returns whether an added token is the text that it is found in."""
    if token["special"]:
        return True  # no text encodes to it
    strips = token.get("lstrip") or token.get("rstrip")
    return not strips and token["content"].isascii() and token["content"].isprintable()


def _byte_alphabet() -> dict[int, int]:
    """Returns {character: byte} of the characters that stand for bytes in byte-level vocabularies.

    Printable Latin-1 characters stand for themselves, and U+0100, U+0101, ... for the other bytes.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


def _without_prefix(settings: Any) -> Any:
    """Returns the settings of a tokenizer.json without the parts that put a space before a text."""
    changed = dict(settings)
    for name in ("normalizer", "pre_tokenizer"):
        changed[name] = _without_prefix_step(settings.get(name))
    return changed


def _without_prefix_step(step: Any) -> Any:
    """Returns a normalizer or pre-tokenizer without a prefix; None if it did nothing else."""
    if not isinstance(step, dict):
        return step
    kind = step.get("type")
    if kind == "Prepend":
        return None
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        steps = [_without_prefix_step(one) for one in step[name]]
        return step | {name: [one for one in steps if one is not None]}
    if kind == "Metaspace":
        changed: dict[str, Any] = {"prepend_scheme": "never"}
        if "add_prefix_space" in step:
            changed["add_prefix_space"] = False
        return step | changed
    if kind == "ByteLevel" and step.get("add_prefix_space"):
        return step | {"add_prefix_space": False}
    return step


def kind_of_file(path: str | os.PathLike) -> str:
    """The kind of a tokenizer file, from its name."""
    return "tokenizers" if pathlib.Path(path).suffix == ".json" else "sentencepiece"


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a sentencepiece model. The same texts and settings give the same bytes.

    Text is not normalized: every space and newline is a token or part of one. Only the model type
    `word` splits text at spaces and drops them. `unigram` and `bpe` cover any text, falling back to
    bytes. All types but `word` cover spaces even if the corpus has none.

    Args:
      texts: the corpus.
      config: the model type and the size of the vocabulary. A small corpus may give fewer pieces.
        A size of 0 fits the corpus (`fitting_size`).

    Raises UserError if the corpus is empty, does not fit the size of the vocabulary, or has a text
    that is not valid Unicode.
    """
    whole_words = config.model_type == "word"
    covers_bytes = config.model_type in ("unigram", "bpe")
    # A list, because sentencepiece would hide errors of an iterator. TRAINING_CHARACTERS bounds it.
    lines = list(_training_lines(texts, (config.silence, *config.reserved)))
    if not lines:
        raise UserError(
            "there is no text to train a tokenizer on: give one with config.data.tokenizer.path"
        )
    size = config.vocab_size or fitting_size(lines, config)
    settings: dict[str, Any] = {}
    if not whole_words and not any(" " in line or SPACE in line for line in lines):
        settings["required_chars"] = SPACE
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=size,
            hard_vocab_limit=False,
            use_all_vocab=not covers_bytes,
            character_coverage=1.0,
            byte_fallback=covers_bytes,
            split_digits=covers_bytes,
            normalization_rule_name="identity",
            remove_extra_whitespaces=whole_words,
            # Makes a word at the start of a text the same piece as elsewhere.
            add_dummy_prefix=whole_words,
            allow_whitespace_only_pieces=not whole_words,
            control_symbols=[config.silence, *config.reserved],
            user_defined_symbols=[] if whole_words else ["\n"],
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # the order of floating-point sums depends on it
            max_sentence_length=8 * LINE_CHARACTERS,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise UserError(
            f"config.data.tokenizer.vocab_size is {size}: sentencepiece cannot train"
            f" {config.model_type!r} on this corpus ({error}): try another size"
        ) from error
    return Tokenizer("sentencepiece", model.getvalue(), config.silence)


def fitting_size(lines: Iterable[str], config: TokenizerConfig) -> int:
    """Returns a number of pieces that fits a corpus.

    Each piece of a BPE or unigram model should occur often enough for a model to learn it. A larger
    vocabulary makes the held-out text of a small corpus less likely (docs/benchmarks.md).

    Args:
      lines: the corpus.
      config: the model type and the reserved pieces.
    """
    alphabet: set[str] = set()
    total = 0
    for line in lines:
        alphabet.update(line)
        total += len(line)
    size = len(alphabet) + len(config.reserved) + _ROUND // 4
    if config.model_type in ("unigram", "bpe"):
        size += 256 + min(max(total // CHARACTERS_PER_PIECE, LEAST_PIECES), MOST_PIECES)
    else:
        size = max(size, MOST_PIECES)
    return -(-size // _ROUND) * _ROUND


def _training_lines(texts: Iterable[str], control: Sequence[str]) -> Iterator[str]:
    """Lines of at most LINE_CHARACTERS, with control symbols split into characters.

    Raises TextError for a text that is not valid Unicode.
    """
    for text in texts:
        check_text(text)
        text = text.replace(_RESERVED, "\n")
        for piece in control:
            # Sentencepiece would skip a control symbol, and would not learn its characters.
            text = text.replace(piece, "\n".join(piece))
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]
