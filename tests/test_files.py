"""Atomic writes: a file has the new content, or keeps what it had."""

import functools
import os

import numpy as np
import pytest

from msllm.runtime.files import describe_missing, write_atomically


def test_writes_text_bytes_and_the_output_of_a_function(tmp_path):
    write_atomically(tmp_path / "text", "für\n")
    assert (tmp_path / "text").read_bytes() == "für\n".encode()
    write_atomically(str(tmp_path / "text"), b"new")
    assert (tmp_path / "text").read_bytes() == b"new"
    write_atomically(tmp_path / "arrays", functools.partial(np.savez, a=np.arange(3)))
    assert np.load(tmp_path / "arrays")["a"].tolist() == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"text", "arrays"}


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    for path in (tmp_path / "old", tmp_path / "new"):
        if path.name == "old":
            path.write_text("content")
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, full)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "content"


def test_an_open_reader_keeps_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        write_atomically(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_an_existing_file_is_kept_without_overwrite(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "one", overwrite=False)
    with pytest.raises(FileExistsError, match="file exists already"):
        write_atomically(path, "two", overwrite=False)
    assert path.read_text() == "one"


def test_links_and_devices_are_written_through(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    (tmp_path / "null").symlink_to(os.devnull)
    write_atomically(tmp_path / "null", "lost")
    assert not os.path.isfile(os.devnull)


def test_a_file_whose_ending_was_left_out_is_named_first(tmp_path):
    for name in (*(f"a{i}.py" for i in range(9)), "my.py", "mys.py"):
        (tmp_path / name).touch()
    found = describe_missing(tmp_path / "my")
    assert found == f"{tmp_path} holds my.py, a0.py, a1.py, a2.py, a3.py and 6 more"
    assert "no folder" in describe_missing(tmp_path / "none" / "my")
