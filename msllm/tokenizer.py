"""Text to token ids and back: sentencepiece models (trained here or given) and imported `tokenizers` files.

Silence ("this stream says nothing now") is a control symbol: no text encodes to it, and decoding drops it. More of them
may be reserved for uses of one's own.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
import tokenizers

from msllm.config import TokenizerConfig
from msllm.errors import UserError
from msllm.runtime.files import write_atomically

FILE_NAMES = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}
TRAINING_CHARACTERS = 20_000_000  # for `train`, at most: sentencepiece keeps its corpus in memory
CACHED_WORDS = 1 << 16
LINE_CHARACTERS = 1000  # sentencepiece silently skips lines above max_sentence_length bytes, so they are cut before


class Tokenizer:
    """A vocabulary of V pieces, one of them silence.

    Attributes:
      kind: "sentencepiece" or "tokenizers".
      silence: the piece that means silence; `silence_id` is its id.
      control: ids by piece of all that no text gives, silence among them.
      vocab_size: V.
      unknown_id: the id of text that the vocabulary does not cover, or None.
      hash: sha256 (hex) of the tokenizer file's bytes.
    """

    def __init__(self, kind: str, data: bytes, silence: str, source: str = "the tokenizer"):
        """Raises UserError if `data` is no tokenizer, or if `silence` is no control symbol of it."""
        self.kind, self.silence, self._data = kind, silence, data
        self.hash = hashlib.sha256(data).hexdigest()
        try:
            if kind == "sentencepiece":
                model = sentencepiece.SentencePieceProcessor(model_proto=data)
                self._pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
                self._encode, self._decode, self.unknown_id = (
                    model.encode,
                    model.decode,
                    model.unk_id(),
                )
                control = {piece for i, piece in enumerate(self._pieces) if model.is_control(i)}
            else:
                model = tokenizers.Tokenizer.from_str(data.decode())
                model.encode_special_tokens = True  # special tokens spelled out in a text stay text
                ids = range(max(model.get_vocab().values()) + 1)
                self._pieces = [model.id_to_token(i) or "" for i in ids]
                self._encode = lambda text: model.encode(text, add_special_tokens=False).ids
                self._decode = lambda ids: model.decode(ids, skip_special_tokens=False)
                self.unknown_id = model.token_to_id(getattr(model.model, "unk_token", None) or "")
                control = {
                    token.content
                    for token in model.get_added_tokens_decoder().values()
                    if token.special
                }
        except Exception as error:  # the libraries raise whatever their parsers raise
            raise UserError(
                f"{source} is no {kind} file ({error}): give a .model or .json tokenizer"
            ) from error
        self._encode_word = functools.lru_cache(CACHED_WORDS)(self._encode)
        self.vocab_size = len(self._pieces)
        if silence not in control:  # any other piece could come from text
            raise UserError(
                f"{source} has no control (special) symbol {silence!r} for silence: add it, or name an unused one with"
                f" config.data.tokenizer.silence (it has: {', '.join(sorted(control)) or 'none'})"
            )
        self.control = {piece: self._pieces.index(piece) for piece in sorted(control)}
        self.silence_id = self.control[silence]

    @classmethod
    def load(cls, path: str | pathlib.Path, silence: str = TokenizerConfig.silence) -> Tokenizer:
        """Reads a sentencepiece `.model` or a tokenizers `.json`. Raises UserError."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(
                f"there is no tokenizer file {path}: correct config.data.tokenizer.path, or leave it empty"
            )
        return cls(kind_of_file(path), path.read_bytes(), silence, str(path))

    @classmethod
    def from_bytes(cls, kind: str, data: bytes, silence: str) -> Tokenizer:
        """The tokenizer that `to_bytes()` came from."""
        return cls(kind, data, silence)

    def to_bytes(self) -> bytes:
        """The tokenizer file."""
        return self._data

    def __reduce__(self):
        """A tokenizer can be sent to another process."""
        return Tokenizer, (self.kind, self._data, self.silence)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the tokenizer file, atomically."""
        write_atomically(path, self._data)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, never silence. U+2581, sentencepiece's mark for a space, comes back as a space."""
        return self._encode(text)

    def encode_word(self, word: str) -> Sequence[int]:
        """The same for a text that is likely to come again: seven times as fast if it does. Not to be changed."""
        return self._encode_word(word)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without silence."""
        return self._decode([int(i) for i in ids if i != self.silence_id])

    def piece(self, token: int) -> str:
        """The vocabulary's spelling of one id."""
        return self._pieces[token]


def kind_of_file(path: str | os.PathLike) -> str:
    """The kind of a tokenizer file by its name: .json is of the tokenizers library."""
    return "tokenizers" if pathlib.Path(path).suffix == ".json" else "sentencepiece"


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a sentencepiece model on texts: the same texts and settings give the same bytes.

    Text is kept as it is: no normalization, every space and newline a token or part of one. `word` is the exception:
    it splits at spaces, which are not kept. `unigram` and `bpe` cover any text (bytes as a last resort). A small
    corpus may give fewer than `config.vocab_size` pieces. Raises UserError if the corpus is empty.
    """
    whole_words = config.model_type == "word"
    covers_bytes = config.model_type in ("unigram", "bpe")
    # A list, because sentencepiece would hide the errors of an iterator; its length is bounded.
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
            add_dummy_prefix=whole_words,  # so that a word is the same piece at the start of a text
            allow_whitespace_only_pieces=not whole_words,
            control_symbols=[config.silence, *config.reserved],
            user_defined_symbols=[] if whole_words else ["\n"],
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # the order of floating-point sums, and so the result, depends on it
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
    for text in texts:
        for piece in control:
            text = text.replace(
                piece, "\n".join(piece)
            )  # else the trainer would not see these characters
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]
