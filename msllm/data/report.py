"""Makes the manifest of prepared data from the reports of the portions, and describes it."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msllm import tokenizer as tokenizer_lib
from msllm.config import Config
from msllm.data import build, records
from msllm.data.build import SPLITS
from msllm.data.duplicates import count_duplicates
from msllm.data.sources import BadRecords
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

# The folder in "folder/file:line". Manifests leave it out because it differs between machines.
_FOLDER = re.compile(r"^.*/(?=[^/]*?:\d)")
_SUMMED = ("tables", "examples", "rows", "cut", "cut_rows", "dropped")


def make_manifest(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    out: pathlib.Path,
    splits: Mapping[str, Mapping[str, Any]],
    bad: BadRecords,
) -> dict[str, Any]:
    """Returns the manifest of the data in `out`.

    Args:
      config, spec, tokenizer: the settings, streams and tokenizer of the data.
      settings: everything that the data depends on (msllm/data/identity.py).
      out: the folder of the data.
      splits: the result of `sum_portions` for each split.
      bad: the counts of bad and empty records of all portions.
    """
    examples = {split: part["examples"] for split, part in splits.items()}
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
        "splits": splits,
        "duplicates": count_duplicates(
            {split: build.ids_files(out, split) for split in SPLITS}, examples
        ),
        "empty": {"records": bad.empty, "reason": "nothing in them to make a table of"},
    }
    if config.data.bad_percent:
        shown = [_FOLDER.sub("", message) for message in bad.shown]
        manifest["bad"] = {"records": bad.records, "bad": bad.bad, "shown": shown}
    return manifest


def sum_portions(
    portions: Sequence[Mapping[str, Any]], config: Config, spec: StreamSpec
) -> dict[str, Any]:
    """Returns the manifest's entry of a split from the reports of its portions."""
    sums = {name: sum(portion[name] for portion in portions) for name in _SUMMED}
    tokens = _sum_by_stream([portion["tokens"] for portion in portions])
    silence = _sum_by_stream([portion["silence"] for portion in portions])
    cells = sum(tokens) + sum(silence)
    tables, rows = sums["tables"], config.data.rows
    return {
        "tables": tables,
        "examples": sums["examples"],
        "rows": sums["rows"],
        "tokens": dict(zip(spec.names, tokens)),
        "silence": dict(zip(spec.names, silence)),
        "silence_rate": round(sum(silence) / cells, 4) if cells else 0.0,
        "packing_efficiency": round(sums["rows"] / (tables * rows), 4) if tables else 0.0,
        "cut": {
            "examples": sums["cut"],
            "rows": sums["cut_rows"],
            "reason": f"longer than {rows} rows",
        },
        "dropped": {
            "examples": sums["dropped"],
            "reason": "fewer than 2 rows: nothing to predict",
        },
        "shards": [shard for portion in portions for shard in portion["shards"]],
    }


def _sum_by_stream(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(stream) for stream in zip(*counts)]


def describe(manifest: Mapping[str, Any]) -> str:
    """Returns the report that `prepare` prints, one fact per line."""
    tokenizer = manifest["tokenizer"]
    lines = [f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces"]
    for split, part in manifest["splits"].items():
        lines += _describe_split(split, part, manifest["rows"])
    duplicates = manifest.get("duplicates", {})
    if any(duplicates.values()):
        counts = " and ".join(f"{duplicates[split]:,} examples of {split}" for split in SPLITS)
        both = duplicates["train_and_eval"]
        lines.append(f"duplicates: {counts} repeat earlier ones; {both:,} are in both splits")
    empty = manifest.get("empty", {})
    if empty.get("records"):
        lines.append(f"gave no table: {empty['records']:,} records ({empty['reason']})")
    bad = manifest.get("bad", {})
    if bad.get("bad"):
        lines.append(f"left out: {bad['bad']:,} bad records of {bad['records']:,}")
        lines += [f"  {message}" for message in bad["shown"]]
    return "\n".join(lines)


def _describe_split(split: str, part: Mapping[str, Any], rows: int) -> list[str]:
    lines = [
        f"{split}: {part['examples']:,} examples, {part['rows']:,} rows in {part['tables']:,}"
        f" tables of {rows} ({part['packing_efficiency']:.1%} filled),"
        f" {part['silence_rate']:.1%} silence"
    ]
    for name, tokens in part["tokens"].items():
        lines.append(f"  {name}: {tokens:,} tokens, {part['silence'][name]:,} silence")
    for what in ("cut", "dropped"):
        if part[what]["examples"]:
            lines.append(f"  {what}: {part[what]['examples']:,} examples ({part[what]['reason']})")
    return lines
