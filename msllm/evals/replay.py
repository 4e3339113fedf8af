"""Replay: the logits of a stream from the transcript of the streams that it depends on.

If the flow certificate says that, with all tokens given, a stream depends on some others only
(docs/flow.md), then their tokens alone determine its logits, to the last bit. `replay` computes
them without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from msllm.evals.score import score
from msllm.flow import certificate
from msllm.weights.load import LoadedModel


class Replay(NamedTuple):
    """The logits of a stream, from a transcript of some streams.

    Attributes:
      reader: the name of the stream.
      sources: the streams on which its logits depend, without itself.
      left_out: the other streams, which are silent in the replay.
      logits: [B, T, V] float32, of the replay.
      difference: the largest difference to the logits with all streams; 0.0: the same bits.
    """

    reader: str
    sources: tuple[str, ...]
    left_out: tuple[str, ...]
    logits: np.ndarray
    difference: float


def replay(
    model: LoadedModel,
    tables: Mapping[str, np.ndarray],
    reader: str,
    silence_id: int | None = None,
) -> Replay:
    """Scores tables in which every stream is silent that the reader does not depend on.

    Args:
      model: the model.
      tables: as in `score.score`.
      reader: the name of a stream.
      silence_id: the silence token. Needed if the model has no tokenizer.

    Raises UserError if there is no such stream, or if the tables do not fit.
    """
    names, column = model.streams.names, model.streams.index(reader)
    found = certificate(model.streams, model.config.vocab_size, generated=False)
    sources = tuple(name for name in names if name != reader and found.flow(name, reader))
    left_out = tuple(name for name in names if name not in (*sources, reader))
    tokens, silence = tables["tokens"].copy(), model.silence_token(silence_id)
    for name in left_out:
        tokens[:, :, names.index(name)] = 0 if silence is None else silence
    logits = score(model, tables, silence_id).logits[:, :, column]
    replayed = score(model, {**tables, "tokens": tokens}, silence_id).logits[:, :, column]
    present = tables.get("present", np.ones(tokens.shape, bool))[:, :, column]
    difference = np.abs(np.where(present[..., None], logits - replayed, 0)).max()
    return Replay(reader, sources, left_out, replayed, float(difference))
