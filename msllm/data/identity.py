"""The settings that identify prepared data: everything that its bytes depend on.

`prepare` stores these settings in the manifest. It compares them before it accepts a directory as
already prepared, and before it continues an unfinished run. An input file is identified by its name
and content, but not by its folder.

A reader or converter of msllm is identified by its name alone, so that editing a comment in msllm
leaves prepared data valid. A user's reader or converter is identified by its name and by the
content of its module.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from msllm import __version__
from msllm.config import Config, DataConfig, import_object
from msllm.data import converters, files
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

# The output versions of msllm's converters (by name) and readers (by import path); 1 if not listed.
# If you change what one of them yields for the same input, increase its version here. Data that was
# prepared with another version is then refused.
REVISIONS: Mapping[str, int] = {}

_PACKAGES = ("array_record", "msgpack", "numpy", "sentencepiece", "tokenizers")
_ALWAYS_STORED = ("converter", "rows", "eval_percent", "split", "max_examples", "shards")
# Settings that were added later. They are stored only if they differ from their defaults, so that
# data prepared before they existed still has equal settings.
_STORED_IF_SET = ("format", "bad_percent", "streams", "vary", "eval_format")


def get_settings(
    config: Config, spec: StreamSpec, hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns everything that the bytes of prepared data depend on, as JSON values.

    Args:
      config, spec: the settings, and the streams of the model.
      hashes: the sha256 (hex) of every input file; None: read the files.

    Raises UserError if an input file cannot be read, or a reader or converter cannot be imported.
    """
    data = config.data
    converter, options = converters.get_converter(data.converter, data.options)
    settings: dict[str, Any] = {name: getattr(data, name) for name in _ALWAYS_STORED}
    settings["options"] = options
    settings["tokenizer"] = _tokenizer_settings(data)
    settings["streams"] = [spec.names, spec.kinds, spec.delays]
    if spec.mail:  # was added later, like the settings in _STORED_IF_SET
        settings["streams.mail"] = spec.mail_settings
    inputs = files.input_files(data.path) if converter.reads else []
    settings["inputs"] = _names_and_hashes(inputs, hashes)
    if data.eval_path:
        held_out = files.input_files(data.eval_path, "eval_path")
        settings["eval_inputs"] = _names_and_hashes(held_out, hashes)
    values, defaults = dataclasses.asdict(data), dataclasses.asdict(DataConfig())
    for name in _STORED_IF_SET:
        if values[name] != defaults[name]:
            settings[f"data.{name}"] = values[name]
    return json.loads(json.dumps(settings | _code_settings(data)))


def code_versions(data: DataConfig) -> dict[str, str]:
    """Returns the versions of all code that turns input into bytes.

    The workers of a run must agree on them.
    """
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {name: str(value) for name, value in _code_settings(data).items()}
    return {"msllm": __version__} | versions | own


def different_settings(settings: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Returns the settings that differ from those that another run stored, by name.

    Numbers and short texts are given with both values, and so are the settings of a trained
    tokenizer and options, because defaults have changed.
    """
    settings, stored = _comparable(settings), _comparable(stored)
    names = [name for name in {**settings, **stored} if settings.get(name) != stored.get(name)]
    for section in {"tokenizer", "options"}.intersection(names):
        new, old = settings.get(section) or {}, stored.get(section) or {}
        changed = [key for key in {**old, **new} if new.get(key) != old.get(key)]
        values = [
            f"{key} was {old[key]!r}, now {new[key]!r}"
            for key in changed
            if key in old.keys() & new.keys()
        ]
        names[names.index(section)] = f"{section} ({', '.join(values)})" if values else section
    return [_with_values(name, settings, stored) for name in names]


def _with_values(name: str, settings: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Returns the name of a setting, with its old and new value if both are short."""
    new, old = settings.get(name), stored.get(name)
    if all(isinstance(v, int | float | str) and len(str(v)) < 40 for v in (new, old)):
        return f"{name} (was {old!r}, now {new!r})"
    return name


def _tokenizer_settings(data: DataConfig) -> dict[str, Any]:
    if data.tokenizer.path:
        given = Tokenizer.load(data.tokenizer.path, data.tokenizer.silence)
        return {"sha256": given.hash, "silence": data.tokenizer.silence}
    settings = dataclasses.asdict(data.tokenizer)
    if not data.tokenizer.reserved:
        del settings["reserved"]  # was added later, like the settings in _STORED_IF_SET
    return settings


def _names_and_hashes(paths: Sequence[str], hashes: Mapping[str, str] | None) -> list[list[str]]:
    return [
        [pathlib.Path(path).name, files.file_hash(path) if hashes is None else hashes[path]]
        for path in paths
    ]


def _code_settings(data: DataConfig) -> dict[str, Any]:
    """Returns what identifies the reading and converting functions besides their names."""
    found: dict[str, Any] = {}
    for name in ("converter", "format", "eval_format"):
        path = getattr(data, name)
        if ":" in path:
            import_object(path, f"config.data.{name}")
            if not _belongs_to_msllm(path):
                found[f"{name}_code"] = _module_hash(path, f"config.data.{name}")
        if path in REVISIONS:
            found[f"{name}_revision"] = REVISIONS[path]
    return found


def _module_hash(path: str, setting: str) -> str:
    """Returns the sha256 (hex) of the file of the module in `module:function`. Raises UserError."""
    module = importlib.import_module(path.partition(":")[0])
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(
            f"{setting} is {path!r}: the module has no file to identify prepared data by; define"
            " the function in a file"
        )
    return files.file_hash(file)


def _belongs_to_msllm(path: str) -> bool:
    return path.startswith("msllm.")


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings in the form of this version.

    Older manifests hold the hashes of msllm's own modules, and lack the options of converters that
    were added later. A missing option has its default value.
    """
    paths = {
        "converter_code": settings.get("converter", ""),
        "format_code": settings.get("data.format", ""),
        "eval_format_code": settings.get("data.eval_format", ""),
    }
    found = {
        name: value
        for name, value in settings.items()
        if not (name in paths and _belongs_to_msllm(paths[name]))
    }
    converter, options = settings.get("converter"), settings.get("options")
    if converter in converters.CONVERTERS and isinstance(options, dict):
        found["options"] = _with_former_defaults(converter, options)
    return found


def _with_former_defaults(converter: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options that an earlier version stored, with those that it did not store."""
    defaults = converters.get_converter(converter, {})[1]
    return defaults | dict(converters.FORMER_DEFAULTS.get(converter, {})) | dict(options)


def with_stored_options(data: DataConfig, manifest: Mapping[str, Any]) -> DataConfig:
    """Returns settings with all options of the converter, as a checkpoint should store them.

    Texts that are later made into tables for the model then become the tables that it was trained
    on, even if defaults change. Options that the settings leave unset have the values with which
    the data was prepared.

    Args:
      data: the settings.
      manifest: that of the data, whose settings may be of another converter.
    """
    if data.converter not in converters.CONVERTERS:
        return data
    options = converters.get_converter(data.converter, data.options)[1]
    if manifest["settings"].get("converter") == data.converter:
        stored = manifest["settings"].get("options") or {}
        options |= {key: stored[key] for key in options if key in stored}
    return dataclasses.replace(data, options=options | dict(data.options))


def with_former_options(data: DataConfig) -> DataConfig:
    """Returns the settings of a checkpoint with the options that it does not give.

    Checkpoints of earlier versions give only options that differed from the defaults of then.
    """
    if data.converter not in converters.CONVERTERS:
        return data
    return dataclasses.replace(data, options=_with_former_defaults(data.converter, data.options))
