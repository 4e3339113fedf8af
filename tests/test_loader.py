"""A batch is a pure function of the step, for any number of hosts and in every epoch."""

import dataclasses
import math
import os
import resource
import shutil
import threading
import time

import grain
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_batch, concatenate, table_keys

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import records
from msllm.data.loader import Loader, spread
from msllm.data.prepare import prepare
from msllm.errors import UserError
from msllm.streams import StreamSpec

SPEC = StreamSpec.from_config(StreamsConfig())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of prepared dictation examples: about 50 tables of 64 rows, in batches of 8."""
    directory = tmp_path_factory.mktemp("data") / "dictation"
    tokenizer = TokenizerConfig(model_type="word", vocab_size=256)
    data = DataConfig(
        dir=str(directory),
        converter="dictation",
        options={"examples": 160},
        tokenizer=tokenizer,
        rows=64,
        eval_percent=20.0,
    )
    prepare(Config(data=data), directory)
    return data


@pytest.fixture(scope="module")
def loader(config):
    loader = Loader(config, "train", SPEC)
    assert loader.num_tables % config.batch_size  # a batch can hold tables of two epochs
    return loader


def test_shapes_and_dtypes(loader):
    batch = loader.batch(3)
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert found == {
        "tokens": ((8, 64, 3), np.int32),
        "present": ((8, 64, 3), bool),
        "segment": ((8, 64), np.int32),
    }
    assert not batch["present"][batch["segment"] == 0].any()
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < loader.tokenizer.vocab_size


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 40), hosts=st.sampled_from([1, 2, 4, 8]))
def test_the_parts_of_all_hosts_are_the_batch(loader, step, hosts):
    size = 8 // hosts
    parts = [loader.batch(step, range(host * size, (host + 1) * size)) for host in range(hosts)]
    assert_same_batch(concatenate(parts), loader.batch(step))
    ids = [loader.example_ids(step, slice(host * size, (host + 1) * size)) for host in range(hosts)]
    assert loader.example_ids(step) == [names for part in ids for names in part]


def test_every_epoch_is_another_permutation(config, loader):
    n = loader.num_tables
    batches = map(loader.batch, range(math.ceil(3 * n / 8)))
    flat = [table for batch in batches for table in table_keys(batch)]
    epochs = [flat[e * n : (e + 1) * n] for e in range(3)]
    assert len(set(epochs[0])) == n
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = Loader(dataclasses.replace(config, seed=1), "train", SPEC)
    assert table_keys(other.batch(0)) != flat[:8]


def test_a_new_loader_gives_the_same_batches(config, loader):
    again = Loader(config, "train", SPEC)
    for step in (0, 7, 100_000):
        assert_same_batch(again.batch(step), loader.batch(step))


def test_tables_come_in_the_order_of_grains_shuffle(config, loader):
    """Compares with grain's own source, which is slower than the loader's."""
    paths = records.open_prepared(config.dir, "train")[1]
    source = grain.sources.ArrayRecordDataSource(paths)
    order = grain.MapDataset.range(len(source)).shuffle(seed=config.seed).repeat()
    for index in range(200):
        table = records.decode_record(source[order[index]], SPEC.size, loader.tokenizer.vocab_size)
        batch = loader.batch(index // 8, range(index % 8, index % 8 + 1))
        for name, array in batch.items():
            np.testing.assert_array_equal(array[0], getattr(table, name))


def test_processes_share_the_check_of_hashes_and_all_report_damage(config, tmp_path):
    """A process that does not check the damaged shard notices it when it reads the shard."""
    shutil.copytree(config.dir, tmp_path / "data")
    damaged = dataclasses.replace(config, dir=str(tmp_path / "data"))
    shard = tmp_path / "data/train-00002-of-00004.array_record"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    name = "train-00002-of-00004.array_record"
    for part in ((0, 1), (0, 2), (2, 3), (2, 5)):
        with pytest.raises(UserError, match=f"{name} is corrupt .sha256 differs"):
            Loader(damaged, "train", SPEC, part)
    for part in ((1, 2), (1, 3), (4, 5)):
        loader = Loader(damaged, "train", SPEC, part)
        with pytest.raises(UserError, match=rf"{name} is corrupt at record \d+ .*hash mismatch"):
            list(loader.iterate(range(8)))
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name} has .* bytes, manifest.json says"):
        Loader(damaged, "train", SPEC, (1, 2))


def test_batch_size_does_not_change_the_order(config, loader):
    small = Loader(dataclasses.replace(config, batch_size=4), "train", SPEC)
    for step in range(10):
        pair = [small.batch(2 * step), small.batch(2 * step + 1)]
        assert_same_batch(concatenate(pair), loader.batch(step))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 5, 9])
def test_iterate_starts_at_any_step(config, prefetch, start):
    loader = Loader(dataclasses.replace(config, prefetch=prefetch), "train", SPEC)
    batches = list(loader.iterate(range(start, 14), range(2, 5)))
    assert len(batches) == 14 - start
    for step, batch in enumerate(batches, start):
        assert_same_batch(batch, loader.batch(step, range(2, 5)))
    assert list(loader.iterate(range(14, 14))) == []


def test_iterate_prefetches_in_threads_that_end_with_it(loader):
    before = threading.active_count()
    for _ in range(3):
        batches = loader.iterate(range(1_000_000))
        next(batches)
        assert threading.active_count() > before
        batches.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@given(st.integers(1, 500), st.integers(1, 600))
def test_spread_chooses_evenly(total, count):
    chosen = spread(total, count)
    assert len(chosen) == min(total, count) and chosen[0] == 0
    gaps = np.diff([*chosen, total])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_iterate_takes_any_steps(config):
    loader = Loader(config, "eval", SPEC)
    steps = spread(loader.num_batches, 2)
    assert steps[-1] > 0
    for step, batch in zip(steps, loader.iterate(steps), strict=True):
        assert_same_batch(batch, loader.batch(step))


def test_evaluation_reads_each_table_once_and_pads_the_last_batch(config):
    config = dataclasses.replace(config, batch_size=4)
    loader = Loader(config, "eval", SPEC)
    batches = list(loader.iterate(range(loader.num_batches)))
    keys = [table for batch in batches for table in table_keys(batch)]
    assert loader.num_tables % 4 and len(set(keys[: loader.num_tables])) == loader.num_tables
    for batch in batches:
        assert batch["tokens"].shape == (4, 64, 3)
    padding = loader.num_batches * 4 - loader.num_tables
    assert not batches[-1]["segment"][-padding:].any()
    assert not batches[-1]["present"][-padding:].any()
    assert loader.example_ids(loader.num_batches - 1)[-1] == []
    other = Loader(dataclasses.replace(config, seed=9), "eval", SPEC)
    assert_same_batch(other.batch(0), loader.batch(0))
    with pytest.raises(ValueError, match="step is"):
        loader.batch(loader.num_batches)


def test_tables_repeat_in_a_batch_that_is_larger_than_an_epoch(config):
    large = Loader(dataclasses.replace(config, batch_size=500), "train", SPEC)
    keys = table_keys(large.batch(0))
    assert len(keys) == 500 and len(set(keys)) == large.num_tables


@pytest.mark.parametrize("rows", [range(0, 9), range(-1, 3), range(0, 8, 2)])
def test_rows_outside_the_batch_are_refused(loader, rows):
    with pytest.raises(ValueError, match="rows is"):
        loader.batch(0, rows)


def test_data_that_does_not_fit_the_config_is_refused(config):
    with pytest.raises(UserError, match="config.data.rows is 128, but .* was prepared with 64"):
        Loader(dataclasses.replace(config, rows=128), "train", SPEC)
    for streams, message in [
        (
            StreamsConfig(names=("user", "mind", "output")),
            "config.streams.names .*'mind'.*'thought'",
        ),
        (StreamsConfig(kinds=("input", "output", "output")), "config.streams.kinds"),
        (StreamsConfig(delays=(0, 1, 1)), "config.streams.delays"),
        (StreamsConfig(names=("text",), kinds=("output",)), "config.streams.names"),
    ]:
        with pytest.raises(UserError, match=message):
            Loader(config, "train", StreamSpec.from_config(streams))


@pytest.fixture
def few_open_files():
    """Lets this process open eight more files at most, in the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/dev/fd")))
    free = [number for number in range(soft) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[8], hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_data_may_have_more_shards_than_a_process_may_open_files(
    tmp_path, monkeypatch, few_open_files
):
    paths = [str(tmp_path / f"{number:02d}.array_record") for number in range(40)]
    for number, path in enumerate(paths):
        writer = ArrayRecordWriter(path, records.WRITER_OPTIONS)
        writer.write(bytes([number]))
        writer.close()
    reader = records.Reader(paths)
    assert [reader[index] for index in range(len(reader))] == [bytes([n]) for n in range(40)]
    del reader
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 40, hard))
    monkeypatch.setattr(records, "_allow_open_files", lambda count: None)
    with pytest.raises(UserError, match=r"cannot be opened \(.*[Tt]oo many open files.*ulimit -n"):
        records.Reader(paths)
