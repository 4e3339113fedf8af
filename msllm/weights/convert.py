"""Imports models from other projects and exports models to them (docs/weights.md).

`from_hf` imports a Hugging Face folder and `from_gguf` a GGUF file. Both write a folder that `load`
reads as a checkpoint, and that training can start from (`config.init_from`). `to_hf` writes a
checkpoint as a Hugging Face folder. A folder appears only when it is complete, and nothing is
overwritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from etils import epath

from msllm.checkpoint import refuse_patterns
from msllm.config import Config, DataConfig, ModelConfig, StreamsConfig, TokenizerConfig
from msllm.errors import UserError
from msllm.runtime.files import new_folder, refuse_existing
from msllm.streams import KINDS, PRESETS, StreamSpec
from msllm.tokenizer import FILE_NAMES, Tokenizer
from msllm.weights import gguf, hf, hf_config, hf_tensors
from msllm.weights.load import LoadedModel, load
from msllm.weights.vocabulary import (
    TokenizerFile,
    add_rows,
    remove_rows,
    with_silence,
    without_silence,
)
from msllm.weights.warm_start import ORIGIN, origin_folders, stream_vectors, write_model

TOKENIZER_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
COMPANIONS = (
    *TOKENIZER_COMPANIONS,
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


class ImportOptions(TypedDict, total=False):
    """Options of an import, which `import_model` documents."""

    streams: str
    visibility: str
    silence: str
    tokenizer: str
    vocab_multiple: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of another project.

    Attributes:
      path: the folder or file, for messages.
      config: the config of the model.
      size: the number of streams.
      streams: the streams; None if the source does not name them.
      parameters: nested dicts of numpy float32.
      tokenizer: the tokenizer; None if the source has none.
      silence: the silence token; None if the source does not name it.
      origin: {name: content} of the files for the folder ORIGIN.
    """

    path: str
    config: ModelConfig
    size: int
    streams: StreamsConfig | None
    parameters: dict[str, Any]
    tokenizer: TokenizerFile | None
    silence: str | None
    origin: dict[str, bytes]


def from_hf(
    directory: str | os.PathLike, out: str | os.PathLike, **options: Unpack[ImportOptions]
) -> str:
    """Imports a Hugging Face folder. Returns a report, one line per fact.

    Args:
      directory: the folder.
      out: the folder to write.
      **options: the options of `import_model`.

    Raises UserError if msllm cannot represent the model, or if a file is missing or damaged.
    """
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: name one that holds {hf.CONFIG} and safetensors"
        )
    refuse_existing(out)
    refuse_patterns(out, "OUT")
    settings = hf.read_settings(folder)
    config, size, parameters = hf.read_folder(folder)
    streams, silence = hf_config.read_streams(settings, size, str(folder / hf.CONFIG))
    with hf.open_tensors(folder) as tensors:
        dtype = hf_tensors.common_dtype(tensors)
    origin = _files(folder, COMPANIONS) | {hf.CONFIG: _origin_config(settings, dtype)}
    tokenizer_path = _first_file(folder, (FILE_NAMES["tokenizers"], FILE_NAMES["sentencepiece"]))
    if not tokenizer_path and not options.get("tokenizer") and (folder / "vocab.json").is_file():
        raise UserError(
            f"{folder} has its tokenizer in vocab.json and merges.txt, which msllm does not read:"
            " load and save it with transformers, which writes tokenizer.json, or name another with"
            " --tokenizer=FILE"
        )
    source = Source(
        path=str(folder),
        config=config,
        size=size,
        streams=streams if hf_config.OWN in settings else None,
        parameters=parameters,
        tokenizer=TokenizerFile.read(tokenizer_path, str(folder)) if tokenizer_path else None,
        silence=silence,
        origin=origin,
    )
    return import_model(source, out, **options)


def from_gguf(
    file: str | os.PathLike, out: str | os.PathLike, **options: Unpack[ImportOptions]
) -> str:
    """Imports a GGUF file. Returns a report, one line per fact.

    Args:
      file: the file, or one of the parts that it was split into.
      out: the folder to write.
      **options: the options of `import_model`.

    Raises UserError if msllm cannot represent the model, or if the file is missing or damaged.
    """
    refuse_existing(out)
    refuse_patterns(out, "OUT")
    model = gguf.read_gguf(file, with_tokenizer=not options.get("tokenizer"))
    origin, tokenizer = {hf.CONFIG: _origin_config(model.settings, "float32")}, None
    if model.tokenizer:
        origin["tokenizer_config.json"] = json.dumps(model.tokenizer_settings, indent=2).encode()
        tokenizer = TokenizerFile("tokenizers", model.tokenizer, str(file))
    source = Source(
        path=str(file),
        config=model.config,
        size=1,
        streams=None,
        parameters=model.parameters,
        tokenizer=tokenizer,
        silence=None,
        origin=origin,
    )
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
    """Writes a model as a folder that training can start from. Returns a report.

    Args:
      source: the model.
      out: the folder to write.
      streams: e.g. "user=input,thought=thought,output=output"; names of the default config need no
        kind. Empty: the streams of the source. A source with one stream may become a model with
        several, each of which computes what the one stream computed.
      visibility: a preset. Empty: the source's, or `isolated` if one stream becomes several.
      silence: a special token of the tokenizer that has no other use. Empty: `<silence>`, which is
        added if necessary.
      tokenizer: a tokenizer file to use instead of the source's.
      vocab_multiple: rows are added to the embedding and the head until their number is a multiple
        of this, so that a mesh can divide them.

    Raises UserError if an option is invalid or does not fit the source.
    """
    if vocab_multiple < 1:
        raise UserError(f"--vocab_multiple={vocab_multiple}: must be at least 1")
    stream_config = _choose_streams(source, streams, visibility)
    file = _given_tokenizer(tokenizer, source) if tokenizer else source.tokenizer
    chosen, added = None, False
    if file:
        _check_vocabulary(file, source)
        chosen, added = with_silence(file, silence or source.silence or "")
    elif silence:
        raise UserError(
            f"{source.path} has no tokenizer, so no {silence!r}: name one with --tokenizer=FILE"
        )
    model_config, parameters = _add_streams(source, len(stream_config.names))
    rows = max(model_config.vocab_size, chosen.vocab_size if chosen else 0)
    rows += -rows % vocab_multiple
    known = file.vocab_size() if file else model_config.vocab_size
    model_config, parameters = add_rows(model_config, parameters, rows, known)
    silence = chosen.silence if chosen else TokenizerConfig.silence
    data = DataConfig(tokenizer=TokenizerConfig(silence=silence))
    config = Config(model=model_config, streams=stream_config, data=data)
    with new_folder(out) as folder:
        write_model(folder, config, parameters, chosen)
        (folder / ORIGIN).mkdir()
        origin = dict(source.origin)
        if tokenizer:  # the source's companions describe its own tokenizer, not this one
            for name in TOKENIZER_COMPANIONS:
                origin.pop(name, None)
            origin |= _files(pathlib.Path(tokenizer).parent, TOKENIZER_COMPANIONS)
        if file:
            origin[file.name] = file.data
        for name, content in origin.items():
            (folder / ORIGIN / name).write_bytes(content)
    return "\n".join(_report(source, config, parameters, chosen, added))


def to_hf(
    checkpoint: str | os.PathLike, out: str | os.PathLike, dtype: str = "", like: str = ""
) -> str:
    """Writes a checkpoint as a Hugging Face folder. Returns a report, one line per fact.

    Args:
      checkpoint: a checkpoint, a workdir or an imported model.
      out: the folder to write.
      dtype: float32, bfloat16 or float16. Empty: the type of the model that was imported if it
        represents every parameter exactly, else float32.
      like: a Hugging Face folder whose config keys and tokenizer settings the export takes over.
        Empty: the folder that the model was imported from, of which the import kept a copy.

    Raises UserError if no Hugging Face family has the form of the model, or if `like` or `dtype`
    does not fit it.
    """
    refuse_existing(out)
    model = load(checkpoint)
    if model.run_config is None:
        raise UserError(f"{checkpoint} is already a Hugging Face folder: name a checkpoint")
    if model.streams.rotations:
        raise UserError(
            f"config.streams.rotations of {checkpoint} is {model.streams.rotations}: no Hugging"
            " Face family rotates embeddings by stream, so the model cannot be exported"
        )
    if model.streams.combine:
        raise UserError(
            f"config.streams.combine of {checkpoint} is {model.run_config.streams.combine}: no"
            " Hugging Face family predicts a stream from several, so the model cannot be exported"
        )
    if model.streams.groups:
        groups = ", ".join(group.name for group in model.streams.groups)
        raise UserError(
            f"config.streams.names of {checkpoint} has groups ({groups}): in no Hugging Face family"
            " streams share a vector, so the model cannot be exported"
        )
    size = model.streams.size
    origin, note = _origin_folder(checkpoint, model.run_config, like)
    settings = hf.read_settings(origin) if origin else {}
    settings.pop(hf_config.OWN, None)
    family = hf_config.to_hf(model.config, size)["model_type"]
    if settings.get("model_type", family) != family:
        raise UserError(
            f"{origin} is of the family {settings['model_type']}, but {checkpoint} is of the family"
            f" {family}: correct --like"
        )
    config, parameters, files = _exported_vocabulary(model, origin, settings.get("vocab_size"))
    if origin:
        files |= _files(origin, COMPANIONS)
    if size > 1:
        streams = dataclasses.asdict(model.run_config.streams)
        # Earlier versions do not know these settings.
        later = ("visibility_medium", "token_sets", "mail", "rotations", "identities")
        for name in (*later, "combine", "combine_smoothing"):
            if streams[name] == getattr(StreamsConfig(), name):
                del streams[name]
        own: dict[str, Any] = {"streams": streams}
        if model.tokenizer:
            own["silence"] = model.tokenizer.silence
        settings[hf_config.OWN] = own
    notes = [note] if note else []
    if not dtype:
        dtype, imported = "float32", settings.get("torch_dtype", settings.get("dtype"))
        if imported in hf_tensors.DTYPES:
            if hf_tensors.is_exact_in(parameters, config, imported):
                dtype = imported
            else:
                notes.append(
                    f"parameters are written as float32, because {imported} would round them; to"
                    f" round them, use --dtype={imported}"
                )
    hf.write_folder(out, config, size, parameters, dtype, settings, files)
    streams = "1 stream" if size == 1 else f"{size} streams ({', '.join(model.streams.names)})"
    summary = f"{family}, {streams}, {config.vocab_size:,} tokens, {dtype}, step {model.step}"
    return "\n".join([summary, *notes])


def parse_streams(text: str) -> StreamsConfig:
    """Returns the streams of "NAME=KIND,...". Raises UserError.

    Names of the default config need no kind.
    """
    known = dict(zip(StreamsConfig.names, StreamsConfig.kinds))
    names, kinds = [], []
    for part in text.split(","):
        name, _, kind = map(str.strip, part.partition("="))
        kind = kind or known.get(name, "")
        if not name or kind not in KINDS:
            raise UserError(
                f"--streams={text}: {part!r} has no kind of {', '.join(KINDS)}: write NAME=KIND,"
                " e.g. --streams=user=input,thought=thought,output=output"
            )
        names.append(name)
        kinds.append(kind)
    return StreamsConfig(names=tuple(names), kinds=tuple(kinds))


def _files(folder: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    """Returns {name: content} of the named files that exist in a folder."""
    paths = (folder / name for name in names)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _origin_config(settings: dict[str, Any], dtype: str) -> bytes:
    """Returns the config.json for ORIGIN: the settings of the source with the given dtype."""
    others = {key: value for key, value in settings.items() if key != "dtype"}
    return json.dumps(others | {"torch_dtype": dtype}, indent=2).encode()


def _first_file(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _given_tokenizer(path: str, source: Source) -> TokenizerFile:
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no tokenizer file {path}: correct --tokenizer")
    return TokenizerFile.read(path, source.path)


def _check_vocabulary(file: TokenizerFile, source: Source) -> None:
    """Raises UserError if the tokenizer is damaged or has more tokens than the model.

    Added tokens may have ids beyond the model's embedding: the model has never read them. An
    example is a `<pad>` that was added for training.
    """
    size, rows = file.vocab_size(), source.config.vocab_size
    # Count instead of listing range(rows, size), because a damaged file may name the id 1e12.
    if sum(rows <= i < size for i in file.added_ids()) < size - rows:
        raise UserError(
            f"the tokenizer of {file.source} has {size} tokens, but vocab_size of the model is"
            f" {rows}: name the model's own tokenizer with --tokenizer=FILE"
        )


def _choose_streams(source: Source, streams: str, visibility: str) -> StreamsConfig:
    """Returns the streams of an import. Raises UserError if they do not fit the source."""
    spec = parse_streams(streams) if streams else source.streams
    spec = spec or hf_config.unnamed_streams(source.size)
    if visibility and visibility not in PRESETS:
        raise UserError(f"--visibility={visibility}: must be one of {', '.join(PRESETS)}")
    if source.size not in (1, len(spec.names)):
        raise UserError(
            f"--streams={streams} names {len(spec.names)} streams: {source.path} has {source.size};"
            " name that many"
        )
    if streams and source.streams and len(spec.names) == source.size:
        spec = _rename_streams(source.streams, spec)
    if visibility:
        spec = dataclasses.replace(
            spec, visibility=visibility, visibility_medium="latent", lags=(), token_sets={}
        )
    elif source.size == 1 and len(spec.names) > 1:
        spec = dataclasses.replace(spec, visibility="isolated")
    StreamSpec.from_config(spec)  # raises UserError if it is invalid
    return spec


def _rename_streams(old: StreamsConfig, new: StreamsConfig) -> StreamsConfig:
    """Returns `old` with the names and kinds of `new`."""
    new_name = dict(zip(old.names, new.names))
    lags = tuple(
        (new_name.get(reader, reader), new_name.get(source, source), lag)
        for reader, source, lag in old.lags
    )
    mail = tuple(
        (new_name.get(reader, reader), new_name.get(source, source), lag, rows)
        for reader, source, lag, rows in old.mail
    )
    combine = tuple(
        (
            new_name.get(stream, stream),
            mode,
            ",".join(new_name.get(name.strip(), name) for name in sources.split(",")),
        )
        for stream, mode, sources in old.combine
    )
    return dataclasses.replace(
        old, names=new.names, kinds=new.kinds, lags=lags, mail=mail, combine=combine
    )


def _add_streams(source: Source, size: int) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns (config, parameters) with `size` streams that each compute what the source does."""
    if size == source.size:
        return source.config, source.parameters
    old = source.parameters.get("stream_embedding")
    vectors = stream_vectors(old, ("",), ("new",) * size, source.config.d_model)
    config = dataclasses.replace(source.config, stream_embedding=True)
    return config, source.parameters | {"stream_embedding": np.asarray(vectors)}


def _origin_folder(
    checkpoint: str | os.PathLike, config: Config, like: str
) -> tuple[pathlib.Path | None, str]:
    """Finds the Hugging Face folder whose settings an export takes over.

    Returns:
      The folder, None if there is none; and a note if there might have been one.
    """
    if like:
        return pathlib.Path(like), ""
    for path in filter(None, (str(checkpoint), config.init_from)):
        for folder in origin_folders(path):
            return pathlib.Path(folder), ""
    if config.init_from and not epath.Path(config.init_from).exists():
        return None, (
            f"there is no {config.init_from}, from which the run was started: if it was imported,"
            " name the folder that it came from with --like, to take over its settings"
        )
    return None, ""


def _exported_vocabulary(
    model: LoadedModel, origin: pathlib.Path | None, origin_size: int | None
) -> tuple[ModelConfig, dict[str, Any], dict[str, bytes]]:
    """Returns (config, parameters as numpy arrays, {name: content} of tokenizer files)."""
    config, tokenizer = model.config, model.tokenizer
    parameters = jax.tree.map(np.asarray, model.parameters)
    if not tokenizer:
        return config, parameters, {}
    name = FILE_NAMES[tokenizer.kind]
    if model.streams.size == 1 and origin and (data := without_silence(origin, tokenizer)):
        # One stream needs no silence, so the model gets its original vocabulary back.
        return *remove_rows(config, parameters, origin_size), {name: data}
    files = {name: tokenizer.to_bytes()}
    if tokenizer.kind == "tokenizers":
        files["tokenizer_config.json"] = b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    return config, parameters, files


def _report(
    source: Source,
    config: Config,
    parameters: dict[str, Any],
    tokenizer: Tokenizer | None,
    added: bool,
) -> list[str]:
    """Returns the lines of the report on an import."""
    model, spec = config.model, config.streams
    count = sum(x.size for x in jax.tree.leaves(parameters))
    streams = ", ".join(f"{name} ({kind})" for name, kind in zip(spec.names, spec.kinds))
    lines = [
        f"{count:,} parameters: {model.num_layers} layers of width {model.d_model},"
        f" {model.vocab_size:,} tokens",
        f"streams: {streams}; {spec.visibility}",
    ]
    if source.size == 1 < len(spec.names) and spec.visibility == "isolated" and not spec.lags:
        lines.append(
            "every stream computes what the imported model computed; before training, set"
            " config.streams.visibility so that streams see one another"
        )
    if tokenizer:
        given = source.config.vocab_size
        beyond = list(range(given, tokenizer.vocab_size - added))
        if beyond:
            pieces = ", ".join(map(tokenizer.piece, beyond))
            lines.append(f"rows added for tokens that had none: {pieces}")
        how = "added" if added else "already there"
        lines.append(f"silence: {tokenizer.silence}, token {tokenizer.silence_id}, {how}")
    else:
        lines.append("no tokenizer: to train or generate, name one with --tokenizer=FILE")
    return lines
