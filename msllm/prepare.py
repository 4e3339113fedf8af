"""Makes the data that training reads: `python -m msllm.prepare --config=configs/gsm8k.py [--out=DIR]`.

Reads or generates examples, trains or takes a tokenizer, splits, packs, and writes shards and a manifest
(docs/data.md). The same settings and inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tqdm
from absl import flags
from ml_collections import config_flags

from msllm import errors, tokenizer as tokenizer_lib
from msllm.config import Config, DataConfig, from_config_dict
from msllm.data import converters, records, sources
from msllm.data.packing import Packer
from msllm.data.sources import BadRecords
from msllm.data.tables import Table, held_out
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

SPLITS = ("train", "eval")
_FOLDER = re.compile(r"^.*/(?=[^/]*?:\d)")  # of "folder/file:line": the manifest does not say where files lie
REPORT_SECONDS = 10.0  # between progress lines where there is no terminal


def prepare(config: Config, out: str | pathlib.Path) -> dict[str, Any]:
    """Prepares the data of a config in the directory `out` and returns its manifest.

    Nothing is done if `out` already holds the data of the same settings and inputs. Raises UserError for bad input, and
    if `out` holds other data.
    """
    out = pathlib.Path(out)
    spec = StreamSpec.from_config(config.streams)
    settings = _settings(config, spec)
    if (out / records.MANIFEST).exists():
        manifest = records.read_manifest(out)
        known = manifest["settings"]
        changed = [name for name in {**settings, **known} if settings.get(name) != known.get(name)]
        if changed:
            names = ", ".join(changed)
            raise UserError(f"{out} holds data of other settings ({names} differ): give another --out, or delete it")
        for split in SPLITS:
            records.open_prepared(out, split)
        print(f"{out} already holds this data")
        return manifest
    out.mkdir(parents=True, exist_ok=True)

    wanted = config.data.tokenizer
    if wanted.path:
        tokenizer = Tokenizer.load(wanted.path, wanted.silence)
    else:
        texts = _progress(converters.texts(config, spec), "tokenizer", "texts")
        tokenizer = tokenizer_lib.train(texts, wanted)
    tokenizer.save(out / tokenizer_lib.FILE_NAMES[tokenizer.kind])

    packers = {split: Packer(config.data.rows) for split in SPLITS}
    writers = {split: records.SplitWriter(out, split, config.data.shards, spec.size, tokenizer) for split in SPLITS}
    bad = BadRecords(config.data.bad_percent, show=True)
    for split, table in _split(config, spec, tokenizer, bad):
        for packed in packers[split].add(table):
            writers[split].write(packed)
    for split in SPLITS:
        for packed in packers[split].finish():
            writers[split].write(packed)

    manifest = {
        "format": records.FORMAT,
        "settings": settings,
        "streams": {"names": spec.names, "kinds": spec.kinds, "delays": spec.delays},
        "rows": config.data.rows,
        "tokenizer": {
            "file": tokenizer_lib.FILE_NAMES[tokenizer.kind],
            "kind": tokenizer.kind,
            "sha256": tokenizer.hash,
            "silence": tokenizer.silence,
            "silence_id": tokenizer.silence_id,
            "vocab_size": tokenizer.vocab_size,
        },
        "splits": {split: _split_report(packers[split], writers[split], spec) for split in SPLITS},
    }
    if config.data.bad_percent:
        shown = [_FOLDER.sub("", message) for message in bad.shown]
        manifest["bad"] = {"records": bad.records, "bad": bad.bad, "shown": shown}
    if not any(part["tables"] for part in manifest["splits"].values()):
        raise UserError(f"config.data.path is {config.data.path!r}: it gave no example of at least 2 rows")
    records.write_manifest(out, manifest)
    return records.read_manifest(out)  # as any reader sees it: lists, not tuples


def _settings(config: Config, spec: StreamSpec) -> dict[str, Any]:
    """All that the prepared bytes depend on, in JSON's types; files by name and hash, not by where they lie."""
    data = config.data
    converter, options = converters.get_converter(data.converter, data.options)
    fields = ("converter", "rows", "eval_percent", "split", "max_examples", "shards")
    tokenizer = dataclasses.asdict(data.tokenizer)
    if data.tokenizer.path:
        tokenizer = {"sha256": Tokenizer.load(data.tokenizer.path, data.tokenizer.silence).hash}
    files = sources.input_files(data.path) if converter.reads else []
    # Newer settings are named where they are set: data prepared before there were any is still the same.
    defaults = dataclasses.asdict(DataConfig())
    fields_since = ("format", "bad_percent", "streams", "vary", "eval_format")
    newer = {field: dataclasses.asdict(data)[field] for field in fields_since}
    own = {"converter": data.converter, "format": data.format, "eval_format": data.eval_format}
    evaluated = sources.input_files(data.eval_path) if data.eval_path else []
    return {
        **{field: getattr(data, field) for field in fields},
        "options": options,
        "tokenizer": tokenizer | {"silence": data.tokenizer.silence},
        "streams": [list(spec.names), list(spec.kinds), list(spec.delays)],
        "inputs": _named_hashes(files),
        **({"eval_inputs": _named_hashes(evaluated)} if evaluated else {}),
        **{f"data.{field}": _as_json(value) for field, value in newer.items() if value != defaults[field]},
        **{f"{k}_code": sources.function_hash(v, f"config.data.{k}") for k, v in own.items() if ":" in v},
    }


def _named_hashes(files: list[str]) -> list[list[str]]:
    return [[pathlib.Path(file).name, sources.file_hash(file)] for file in files]


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _split(config: Config, spec: StreamSpec, tokenizer: Tokenizer, bad: BadRecords) -> Iterator[tuple[str, Table]]:
    """("train" or "eval", table) of every example, in input order."""
    if config.data.eval_path:
        evaluated = dataclasses.replace(config.data, path=config.data.eval_path, format=config.data.eval_format)
        for split, data in (("train", config.data), ("eval", evaluated)):
            tables = converters.convert(dataclasses.replace(config, data=data), spec, tokenizer, bad)
            yield from ((split, table) for table in _progress(tables, split, "examples"))
        return
    percent = config.data.eval_percent
    first = None
    if config.data.split == "tail":  # a pass to count them: memory must not grow with the corpus
        total = sum(1 for _ in converters.convert(config, spec, tokenizer))
        first = total - round(total * percent / 100)
    examples = _progress(converters.convert(config, spec, tokenizer, bad), "tables", "examples")
    for number, table in enumerate(examples):
        out = held_out(table.example, percent) if first is None else number >= first
        yield ("eval" if out else "train"), table


def _split_report(packer: Packer, writer: records.SplitWriter, spec: StreamSpec) -> dict[str, Any]:
    shards = writer.close()
    cells = int(writer.tokens.sum() + writer.silence.sum())
    return {
        "tables": writer.tables,
        "examples": writer.examples,
        "rows": writer.rows,
        "tokens": dict(zip(spec.names, writer.tokens.tolist())),
        "silence": dict(zip(spec.names, writer.silence.tolist())),
        "silence_rate": round(int(writer.silence.sum()) / cells, 4) if cells else 0.0,
        "packing_efficiency": round(writer.rows / (writer.tables * packer.table_rows), 4) if writer.tables else 0.0,
        "cut": {"examples": packer.cut, "rows": packer.cut_rows, "reason": f"longer than {packer.table_rows} rows"},
        "dropped": {"examples": packer.dropped, "reason": "fewer than 2 rows: nothing to predict"},
        "shards": shards,
    }


def _progress(items: Iterable, stage: str, unit: str) -> Iterator:
    """Passes items on and shows how many there were: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, desc=f"prepare: {stage}", unit=f" {unit}", leave=False)
        return
    shown = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - shown > REPORT_SECONDS:
            shown = time.monotonic()
            print(f"prepare: {stage}: {count:,} {unit}", file=sys.stderr, flush=True)
        yield item


def describe(manifest: dict[str, Any]) -> str:
    """The final report, one line a fact."""
    tokenizer = manifest["tokenizer"]
    lines = [f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces"]
    for split, part in manifest["splits"].items():
        lines.append(
            f"{split}: {part['examples']:,} examples, {part['rows']:,} rows in {part['tables']:,} tables of"
            f" {manifest['rows']} ({part['packing_efficiency']:.1%} filled), {part['silence_rate']:.1%} silence"
        )
        for name, tokens in part["tokens"].items():
            lines.append(f"  {name}: {tokens:,} tokens, {part['silence'][name]:,} silence")
        for what in ("cut", "dropped"):
            if part[what]["examples"]:
                lines.append(f"  {what}: {part[what]['examples']:,} examples ({part[what]['reason']})")
    if manifest.get("bad", {}).get("bad"):
        lines.append(f"left out: {manifest['bad']['bad']:,} bad records of {manifest['bad']['records']:,}")
        lines += [f"  {message}" for message in manifest["bad"]["shown"]]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prepares what the flags say and prints the report."""
    del argv
    config = from_config_dict(flags.FLAGS.config)
    out = flags.FLAGS.out or config.data.dir
    if not out:
        raise UserError("config.data.dir is empty: say where to write with --out=DIR or --config.data.dir=DIR")
    print(describe(prepare(config, out)))
    print(f"prepared in {out}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The config file.")
    flags.DEFINE_string("out", "", "Where to write; the default is config.data.dir.")
    flags.mark_flag_as_required("config")
    errors.run(main)
