"""Prepared data on disk: ArrayRecord shards of packed tables, the tokenizer, and a manifest that describes them.

A record is a msgpack map of one packed table: `tokens` (bytes of [T, S], uint16 where V <= 65536, else int32),
`present` (bits of [T, S], as numpy.packbits), `segment` (bytes of [T] int32) and `examples` (ids).
The manifest is written last: a directory without one is unfinished.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any

import msgpack
import numpy as np

from msllm.data.packing import Packed
from msllm.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,zstd:1"  # one record a chunk: any record is read alone
_AGAIN = "run `python -m msllm.prepare` again into an empty directory"


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
    present = np.unpackbits(np.frombuffer(fields["present"], np.uint8), count=tokens.size).view(bool).reshape(shape)
    return Packed(tokens, present, segment, fields["examples"])


def file_hash(path: str | pathlib.Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, atomically."""
    temporary = directory / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, directory / MANIFEST)


def read_manifest(directory: str | pathlib.Path) -> dict[str, Any]:
    """The manifest of a prepared directory. Raises UserError."""
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        what = "is unfinished or no prepared data" if path.parent.is_dir() else "does not exist"
        raise UserError(
            f"{path.parent} {what} (no {MANIFEST}): run `python -m msllm.prepare --config=...`, or correct"
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


def open_prepared(directory: str | pathlib.Path, split: str) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and the paths of a split's shards after checking them and the tokenizer byte by byte.

    Raises UserError naming the file where something is missing, damaged or of another run.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        raise UserError(f"{directory} has no split {split!r}: must be one of {', '.join(manifest['splits'])}")
    tokenizer = manifest["tokenizer"]
    path = directory / tokenizer["file"]
    if not path.is_file():
        raise UserError(f"{path} is missing: restore the tokenizer that {MANIFEST} names, or {_AGAIN}")
    if file_hash(path) != tokenizer["sha256"]:
        raise UserError(f"{path} is not the tokenizer of this data (sha256 differs): restore it, or {_AGAIN}")
    shards = manifest["splits"][split]["shards"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing runs outside the interpreter lock
        list(pool.map(lambda shard: check_shard(directory, shard), shards))
    return manifest, [str(directory / shard["file"]) for shard in shards]


def check_shard(directory: pathlib.Path, shard: dict[str, Any]) -> None:
    """Checks the bytes of a shard against its manifest entry. Raises UserError."""
    path = directory / shard["file"]
    if not path.is_file():
        raise UserError(f"{path} is missing ({MANIFEST} lists it): restore it, or {_AGAIN}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(f"{path} has {size} bytes, {MANIFEST} says {shard['bytes']}: restore it, or {_AGAIN}")
    if file_hash(path) != shard["sha256"]:
        raise UserError(f"{path} is corrupt (sha256 differs from {MANIFEST}): restore it, or {_AGAIN}")
