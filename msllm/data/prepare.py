"""Prepares data for training: `msllm prepare --config=configs/gsm8k.py [--out=DIR]`.

`prepare` reads or generates examples, trains or loads a tokenizer, splits and packs the examples,
and writes shards and a manifest (docs/data.md). Equal settings and inputs give equal bytes, on any
executor and for any number of workers. The same command continues a run that was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from msllm import tokenizer as tokenizer_lib
from msllm.config import Config
from msllm.data import build, converters, duplicates, files, identity, records, sources
from msllm.data.build import SPLITS, Portion
from msllm.data.executors import Pool, Status, open_pool
from msllm.data.job import IDS, STATE, Input, InputGroup, Job, Sample, Sampled, read_inputs, run_id
from msllm.data.report import make_manifest, rows_too_few, sum_portions
from msllm.data.sources import BadRecords
from msllm.errors import UserError
from msllm.runtime.files import lock_file, write_atomically
from msllm.runtime.progress import Progress
from msllm.streams import StreamSpec, resolve_visibility
from msllm.tokenizer import Tokenizer

LOCK = "prepare.lock"  # file in the folder of the data, for the time of a run
LOCK_SECONDS = 1.0  # between two attempts to lock a folder
# In the folder of an unfinished run, besides its STATE:
INPUTS = "inputs.json"  # hashes of input files
COUNTS = "counts.json"  # the number of examples of every portion
SAVE_SECONDS = 10.0  # between two times that INPUTS is written


def prepare(
    config: Config,
    out: str | pathlib.Path,
    processes: int = 1,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Prepares the data of a config in the directory `out` and returns its manifest.

    If `out` already holds data of the same settings and inputs, nothing is done. If it holds a part
    of this data, only the rest is prepared. If another process is preparing data in `out`, this
    waits until it ends. With several processes, a script needs the usual
    `if __name__ == "__main__":`, because each process imports it.

    Args:
      config: the settings.
      out: the directory.
      processes: the number of processes on this machine; 1: this process alone.
      executor: an executor to run on instead, such as `Client.get_executor(pure=False)` of
        dask.distributed. Its workers must see the input and `out` at the same paths.

    Raises UserError for bad input, or if `out` holds other data; RunError if a worker dies.
    """
    out, config = pathlib.Path(out), resolve_visibility(config)
    if executor is not None:
        config = _with_absolute_paths(config)  # workers may run in another folder
    spec = StreamSpec.from_config(config.streams)
    converters.check_streams(config, spec)
    portions = build.divide(config)
    with open_pool(processes, executor) as pool:
        if (out / records.MANIFEST).exists():
            return _check_finished(config, spec, out, portions, pool)
        with _exclusive(out):
            if (out / records.MANIFEST).exists():  # another process has finished it
                return _check_finished(config, spec, out, portions, pool)
            return _prepare(config, spec, out, portions, pool)


def _prepare(
    config: Config, spec: StreamSpec, out: pathlib.Path, portions: list[Portion], pool: Pool
) -> dict[str, Any]:
    work = out / build.WORK
    hashes, portions = _read_inputs(portions, work, pool)
    settings = identity.get_settings(config, spec, hashes)
    _begin(out, {**settings, "portions": len(portions)})
    code = identity.code_versions(config.data)
    job = Job(config, str(out.absolute()), run_id(out), code)
    tokenizer = _get_tokenizer(job, spec, out, portions, pool)
    file = tokenizer_lib.FILE_NAMES[tokenizer.kind]
    job = dataclasses.replace(job, tokenizer=(file, tokenizer.kind, tokenizer.hash))
    selected = _select_examples(job, out, portions, pool)
    reports = _build(job, out, selected, pool)
    bad = _sum_bad_records([report["bad"] for report in reports], config.data.bad_percent)
    if len(selected) == len(portions) and all(p.examples is None for p in selected):
        bad.finish()  # only if all input was read: the limit is a share of all records
    splits = {
        split: sum_portions([report["splits"][split] for report in reports], config, spec)
        for split in SPLITS
    }
    if not any(part["tables"] for part in splits.values()):
        shutil.rmtree(work)  # there is nothing to continue
        raise UserError(
            f"config.data.path is {config.data.path!r}: it gave no example of at least 2 rows;"
            " name other files, or another config.data.converter"
        )
    if too_few := rows_too_few(
        splits["train"], [report["splits"]["train"] for report in reports], spec
    ):
        for report in reports:  # with other rows, the shards may have other names
            for shard in (s for part in report["splits"].values() for s in part["shards"]):
                (out / shard["file"]).unlink(missing_ok=True)
        shutil.rmtree(work)
        raise UserError(f"config.data.rows is {config.data.rows}: {too_few}")
    repeated = _count_duplicates(job, reports, splits, work, pool)
    manifest = make_manifest(config, spec, tokenizer, settings, splits, repeated, bad)
    records.write_manifest(out, manifest)
    _clean(out)
    return records.read_manifest(out)  # as readers get it: with lists in place of tuples


def _with_absolute_paths(config: Config) -> Config:
    """Returns a config whose local input paths do not depend on the current folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(path) if path and "://" not in path else path

    data = config.data
    changed = dataclasses.replace(
        data, path=absolute(data.path), eval_path=absolute(data.eval_path)
    )
    return dataclasses.replace(config, data=changed)


@contextlib.contextmanager
def _exclusive(out: pathlib.Path) -> Iterator[None]:
    """Locks the folder of the data. Waits as long as another process holds the lock.

    Raises UserError if the folder cannot be written.
    """
    waiting = False
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with lock_file(out / LOCK, remove=True) as holder:
                if holder is None:
                    yield
                    return
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"--out is {out}: cannot be written ({error}); choose another folder"
            ) from error
        if not waiting:
            waiting = True
            print(f"{holder} is preparing {out}: waiting for it", file=sys.stderr, flush=True)
        time.sleep(LOCK_SECONDS)


def _read_inputs(
    portions: Sequence[Portion], work: pathlib.Path | None, pool: Pool
) -> tuple[dict[str, str], list[Portion]]:
    """Reads all input files, to identify them and to number their lines.

    Args:
      portions: the result of `build.divide`.
      work: the folder in which to keep what was read, for a run that continues this one; None: do
        not keep it.

    Returns:
      The sha256 (hex) of each file, and the portions with the line numbers of their parts.
    """
    parts = [part for portion in portions for part in portion.parts if part]
    inputs = dict.fromkeys(map(Input.of, parts))
    versions = files.file_versions(list(dict.fromkeys(item.file for item in inputs)))
    known: dict[Input, tuple[str, list[int]]] = {}
    if work is not None:
        work.mkdir(exist_ok=True)
        known = _load_inputs(work / INPUTS, versions)
    groups = _group([item for item in inputs if item not in known], versions)
    with contextlib.ExitStack() as stack:
        status = work or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(
            Progress("prepare: input files read", len(inputs), len(inputs) - sum(map(len, groups)))
        )
        saved, done = time.monotonic(), len(inputs) - sum(map(len, groups))
        for event in pool.run(read_inputs, groups, status):
            if not event.done:
                continue
            known |= dict(zip(groups[event.item], event.value, strict=True))
            done += len(groups[event.item])
            progress.show(done)
            if work is not None and time.monotonic() > saved + SAVE_SECONDS:
                saved = time.monotonic()
                _save_inputs(work / INPUTS, known, versions)
    if work is not None and groups:
        _save_inputs(work / INPUTS, known, versions)
    numbered = [
        portion._replace(parts=[part and _number_lines(part, known) for part in portion.parts])
        for portion in portions
    ]
    return {item.file: known[item][0] for item in inputs}, numbered


def _number_lines(part: sources.Part, known: Mapping[Input, tuple[str, list[int]]]) -> sources.Part:
    _, before = known[Input.of(part)]
    return sources.number_lines([part], before)[0]


def _group(
    inputs: Sequence[Input], versions: Mapping[str, tuple[int, int | None]]
) -> list[InputGroup]:
    """Divides files into groups of about PORTION_BYTES, or of one larger file."""
    groups: list[list[Input]] = []
    size = sources.PORTION_BYTES
    for item in inputs:
        if size >= sources.PORTION_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += versions[item.file][0]
    return [InputGroup(group) for group in groups]


def _load_inputs(
    path: pathlib.Path, versions: Mapping[str, tuple[int, int | None]]
) -> dict[Input, tuple[str, list[int]]]:
    """Returns what `_save_inputs` has written about files that did not change since."""
    try:
        stored = json.loads(path.read_text())
        return {
            Input(file, parts): (sha256, lines)
            for file, parts, size, changed, sha256, lines in stored
            if changed is not None and versions.get(file) == (size, changed)
        }
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged
        return {}


def _save_inputs(
    path: pathlib.Path,
    known: Mapping[Input, tuple[str, list[int]]],
    versions: Mapping[str, tuple[int, int | None]],
) -> None:
    rows = [[*item, *versions[item.file], *found] for item, found in known.items()]
    write_atomically(path, json.dumps(rows))


def _check_finished(
    config: Config, spec: StreamSpec, out: pathlib.Path, portions: Sequence[Portion], pool: Pool
) -> dict[str, Any]:
    """Returns the manifest of prepared data after checking its settings and all of its files."""
    manifest = records.read_manifest(out)
    hashes, _ = _read_inputs(portions, None, pool)
    _check_settings(out, "data", identity.get_settings(config, spec, hashes), manifest["settings"])
    for split in SPLITS:
        records.open_prepared(out, split)
    if (out / build.WORK).exists():  # the run was killed at its very end
        _clean(out)
    print(
        f"{out} already holds this data: nothing to do; to prepare it again, give another --out, or"
        " delete it"
    )
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
            " another --out, or delete it; to go on with it, set them as they were"
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
        for path in work.iterdir():
            if path.name != INPUTS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomically(work / STATE, json.dumps(state))
    _remove_temporary(out)


def _clean(out: pathlib.Path) -> None:
    """Removes the files of an unfinished run."""
    shutil.rmtree(out / build.WORK, ignore_errors=True)
    _remove_temporary(out)


def _remove_temporary(out: pathlib.Path) -> None:
    """Removes the files of workers that were killed."""
    for file in out.glob("*-of-*.array_record.*.tmp"):
        file.unlink(missing_ok=True)


def _get_tokenizer(
    job: Job, spec: StreamSpec, out: pathlib.Path, portions: Sequence[Portion], pool: Pool
) -> Tokenizer:
    """Returns the tokenizer that the config names or, if it names none, a trained one.

    A tokenizer that this run trained before it was stopped is not trained again. Either is saved in
    `out`.
    """
    settings = job.config.data.tokenizer
    trained = out / build.WORK / tokenizer_lib.FILE_NAMES["sentencepiece"]
    if settings.path:
        tokenizer = Tokenizer.load(settings.path, settings.silence)
    elif trained.exists():
        tokenizer = Tokenizer.load(trained, settings.silence)
    else:
        inputs = [portion.parts for portion in portions if portion.split != "eval"]
        tokenizer = tokenizer_lib.train(_sample(job, inputs, out / build.WORK, pool), settings)
        write_atomically(trained, tokenizer.to_bytes())
    write_atomically(out / tokenizer_lib.FILE_NAMES[tokenizer.kind], tokenizer.to_bytes())
    return tokenizer


def _sample(
    job: Job, inputs: Sequence[Sequence[sources.Part | None]], work: pathlib.Path, pool: Pool
) -> list[str]:
    """Returns texts for the tokenizer, an equal share of every portion, in their order."""
    if job.config.data.max_examples:
        inputs = [converters.input_parts(job.config)]
    items = [Sample(parts, tokenizer_lib.TRAINING_CHARACTERS / len(inputs)) for parts in inputs]
    found: dict[int, Sampled] = {}
    with Progress("prepare: tokenizer, portions sampled", len(items)) as progress:
        for event in pool.run(job.sample, items, work):
            if event.done:
                found[event.item] = event.value
                progress.show(len(found))
    samples = [found[index] for index in range(len(items))]
    if all(sample.all_read for sample in samples):  # too many bad records: fail before training
        counts = [sample.records for sample in samples]
        total = _sum_bad_records(counts, job.config.data.bad_percent)
        total.finish()
        if (path := job.config.data.path) and not total.records:  # generated data has no path
            raise UserError(f"config.data.path is {path!r}: there is no record in it")
    return [text for sample in samples for text in sample.texts]


def _select_examples(
    job: Job, out: pathlib.Path, portions: list[Portion], pool: Pool
) -> list[Portion]:
    """Returns the portions to build, limited to `max_examples` and with the held-out tail marked.

    Both depend on an example's position in the whole input, so the examples of the portions are
    counted first.
    """
    data = job.config.data
    if not data.max_examples and (data.split != "tail" or data.eval_path):
        return portions
    path = out / build.WORK / COUNTS
    if path.exists():
        counts = json.loads(path.read_text())
    else:
        counts = _count_examples(job, portions, out / build.WORK, pool)
        write_atomically(path, json.dumps(counts))
    return build.place(job.config, portions, counts)


def _count_examples(
    job: Job, portions: Sequence[Portion], work: pathlib.Path, pool: Pool
) -> list[int]:
    """Counts the examples of each portion; 0 for portions that `max_examples` does not reach."""
    limit = job.config.data.max_examples
    run = functools.partial(pool.run, job.count, folder=work)
    counts = [0] * len(portions)
    for split in build.splits_of(portions):
        numbers = [i for i, portion in enumerate(portions) if portion.split == split]
        items = [portions[i]._replace(examples=limit or None) for i in numbers]
        for item, count in _count_split(run, items, limit).items():
            counts[numbers[item]] = count
    return counts


def _count_split(
    run: Callable[[Sequence[Portion]], Generator], portions: Sequence[Portion], limit: int
) -> dict[int, int]:
    """Counts the examples of portions until the first portions hold `limit` (0: no limit).

    Returns {index of a portion: its number of examples} of the portions that were counted.
    """
    counts: dict[int, int] = {}
    so_far: dict[int, int] = {}  # includes the portions that are still being counted
    events = run(portions)
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
    job: Job, out: pathlib.Path, portions: Sequence[Portion], pool: Pool
) -> list[dict[str, Any]]:
    """Builds the portions that are not finished yet. Shows the progress and the CPU time.

    Returns the report of every portion.
    """
    work = out / build.WORK
    begun = sum((work / f"{portion.name}.json").exists() for portion in portions)
    if begun:
        print(f"{out} holds {begun} of {len(portions)} portions: preparing the rest")
    shown = _Shown(job.config.data.bad_percent)
    status: dict[int, Status] = {}  # the latest status of every portion
    reports: dict[int, dict[str, Any]] = {}
    examples = tokens = 0
    cpu_seconds = 0.0
    with Progress("prepare: portions", len(portions)) as progress:
        for event in pool.run(job.build, portions, work):
            if event.done:
                reports[event.item] = event.value
                cpu_seconds += event.cpu_seconds
                status[event.item] = build.final_status(event.value)
            else:
                status[event.item] = event.value
            shown.show(event.item, status[event.item].bad)
            examples = sum(one.examples for one in status.values())
            tokens = sum(one.tokens for one in status.values())
            progress.show(
                len(reports),
                f"{examples:,} examples",
                f"{tokens:,} tokens",
                f"{tokens / progress.seconds:,.0f} tokens/s",
            )
    rate = f", {tokens / cpu_seconds:,.0f} a second" if cpu_seconds else ""
    print(
        f"prepare: {examples:,} examples, {tokens:,} tokens in {cpu_seconds:,.1f}"
        f" CPU-seconds{rate}",
        file=sys.stderr,
    )
    return [reports[index] for index in range(len(portions))]


class _Shown:
    """Prints the messages of the first bad records of all portions as they come."""

    def __init__(self, percent: float):
        self._bad = BadRecords(percent, show=True)
        self._counts: dict[int, int] = {}  # printed messages of each portion

    def show(self, item: int, messages: Sequence[str]) -> None:
        for message in messages[self._counts.get(item, 0) :]:
            self._bad.note(message)
        self._counts[item] = max(len(messages), self._counts.get(item, 0))


def _count_duplicates(
    job: Job,
    reports: Sequence[Mapping[str, Any]],
    splits: Mapping[str, Mapping[str, Any]],
    work: pathlib.Path,
    pool: Pool,
) -> dict[str, int]:
    """Returns `duplicates.sum_duplicates` of all examples of the run."""
    examples = {split: splits[split]["examples"] for split in SPLITS}
    names = {
        split: [name for report in reports for name in report["splits"][split]["ids"]]
        for split in SPLITS
    }
    write_atomically(work / IDS, json.dumps(names))
    ranges = duplicates.ranges(sum(examples.values()))
    counts = []
    with Progress("prepare: search for duplicates", len(ranges)) as progress:
        for event in pool.run(job.count_distinct, ranges, work):
            if event.done:
                counts.append(event.value)
                progress.show(len(counts))
    return duplicates.sum_duplicates(counts, examples)


def _sum_bad_records(counts: Sequence[Mapping[str, Any]], percent: float) -> BadRecords:
    bad = BadRecords(percent)
    for count in counts:
        bad.merge(count)
    return bad
