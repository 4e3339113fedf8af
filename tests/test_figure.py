"""The figure in the README is reproducible, and its example shows what the captions say."""

import importlib.util
import pathlib

import numpy as np
import pytest

from msllm.config import StreamsConfig

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `test`)")

SCRIPT = pathlib.Path(__file__).parents[1] / "docs/make_figure.py"
STREAMS = {"names": ("user", "tool", "output"), "kinds": ("input", "input", "output")}


@pytest.fixture(scope="module")
def make_figure():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_figure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_svg_is_reproducible_and_small(make_figure, tmp_path):
    for name in ("a.svg", "b.svg"):
        make_figure.save(tmp_path / name)
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert len(first) < 200_000 and first.rstrip().endswith(b"</svg>")


def test_the_example_shows_a_correction_and_its_answer(make_figure):
    shown = make_figure.example()
    assert shown.row_of("thought", "undo") == shown.row_of("user", "wait") + 2
    assert shown.row_of("output", "that") >= shown.row_of("user", "?") + 2
    assert shown.words[0][2] == ""  # silence


def test_the_panels_show_the_visible_cells(make_figure):
    def count(**settings):
        """The number of visible cells in each stream."""
        return make_figure.seen_from(3, "output", 5, StreamsConfig(**STREAMS, **settings)).sum(0)

    np.testing.assert_array_equal(count(), [3, 3, 4])
    np.testing.assert_array_equal(count(visibility="same_row"), [4, 4, 4])
    np.testing.assert_array_equal(count(visibility="isolated"), [0, 0, 4])
    np.testing.assert_array_equal(count(lags=(("output", "tool", "never"),)), [3, 0, 4])
