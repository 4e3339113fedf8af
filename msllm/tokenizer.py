"""Text to token ids and back: sentencepiece models (trained here or given) and imported `tokenizers` files.

Silence ("this stream says nothing now") is a control symbol: no text encodes to it, and decoding drops it.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
import tokenizers

from msllm.config import TokenizerConfig
from msllm.errors import UserError

SENTENCEPIECE = "sentencepiece"
TOKENIZERS = "tokenizers"
FILE_NAMES = {SENTENCEPIECE: "tokenizer.model", TOKENIZERS: "tokenizer.json"}
TRAINING_CHARACTERS = 20_000_000  # sentencepiece keeps its corpus in memory: it gets the beginning of a larger one
LINE_CHARACTERS = 1000  # sentencepiece silently skips lines above max_sentence_length bytes, so they are cut before


class Tokenizer:
    """A vocabulary of V pieces, one of them silence.

    Attributes:
      kind: "sentencepiece" or "tokenizers".
      silence: the piece that means silence; `silence_id` is its id.
      vocab_size: V.
      unknown_id: the id of text that the vocabulary does not cover, or None.
      hash: sha256 (hex) of the tokenizer file's bytes.
    """

    def __init__(self, kind: str, data: bytes, silence: str, source: str = "the tokenizer"):
        """Raises UserError if `data` is no tokenizer, or if `silence` is no control symbol of it."""
        self.kind, self.silence, self._data = kind, silence, data
        try:
            if kind == SENTENCEPIECE:
                self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
                self.vocab_size = self._model.get_piece_size()
                pieces = {self._model.id_to_piece(i) for i in range(self.vocab_size)}
                self.unknown_id = self._model.unk_id()
            else:
                self._model = tokenizers.Tokenizer.from_str(data.decode())
                self._model.encode_special_tokens = True  # special tokens spelled out in a text stay text
                pieces = self._model.get_vocab()
                self.vocab_size = max(pieces.values()) + 1
                self.unknown_id = self._model.token_to_id(getattr(self._model.model, "unk_token", None) or "")
        except Exception as error:  # the libraries raise whatever their parsers raise
            raise UserError(f"{source} is no {kind} file ({error}): give a .model or .json tokenizer") from error
        if silence not in pieces:
            raise UserError(
                f"{source} has no piece {silence!r} for silence: add it as a control (special) symbol, or name an unused"
                " one with config.data.tokenizer.silence"
            )
        self.silence_id = self._id(silence)
        if silence and self.silence_id in self._encode(silence):
            raise UserError(
                f"{source}: the text {silence!r} encodes to the silence piece, so text could silence a stream: make it a"
                " control (special) symbol, or name another one with config.data.tokenizer.silence"
            )
        self.hash = hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | pathlib.Path, silence: str = TokenizerConfig.silence) -> Tokenizer:
        """Reads a sentencepiece `.model` or a tokenizers `.json`. Raises UserError."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f"there is no tokenizer file {path}: correct config.data.tokenizer.path, or leave it empty")
        kind = TOKENIZERS if path.suffix == ".json" else SENTENCEPIECE
        return cls(kind, path.read_bytes(), silence, str(path))

    @classmethod
    def from_bytes(cls, kind: str, data: bytes, silence: str) -> Tokenizer:
        """The tokenizer that `to_bytes()` came from."""
        return cls(kind, data, silence)

    def to_bytes(self) -> bytes:
        """The tokenizer file."""
        return self._data

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the tokenizer file."""
        pathlib.Path(path).write_bytes(self._data)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, never silence. U+2581, sentencepiece's mark for a space, comes back as a space."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without silence."""
        ids = [int(i) for i in ids if i != self.silence_id]
        if self.kind == SENTENCEPIECE:
            return self._model.decode(ids)
        return self._model.decode(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """The vocabulary's spelling of one id."""
        if self.kind == SENTENCEPIECE:
            return self._model.id_to_piece(int(token))
        return self._model.id_to_token(int(token)) or ""

    def _id(self, piece: str) -> int:
        return self._model.piece_to_id(piece) if self.kind == SENTENCEPIECE else self._model.token_to_id(piece)

    def _encode(self, text: str) -> list[int]:
        if self.kind == SENTENCEPIECE:
            return self._model.encode(text)
        return self._model.encode(text, add_special_tokens=False).ids


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a sentencepiece model on texts: the same texts and settings give the same bytes.

    Text is kept as it is: no normalization, every space and newline a token or part of one. `word` is the exception:
    it splits at white space, which is not kept. `unigram` and `bpe` cover any text (bytes as a last resort). A small
    corpus may give fewer than `config.vocab_size` pieces. Raises UserError if the corpus is empty.
    """
    whole_words = config.model_type == "word"
    covers_bytes = config.model_type in ("unigram", "bpe")
    lines = _Lines(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            use_all_vocab=config.model_type == "char" or whole_words,
            character_coverage=1.0,
            byte_fallback=covers_bytes,
            split_digits=covers_bytes,
            normalization_rule_name="identity",
            remove_extra_whitespaces=whole_words,
            add_dummy_prefix=whole_words,  # so that a word is the same piece at the start of a text
            allow_whitespace_only_pieces=not whole_words,
            control_symbols=[config.silence],
            user_defined_symbols=[] if whole_words else ["\n"],
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # the order of floating-point sums, and so the result, depends on it
            max_sentence_length=8 * LINE_CHARACTERS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if lines.count == 0:
            raise UserError("there is no text to train a tokenizer on: give one with config.data.tokenizer.path") from error
        raise UserError(
            f"config.data.tokenizer (model_type={config.model_type!r}, vocab_size={config.vocab_size}): sentencepiece says"
            f" {error}: try another vocab_size"
        ) from error
    return Tokenizer(SENTENCEPIECE, model.getvalue(), config.silence)


class _Lines:
    """Iterates over the lines of texts, cut to a length that the trainer accepts, up to TRAINING_CHARACTERS."""

    def __init__(self, texts: Iterable[str]):
        self._texts, self.count = texts, 0

    def __iter__(self) -> Iterator[str]:
        total = 0
        for text in self._texts:
            for line in _cut(text.split("\n")):
                self.count += 1
                total += len(line)
                yield line
            if total > TRAINING_CHARACTERS:
                return


def _cut(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        for start in range(0, len(line), LINE_CHARACTERS):
            yield line[start : start + LINE_CHARACTERS]
