"""Tokenizers: sentencepiece models and files of the `tokenizers` library.

Sentencepiece models can be trained here. Silence ("this stream says nothing now") is a control
symbol: no text encodes to it, and decoding drops it. A vocabulary may have further control symbols
for other uses.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import sentencepiece
import tokenizers

from msllm.config import TokenizerConfig
from msllm.errors import UserError

FILE_NAMES = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
# Callers of `train` should give it at most this much text: sentencepiece holds it in memory.
TRAINING_CHARACTERS = 20_000_000
CACHED_WORDS = 1 << 16
# sentencepiece silently skips lines of more than max_sentence_length bytes, so `train` cuts them.
LINE_CHARACTERS = 1000


class Tokenizer:
    """A vocabulary of V pieces, one of which is silence.

    Attributes:
      kind: "sentencepiece" or "tokenizers".
      silence: the piece that means silence.
      silence_id: the id of silence.
      control: {piece: id} of all pieces that no text encodes to, including silence.
      vocab_size: V.
      unknown_id: the id of text that the vocabulary does not cover, or None.
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
        self._pieces, self._encode, self._decode = model.pieces, model.encode, model.decode
        self._encode_word = functools.lru_cache(CACHED_WORDS)(self._encode)
        self.unknown_id = model.unknown_id
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

        `decode` turns U+2581, sentencepiece's mark for a space, into a space.
        """
        return self._encode(text)

    def encode_word(self, word: str) -> Sequence[int]:
        """Like `encode`, but cached, for text that is likely to recur. Do not modify the result.

        The cache makes a repeated word seven times as fast.
        """
        return self._encode_word(word)

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

    def piece(self, token: int) -> str:
        """The vocabulary's spelling of one id; `<id N>` for ids that the tokenizer lacks."""
        return self._pieces[token] if token < self.vocab_size else f"<id {token}>"


class _Model(Protocol):
    """A parsed tokenizer file."""

    pieces: list[str]  # index: id
    control: set[str]  # pieces that no text encodes to
    unknown_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class _SentencePiece:
    def __init__(self, data: bytes):
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        self.control = {piece for i, piece in enumerate(self.pieces) if model.is_control(i)}
        self.unknown_id: int | None = model.unk_id()
        self._model = model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _Tokenizers:
    def __init__(self, data: bytes):
        self._model = model = tokenizers.Tokenizer.from_str(data.decode())
        model.encode_special_tokens = True  # a special token spelled out in text is text
        ids = range(max(model.get_vocab().values()) + 1)
        self.pieces = [model.id_to_token(i) or "" for i in ids]
        added = model.get_added_tokens_decoder().values()
        self.control = {token.content for token in added if token.special}
        self.unknown_id = model.token_to_id(getattr(model.model, "unk_token", None) or "")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


def kind_of_file(path: str | os.PathLike) -> str:
    """The kind of a tokenizer file, from its name."""
    return "tokenizers" if pathlib.Path(path).suffix == ".json" else "sentencepiece"


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a sentencepiece model. The same texts and settings give the same bytes.

    Text is not normalized: every space and newline is a token or part of one. Only the model type
    `word` splits text at spaces and drops them. `unigram` and `bpe` cover any text, falling back to
    bytes.

    Args:
      texts: the corpus.
      config: the model type and the size of the vocabulary. A small corpus may give fewer pieces.

    Raises UserError if the corpus is empty or does not fit the size of the vocabulary.
    """
    whole_words = config.model_type == "word"
    covers_bytes = config.model_type in ("unigram", "bpe")
    # A list, because sentencepiece would hide errors of an iterator. TRAINING_CHARACTERS bounds it.
    lines = list(_training_lines(texts, (config.silence, *config.reserved)))
    if not lines:
        raise UserError(
            "there is no text to train a tokenizer on: give one with config.data.tokenizer.path"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
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
        )
    except RuntimeError as error:
        raise UserError(
            f"config.data.tokenizer.vocab_size is {config.vocab_size}: sentencepiece cannot train"
            f" {config.model_type!r} on this corpus ({error}): try another size"
        ) from error
    return Tokenizer("sentencepiece", model.getvalue(), config.silence)


def _training_lines(texts: Iterable[str], control: Sequence[str]) -> Iterator[str]:
    """Lines of at most LINE_CHARACTERS, with control symbols split into characters."""
    for text in texts:
        for piece in control:
            # Sentencepiece would skip a control symbol, and would not learn its characters.
            text = text.replace(piece, "\n".join(piece))
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]
