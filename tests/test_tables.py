"""Tables and packing: every example is kept once and whole, and few rows are wasted."""

import dataclasses
import os
import pathlib
import runpy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.config import from_config_dict
from msllm.data import packing
from msllm.data.packing import Packer
from msllm.data.prepare import prepare
from msllm.data.tables import (
    Placement,
    Table,
    example_hash,
    held_out,
    make_table,
    shift,
    unpack,
    unshift,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("MSLLM_SHARED") or ROOT.parent / "shared")


def random_table(rows, streams, seed):
    rng = np.random.default_rng(seed)
    present = rng.random((rows, streams)) < 0.8
    tokens = np.where(present, rng.integers(0, 1000, (rows, streams)), 0).astype(np.int32)
    weights = rng.integers(0, 3, (rows, streams)).astype(np.float32)
    return Table(tokens, present, f"{seed:016x}", weights=weights if seed % 2 else None)


def assert_same(table, expected):
    assert table.example == expected.example
    np.testing.assert_array_equal(table.tokens, expected.tokens)
    np.testing.assert_array_equal(table.present, expected.present)
    np.testing.assert_array_equal(weights_of(table), weights_of(expected))


def weights_of(table):
    """The loss weights of a table. Without weights, all are 1."""
    return np.ones(table.tokens.shape) if table.weights is None else table.weights


def test_make_table_fills_with_silence():
    placements = [Placement(0, 0, [5, 6]), Placement(2, 1, [7])]
    table = make_table(placements, rows=3, streams=3, silence_id=1)
    assert table.tokens.tolist() == [[5, 1, 1], [6, 1, 7], [1, 1, 1]]
    assert table.present.all()


def test_shift_delays_streams():
    tokens = np.array([[1, 4], [2, 5], [3, 6]], np.int32)
    table = shift(Table(tokens, np.ones((3, 2), bool)), (0, 1))
    assert table.tokens.tolist() == [[1, 0], [2, 4], [3, 5], [0, 6]]
    assert table.present.tolist() == [[True, False], [True, True], [True, True], [False, True]]


@given(
    rows=st.integers(1, 8),
    delays=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_unshift_undoes_shift_and_no_cell_is_lost(rows, delays, seed):
    table = random_table(rows, len(delays), seed)
    shifted = shift(table, delays)
    assert shifted.tokens.shape == (rows + max(delays), len(delays))
    assert shifted.present.sum() == table.present.sum()
    assert_same(unshift(shifted, delays), table)


def test_the_share_of_held_out_examples():
    names = [example_hash(str(i)) for i in range(4000)]
    assert 0.08 < np.mean([held_out(name, 10.0) for name in names]) < 0.12
    assert not any(held_out(name, 0.0) for name in names)
    # A larger share holds out the same examples and more.
    five, ten = ({name for name in names if held_out(name, share)} for share in (5.0, 10.0))
    assert five < ten


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 16), max_size=60), window=st.integers(1, 20))
def test_packing_keeps_every_example_once_and_whole(lengths, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        patch.setattr(packing, "OPEN_BINS", 2)
        packer = Packer(16)
        examples = [random_table(length, 2, seed) for seed, length in enumerate(lengths)]
        packed = [out for table in examples for out in packer.add(table)] + packer.finish()
    seen = {}
    for table in packed:
        assert table.tokens.shape == (16, 2) and table.segment.shape == (16,)
        assert not table.present[table.segment == 0].any()
        assert not table.tokens[table.segment == 0].any()
        for single in unpack(table._asdict(), table.examples):
            assert single.example not in seen
            seen[single.example] = single
    assert len(seen) == len(examples) == packer.examples
    for table in examples:
        assert_same(seen[table.example], table)
    assert packer.rows == sum(lengths)


def test_packing_fills_tables_and_holds_few_at_a_time():
    packer, packed, most = Packer(512), [], 0
    lengths = np.random.default_rng(0).lognormal(5, 0.5, 12_000)
    lengths = np.clip(lengths, 20, 500).astype(int)
    for seed, length in enumerate(lengths):
        tokens, present = np.zeros((length, 1), np.int32), np.ones((length, 1), bool)
        packed += packer.add(Table(tokens, present, f"{seed:016x}"))
        most = max(most, len(packer._window) + sum(map(len, packer._bins.values())))
    packed += packer.finish()
    assert lengths.sum() / (512 * len(packed)) > 0.97
    assert most <= packing.WINDOW + 20 * packing.OPEN_BINS  # independent of the corpus
    assert sum(len(table.examples) for table in packed) == len(lengths)


def test_the_cells_that_wait_to_be_packed_are_limited(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_CELLS", 5 * 8 * 3)
    packer = Packer(8)
    done = [len(packer.add(random_table(8, 3, seed))) + len(packer._window) for seed in range(200)]
    assert max(done) <= 5 + 1 and len(packer._bins) <= packing.OPEN_BINS


def test_long_examples_are_cut_and_short_ones_dropped():
    packer = Packer(8)
    long, short = random_table(11, 2, 1), random_table(1, 2, 2)
    assert packer.add(long) == [] and packer.add(short) == []
    (packed,) = packer.finish()
    assert np.array_equal(packed.tokens, long.tokens[:8])
    assert (packer.examples, packer.cut, packer.cut_rows, packer.dropped) == (1, 1, 3, 1)


def test_unpack_reads_batches():
    packer = Packer(10)
    examples = [random_table(length, 3, seed) for seed, length in enumerate((4, 6, 9))]
    for table in examples:
        packer.add(table)
    tables = packer.finish()
    names = ("tokens", "present", "segment")
    batch = {name: np.stack([getattr(t, name) for t in tables]) for name in names}
    batch["weights"] = np.stack([weights_of(t) for t in tables])
    singles = {t.example: t for t in unpack(batch, [t.examples for t in tables])}
    for table in examples:
        assert_same(singles[table.example], table)
    assert [t.example for t in unpack(batch)] == ["", "", ""]


def test_packing_gsm8k_wastes_less_than_five_percent(tmp_path):
    config = from_config_dict(runpy.run_path(str(ROOT / "configs/gsm8k.py"))["get_config"]())
    path = SHARED / "data/gsm8k/train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is missing: set MSLLM_SHARED to the folder that holds data/gsm8k")
    data = dataclasses.replace(config.data, path=str(path), eval_percent=0.0)
    part = prepare(dataclasses.replace(config, data=data), tmp_path)["splits"]["train"]
    assert part["examples"] == 7473
    assert part["packing_efficiency"] > 0.95
    assert part["cut"]["examples"] < 10
