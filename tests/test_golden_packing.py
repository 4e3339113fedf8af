"""The reference's packing of two and three streams, expressed as tables with absent cells.

In the reference each stream is a contiguous block of a flat sequence, and the position y of a token
is arbitrary. In a table, rows are time steps. docs/semantics.md describes how tables express the
packing, and where the reference's decoding loop differs.
"""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msllm.config import LossConfig, StreamsConfig
from msllm.loss import next_row_loss, targets_and_weights
from msllm.model.model import bind
from msllm.streams import StreamSpec, make_cells, visibility_table
from msllm.weights.hf import read_folder
from msllm.weights.hf_tensors import to_hf
from msllm.weights.load import LoadedModel

LOOPS = [
    ("s5_two_stream_offset", "stream"),
    ("s5_two_stream_offset", "samestep"),
    ("s5_three_stream", "fixed_multi"),
    ("s5_two_stream", "stream"),
    ("s5_two_stream", "samestep"),
]


def spec_of(size, lag=None):
    """A StreamSpec of output streams."""
    names = tuple(f"s{s}" for s in range(size))
    spec = StreamSpec.from_config(StreamsConfig(names=names, kinds=("output",) * size))
    return spec if lag is None else dataclasses.replace(spec, lag=tuple(map(tuple, lag.tolist())))


def table_of(row, stream, values, shape, dtype=np.int32):
    """(table, present) [1, T, S] with values at the cells (row, stream) and the others absent."""
    table, present = np.zeros(shape, dtype), np.zeros(shape, bool)
    table[row, stream], present[row, stream] = values, True
    assert present.sum() == len(row), "two tokens in one cell"
    return table[None], present[None]


@pytest.mark.parametrize("name, loop", LOOPS)
def test_decoding_loops(name, loop):
    """A full forward pass gives the logits and tokens of the reference's decoding loop."""
    case = golden_cases.case(name)
    ids, (cid, y) = case[f"{loop}__ids"], case[f"{loop}__pos"].T
    lengths = case[f"{loop}__call_lengths"]
    call = np.repeat(np.arange(len(lengths)), lengths)
    config, size, parameters = read_folder(case.path)

    # A row is the time at which a token arrives: the tokens of step 0 row by row, then one row for
    # each call. The distance row - y of tokens in the loop differs from that of tokens in step 0,
    # so they have separate streams: system, user, assistants, then the loop's user and assistants.
    row = np.where(call == 0, y, y[call == 0].max() + call)
    stream = np.where(call == 0, cid, cid + size - 1)
    embedding = parameters["stream_embedding"]
    parameters = dict(parameters, stream_embedding=np.concatenate([embedding, embedding[1:]]))
    offset = np.zeros(2 * size - 1, int)
    for s in range(2 * size - 1):
        distances = np.unique((row - y)[stream == s])
        assert len(distances) == 1
        offset[s] = distances[0]
    # A key is visible if it has arrived (row_k < row_q) and y_k < y_q, where y = row - offset.
    lag = np.maximum(1, 1 + offset[:, None] - offset[None, :])
    if loop == "samestep":
        lag[size + 1 :, size] = 0

    shape = (row.max() + 1, 2 * size - 1)
    tokens, present = table_of(row, stream, ids, shape)
    position, _ = table_of(row, stream, y, shape)
    cells = make_cells(present, np.ones(tokens.shape[:2], np.int32))
    seen = visibility_table(cells, lag)[row, stream][:, row, stream]
    np.testing.assert_array_equal(seen, case[f"{loop}__visible_used"])

    model = LoadedModel(config, spec_of(2 * size - 1, lag), parameters)
    with jax.default_matmul_precision("highest"):
        bound = bind(model.graph, jax.tree.map(jnp.asarray, model.parameters))
        logits = np.asarray(bound.logits(bound(tokens, cells, position)))[0, row, stream]
    np.testing.assert_allclose(
        golden_cases.thin("logits", logits), case[f"{loop}__logits_loop"], rtol=0, atol=1e-4
    )
    # The loop feeds each head the token with the largest logit.
    for head in range(2, size):
        chosen = np.argmax(logits[(stream == head + size - 1)], axis=-1)
        np.testing.assert_array_equal(
            chosen, case[f"{loop}__output_head{head - 2}"][1 : len(chosen) + 1]
        )


def test_training():
    """Masks, loss, logits and gradients equal those of the reference's training sequences."""
    case = golden_cases.case("s5_train")
    config, size, parameters = read_folder(case.path)
    model = LoadedModel(config, spec_of(size), jax.tree.map(jnp.asarray, parameters))
    labels, rows = case["labels"], int(case["position_ids"][..., 1].max()) + 1
    tokens, present, loss_masks, cells_of = [], [], [], []
    for b in range(len(labels)):
        visible = case["visible"][b]
        # Only the second sequence has a padding token, at its end.
        is_pad = (np.arange(len(visible)) == len(visible) - 1) & (labels[b] == -100)
        cid, y = case["position_ids"][b][~is_pad].T
        table, exists = table_of(y, cid, case["input_ids"][b][~is_pad], (rows, size))
        predicts = np.zeros((rows, size), bool)
        for start, end, ok in zip(case["head_start"][b], case["head_end"][b], case["head_ok"][b]):
            for t in range(start, end if ok else start):
                predicts[y[t] - 1, cid[t]] = labels[b][t] != -100
        tokens.append(table)
        present.append(exists)
        loss_masks.append(predicts)
        cells_of.append((y, cid))
    tokens, present = np.concatenate(tokens), np.concatenate(present)
    loss_mask = np.stack(loss_masks)
    segment = np.ones(tokens.shape[:2], np.int32)
    cells = make_cells(present, segment)
    position = np.broadcast_to(np.arange(rows, dtype=np.int32), segment.shape)
    for b, (y, cid) in enumerate(cells_of):
        seen = visibility_table(cells, model.streams.lag_array, b)[y, cid][:, y, cid]
        np.testing.assert_array_equal(seen, case["visible"][b][: len(y), : len(y)])

    batch = {"tokens": tokens, "present": present, "segment": segment}
    targets, counted, weights = targets_and_weights(batch, (1.0,) * size, loss_mask)
    assert counted.sum() == case["loss_tokens"]

    def loss_of(parameters):
        bound = bind(model.graph, parameters)
        hidden = bound(tokens, cells, position)
        total, _ = next_row_loss(hidden, bound.head_table(), targets, weights, LossConfig())
        return total / weights.sum(), bound.logits(hidden)

    with jax.default_matmul_precision("highest"):
        (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
            model.parameters
        )
    np.testing.assert_allclose(loss, case["loss"], rtol=0, atol=1e-5)
    for b, (y, cid) in enumerate(cells_of):
        ours = golden_cases.thin("logits", np.asarray(logits)[b, y, cid])
        np.testing.assert_allclose(ours, case["logits"][b][: len(y)], rtol=0, atol=1e-4)
    ours = to_hf(gradients, config)
    names = [name for name in case.names if name.startswith("grad.")]
    assert len(names) == 7
    for name in names:
        golden, mine = case[name], golden_cases.thin(name, ours[name.removeprefix("grad.")])
        assert np.abs(mine - golden).max() <= 1e-4 * np.abs(golden).max(), name
