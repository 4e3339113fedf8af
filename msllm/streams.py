"""Streams, and who sees whom: the one visibility rule of msllm (design: contracts 1 and 2).

The rule is `visible()`. It is a predicate on integers that runs on numpy and on jax arrays; every attention backend,
decoding and every picture of a mask calls it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from msllm.config import StreamsConfig
from msllm.errors import UserError

NEVER = 1 << 30  # a lag that no row can reach: "never sees"
KINDS = ("input", "output", "thought")
PRESETS = ("block_causal", "same_row", "isolated")


def visible(q_row, q_stream, q_segment, q_present, k_row, k_stream, k_segment, k_seen, lag):
    """True where the cell (q_row, q_stream) sees the cell (k_row, k_stream).

    A cell sees itself, and every present cell of its segment that lies at least `lag` rows back.

    Args (integers or integer arrays that broadcast together, numpy or jax; bool where noted):
      q_row, q_stream, q_segment: the query's row in the table, its stream and its segment.
      q_present: bool, the query's cell is not absent.
      k_row, k_stream, k_segment: the same of the key.
      k_seen: bool, the key's cell is not absent (and, with skip_silence, not silence).
      lag: lag[q_stream, k_stream], already looked up: a gather inside a kernel is slow.

    Returns: bool, of the broadcast shape.
    """
    itself = (q_row == k_row) & (q_stream == k_stream)
    earlier = (k_row <= q_row - lag) & (q_segment == k_segment) & k_seen & q_present
    return itself | earlier


class Cells(NamedTuple):
    """What attention must know about the cells of a batch of tables, besides their contents."""

    row: Any  # [B, T] int32: row in the table
    segment: Any  # [B, T] int32: packed example; 0: no example, the row is empty
    present: Any  # [B, T, S] bool: the cell is not absent
    seen: Any  # [B, T, S] bool: others may see it as a key


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """The S streams of a model: names, kinds, loss weights and the lag matrix."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    loss_weights: tuple[float, ...]
    lag: tuple[tuple[int, ...], ...]  # lag[reader][source], rows; NEVER: never
    skip_silence: bool = False
    delays: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: StreamsConfig) -> StreamSpec:
        """Checks the settings and resolves presets. Raises UserError."""
        names, kinds = config.names, config.kinds
        size = len(names)
        if not names or len(set(names)) != size:
            raise UserError(
                f"config.streams.names is {names}: needs at least one name, each of them once"
            )
        for field in ("kinds", "loss_weights", "delays"):
            values = getattr(config, field)
            if len(values) != size and (values or field == "kinds"):
                raise UserError(
                    f"config.streams.{field} has {len(values)} items: names has {size}, give one per stream"
                )
        for kind in kinds:
            if kind not in KINDS:
                raise UserError(
                    f"config.streams.kinds holds {kind!r}: must be one of {', '.join(KINDS)}"
                )
        weights = config.loss_weights or tuple(float(kind != "input") for kind in kinds)
        if any(w < 0 for w in weights) or not any(weights):
            raise UserError(
                f"config.streams.loss_weights is {weights}: must be >= 0, and one of them positive"
            )
        if any(d < 0 for d in config.delays):
            raise UserError(f"config.streams.delays is {config.delays}: must be >= 0 rows")
        lag = lag_matrix(config.visibility, size)
        for reader, source, value in config.lags:
            for name in (reader, source):
                if name not in names:
                    raise UserError(
                        f"config.streams.lags names {name!r}: the streams are {', '.join(names)}"
                    )
            if value != "never" and not value.isdigit():
                raise UserError(
                    f"config.streams.lags holds lag {value!r}: must be a number of rows >= 0, or 'never'"
                )
            lag[names.index(reader), names.index(source)] = (
                NEVER if value == "never" else int(value)
            )
        return cls(
            names,
            kinds,
            weights,
            tuple(map(tuple, lag.tolist())),
            config.skip_silence,
            config.delays or (0,) * size,
        )

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def lag_array(self) -> np.ndarray:
        """[S, S] int32, lag[reader, source]."""
        return np.array(self.lag, np.int32)

    def index(self, name: str) -> int:
        """Position of the stream `name`. Raises UserError."""
        if name not in self.names:
            raise UserError(f"there is no stream {name!r}: the streams are {', '.join(self.names)}")
        return self.names.index(name)


def lag_matrix(visibility: str, size: int) -> np.ndarray:
    """The lag matrix [S, S] int32 of a preset.

    `block_causal`: earlier rows of all streams. `same_row`: also the same row of all streams. `isolated`: earlier rows
    of the own stream only.
    """
    if visibility == "block_causal":
        return np.ones((size, size), np.int32)
    if visibility == "same_row":
        return np.zeros((size, size), np.int32)
    if visibility == "isolated":
        return np.where(np.eye(size, dtype=bool), 1, NEVER).astype(np.int32)
    raise UserError(f"visibility is {visibility!r}: must be one of {', '.join(PRESETS)}")


def pad_lag(lag: np.ndarray, size: int) -> np.ndarray:
    """The lag matrix with absent streams at its end, [size, size]: they see nobody and nobody sees them."""
    missing = size - lag.shape[0]
    return np.pad(lag, (0, missing), constant_values=NEVER) if missing else lag


def make_cells(present, segment, silent=None) -> Cells:
    """Cells of tables that start at row 0.

    Args:
      present: [B, T, S] bool.
      segment: [B, T] int32; rows of segment 0 count as absent.
      silent: [B, T, S] bool or None: cells that others do not see although they are present (skip_silence).
    """
    present = present & (segment > 0)[:, :, None]
    rows = np.broadcast_to(np.arange(segment.shape[1], dtype=np.int32), segment.shape)
    return Cells(rows, segment, present, present if silent is None else present & ~silent)


def positions(segment):
    """RoPE positions [B, T] int32: the row within its segment (a segment is a run of equal ids), numpy or jax."""
    xp = _array_module(segment)
    row = xp.arange(segment.shape[1], dtype=np.int32)[None, :]
    start = xp.concatenate(
        [xp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1
    )
    return row - _cumulative_max(xp.where(start, row, 0), axis=1)


def target_mask(present, segment):
    """[B, T, S] bool: the cell predicts its stream's cell in the next row, because both are present in one segment."""
    xp = _array_module(present)
    present = present & (segment > 0)[:, :, None]
    both = present[:, :-1] & present[:, 1:] & (segment[:, :-1] == segment[:, 1:])[:, :, None]
    return xp.concatenate([both, xp.zeros_like(present[:, :1])], axis=1)


def _array_module(array):
    if isinstance(array, np.ndarray):
        return np
    import jax.numpy as jnp  # preparing data works without jax, and starts in a fifth of the time

    return jnp


def _cumulative_max(array, axis: int):
    if isinstance(array, np.ndarray):
        return np.maximum.accumulate(array, axis=axis)
    import jax

    return jax.lax.cummax(array, axis=axis)


def visible_between(queries: Cells, keys: Cells, lag, q_streams, k_start=0):
    """`visible()` of each query and each key: [B, Tq, Sq, Tk, Sk] bool, numpy or jax.

    Args:
      queries, keys: cells of [B, Tq, Sq] and [B, Tk, Sk]. lag: [S, Sk]. q_streams: [Sq], the streams of the queries.
      k_start: the first stream of the keys; the others follow it.
    """
    return visible(
        queries.row[:, :, None, None, None],
        q_streams[:, None, None],
        queries.segment[:, :, None, None, None],
        queries.present[:, :, :, None, None],
        keys.row[:, None, None, :, None],
        k_start + np.arange(lag.shape[1], dtype=np.int32),
        keys.segment[:, None, None, :, None],
        keys.seen[:, None, None],
        lag[q_streams][:, None, :],
    )


def visibility_table(cells: Cells, lag: np.ndarray, batch: int = 0) -> np.ndarray:
    """The rule of one table as [T, S, T, S] bool (query row, query stream, key row, key stream): tests and pictures."""
    table = Cells(*(np.asarray(x)[batch : batch + 1] for x in cells))
    return visible_between(table, table, lag, np.arange(lag.shape[0]))[0]
