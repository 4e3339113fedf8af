"""Prepared data on disk: ArrayRecord shards of packed tables, the tokenizer, and a manifest that describes them.

A record is a msgpack map of one packed table: `tokens` (bytes of [T, S], uint16 where V <= 65536, else int32),
`present` (bits of [T, S], as numpy.packbits), `segment` (bytes of [T] int32) and `examples` (ids).
The manifest is written last: a directory without one is unfinished.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module

from msllm.data.packing import Packed
from msllm.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,zstd:1"  # one record a chunk: any record is read alone
_AGAIN = "run `msllm prepare` again into an empty directory"


def token_dtype(vocab_size: int) -> type:
    """How tokens are stored: two bytes where they suffice."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def encode_record(table: Packed, vocab_size: int) -> bytes:
    """One packed table as a record."""
    return msgpack.packb(
        {
            "tokens": table.tokens.astype(token_dtype(vocab_size)).tobytes(),
            "present": np.packbits(table.present).tobytes(),
            "segment": table.segment.astype(np.int32).tobytes(),
            "examples": table.examples,
        }
    )


def decode_record(record: bytes, streams: int, vocab_size: int) -> Packed:
    """The packed table of a record; its tokens keep the stored dtype."""
    fields = msgpack.unpackb(record)
    segment = np.frombuffer(fields["segment"], np.int32)
    shape = (len(segment), streams)
    tokens = np.frombuffer(fields["tokens"], token_dtype(vocab_size)).reshape(shape)
    present = (
        np.unpackbits(np.frombuffer(fields["present"], np.uint8), count=tokens.size)
        .view(bool)
        .reshape(shape)
    )
    return Packed(tokens, present, segment, fields["examples"])


def file_hash(path: str | pathlib.Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(directory: str | pathlib.Path) -> dict[str, Any]:
    """The manifest of a prepared directory. Raises UserError."""
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        what = "is unfinished or no prepared data" if path.parent.is_dir() else "does not exist"
        raise UserError(
            f"{path.parent} {what} (no {MANIFEST}): run `msllm prepare --config=...`, or correct"
            " config.data.dir"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {_AGAIN}") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}: {_AGAIN}")
    return manifest


def open_prepared(
    directory: str | pathlib.Path, split: str, part: tuple[int, int] | None = (0, 1)
) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and the paths of a split's shards after checking them and the tokenizer byte by byte.

    Raises UserError naming the file where something is missing, damaged or of another run.

    Args:
      part: (i, n): as one of n processes, read only every n-th shard from i on; of the others check the size. (What is
        damaged in those is still found when it is used: records have checksums.) None: all are left to `check_shard`.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        raise UserError(
            f"{directory} has no split {split!r}: must be one of {', '.join(manifest['splits'])}"
        )
    tokenizer = manifest["tokenizer"]
    path = directory / tokenizer["file"]
    if not path.is_file():
        raise UserError(
            f"{path} is missing: restore the tokenizer that {MANIFEST} names, or {_AGAIN}"
        )
    if file_hash(path) != tokenizer["sha256"]:
        raise UserError(
            f"{path} is not the tokenizer of this data (sha256 differs): restore it, or {_AGAIN}"
        )
    shards = manifest["splits"][split]["shards"]
    if part is not None:
        whole = [number % part[1] == part[0] for number in range(len(shards))]
        with concurrent.futures.ThreadPoolExecutor(
            4
        ) as pool:  # hashing runs outside the interpreter lock
            list(pool.map(lambda shard, whole: check_shard(directory, shard, whole), shards, whole))
    return manifest, [str(directory / shard["file"]) for shard in shards]


def check_shard(directory: pathlib.Path, shard: dict[str, Any], whole: bool = True) -> None:
    """Raises UserError unless a shard is there as the manifest has it; not `whole`: without reading it."""
    path = directory / shard["file"]
    if not path.is_file():
        raise UserError(f"{path} is missing ({MANIFEST} lists it): restore it, or {_AGAIN}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(
            f"{path} has {size} bytes, {MANIFEST} says {shard['bytes']}: restore it, or {_AGAIN}"
        )
    if whole and file_hash(path) != shard["sha256"]:
        raise UserError(
            f"{path} is corrupt (sha256 differs from {MANIFEST}): restore it, or {_AGAIN}"
        )


class Reader:
    """The records of several shards, one after the other, by number, from any thread.

    Each record is read as a range of one, without threads of the library: reading a list of records, as
    `grain.sources.ArrayRecordDataSource` does, takes time in proportion to the records of the shard (2.9 ms of CPU for one
    of 1,000,000, instead of 6 us).
    """

    _OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

    def __init__(self, paths: Sequence[str]):
        self._paths = paths

        def open_shard(path):
            return array_record_module.ArrayRecordReader(
                path, self._OPTIONS, file_reader_buffer_size=1 << 14
            )

        self._readers = [open_shard(path) for path in paths]
        self._ends = list(itertools.accumulate(reader.num_records() for reader in self._readers))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """Record `index`, 0 <= index < len. Raises UserError naming the shard if it is damaged."""
        shard = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        try:
            return self._readers[shard].read(place, place + 1)[0]
        except (ValueError, RuntimeError, IndexError) as error:
            what = f"is corrupt at record {place} ({error})"
            raise UserError(f"{self._paths[shard]} {what}: restore it, or {_AGAIN}") from error
