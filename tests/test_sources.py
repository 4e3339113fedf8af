"""Input files: every format gives the same records in any number of parts; bad records."""

import gzip
import json
import pathlib
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from msllm.data import files, sources
from msllm.data.files import input_files
from msllm.data.sources import BadRecord, BadRecords, parts, read, texts
from msllm.errors import UserError

RECORDS = [{"text": f"line {i} ü", "n": i} for i in range(700)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write_gz(path):
    path.write_bytes(gzip.compress(LINES))


def write_zst(path):
    """Writes two frames, as `cat a.zst b.zst` does."""
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(LINES[:5000]) + compress(LINES[5000:]))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=90)


def write_array_record(path):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.data": lambda path: path.write_bytes(LINES),
    "a.JSONL.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "a.parquet": write_parquet,
    "a.array_record": write_array_record,
}
SPLITTABLE = ("a.jsonl", "a.data", "a.parquet", "a.array_record")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("count", [1, 3])
def test_every_format_gives_the_same_records(tmp_path, name, count):
    path = tmp_path / name
    WRITERS[name](path)
    found = parts(str(path), count=count)
    assert len(found) == (count if name in SPLITTABLE else 1)
    records = [list(read(part)) for part in found]
    assert all(records)  # no part is empty
    assert [record.value for part in records for record in part] == RECORDS
    places = [record.where for part in records for record in part]
    assert places == [f"{path}:{i}" for i in range(1, 701)]
    documents = [
        (where, "".join(blocks))
        for part in found
        for where, blocks in texts(part, "text", BadRecords())
    ]
    assert documents == [(f"{path}:{i}", record["text"]) for i, record in enumerate(RECORDS, 1)]


@given(
    lines=st.lists(st.text("a\n", max_size=5).map(str.encode), max_size=12), count=st.integers(1, 6)
)
def test_a_line_belongs_to_exactly_one_part(tmp_path_factory, lines, count):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(b"\n".join(lines))
    whole = list(files.lines(str(path)))
    assert b"".join(line for _, line in whole) == path.read_bytes()
    sha256, before = files.hash_and_lines_before(str(path), count)
    assert sha256 == files.file_hash(str(path))
    split = [files.lines(str(path), i, count, before[i]) for i in range(count)]
    assert [line for part in split for line in part] == whole


def test_a_text_is_one_document_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_CHARACTERS", 100)
    text = "to be ü\r\n" * 50
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    found = parts(str(tmp_path / "*.txt*"), other="text", count=4)
    documents = [
        (where, list(blocks))
        for part in found
        for where, blocks in texts(part, "text", BadRecords())
    ]
    assert [where for where, _ in documents] == [f"{tmp_path}/a.txt:1", f"{tmp_path}/b.txt.gz:1"]
    (_, first), (_, second) = documents
    assert len(first) > 4 and "".join(first) == text
    assert second == ["second"]
    (record,) = read(parts(str(tmp_path / "a.txt"), "text")[0])
    assert record.value == text


def test_a_format_in_the_config_overrides_file_names(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(LINES)
    (part,) = parts(str(tmp_path / "a.txt"), "jsonl", "text")
    assert [record.value for record in read(part)] == RECORDS
    (tmp_path / "own_reader.py").write_text(
        "def rows(file):\n    yield from open(file).read().split()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (part,) = parts(str(tmp_path / "a.txt"), "own_reader:rows", count=5)
    assert [record.value for record in read(part)][:2] == LINES.decode().split()[:2]
    for format in ("excel", "own_reader:columns", "nowhere:rows"):
        with pytest.raises(UserError, match=f"config.data.format is '{format}'"):
            list(read(parts(str(tmp_path / "a.txt"), format)[0]))


class Bucket:
    """Stands in for etils.epath.Path: gs://bucket is a local folder."""

    folder = None

    def __init__(self, path):
        assert path.startswith("gs://bucket")
        self._path = pathlib.Path(path.replace("gs://bucket", str(self.folder)))

    def glob(self, pattern):
        return [
            str(path).replace(str(self.folder), "gs://bucket") for path in self._path.glob(pattern)
        ]

    def exists(self):
        return self._path.exists()

    def open(self, mode):
        return self._path.open(mode)

    def stat(self):
        return types.SimpleNamespace(length=self._path.stat().st_size)


@pytest.mark.parametrize(
    "path", ["gs://bucket/x/a.parquet", "gs://bucket/x/*.parquet", "gs://bucket/*/a.par?uet"]
)
def test_remote_files(tmp_path, monkeypatch, path):
    Bucket.folder = tmp_path
    monkeypatch.setattr(files.epath, "Path", Bucket)
    (tmp_path / "x").mkdir()
    write_parquet(tmp_path / "x/a.parquet")
    (part,) = parts(path)
    assert sources.portions(path) == [[part]]
    assert part.file == "gs://bucket/x/a.parquet"
    assert [record.value for record in read(part)] == RECORDS
    assert files.file_hash(part.file) == files.file_hash(str(tmp_path / "x/a.parquet"))
    with pytest.raises(UserError, match="there is no such file"):
        parts("gs://bucket/y/a.parquet")
    write_array_record(tmp_path / "x/a.array_record")
    with pytest.raises(UserError, match="ArrayRecord files are read from disk only"):
        list(read(parts("gs://bucket/x/a.array_record")[0]))


BAD_LINES = (
    b'{"text": "a"}\n{"text"\n\n[1]\n{"text": "\xff"}\n{"text": 5}\n' + b'{"text": "a"}\n' * 20
)


def test_a_name_may_hold_what_a_pattern_would(tmp_path):
    for name in ("chat[1].jsonl", "chat1.jsonl"):
        (tmp_path / name).write_text("{}")
    assert input_files(str(tmp_path / "chat[1].jsonl")) == [str(tmp_path / "chat[1].jsonl")]
    assert input_files(str(tmp_path / "chat[12].jsonl")) == [str(tmp_path / "chat1.jsonl")]


def test_bad_records_are_dropped_counted_and_shown(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES)
    (part,) = parts(str(path))
    bad = BadRecords(percent=20.0, show=True)
    found = ["".join(blocks) for _, blocks in texts(part, "text", bad)]
    bad.finish()
    assert found == ["a"] * 21 and (bad.bad, bad.records) == (4, 25)
    reasons = ["2: invalid JSON", "4: '[1]': each line", "5: not UTF-8", "6: 'text' is 5"]
    for message, reason in zip(bad.shown, reasons, strict=True):
        assert message.startswith(f"{path}:{reason}")
    assert capsys.readouterr().err.splitlines() == [f"left out: {message}" for message in bad.shown]


def test_a_run_stops_when_too_many_are_bad(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES)
    (part,) = parts(str(path))
    with pytest.raises(BadRecord, match="a.jsonl:2: invalid JSON"):
        list(read(part))
    bad = BadRecords(percent=11.0)
    assert (
        len(list(read(part, bad))) == 22
    )  # the share is checked from 1,000 records on, or at the end
    with pytest.raises(
        UserError,
        match=r"3 of 25 records are bad, .*bad_percent=11.0.*a.jsonl:2: invalid JSON.*:4:",
    ):
        bad.finish()
    path.write_bytes(b"oops\n" * 3000)
    bad = BadRecords(percent=2.0)
    with pytest.raises(UserError, match="21 of 21 records are bad"):
        list(read(part, bad))
    assert len(bad.shown) == sources.MAX_SHOWN


@pytest.mark.parametrize(
    "module, name", [("pyarrow.parquet", "a.parquet"), ("zstandard", "a.jsonl.zst")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, name):
    WRITERS[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(
        UserError,
        match=rf"{name}: needs the package {package}: .*pip install {package}.*msllm.data",
    ):
        list(read(parts(str(tmp_path / name))[0]))


@pytest.mark.parametrize("name", ["a.JSONL.gz", "a.jsonl.zst", "a.parquet", "a.array_record"])
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-900], lambda content: b"what is this?" * 9]
)
def test_damaged_files_are_named(tmp_path, name, damage):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(content))
    with pytest.raises(UserError, match=name):
        list(read(parts(str(tmp_path / name))[0]))


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\n")
    (part,) = parts(str(tmp_path / "a.txt"), other="text")
    with pytest.raises(UserError, match="a.txt:2: not UTF-8"):
        for _, blocks in texts(part, "text", BadRecords()):
            list(blocks)
