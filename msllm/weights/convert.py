"""Models from and to the rest of the world (docs/weights.md).

`from_hf` and `from_gguf` write a folder that `score` and `generate` take as a checkpoint and that training starts from
(`config.init_from`); `to_hf` writes a Hugging Face folder of a checkpoint. A folder appears when it is complete, and
nothing is overwritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from msllm.config import Config, DataConfig, ModelConfig, StreamsConfig, TokenizerConfig
from msllm.errors import UserError
from msllm.runtime.files import new_folder, refuse_existing
from msllm.streams import KINDS, PRESETS, StreamSpec
from msllm.tokenizer import FILE_NAMES, Tokenizer
from msllm.weights import gguf, hf
from msllm.weights.load import load
from msllm.weights.warm_start import stream_vectors, write_model

ORIGIN = "hf"  # folder inside OUT with what came beside the weights: to_hf writes it again
COMPANIONS = (
    *(
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ),
    *("chat_template.jinja", "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of another project, read."""

    path: str
    config: ModelConfig
    size: int  # streams
    streams: StreamsConfig | None  # by name, if it says so
    parameters: dict[str, Any]
    tokenizer: tuple[str, bytes] | None  # kind and file
    silence: str | None  # if it says so
    origin: dict[str, bytes]  # files for ORIGIN


def from_hf(directory: str | os.PathLike, out: str | os.PathLike, **options) -> str:
    """Imports a Hugging Face folder; returns a report. `options` are those of `import_model`. Raises UserError."""
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one with {hf.CONFIG} and safetensors")
    refuse_existing(out)
    settings = hf.read_settings(folder)
    config, size, parameters = hf.read_folder(folder)
    streams, silence = hf.read_own(settings, size, str(folder / hf.CONFIG))
    with hf.open_tensors(folder) as tensors:
        settings = {key: x for key, x in settings.items() if key != "dtype"} | {
            "torch_dtype": hf.stored_dtype(tensors)
        }
    origin = {
        name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()
    }
    origin[hf.CONFIG] = json.dumps(settings, indent=2).encode()
    kinds = [
        kind for kind in ("tokenizers", "sentencepiece") if (folder / FILE_NAMES[kind]).is_file()
    ]
    tokenizer = (kinds[0], (folder / FILE_NAMES[kinds[0]]).read_bytes()) if kinds else None
    streams = streams if hf.OWN in settings else None
    source = Source(str(folder), config, size, streams, parameters, tokenizer, silence, origin)
    return import_model(source, out, **options)


def from_gguf(file: str | os.PathLike, out: str | os.PathLike, **options) -> str:
    """Imports a GGUF file; returns a report. `options` are those of `import_model`. Raises UserError."""
    refuse_existing(out)
    model = gguf.read_gguf(file, with_tokenizer=not options.get("tokenizer"))
    settings = model.settings | {"torch_dtype": "float32"}
    origin, tokenizer = {hf.CONFIG: json.dumps(settings, indent=2).encode()}, None
    if model.tokenizer:
        origin["tokenizer_config.json"] = json.dumps(model.tokenizer_settings, indent=2).encode()
        tokenizer = ("tokenizers", model.tokenizer)
    source = Source(str(file), model.config, 1, None, model.parameters, tokenizer, None, origin)
    return import_model(source, out, **options)


def import_model(
    source: Source,
    out: str | os.PathLike,
    streams: str = "",
    visibility: str = "",
    silence: str = "",
    tokenizer: str = "",
    vocab_multiple: int = 1,
) -> str:
    """Writes a model as a folder to start from; returns a report, one line a fact. Raises UserError.

    Args:
      streams: "user=input,thought=thought,output=output"; names of the default config need no kind. Empty: as many as
        the source has. A source of one stream may become several: all of them compute what it computed.
      visibility: a preset; empty: the source's, or `isolated` if it had one stream and gets several.
      silence: a special token of the tokenizer, not used otherwise; empty: `<silence>`, which is added if need be.
      tokenizer: a file in place of the source's.
      vocab_multiple: the tables get rows until their number is a multiple of it, so that a mesh can divide them.
    """
    if vocab_multiple < 1:
        raise UserError(f"--vocab_multiple={vocab_multiple}: must be at least 1")
    spec = _streams(source, streams, visibility)
    config, parameters = _grow(source, len(spec.names))
    chosen, added = None, False
    if tokenizer:
        kind = "tokenizers" if tokenizer.endswith(".json") else "sentencepiece"
        if not pathlib.Path(tokenizer).is_file():
            raise UserError(f"there is no tokenizer file {tokenizer}: correct --tokenizer")
        source = dataclasses.replace(source, tokenizer=(kind, pathlib.Path(tokenizer).read_bytes()))
    if source.tokenizer:
        _check_vocabulary(source)
        chosen, added = with_silence(
            *source.tokenizer, silence or source.silence or "", source.path
        )
    elif silence:
        raise UserError(
            f"{source.path} has no tokenizer, so no {silence!r}: give one with --tokenizer=FILE"
        )
    known = _known_size(*source.tokenizer) if source.tokenizer else config.vocab_size
    rows = max(config.vocab_size, chosen.vocab_size if chosen else 0)
    config, parameters = _with_rows(config, parameters, rows + -rows % vocab_multiple, known)
    data = DataConfig(
        tokenizer=TokenizerConfig(silence=chosen.silence if chosen else TokenizerConfig.silence)
    )
    whole = Config(model=config, streams=spec, data=data)
    with new_folder(out) as folder:
        write_model(folder, whole, parameters, chosen)
        (folder / ORIGIN).mkdir()
        files = source.origin | (
            {FILE_NAMES[source.tokenizer[0]]: source.tokenizer[1]} if source.tokenizer else {}
        )
        for name, content in files.items():
            (folder / ORIGIN / name).write_bytes(content)
    return "\n".join(_report(source, whole, parameters, chosen, added))


def to_hf(
    checkpoint: str | os.PathLike, out: str | os.PathLike, dtype: str = "", like: str = ""
) -> str:
    """Writes a checkpoint as a Hugging Face folder; returns a report, one line a fact. Raises UserError.

    Args:
      dtype: float32, bfloat16 or float16; empty: the imported model's if it holds every number exactly, else float32.
      like: a Hugging Face folder whose config keys and tokenizer settings are taken over; empty: the one that the model
        was imported from, which its import keeps a copy of.
    """
    refuse_existing(out)
    loaded = load(checkpoint)
    if loaded.run_config is None:
        raise UserError(
            f"{checkpoint} is a Hugging Face folder already: give a checkpoint of msllm"
        )
    origin = _origin(checkpoint, loaded.run_config, like)
    settings = hf.read_settings(origin) if origin else {}
    config, size, parameters = (
        loaded.config,
        loaded.streams.size,
        jax.tree.map(np.asarray, loaded.parameters),
    )
    family = hf.hf_config(config, size)["model_type"]
    if settings.get("model_type", family) != family:
        raise UserError(
            f"{origin} is of the family {settings['model_type']}, {checkpoint} of {family}: correct --like"
        )
    files = {
        name: (origin / name).read_bytes()
        for name in COMPANIONS
        if origin and (origin / name).is_file()
    }
    tokenizer, report = loaded.tokenizer, []
    settings.pop(hf.OWN, None)
    if size == 1 and tokenizer and (kept := _tokenizer_before(origin, tokenizer)):
        # One stream needs no silence: the model gets back the vocabulary that it came with.
        files[FILE_NAMES[tokenizer.kind]] = kept
        config, parameters = _without_rows(config, parameters, settings.get("vocab_size"))
    elif tokenizer:
        files[FILE_NAMES[tokenizer.kind]] = tokenizer.to_bytes()
        if tokenizer.kind == "tokenizers":
            files.setdefault(
                "tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
            )
    if size > 1:
        own = {"streams": dataclasses.asdict(loaded.run_config.streams)}
        settings[hf.OWN] = own | ({"silence": tokenizer.silence} if tokenizer else {})
    if not dtype:
        wanted = settings.get("torch_dtype", settings.get("dtype"))
        exact = wanted in hf.DTYPES and hf.fits(parameters, config, wanted)
        dtype = wanted if exact else "float32"
        if wanted in hf.DTYPES and not exact:
            report.append(
                f"{wanted} would round the parameters: float32 is written; --dtype={wanted} rounds them"
            )
    hf.write_folder(out, config, size, parameters, dtype, settings, files)
    streams = "1 stream" if size == 1 else f"{size} streams ({', '.join(loaded.streams.names)})"
    return "\n".join(
        [f"{family}, {streams}, {config.vocab_size:,} tokens, {dtype}, step {loaded.step}", *report]
    )


def parse_streams(text: str) -> StreamsConfig:
    """Streams of "NAME=KIND,..."; names of the default config may stand without their kind. Raises UserError."""
    known, names, kinds = dict(zip(StreamsConfig.names, StreamsConfig.kinds)), [], []
    for part in text.split(","):
        name, _, kind = (x.strip() for x in part.partition("="))
        kind = kind or known.get(name, "")
        if not name or kind not in KINDS:
            raise UserError(
                f"--streams={text}: {part!r} has no kind of {', '.join(KINDS)}: write NAME=KIND, e.g. --streams="
                "user=input,thought=thought,output=output"
            )
        names.append(name)
        kinds.append(kind)
    return StreamsConfig(names=tuple(names), kinds=tuple(kinds))


def with_silence(kind: str, data: bytes, silence: str, source: str) -> tuple[Tokenizer, bool]:
    """(the tokenizer with a silence token, whether it was added).

    `silence` names a special token that is there; empty: `<silence>`, which is added at the end if it is not there.
    """
    there = _special_tokens(kind, data, source)
    if silence and silence not in there:
        raise UserError(
            f"--silence={silence}: the tokenizer of {source} has no such special token (it has"
            f" {', '.join(sorted(there)) or 'none'}): name one of these, or none, and {TokenizerConfig.silence} is added"
        )
    if silence or TokenizerConfig.silence in there:
        return Tokenizer(kind, data, silence or TokenizerConfig.silence, source), False
    if kind == "tokenizers":
        model = tokenizers.Tokenizer.from_str(data.decode())
        taken = set(model.get_vocab().values())
        model.add_special_tokens(
            [tokenizers.AddedToken(TokenizerConfig.silence, special=True, normalized=False)]
        )
        if (
            model.token_to_id(TokenizerConfig.silence) in taken
        ):  # the library counts tokens, and ids may have gaps
            raise UserError(
                f"the ids of the tokenizer of {source} have gaps: name a special token of it with --silence"
            )
        return Tokenizer(kind, model.to_str().encode(), TokenizerConfig.silence, source), True
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    model.pieces.add(piece=TokenizerConfig.silence, score=0.0, type=model.SentencePiece.CONTROL)
    return Tokenizer(kind, model.SerializeToString(), TokenizerConfig.silence, source), True


def _special_tokens(kind: str, data: bytes, source: str) -> set[str]:
    try:
        if kind == "tokenizers":
            added = tokenizers.Tokenizer.from_str(data.decode()).get_added_tokens_decoder().values()
            return {token.content for token in added if token.special}
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        return {piece.piece for piece in model.pieces if piece.type == model.SentencePiece.CONTROL}
    except Exception as error:  # the libraries raise whatever their parsers raise
        raise UserError(
            f"the tokenizer of {source} is damaged or no {kind} file ({error}): copy it again"
        ) from error


def _known_size(kind: str, data: bytes) -> int:
    """One more than the largest id of the tokenizer as it came."""
    if kind == "tokenizers":
        return max(tokenizers.Tokenizer.from_str(data.decode()).get_vocab().values()) + 1
    return len(sentencepiece_model_pb2.ModelProto.FromString(data).pieces)


def _check_vocabulary(source: Source) -> None:
    kind, data = source.tokenizer
    _special_tokens(kind, data, source.path)
    size = _known_size(kind, data)
    if size > source.config.vocab_size:
        raise UserError(
            f"the tokenizer of {source.path} has {size} tokens and its model {source.config.vocab_size} (vocab_size):"
            " they do not belong together"
        )


def _streams(source: Source, streams: str, visibility: str) -> StreamsConfig:
    spec = parse_streams(streams) if streams else source.streams or hf.unnamed_streams(source.size)
    if visibility and visibility not in PRESETS:
        raise UserError(f"--visibility={visibility}: must be one of {', '.join(PRESETS)}")
    if source.size not in (1, len(spec.names)):
        raise UserError(
            f"--streams={streams} names {len(spec.names)} streams: {source.path} has {source.size}"
        )
    if (
        streams and source.streams and len(spec.names) == source.size
    ):  # renamed: who sees whom stays
        lags = [
            [dict(zip(source.streams.names, spec.names)).get(x, x) for x in lag]
            for lag in source.streams.lags
        ]
        spec = dataclasses.replace(
            source.streams, names=spec.names, kinds=spec.kinds, lags=tuple(map(tuple, lags))
        )
    if visibility:
        spec = dataclasses.replace(spec, visibility=visibility, lags=())
    elif source.size == 1 and len(spec.names) > 1:
        spec = dataclasses.replace(spec, visibility="isolated")
    StreamSpec.from_config(spec)  # checks it
    return spec


def _grow(source: Source, size: int) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) for so many streams, each of which adds nothing to what the source computes."""
    if size == source.size:
        return source.config, source.parameters
    old = source.parameters.get("stream_embedding")
    vectors = stream_vectors(old, ("",), ("new",) * size, source.config.d_model)
    config = dataclasses.replace(source.config, stream_embedding=True)
    return config, source.parameters | {"stream_embedding": np.asarray(vectors)}


def _with_rows(
    config: ModelConfig, parameters: dict[str, Any], size: int, known: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """Tables of `size` tokens. A new row is the mean of the `known` ones, so its logit is the mean of theirs."""
    missing = size - config.vocab_size
    if not missing:
        return config, parameters
    tables = {name: parameters[name] for name in ("embedding", "head") if name in parameters}
    mean = {
        name: table[:known].mean(axis=0, keepdims=True, dtype=np.float64)
        for name, table in tables.items()
    }
    rows = {name: mean[name].astype(np.float32).repeat(missing, axis=0) for name in tables}
    grown = {name: np.concatenate([table, rows[name]]) for name, table in tables.items()}
    return dataclasses.replace(config, vocab_size=size), parameters | grown


def _without_rows(
    config: ModelConfig, parameters: dict[str, Any], size: int | None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The tables without the rows that `_with_rows` added to those of `size` tokens."""
    if not size or size >= config.vocab_size:
        return config, parameters
    tables = {name: parameters[name][:size] for name in ("embedding", "head") if name in parameters}
    return dataclasses.replace(config, vocab_size=size), parameters | tables


def _origin(checkpoint: str | os.PathLike, config: Config, like: str) -> pathlib.Path | None:
    if like:
        return pathlib.Path(like)
    folders = [pathlib.Path(checkpoint) / ORIGIN] + [
        pathlib.Path(config.init_from) / ORIGIN
    ] * bool(config.init_from)
    return next((folder for folder in folders if (folder / hf.CONFIG).is_file()), None)


def _tokenizer_before(origin: pathlib.Path | None, tokenizer: Tokenizer) -> bytes | None:
    """The tokenizer file in `origin` if silence has been added to it, and nothing else was changed."""
    if not origin or not (file := origin / FILE_NAMES[tokenizer.kind]).is_file():
        return None
    again, added = with_silence(tokenizer.kind, file.read_bytes(), "", str(origin))
    return file.read_bytes() if added and again.hash == tokenizer.hash else None


def _report(
    source: Source,
    config: Config,
    parameters: dict[str, Any],
    tokenizer: Tokenizer | None,
    added: bool,
) -> list[str]:
    count, model, spec = (
        sum(x.size for x in jax.tree.leaves(parameters)),
        config.model,
        config.streams,
    )
    lines = [
        f"{count:,} parameters: {model.num_layers} layers of width {model.d_model}, {model.vocab_size:,} tokens"
    ]
    lines.append(
        "streams: "
        + ", ".join(f"{n} ({k})" for n, k in zip(spec.names, spec.kinds))
        + f"; {spec.visibility}"
    )
    if source.size == 1 < len(spec.names) and spec.visibility == "isolated" and not spec.lags:
        lines.append(
            "every stream computes what the imported model did; set config.streams.visibility to train them"
        )
    if not tokenizer:
        return [*lines, "no tokenizer: give one with --tokenizer=FILE to train or generate"]
    how = "added" if added else "there already"
    return [*lines, f"silence: {tokenizer.silence}, token {tokenizer.silence_id}, {how}"]
