"""The vocabulary of an imported model: a silence token for its tokenizer, rows for its tables."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from msllm.config import ModelConfig, TokenizerConfig
from msllm.errors import UserError
from msllm.tokenizer import FILE_NAMES, Tokenizer, kind_of_file

_ModelProto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # generated code

TABLES = ("embedding", "head")  # the parameters with a row per token


class TokenizerFile(NamedTuple):
    """A tokenizer of another project, which may lack a silence token.

    Attributes:
      kind: "sentencepiece" or "tokenizers".
      data: the content of the file.
      source: where it comes from, for messages.
    """

    kind: str
    data: bytes
    source: str

    @classmethod
    def read(cls, path: str | os.PathLike, source: str) -> TokenizerFile:
        """Reads a sentencepiece `.model` or a tokenizers `.json`."""
        path = pathlib.Path(path)
        return cls(kind_of_file(path), path.read_bytes(), source)

    @property
    def name(self) -> str:
        """The name that the file has in a folder."""
        return FILE_NAMES[self.kind]

    def special_tokens(self) -> set[str]:
        """The pieces that no text encodes to. Raises UserError if the file cannot be parsed."""
        try:
            if self.kind == "tokenizers":
                model = tokenizers.Tokenizer.from_str(self.data.decode())
                added = model.get_added_tokens_decoder().values()
                return {token.content for token in added if token.special}
            model = _ModelProto.FromString(self.data)
            control = model.SentencePiece.CONTROL
            return {piece.piece for piece in model.pieces if piece.type == control}
        except Exception as error:  # the libraries raise whatever their parsers raise
            raise UserError(
                f"the tokenizer of {self.source} is damaged or no {self.kind} file ({error}): copy"
                " it again"
            ) from error

    def vocab_size(self) -> int:
        """One more than the largest id."""
        if self.kind == "tokenizers":
            model = tokenizers.Tokenizer.from_str(self.data.decode())
            return max(model.get_vocab().values()) + 1
        return len(_ModelProto.FromString(self.data).pieces)


def with_silence(file: TokenizerFile, silence: str) -> tuple[Tokenizer, bool]:
    """(the tokenizer with a silence token, whether the token was added).

    Args:
      file: the tokenizer.
      silence: a special token of it that shall mean silence; empty: `<silence>`, which is added at
        the end of the vocabulary if it is not there.

    Raises UserError if there is no such special token, or if none can be added.
    """
    default = TokenizerConfig.silence
    special = file.special_tokens()
    if silence and silence not in special:
        raise UserError(
            f"--silence={silence}: the tokenizer of {file.source} has no such special token (it has"
            f" {', '.join(sorted(special)) or 'none'}): name one of these, or none, and {default}"
            " is added"
        )
    if silence or default in special:
        return Tokenizer(file.kind, file.data, silence or default, file.source), False
    add = _add_to_tokenizers if file.kind == "tokenizers" else _add_to_sentencepiece
    return Tokenizer(file.kind, add(file, default), default, file.source), True


def without_silence(folder: pathlib.Path, tokenizer: Tokenizer) -> bytes | None:
    """The tokenizer file in `folder` if `tokenizer` is that file and nothing but silence added."""
    path = folder / FILE_NAMES[tokenizer.kind]
    if not path.is_file():
        return None
    file = TokenizerFile.read(path, str(folder))
    again, added = with_silence(file, "")
    return file.data if added and again.hash == tokenizer.hash else None


def _add_to_tokenizers(file: TokenizerFile, piece: str) -> bytes:
    model = tokenizers.Tokenizer.from_str(file.data.decode())
    taken = set(model.get_vocab().values())
    model.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False)])
    # The library gives a new token the number of tokens as its id, and ids may have gaps.
    if model.token_to_id(piece) in taken:
        raise UserError(
            f"the ids of the tokenizer of {file.source} have gaps: name a special token of it with"
            " --silence"
        )
    return model.to_str().encode()


def _add_to_sentencepiece(file: TokenizerFile, piece: str) -> bytes:
    model = _ModelProto.FromString(file.data)
    model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.CONTROL)
    return model.SerializeToString()


def add_rows(
    config: ModelConfig, parameters: dict[str, Any], size: int, known: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model with `size` tokens.

    A new row is the mean of the first `known` rows, so the logit of a new token is the mean of
    theirs.
    """
    missing = size - config.vocab_size
    if not missing:
        return config, parameters
    grown = {}
    for name in TABLES:
        if name in parameters:
            table = parameters[name]  # [V, D] float32
            mean = table[:known].mean(axis=0, keepdims=True, dtype=np.float64)
            new_rows = mean.astype(np.float32).repeat(missing, axis=0)
            grown[name] = np.concatenate([table, new_rows])
    return dataclasses.replace(config, vocab_size=size), parameters | grown


def remove_rows(
    config: ModelConfig, parameters: dict[str, Any], size: int | None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model without the rows after those of `size` tokens; None: all stay."""
    if not size or size >= config.vocab_size:
        return config, parameters
    tables = {name: parameters[name][:size] for name in TABLES if name in parameters}
    return dataclasses.replace(config, vocab_size=size), parameters | tables
