"""A batch is a pure function of the step, for any number of hosts, epoch after epoch."""

import dataclasses
import shutil
import threading
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import records
from msllm.data.loader import Loader, spread
from msllm.data.prepare import prepare
from msllm.errors import UserError
from msllm.streams import StreamSpec

SPEC = StreamSpec.from_config(StreamsConfig())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Prepared dictation: some 50 tables of 64 rows, in batches of 8."""
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
    assert loader.num_tables % config.batch_size  # an epoch ends inside a batch
    return loader


def key(batch, i):
    return b"".join(batch[name][i].tobytes() for name in ("tokens", "present", "segment"))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_shapes(config, loader):
    batch = loader.batch(3)
    assert batch["tokens"].shape == batch["present"].shape == (8, 64, 3) and batch[
        "segment"
    ].shape == (8, 64)
    assert (batch["tokens"].dtype, batch["present"].dtype, batch["segment"].dtype) == (
        np.int32,
        bool,
        np.int32,
    )
    assert not batch["present"][batch["segment"] == 0].any()
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < loader.tokenizer.vocab_size


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 40), hosts=st.sampled_from([1, 2, 4, 8]))
def test_hosts_together_hold_the_batch(loader, step, hosts):
    whole, size = loader.batch(step), 8 // hosts
    parts = [loader.batch(step, range(host * size, (host + 1) * size)) for host in range(hosts)]
    assert same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})
    ids = [loader.example_ids(step, slice(host * size, (host + 1) * size)) for host in range(hosts)]
    assert loader.example_ids(step) == [names for part in ids for names in part]


def test_every_epoch_is_another_permutation(config, loader):
    n = loader.num_tables
    flat = [key(batch, i) for batch in map(loader.batch, range(-(-3 * n // 8))) for i in range(8)]
    epochs = [flat[e * n : (e + 1) * n] for e in range(3)]
    assert len(set(epochs[0])) == n
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = Loader(dataclasses.replace(config, seed=1), "train", SPEC)
    assert [key(other.batch(0), i) for i in range(8)] != flat[:8]


def test_a_new_loader_gives_the_same_batches(config, loader):
    again = Loader(config, "train", SPEC)
    assert all(same(loader.batch(step), again.batch(step)) for step in (0, 7, 100_000))


def test_one_source_is_read_in_grains_order(config, loader):
    """The order and the bytes are those of grain's shuffle and of its source, which is slower."""
    paths = records.open_prepared(config.dir, "train")[1]
    source = grain.sources.ArrayRecordDataSource(paths)
    order = grain.MapDataset.range(len(source)).shuffle(seed=config.seed).repeat()
    for index in range(0, 200):
        table = records.decode_record(source[order[index]], SPEC.size, loader.tokenizer.vocab_size)
        batch = loader.batch(index // 8, range(index % 8, index % 8 + 1))
        assert all(np.array_equal(batch[name][0], getattr(table, name)) for name in batch)


def test_processes_share_the_checking_and_still_name_every_damage(config, tmp_path):
    shutil.copytree(config.dir, tmp_path / "data")
    damaged = dataclasses.replace(config, dir=str(tmp_path / "data"))
    shard = tmp_path / "data/train-00002-of-00004.array_record"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    for part in ((0, 1), (0, 2), (2, 3), (2, 5)):
        with pytest.raises(
            UserError, match="train-00002-of-00004.array_record is corrupt .sha256 differs"
        ):
            Loader(damaged, "train", SPEC, part)
    for part in ((1, 2), (1, 3), (4, 5)):
        loader = Loader(damaged, "train", SPEC, part)
        with pytest.raises(
            UserError,
            match=r"train-00002-of-00004.array_record is corrupt at record \d+ .*hash mismatch",
        ):
            list(loader.iterate(range(8)))
    shard.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match="train-00002-of-00004.array_record has .* bytes, manifest.json says"
    ):
        Loader(damaged, "train", SPEC, (1, 2))


def test_batch_size_does_not_change_the_order(config, loader):
    small = Loader(dataclasses.replace(config, batch_size=4), "train", SPEC)
    for step in range(10):
        pair = [small.batch(2 * step), small.batch(2 * step + 1)]
        assert same(
            loader.batch(step), {name: np.concatenate([p[name] for p in pair]) for name in pair[0]}
        )


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 5, 9])
def test_iterate_gives_the_batches_from_any_step_on(config, prefetch, start):
    loader = Loader(dataclasses.replace(config, prefetch=prefetch), "train", SPEC)
    batches = list(loader.iterate(range(start, 14), range(2, 5)))
    assert len(batches) == 14 - start
    assert all(
        same(batch, loader.batch(step, range(2, 5))) for step, batch in enumerate(batches, start)
    )
    assert list(loader.iterate(range(14, 14))) == []


def test_iterate_works_ahead_and_ends_when_abandoned(loader):
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
def test_a_part_is_spread_over_the_whole(total, count):
    chosen = spread(total, count)
    assert len(chosen) == min(total, count) and chosen[0] == 0
    gaps = np.diff([*chosen, total])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_iterate_takes_any_steps(config):
    loader = Loader(config, "eval", SPEC)
    steps = spread(loader.num_batches, 2)
    assert steps[-1] > 0
    assert all(same(a, loader.batch(s)) for s, a in zip(steps, loader.iterate(steps), strict=True))


def test_eval_is_in_order_once_and_filled_up(config):
    config = dataclasses.replace(config, batch_size=4)
    loader = Loader(config, "eval", SPEC)
    batches = list(loader.iterate(range(loader.num_batches)))
    keys = [key(batch, i) for batch in batches for i in range(4)]
    assert loader.num_tables % 4 and len(set(keys[: loader.num_tables])) == loader.num_tables
    for batch in batches:
        assert batch["tokens"].shape == (4, 64, 3)
    rest = loader.num_batches * 4 - loader.num_tables
    assert not batches[-1]["segment"][-rest:].any() and not batches[-1]["present"][-rest:].any()
    assert loader.example_ids(loader.num_batches - 1)[-1] == []
    other = Loader(dataclasses.replace(config, seed=9), "eval", SPEC)
    assert same(other.batch(0), loader.batch(0))
    with pytest.raises(ValueError, match="step is"):
        loader.batch(loader.num_batches)


def test_fewer_tables_than_a_batch_repeat(config):
    large = Loader(dataclasses.replace(config, batch_size=500), "train", SPEC)
    batch = large.batch(0)
    assert len({key(batch, i) for i in range(500)}) == large.num_tables


@pytest.mark.parametrize("rows", [range(0, 9), range(-1, 3), range(0, 8, 2)])
def test_rows_outside_the_batch(loader, rows):
    with pytest.raises(ValueError, match="rows is"):
        loader.batch(0, rows)


def test_data_that_does_not_fit_the_config(config):
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
