"""Prepared data on disk: ArrayRecord shards of packed tables, the tokenizer, and a manifest.

A record is a msgpack map of one packed table:

- `tokens`: the bytes of [T, S], uint16 where V <= 65536, else int32.
- `present`: the bits of [T, S], as packed by numpy.packbits.
- `segment`: the bytes of [T] int32.
- `examples`: the ids of the examples, in the order of their segments.
- `weights`: the bytes of [T, S] float32, the loss weights of the cells. It is missing if all are 1.

The manifest describes the data (docs/data.md). It is written last, so a directory without a
manifest is unfinished.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import pathlib
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module

from msllm.data.packing import Packed
from msllm.errors import UserError
from msllm.runtime.files import (
    describe_missing,
    digest_differs,
    read_object,
    with_digest,
    write_atomically,
)

FORMAT = 1
FORMAT_WITH_WEIGHTS = 2  # of data with loss weights of cells, which earlier versions cannot read
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,zstd:1"  # one record per chunk: any record can be read alone
_PREPARE_AGAIN = "run `msllm prepare` again into an empty directory"


def _allow_open_files(count: int) -> None:
    """Lets this process open `count` more files than before, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = soft + count
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (most if hard == resource.RLIM_INFINITY else min(most, hard), hard),
        )


def token_dtype(vocab_size: int) -> type:
    """Returns the dtype in which tokens are stored: two bytes where they suffice."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def encode_record(table: Packed, vocab_size: int) -> bytes:
    """Returns the record of one packed table."""
    fields = {
        "tokens": table.tokens.astype(token_dtype(vocab_size)).tobytes(),
        "present": np.packbits(table.present).tobytes(),
        "segment": table.segment.astype(np.int32).tobytes(),
        "examples": table.examples,
    }
    if table.weights is not None:
        fields["weights"] = table.weights.astype(np.float32).tobytes()
    return msgpack.packb(fields)


def decode_record(record: bytes, streams: int, vocab_size: int) -> Packed:
    """Returns the packed table of a record; its tokens keep the stored dtype.

    Raises Damaged if the record is not one of a table of this many streams, or has tokens beyond
    the vocabulary.
    """
    try:
        fields = msgpack.unpackb(record)
        segment = np.frombuffer(fields["segment"], np.int32)
        shape = (len(segment), streams)
        dtype = token_dtype(vocab_size)
        tokens: np.ndarray = np.frombuffer(fields["tokens"], dtype).reshape(shape)
        bits = np.frombuffer(fields["present"], np.uint8)
        if len(bits) != -(-tokens.size // 8):
            raise ValueError(f"{len(bits)} bytes of present cells for {tokens.size} cells")
        present = np.unpackbits(bits, count=tokens.size).view(bool).reshape(shape)
        examples, weights = fields["examples"], fields.get("weights")
        if weights is not None:
            weights = np.frombuffer(weights, np.float32).reshape(shape)
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise Damaged(
            f"tokens from {tokens.min()} to {tokens.max()}, but the vocabulary has {vocab_size}"
        )
    if weights is not None and not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise Damaged("loss weights that are not finite, or negative")
    return Packed(tokens, present, segment, examples, weights)


class Damaged(UserError):
    """A record of prepared data that cannot be used."""


def file_hash(path: str | pathlib.Path) -> str:
    """Returns the sha256 (hex) of a file on disk."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(directory: str | pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of a prepared directory, without its digest. Raises UserError."""
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        what = f"does not exist ({describe_missing(path.parent)})"
        if path.parent.is_dir():
            what = f"is unfinished or holds no prepared data (no {MANIFEST})"
        elif path.parent.exists():
            what = "is a file, not a folder of prepared data"
        raise UserError(
            f"{path.parent} {what}: prepare it with `msllm prepare --config=...`, or name the"
            " folder of other prepared data"
        )
    manifest = read_object(path, _PREPARE_AGAIN)
    version = manifest.get("format")
    if version not in (FORMAT, FORMAT_WITH_WEIGHTS):
        raise UserError(
            f"{path} has format {version}, but this version of msllm reads the formats {FORMAT} and"
            f" {FORMAT_WITH_WEIGHTS}: {_PREPARE_AGAIN}"
        )
    if "digest" in manifest and digest_differs(manifest):  # earlier versions wrote none
        raise UserError(f"{path} is damaged (its digest differs): {_PREPARE_AGAIN}")
    manifest.pop("digest", None)
    return manifest


def has_weights(manifest: Mapping[str, Any]) -> bool:
    """Returns whether any cell of prepared data has a loss weight other than 1."""
    return manifest["format"] == FORMAT_WITH_WEIGHTS


def write_manifest(directory: str | pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, atomically."""
    path = pathlib.Path(directory) / MANIFEST
    write_atomically(path, json.dumps(with_digest(manifest), indent=2) + "\n")


def open_prepared(
    directory: str | pathlib.Path, split: str, part: tuple[int, int] | None = (0, 1)
) -> tuple[dict[str, Any], list[str]]:
    """Checks the tokenizer and shards of a split; returns the manifest and the shards' paths.

    Args:
      directory: the prepared directory.
      split: the name of the split.
      part: (i, n) for process i of n that share the work. It hashes every n-th shard from shard i
        on, and compares only the sizes of the others. Damage in the others is still found when they
        are read, because records have checksums. None: check no shard (see `check_shard`).

    Raises UserError, naming the file, if a file is missing, damaged or from another run.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        raise UserError(
            f"{directory} has no split {split!r}: must be one of {', '.join(manifest['splits'])}"
        )
    _check_tokenizer(directory, manifest["tokenizer"])
    shards = manifest["splits"][split]["shards"]
    if part is not None:
        _check_shards(directory, shards, part)
    return manifest, [str(directory / shard["file"]) for shard in shards]


def _check_tokenizer(directory: pathlib.Path, stored: Mapping[str, Any]) -> None:
    path = directory / stored["file"]
    if not path.is_file():
        raise UserError(
            f"{path} is missing: restore the tokenizer that {MANIFEST} names, or {_PREPARE_AGAIN}"
        )
    if file_hash(path) != stored["sha256"]:
        raise UserError(
            f"{path} is not the tokenizer of this data (sha256 differs): restore it, or"
            f" {_PREPARE_AGAIN}"
        )


def _check_shards(
    directory: pathlib.Path, shards: Sequence[Mapping[str, Any]], part: tuple[int, int]
) -> None:
    index, count = part
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        checks = [
            pool.submit(check_shard, directory, shard, read=number % count == index)
            for number, shard in enumerate(shards)
        ]
    for check in checks:
        check.result()


def check_shard(directory: pathlib.Path, shard: Mapping[str, Any], read: bool = True) -> None:
    """Raises UserError unless a shard is as the manifest says.

    Args:
      directory: the prepared directory.
      shard: the manifest's entry of the shard.
      read: read and hash the file; otherwise compare only its size.
    """
    path = directory / shard["file"]
    if not path.is_file():
        raise UserError(f"{path} is missing ({MANIFEST} lists it): restore it, or {_PREPARE_AGAIN}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(
            f"{path} has {size} bytes, {MANIFEST} says {shard['bytes']}: restore it, or"
            f" {_PREPARE_AGAIN}"
        )
    if read and file_hash(path) != shard["sha256"]:
        raise UserError(
            f"{path} is corrupt (sha256 differs from {MANIFEST}): restore it, or {_PREPARE_AGAIN}"
        )


class Reader:
    """Reads records by number from the concatenation of several shards, in any thread.

    Each record is read as a range of one record, without ArrayRecord's threads, in 6 us of CPU.
    Reading a list of records, as `grain.sources.ArrayRecordDataSource` does, takes time in
    proportion to the number of records in the shard: 2.9 ms per record for 1,000,000 records.
    """

    _OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
    _BUFFER_BYTES = 1 << 14

    def __init__(self, paths: Sequence[str]):
        """Opens all shards, and keeps them open.

        Raises UserError if a shard cannot be opened.
        """
        _allow_open_files(len(paths))
        self._paths = paths
        self._readers = [self._open(path) for path in paths]
        self._ends = list(itertools.accumulate(reader.num_records() for reader in self._readers))

    def _open(self, path: str) -> array_record_module.ArrayRecordReader:
        reader = array_record_module.ArrayRecordReader(
            path, self._OPTIONS, file_reader_buffer_size=self._BUFFER_BYTES
        )
        if not reader.ok():  # it would seem to hold no records
            error = ""
            try:
                reader.close()
            except Exception as raised:  # the library's errors have no common base class
                error = str(raised).partition(";")[0]
            if "open files" in error:
                raise UserError(
                    f"{path}, one of {len(self._paths):,} shards, cannot be opened ({error}): allow"
                    " more open files (`ulimit -n`)"
                )
            raise UserError(f"{path} is corrupt ({error}): restore it, or {_PREPARE_AGAIN}")
        return reader

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """Returns record `index`, 0 <= index < len. Raises UserError if its shard is damaged."""
        shard = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        try:
            return self._readers[shard].read(place, place + 1)[0]
        except (ValueError, RuntimeError, IndexError) as error:
            raise UserError(
                f"{self._paths[shard]} is corrupt at record {place} ({error}): restore it, or"
                f" {_PREPARE_AGAIN}"
            ) from error
