"""The FLOP formulas count exactly the pairs of cells that the visibility rule allows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.config import ModelConfig, StreamsConfig
from msllm.runtime.flops import batch_pairs, train_flops, visible_pairs
from msllm.streams import NEVER, StreamSpec, make_cells, visibility_table


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9),
    lags=st.lists(st.sampled_from([0, 1, 2, 5, NEVER]), min_size=9, max_size=9),
)
def test_visible_pairs_equals_the_rule(rows, lags):
    lag = np.array(lags, np.int32).reshape(3, 3)
    cells = make_cells(np.ones((1, rows, 3), bool), np.ones((1, rows), np.int32))
    assert visible_pairs(lag, rows) == visibility_table(cells, lag).sum()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([0, 1, 2, 5, NEVER]), min_size=9, max_size=9),
    st.booleans(),
)
def test_batch_pairs_equals_the_rule_in_packed_tables_with_absent_and_silent_cells(
    seed, lags, skip_silence
):
    rng, lag = np.random.default_rng(seed), np.array(lags, np.int32).reshape(3, 3)
    segment = np.sort(rng.integers(1, 4, (2, 9)), 1)
    present, silent = rng.random((2, 2, 9, 3)) < 0.7
    cells = make_cells(present, segment, silent if skip_silence else None)
    # By the rule an absent cell sees itself, so that its softmax is defined. That work is useless
    # and not counted.
    expected = sum(visibility_table(cells, lag, batch)[present[batch]].sum() for batch in range(2))
    assert batch_pairs(lag, present, cells.seen, segment) == expected


def test_one_stream_costs_six_flops_per_weight_and_token_and_the_causal_triangle():
    config = ModelConfig(
        vocab_size=100, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16
    )
    streams = StreamSpec.from_config(StreamsConfig(names=("text",), kinds=("output",)))
    weights = 2 * (8 * (2 * 2 + 2 * 1) * 4 + 3 * 8 * 16) + 8 * 100
    # 12 per layer, head and head dimension: two products of 2 FLOPs, forward and twice backward.
    triangle = 12 * 2 * 2 * 4 * 10 * 11 // 2
    assert train_flops(config, streams, batch=3, rows=10) == 3 * (6 * weights * 10 + triangle)


def test_the_head_is_not_counted_for_inputs():
    config = ModelConfig(vocab_size=100)

    def cost(kinds):
        streams = StreamSpec.from_config(StreamsConfig(names=("a", "b"), kinds=kinds))
        return train_flops(config, streams, batch=1, rows=4)

    assert cost(("output", "output")) - cost(("input", "output")) == 6 * 4 * config.d_model * 100
