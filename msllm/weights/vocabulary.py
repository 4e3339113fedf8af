"""Extends the vocabulary of an imported model: the tokenizer, the embedding and the head."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from msllm.config import ModelConfig, TokenizerConfig
from msllm.errors import UserError
from msllm.tokenizer import FILE_NAMES, Tokenizer, kind_of_file
from msllm.weights.hf import read_json

_ModelProto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # generated code

TOKENIZER_SETTINGS = "tokenizer_config.json"
TABLES = ("embedding", "head")  # the parameters with a row per token


class AddedToken(NamedTuple):
    """A token that other files of a Hugging Face folder add to its tokenizer file."""

    id: int
    piece: str
    special: bool  # no text encodes to it


class TokenizerFile(NamedTuple):
    """A tokenizer of another project, which may lack a silence token.

    Attributes:
      kind: "sentencepiece" or "tokenizers".
      data: the content of the file.
      source: the folder or file that the tokenizer comes from, for messages.
      added: the tokens that other files of its folder add, sorted by id.
    """

    kind: str
    data: bytes
    source: str
    added: tuple[AddedToken, ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike, source: str) -> TokenizerFile:
        """Reads a sentencepiece `.model` or a tokenizers `.json` file, and its added tokens.

        Raises UserError if its folder has settings that the file does not implement.
        """
        path = pathlib.Path(path)
        kind = kind_of_file(path)
        if kind == "sentencepiece":
            _check_settings(path)
        return cls(kind, path.read_bytes(), source, _added_tokens(path.parent))

    @property
    def name(self) -> str:
        """The name of such a file in a folder."""
        return FILE_NAMES[self.kind]

    def with_added_tokens(self) -> bytes:
        """Returns the content of the file with the added tokens. Raises UserError."""
        pieces = self._pieces()
        missing = [token for token in self.added if pieces.get(token.id) != token.piece]
        if not missing:
            return self.data
        known = set(pieces.values())
        for number, token in enumerate(missing, len(pieces)):
            if self.kind == "tokenizers" or token.id != number or token.piece in known:
                other = pieces.get(token.id)
                found = f"has {other!r} there" if other is not None else "has no such id"
                raise UserError(
                    f"{self.source} adds the token {token.piece!r} with the id {token.id}, but its"
                    f" {self.name} {found} ({len(pieces)} tokens): save the tokenizer again with"
                    " transformers, or name another with --tokenizer=FILE"
                )
        model = self._proto()
        types = model.SentencePiece
        for token in missing:
            piece_type = types.CONTROL if token.special else types.USER_DEFINED
            model.pieces.add(piece=token.piece, score=0.0, type=piece_type)
        return model.SerializeToString()

    def special_tokens(self) -> set[str]:
        """Returns the pieces that no text encodes to. Raises UserError if the file is damaged."""
        special = {token.piece for token in self.added if token.special}
        if self.kind == "tokenizers":
            added = self._tokenizer().get_added_tokens_decoder().values()
            return special | {token.content for token in added if token.special}
        model = self._proto()
        control = model.SentencePiece.CONTROL
        return special | {piece.piece for piece in model.pieces if piece.type == control}

    def added_ids(self) -> set[int]:
        """Returns the ids of the tokens that the file or its folder marks as added."""
        ids = {token.id for token in self.added}
        if self.kind == "tokenizers":
            ids |= self._tokenizer().get_added_tokens_decoder().keys()
        return ids

    def vocab_size(self) -> int:
        """Returns the largest id plus one. Raises UserError if the file is damaged."""
        return max([-1, *self._pieces(), *(token.id for token in self.added)]) + 1

    def _pieces(self) -> dict[int, str]:
        """Returns {id: piece} of the file itself, without added tokens of other files."""
        if self.kind == "tokenizers":
            return {i: piece for piece, i in self._tokenizer().get_vocab().items()}
        return {i: piece.piece for i, piece in enumerate(self._proto().pieces)}

    def _tokenizer(self) -> tokenizers.Tokenizer:
        return self._parse(lambda: tokenizers.Tokenizer.from_str(self.data.decode()))

    def _proto(self) -> Any:
        return self._parse(lambda: _ModelProto.FromString(self.data))

    def _parse(self, parse: Callable[[], Any]) -> Any:
        try:
            return parse()
        except Exception as error:  # the libraries' parsers raise many types
            raise UserError(
                f"the tokenizer of {self.source} is damaged or no {self.kind} file ({error}): copy"
                " it again"
            ) from error


def _added_tokens(folder: pathlib.Path) -> tuple[AddedToken, ...]:
    """Returns the tokens that `added_tokens.json` and `tokenizer_config.json` add, sorted by id.

    `tokenizer_config.json` says which of them are special. A token that is only in
    `added_tokens.json` is special if a setting such as `eos_token` names it.
    """
    settings = read_json(folder / TOKENIZER_SETTINGS)
    found: dict[int, AddedToken] = {}
    named = _named_tokens(settings) | _named_tokens(read_json(folder / "special_tokens_map.json"))
    for piece, i in read_json(folder / "added_tokens.json").items():
        if type(i) is not int:
            raise UserError(f"{folder / 'added_tokens.json'}: {piece!r} is {i!r}: must be an id")
        found[i] = AddedToken(i, piece, piece in named)
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(
            f"{folder / TOKENIZER_SETTINGS}: added_tokens_decoder is {decoder!r}: must be an object"
        )
    for i, details in decoder.items():
        try:
            piece = details["content"]
            if not isinstance(piece, str):
                raise TypeError("content is not a string")
            token = AddedToken(int(i), piece, bool(details.get("special")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder / TOKENIZER_SETTINGS}: added_tokens_decoder has {i!r}: {details!r}: must"
                ' be an id and {"content": ..., ...}'
            ) from error
        if (other := found.get(token.id)) and other.piece != token.piece:
            raise UserError(
                f"{folder}: the token {token.id} is {other.piece!r} in added_tokens.json and"
                f" {token.piece!r} in {TOKENIZER_SETTINGS}: save the tokenizer again"
            )
        found[token.id] = token
    return tuple(found[i] for i in sorted(found))


def _named_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Returns the special tokens that settings such as `eos_token` name."""
    values: list[Any] = []
    for key, value in settings.items():
        if key.endswith(("_token", "_special_tokens")):
            values += value if isinstance(value, list) else [value]
    contents = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {content for content in contents if isinstance(content, str)}


def _check_settings(path: pathlib.Path) -> None:
    """Raises UserError if the folder of a sentencepiece file has settings that contradict it."""
    settings = read_json(path.parent / TOKENIZER_SETTINGS)
    try:
        prefix = _ModelProto.FromString(path.read_bytes()).normalizer_spec.add_dummy_prefix
    except Exception:  # TokenizerFile refuses the damaged file later
        return
    expected = {"add_prefix_space": prefix, "do_lower_case": False}
    for key, value in expected.items():
        if settings.get(key) is not None and settings[key] != value:
            raise UserError(
                f"{path.parent / TOKENIZER_SETTINGS}: {key} is {settings[key]!r}, but {path.name}"
                f" implements {value!r}: save the tokenizer with transformers, as tokenizer.json,"
                " or name another with --tokenizer=FILE"
            )


def with_silence(file: TokenizerFile, silence: str) -> tuple[Tokenizer, bool]:
    """Returns (the tokenizer with a silence token, whether the token was added).

    Args:
      file: the tokenizer.
      silence: a special token of the tokenizer to use for silence. Empty: `<silence>`, which is
        added at the end of the vocabulary if it is not there.

    Raises UserError if there is no such special token, or if `<silence>` cannot be added.
    """
    default = TokenizerConfig.silence
    special, data = file.special_tokens(), file.with_added_tokens()
    if silence and silence not in special:
        raise UserError(
            f"--silence={silence}: the tokenizer of {file.source} has no such special token (it has"
            f" {', '.join(sorted(special)) or 'none'}): name one that it has, or leave out"
            f" --silence to add {default}"
        )
    if silence or default in special:
        return Tokenizer(file.kind, data, silence or default, file.source), False
    add = _add_to_tokenizers if file.kind == "tokenizers" else _add_to_sentencepiece
    return Tokenizer(file.kind, add(file._replace(data=data), default), default, file.source), True


def without_silence(folder: pathlib.Path, tokenizer: Tokenizer) -> bytes | None:
    """Returns the tokenizer file in `folder` if `tokenizer` is that file with silence added."""
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
    # The library uses the number of tokens as the id of a new one. If ids have gaps, this id may
    # be taken.
    if model.token_to_id(piece) in taken:
        raise UserError(
            f"the ids of the tokenizer of {file.source} have gaps, so {piece} cannot be added: name"
            " one of its special tokens with --silence"
        )
    return model.to_str().encode()


def _add_to_sentencepiece(file: TokenizerFile, piece: str) -> bytes:
    model = _ModelProto.FromString(file.data)
    model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.CONTROL)
    return model.SerializeToString()


def add_rows(
    config: ModelConfig, parameters: dict[str, Any], size: int, known: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns (config, parameters) of the model with `size` tokens.

    A new row is the mean of the first `known` rows, so the logit of a new token is the mean of
    their logits.
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
    """Returns (config, parameters) with the rows of the first `size` tokens; None: all rows."""
    if not size or size >= config.vocab_size:
        return config, parameters
    tables = {name: parameters[name][:size] for name in TABLES if name in parameters}
    return dataclasses.replace(config, vocab_size=size), parameters | tables
