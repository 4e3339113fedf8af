"""Makes the data that training reads: `msllm prepare --config=configs/gsm8k.py [--out=DIR] [--processes=N]`.

Reads or generates examples, trains or takes a tokenizer, splits, packs, and writes shards and a manifest
(docs/data.md). The same settings and inputs give the same bytes, in any number of processes. A run that was stopped
continues when it is started again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import resource
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from msllm import errors
from msllm import tokenizer as tokenizer_lib
from msllm.config import Config, DataConfig, from_config_dict
from msllm.data import build, converters, records, sources, workers
from msllm.data.build import SPLITS, Portion
from msllm.data.duplicates import count_duplicates
from msllm.data.sources import BadRecords
from msllm.errors import RunError, UserError
from msllm.runtime.files import write_atomically
from msllm.runtime.progress import Progress
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

STATE = "state.json"  # in the folder of an unfinished run: what it is a run of
COUNTS = "counts.json"
_FOLDER = re.compile(
    r"^.*/(?=[^/]*?:\d)"
)  # of "folder/file:line": the manifest does not say where files lie


def prepare(config: Config, out: str | pathlib.Path, processes: int = 1) -> dict[str, Any]:
    """Prepares the data of a config in the directory `out` and returns its manifest.

    Nothing is done if `out` already holds the data of the same settings and inputs; if it holds a part of it, the rest
    is. With several processes a script needs the usual `if __name__ == "__main__":`. Raises UserError for bad input,
    and if `out` holds other data; RunError if a process dies.
    """
    out = pathlib.Path(out)
    spec = StreamSpec.from_config(config.streams)
    settings = _settings(config, spec)
    if (out / records.MANIFEST).exists():
        manifest = records.read_manifest(out)
        _refuse_others(out, "data", settings, manifest["settings"])
        for split in SPLITS:
            records.open_prepared(out, split)
        shutil.rmtree(out / build.WORK, ignore_errors=True)
        print(f"{out} already holds this data")
        return manifest

    portions = build.divide(config)
    _begin(out, {**settings, "portions": len(portions)})
    tokenizer = _tokenizer(config, spec, out, portions)
    placed = _placed(config, spec, tokenizer, out, portions, processes)
    work = functools.partial(build.build, config, spec, tokenizer, out)
    _build(work, out, placed, processes, config.data.bad_percent)

    reports = [build.read_report(out, portion) for portion in placed]
    bad = BadRecords(config.data.bad_percent)
    for report in reports:
        bad.merge(report["bad"])
    if len(placed) == len(portions) and all(portion.examples is None for portion in placed):
        bad.finish()  # of a part of the input, it would say less
    splits = {
        split: _split_report([report["splits"][split] for report in reports], config, spec)
        for split in SPLITS
    }
    if not any(part["tables"] for part in splits.values()):
        shutil.rmtree(out / build.WORK)  # there is nothing to continue
        raise UserError(
            f"config.data.path is {config.data.path!r}: it gave no example of at least 2 rows"
        )
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
            {split: build.ids_files(out, split) for split in SPLITS},
            {split: part["examples"] for split, part in splits.items()},
        ),
        "empty": {"records": bad.empty, "reason": "nothing in them to make a table of"},
    }
    if config.data.bad_percent:
        shown = [_FOLDER.sub("", message) for message in bad.shown]
        manifest["bad"] = {"records": bad.records, "bad": bad.bad, "shown": shown}
    build.write_manifest(out, manifest)
    shutil.rmtree(out / build.WORK)
    return records.read_manifest(out)  # as any reader sees it: lists, not tuples


def _refuse_others(
    out: pathlib.Path, what: str, settings: dict[str, Any], known: dict[str, Any]
) -> None:
    changed = [name for name in {**settings, **known} if settings.get(name) != known.get(name)]
    if changed:
        names = ", ".join(changed)
        raise UserError(
            f"{out} holds {what} of other settings ({names} differ): give another --out, or delete it"
        )


def _begin(out: pathlib.Path, state: dict[str, Any]) -> None:
    """Makes the folder of an unfinished run, or finds the one of a run that was stopped. Raises UserError."""
    work = out / build.WORK
    known = json.loads((work / STATE).read_text()) if (work / STATE).exists() else None
    if known != _as_json(state):
        if known and list(work.glob("*-*.json")):  # finished portions: hours of work, perhaps
            _refuse_others(out, "an unfinished run", _as_json(state), known)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(work / STATE, json.dumps(state))
    for file in out.glob("*-of-*.array_record.*.tmp"):  # of processes that were killed
        file.unlink()


def _tokenizer(
    config: Config, spec: StreamSpec, out: pathlib.Path, portions: Sequence[Portion]
) -> Tokenizer:
    """The tokenizer that is given, else the one that a run before this one trained, else a new one; saved in `out`."""
    wanted, trained = (
        config.data.tokenizer,
        out / build.WORK / tokenizer_lib.FILE_NAMES["sentencepiece"],
    )
    if wanted.path:
        tokenizer = Tokenizer.load(wanted.path, wanted.silence)
    elif trained.exists():
        tokenizer = Tokenizer.load(trained, wanted.silence)
    else:
        inputs = [portion.parts for portion in portions if portion.split != "eval"]
        with Progress("prepare: tokenizer") as progress:

            def texts():
                found = converters.texts(config, spec, inputs, tokenizer_lib.TRAINING_CHARACTERS)
                for number, text in enumerate(found, 1):
                    progress.show(number, f"{number:,} texts")
                    yield text

            tokenizer = tokenizer_lib.train(texts(), wanted)
        tokenizer.save(trained)
    tokenizer.save(out / tokenizer_lib.FILE_NAMES[tokenizer.kind])
    return tokenizer


def _placed(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer,
    out: pathlib.Path,
    portions: list[Portion],
    processes: int,
) -> list[Portion]:
    """The portions to build. Where an example's place in the whole input matters, examples are counted first."""
    most = config.data.max_examples
    if not most and (config.data.split != "tail" or config.data.eval_path):
        return portions
    path = out / build.WORK / COUNTS
    if path.exists():
        return build.place(config, portions, json.loads(path.read_text()))
    counts = [0] * len(portions)
    for split in {portion.split: None for portion in portions}:
        mine = [i for i, portion in enumerate(portions) if portion.split == split]
        first = [portions[i]._replace(examples=most or None) for i in mine]
        events = workers.run(
            functools.partial(build.count, config, spec, tokenizer), first, processes
        )
        running, done = {}, set()
        with Progress("prepare: portions counted", len(mine)) as progress:
            for event in events:
                running[event.item] = event.value if event.done else event.value.examples
                if event.done:
                    done.add(event.item)
                    counts[mine[event.item]] = event.value
                progress.show(len(done), f"{sum(running.values()):,} examples")
                whole = next(
                    (i for i in range(len(mine)) if i not in done), len(mine)
                )  # the first ones are counted
                if most and sum(counts[i] for i in mine[:whole]) >= most:
                    events.close()
                    break
    write_atomically(path, json.dumps(counts))
    return build.place(config, portions, counts)


def _build(
    work, out: pathlib.Path, portions: Sequence[Portion], processes: int, bad_percent: float
) -> None:
    """Builds the portions that are not finished; says how it goes, and what it cost."""
    left = [portion for portion in portions if not build.is_finished(out, portion)]
    before = len(portions) - len(left)
    if before:
        print(f"{out} holds {before} of {len(portions)} portions: making the rest")
    shown, told, finished = BadRecords(bad_percent, show=True), {}, before
    examples = tokens = 0
    cpu = _cpu_seconds()
    with Progress("prepare: portions", len(portions), before) as progress:
        for event in workers.run(work, left, processes):
            if event.done:
                finished += 1
            else:
                was = told.get(event.item, build.Told(0, 0, []))
                told[event.item] = event.value
                examples += event.value.examples - was.examples
                tokens += event.value.tokens - was.tokens
                for message in event.value.left_out:
                    shown.tell(message)
            progress.show(
                finished,
                f"{examples:,} examples",
                f"{tokens:,} tokens",
                f"{tokens / progress.seconds:,.0f} tokens/s",
            )
    cpu = _cpu_seconds() - cpu
    rate = f", {tokens / cpu:,.0f} a second" if cpu else ""
    print(
        f"prepare: {examples:,} examples, {tokens:,} tokens in {cpu:,.1f} CPU-seconds{rate}",
        file=sys.stderr,
    )


def _cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _settings(config: Config, spec: StreamSpec) -> dict[str, Any]:
    """All that the prepared bytes depend on, in JSON's types; files by name and hash, not by where they lie."""
    data = config.data
    converter, options = converters.get_converter(data.converter, data.options)
    fields = ("converter", "rows", "eval_percent", "split", "max_examples", "shards")
    tokenizer = _as_json(dataclasses.asdict(data.tokenizer))
    if not data.tokenizer.reserved:
        del tokenizer["reserved"]  # as in `newer` below
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
        **{
            f"data.{field}": _as_json(value)
            for field, value in newer.items()
            if value != defaults[field]
        },
        **{
            f"{k}_code": sources.function_hash(v, f"config.data.{k}")
            for k, v in own.items()
            if ":" in v
        },
    }


def _named_hashes(files: list[str]) -> list[list[str]]:
    return [[pathlib.Path(file).name, sources.file_hash(file)] for file in files]


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _split_report(
    parts: Sequence[dict[str, Any]], config: Config, spec: StreamSpec
) -> dict[str, Any]:
    """The manifest entry of a split from the reports of its portions."""
    sums = ("tables", "examples", "rows", "cut", "cut_rows", "dropped")
    tables, examples, rows, cut, cut_rows, dropped = (
        sum(part[name] for part in parts) for name in sums
    )
    tokens, silence = (
        [sum(s) for s in zip(*(part[name] for part in parts))] for name in ("tokens", "silence")
    )
    cells = sum(tokens) + sum(silence)
    return {
        "tables": tables,
        "examples": examples,
        "rows": rows,
        "tokens": dict(zip(spec.names, tokens)),
        "silence": dict(zip(spec.names, silence)),
        "silence_rate": round(sum(silence) / cells, 4) if cells else 0.0,
        "packing_efficiency": round(rows / (tables * config.data.rows), 4) if tables else 0.0,
        "cut": {
            "examples": cut,
            "rows": cut_rows,
            "reason": f"longer than {config.data.rows} rows",
        },
        "dropped": {"examples": dropped, "reason": "fewer than 2 rows: nothing to predict"},
        "shards": [shard for part in parts for shard in part["shards"]],
    }


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
                lines.append(
                    f"  {what}: {part[what]['examples']:,} examples ({part[what]['reason']})"
                )
    duplicates = manifest.get("duplicates", {})
    if any(duplicates.values()):
        again = " and ".join(f"{duplicates[split]:,} examples of {split}" for split in SPLITS)
        lines.append(
            f"duplicates: {again} came before; {duplicates['train_and_eval']:,} are in both"
        )
    if manifest.get("empty", {}).get("records"):
        lines.append(
            f"gave no table: {manifest['empty']['records']:,} records ({manifest['empty']['reason']})"
        )
    if manifest.get("bad", {}).get("bad"):
        lines.append(
            f"left out: {manifest['bad']['bad']:,} bad records of {manifest['bad']['records']:,}"
        )
        lines += [f"  {message}" for message in manifest["bad"]["shown"]]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prepares what the flags say and prints the report."""
    del argv
    config = from_config_dict(flags.FLAGS.config)
    out = flags.FLAGS.out or config.data.dir
    if not out:
        raise UserError(
            "config.data.dir is empty: say where to write with --out=DIR or --config.data.dir=DIR"
        )
    processes = flags.FLAGS.processes or workers.available_cores()
    try:
        print(describe(prepare(config, out, processes)))
    except KeyboardInterrupt:
        raise RunError("stopped: what is finished is kept, the same command continues") from None
    print(f"prepared in {out}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The config file.")
    flags.DEFINE_string("out", "", "Where to write; the default is config.data.dir.")
    flags.DEFINE_integer(
        "processes", 0, "Processes that prepare; 0: as many as there are cores.", lower_bound=0
    )
    flags.mark_flag_as_required("config")
    errors.run(main)
