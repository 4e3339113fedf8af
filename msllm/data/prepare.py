"""Prepares data for training: `msllm prepare --config=configs/gsm8k.py [--out=DIR]`.

`prepare` reads or generates examples, trains or loads a tokenizer, splits and packs the examples,
and writes shards and a manifest (docs/data.md). Equal settings and inputs give equal bytes, for any
number of processes. The same command continues a run that was stopped.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msllm import tokenizer as tokenizer_lib
from msllm.config import Config
from msllm.data import build, converters, identity, records, workers
from msllm.data.build import SPLITS, Portion, Status
from msllm.data.report import make_manifest, sum_portions
from msllm.data.sources import BadRecords
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.runtime.progress import Progress
from msllm.streams import StreamSpec, resolve_visibility
from msllm.tokenizer import Tokenizer

# In the folder of an unfinished run:
STATE = "state.json"  # its settings
COUNTS = "counts.json"  # the number of examples of every portion


def prepare(config: Config, out: str | pathlib.Path, processes: int = 1) -> dict[str, Any]:
    """Prepares the data of a config in the directory `out` and returns its manifest.

    If `out` already holds data of the same settings and inputs, nothing is done. If it holds a part
    of this data, only the rest is prepared. With several processes, a script needs the usual
    `if __name__ == "__main__":`, because each process imports it.

    Raises UserError for bad input, or if `out` holds other data; RunError if a process dies.
    """
    out, config = pathlib.Path(out), resolve_visibility(config)
    spec = StreamSpec.from_config(config.streams)
    converters.check_streams(config, spec)
    settings = identity.get_settings(config, spec)
    if (out / records.MANIFEST).exists():
        return _check_finished(out, settings)
    portions = build.divide(config)
    _begin(out, {**settings, "portions": len(portions)})
    tokenizer = _get_tokenizer(config, spec, out, portions)
    selected = _select_examples(config, spec, tokenizer, out, portions, processes)
    work = functools.partial(build.build, config, spec, tokenizer, out)
    _build(work, out, selected, processes, config.data.bad_percent)
    reports = [build.read_report(out, portion) for portion in selected]
    bad = _sum_bad_records(reports, config.data.bad_percent)
    if len(selected) == len(portions) and all(p.examples is None for p in selected):
        bad.finish()  # only if all input was read: the limit is a share of all records
    splits = {
        split: sum_portions([report["splits"][split] for report in reports], config, spec)
        for split in SPLITS
    }
    if not any(part["tables"] for part in splits.values()):
        shutil.rmtree(out / build.WORK)  # there is nothing to continue
        raise UserError(
            f"config.data.path is {config.data.path!r}: it gave no example of at least 2 rows;"
            " name other files, or another config.data.converter"
        )
    manifest = make_manifest(config, spec, tokenizer, settings, out, splits, bad)
    records.write_manifest(out, manifest)
    shutil.rmtree(out / build.WORK)
    return records.read_manifest(out)  # as readers get it: with lists in place of tuples


def _check_finished(out: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest of prepared data after checking its settings and all of its files."""
    manifest = records.read_manifest(out)
    _check_settings(out, "data", settings, manifest["settings"])
    for split in SPLITS:
        records.open_prepared(out, split)
    shutil.rmtree(out / build.WORK, ignore_errors=True)
    print(f"{out} already holds this data")
    if not all("unknown" in part for part in manifest["splits"].values()):
        print(
            f"{out} was prepared by a version of msllm that did not look for texts and keys of"
            " records that get lost: prepare it again into another --out to check"
        )
    return manifest


def _check_settings(
    out: pathlib.Path, what: str, settings: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Raises UserError if the settings stored in `out` differ. `what` says what it holds."""
    different = identity.different_settings(settings, stored)
    if different:
        raise UserError(
            f"{out} holds {what} with other settings ({', '.join(different)} differ): choose"
            " another --out, or delete it"
        )


def _begin(out: pathlib.Path, state: Mapping[str, Any]) -> None:
    """Makes the folder of an unfinished run, or keeps the folder of a run that was stopped.

    The folder of a run with other settings is replaced. If that run had finished any portions,
    which may be hours of work, UserError is raised instead.
    """
    work = out / build.WORK
    stored = json.loads((work / STATE).read_text()) if (work / STATE).exists() else {}
    if identity.different_settings(state, stored):
        if stored and list(work.glob("*-*.json")):  # reports of finished portions
            _check_settings(out, "an unfinished run", state, stored)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(work / STATE, json.dumps(state))
    for file in out.glob("*-of-*.array_record.*.tmp"):  # left by processes that were killed
        file.unlink()


def _get_tokenizer(
    config: Config, spec: StreamSpec, out: pathlib.Path, portions: Sequence[Portion]
) -> Tokenizer:
    """Returns the tokenizer that the config names or, if it names none, a trained one.

    A tokenizer that this run trained before it was stopped is not trained again. Either is saved in
    `out`.
    """
    settings = config.data.tokenizer
    trained = out / build.WORK / tokenizer_lib.FILE_NAMES["sentencepiece"]
    if settings.path:
        tokenizer = Tokenizer.load(settings.path, settings.silence)
    elif trained.exists():
        tokenizer = Tokenizer.load(trained, settings.silence)
    else:
        inputs = [portion.parts for portion in portions if portion.split != "eval"]
        texts = converters.texts(config, spec, inputs, tokenizer_lib.TRAINING_CHARACTERS)
        with Progress("prepare: tokenizer") as progress:
            tokenizer = tokenizer_lib.train(_show_progress(texts, progress), settings)
        write_atomically(trained, tokenizer.to_bytes())
    write_atomically(out / tokenizer_lib.FILE_NAMES[tokenizer.kind], tokenizer.to_bytes())
    return tokenizer


def _show_progress(texts: Iterator[str], progress: Progress) -> Iterator[str]:
    for number, text in enumerate(texts, 1):
        progress.show(number, f"{number:,} texts")
        yield text


def _select_examples(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer,
    out: pathlib.Path,
    portions: list[Portion],
    processes: int,
) -> list[Portion]:
    """Returns the portions to build, limited to `max_examples` and with the held-out tail marked.

    Both depend on an example's position in the whole input, so the examples of the portions are
    counted first.
    """
    data = config.data
    if not data.max_examples and (data.split != "tail" or data.eval_path):
        return portions
    path = out / build.WORK / COUNTS
    if path.exists():
        counts = json.loads(path.read_text())
    else:
        counts = _count_examples(config, spec, tokenizer, portions, processes)
        write_atomically(path, json.dumps(counts))
    return build.place(config, portions, counts)


def _count_examples(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer,
    portions: Sequence[Portion],
    processes: int,
) -> list[int]:
    """Counts the examples of each portion; 0 for portions that `max_examples` does not reach."""
    limit = config.data.max_examples
    work = functools.partial(build.count, config, spec, tokenizer)
    counts = [0] * len(portions)
    for split in build.splits_of(portions):
        numbers = [i for i, portion in enumerate(portions) if portion.split == split]
        items = [portions[i]._replace(examples=limit or None) for i in numbers]
        for item, count in _count_split(work, items, processes, limit).items():
            counts[numbers[item]] = count
    return counts


def _count_split(
    work: Callable[[Portion], Iterator[Status]],
    portions: Sequence[Portion],
    processes: int,
    limit: int,
) -> dict[int, int]:
    """Counts the examples of portions until the first portions hold `limit` (0: no limit).

    Returns {index of a portion: its number of examples} of the portions that were counted.
    """
    counts: dict[int, int] = {}
    so_far: dict[int, int] = {}  # includes the portions that are still being counted
    events = workers.run(work, portions, processes)
    with Progress("prepare: portions counted", len(portions)) as progress:
        for event in events:
            if event.done:
                counts[event.item] = so_far[event.item] = event.value
            else:
                so_far[event.item] = event.value.examples
            progress.show(len(counts), f"{sum(so_far.values()):,} examples")
            leading = itertools.takewhile(counts.__contains__, range(len(portions)))
            if limit and sum(counts[i] for i in leading) >= limit:
                events.close()
                break
    return counts


def _build(
    work: Callable[[Portion], Iterator[Status]],
    out: pathlib.Path,
    portions: Sequence[Portion],
    processes: int,
    bad_percent: float,
) -> None:
    """Builds the portions that are not finished yet. Shows the progress and the CPU time."""
    left = [portion for portion in portions if not build.is_finished(out, portion)]
    finished = len(portions) - len(left)
    if finished:
        print(f"{out} holds {finished} of {len(portions)} portions: preparing the rest")
    shown = BadRecords(bad_percent, show=True)
    status: dict[int, Status] = {}  # the latest status of every portion
    examples = tokens = 0
    cpu = _cpu_seconds()
    with Progress("prepare: portions", len(portions), finished) as progress:
        for event in workers.run(work, left, processes):
            if event.done:
                finished += 1
            else:
                status[event.item] = event.value
                for message in event.value.bad:
                    shown.note(message)
            examples = sum(one.examples for one in status.values())
            tokens = sum(one.tokens for one in status.values())
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
    """Returns the CPU time of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _sum_bad_records(reports: Sequence[Mapping[str, Any]], percent: float) -> BadRecords:
    bad = BadRecords(percent)
    for report in reports:
        bad.merge(report["bad"])
    return bad
