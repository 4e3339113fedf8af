"""Makes the manifest of prepared data from the reports of the portions, and describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from msllm import tokenizer as tokenizer_lib
from msllm.config import Config
from msllm.data import records
from msllm.data.build import SPLITS
from msllm.data.sources import BadRecords
from msllm.streams import NEVER, StreamSpec
from msllm.tokenizer import Tokenizer

# The folder in "folder/file:line". Manifests leave it out because it differs between machines.
_FOLDER = re.compile(r"^.*/(?=[^/]*?:\d)")
MAX_UNKNOWN = 0.01  # warn of a larger share of unknown tokens in a stream
MAX_CUT = 0.1  # warn if a larger share of the examples is cut
# What a model learns from empty turns of a stream, by whether it is an input.
_LEARNS = {False: "the model learns to say nothing there", True: "the model answers silence there"}
_SUMMED = ("tables", "examples", "rows", "cut", "cut_rows", "dropped")


def make_manifest(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, Any]],
    duplicates: Mapping[str, int],
    bad: BadRecords,
) -> dict[str, Any]:
    """Returns the manifest of prepared data.

    Args:
      config, spec, tokenizer: the settings, streams and tokenizer of the data.
      settings: everything that the data depends on (msllm/data/identity.py).
      splits: the result of `sum_portions` for each split.
      duplicates: the result of `sum_duplicates`.
      bad: the counts of bad and empty records of all portions.
    """
    weighted = any("excluded" in part for part in splits.values())
    manifest = {
        "format": records.FORMAT_WITH_WEIGHTS if weighted else records.FORMAT,
        "settings": settings,
        "streams": {
            "names": spec.names,
            "kinds": spec.kinds,
            "delays": spec.delays,
            **({"mail": spec.mail_settings} if spec.mail else {}),
        },
        # Rows of lag from each reader to each source; null: never. The tables do not depend on it.
        "lag": [
            [None if rows == NEVER else rows for rows in row]
            for row in spec.prediction_lag_array.tolist()
        ],
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
        "duplicates": duplicates,
        "empty": {"records": bad.empty, "reason": "nothing in them to make a table of"},
    }
    if bad.texts["texts"]:
        manifest["texts"] = {**bad.texts, "changed_text": bad.changed}
    if any(counts["empty"] for counts in bad.turns.values()):
        manifest["empty_turns"] = {
            stream: {**counts, "first": _FOLDER.sub("", counts["first"])}
            for stream, counts in bad.turns.items()
            if counts["empty"]
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
    # The reports of portions that an earlier version made lack some counts.
    none = [0] * spec.size
    unknown = _sum_by_stream([portion.get("unknown", none) for portion in portions])
    weights = {
        name: _sum_by_stream([portion.get(name, none) for portion in portions])
        for name in ("excluded", "weighted")
    }
    if not any(map(any, weights.values())):
        weights = {}
    cells = sum(tokens) + sum(silence)
    tables, rows = sums["tables"], config.data.rows
    return {
        "tables": tables,
        "examples": sums["examples"],
        "rows": sums["rows"],
        "longest": max((portion.get("longest", 0) for portion in portions), default=0),
        "tokens": dict(zip(spec.names, tokens)),
        "silence": dict(zip(spec.names, silence)),
        "unknown": dict(zip(spec.names, unknown)),
        **{name: dict(zip(spec.names, counts)) for name, counts in weights.items()},
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


def rows_too_few(
    part: Mapping[str, Any], portions: Sequence[Mapping[str, Any]], spec: StreamSpec
) -> str:
    """Says that tables have too few rows for a stream that the model writes; "" if they do not.

    They have if all that the stream says is in rows that were cut. A model that is trained on such
    tables learns to say nothing.

    Args:
      part: the result of `sum_portions`.
      portions: the reports of the portions.
      spec: the streams.
    """
    none = [0] * spec.size
    lost = _sum_by_stream([portion.get("cut_tokens", none) for portion in portions])
    silent = [
        name
        for name, kind, count in zip(spec.names, spec.kinds, lost)
        if kind != "input" and count and not part["tokens"][name]
    ]
    if not silent:
        return ""
    cut, examples = part["cut"]["examples"], part["examples"]
    return (
        f"all that {' and '.join(silent)} says is lost, because {cut:,} of {examples:,} examples"
        f" ({cut / examples:.0%}) are cut before it; increase it: {part['longest']} cuts none"
    )


def _sum_by_stream(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(stream) for stream in zip(*counts)]


def describe(manifest: Mapping[str, Any]) -> str:
    """Returns the report that `prepare` prints, one fact per line."""
    tokenizer, streams = manifest["tokenizer"], manifest["streams"]
    kinds = dict(zip(streams["names"], streams["kinds"]))
    lines = [f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces"]
    lines += _describe_texts(manifest.get("texts", {}))
    for split, part in manifest["splits"].items():
        if part["examples"]:
            lines += _describe_split(split, part, manifest)
        else:
            lines += _describe_empty(split, manifest)
    for stream, counts in manifest.get("empty_turns", {}).items():
        lines.append(
            f"WARNING: {counts['empty']:,} of {counts['turns']:,} turns of {stream} are empty, the"
            f" first at {counts['first']}: {_LEARNS[kinds[stream] == 'input']}; remove them if this"
            " is not what you want"
        )
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


def _describe_texts(texts: Mapping[str, Any]) -> list[str]:
    """Describes how the tokenizer encodes the texts; {}: there are none."""
    tokens, changed = texts.get("tokens", 0), texts.get("changed", 0)
    lines = []
    if tokens and texts["words"]:
        lines.append(
            f"  {tokens / texts['words']:.2f} tokens per word,"
            f" {texts['characters'] / tokens:.2f} characters per token"
        )
    if changed:
        lines.append(
            f"  {changed:,} texts come back from their tokens with other spaces or normalized, the"
            f" first: {texts['changed_text']}"
        )
    return lines


def _describe_empty(split: str, manifest: Mapping[str, Any]) -> list[str]:
    """Says that a split is empty, and why that matters."""
    settings, others = manifest["settings"], manifest["splits"]
    percent, examples = settings["eval_percent"], sum(p["examples"] for p in others.values())
    if split == "train":
        what = f"all {examples:,} examples are held out (config.data.eval_percent is {percent})"
        return [f"WARNING: {split}: {what}: there is nothing to train on; lower it"]
    remedy = "train with config.eval_every=0"
    if settings.get("eval_inputs"):
        what = "the files of config.data.eval_path hold no example of at least 2 rows"
        return [f"WARNING: {split}: {what}: name other files, or {remedy}"]
    if not percent:
        return [f"{split}: no examples are held out (config.data.eval_percent is 0): {remedy}"]
    return [
        f"WARNING: {split}: none of the {examples:,} examples is held out"
        f" (config.data.eval_percent is {percent}): increase it, give more examples, or {remedy}"
    ]


def _describe_split(split: str, part: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    rows, kinds = manifest["rows"], manifest["streams"]["kinds"]
    lines = [
        f"{split}: {part['examples']:,} examples, {part['rows']:,} rows in {part['tables']:,}"
        f" tables of {rows} ({part['packing_efficiency']:.1%} filled),"
        f" {part['silence_rate']:.1%} silence"
    ]
    cut = part["cut"]["examples"]
    for (name, tokens), kind in zip(part["tokens"].items(), kinds):
        unknown = part.get("unknown", {}).get(name, 0)
        line = f"  {name}: {tokens:,} tokens, {part['silence'][name]:,} silence"
        if unknown:
            line += f", {unknown:,} unknown"
        if excluded := part.get("excluded", {}).get(name):
            line += f", {excluded:,} cells of loss weight 0"
        if weighted := part.get("weighted", {}).get(name):
            line += f", {weighted:,} cells of other loss weights than 1"
        lines.append(line)
        if unknown > MAX_UNKNOWN * tokens:
            lines.append(
                f"  WARNING: {unknown / tokens:.1%} of the tokens of {name} are unknown: the"
                " tokenizer does not cover this text; train one on it, or use one with bytes"
                " (config.data.tokenizer)"
            )
        if not tokens and kind != "input":
            why = "no record has text for it"
            if cut:
                why = f"all examples end before it speaks, {cut:,} of them cut at {rows} rows"
            lines.append(
                f"  WARNING: {name} never says anything, so a model learns that it is silent: {why}"
            )
    for what in ("cut", "dropped"):
        if part[what]["examples"]:
            lines.append(f"  {what}: {part[what]['examples']:,} examples ({part[what]['reason']})")
    if cut > MAX_CUT * part["examples"]:
        lost, longest = part["cut"]["rows"], part.get("longest", 0)
        enough = f"config.data.rows={longest} cuts none" if longest else "increase it"
        lines.append(
            f"  WARNING: {cut / part['examples']:.0%} of the examples are cut at config.data.rows ="
            f" {rows}, which loses {lost / (lost + part['rows']):.0%} of all rows: {enough}"
        )
    return lines
