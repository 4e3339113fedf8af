"""Generation of a text in lanes: its parts grow side by side, and are joined at the end.

`msllm/data/converters/lanes.py` describes the tables of such texts.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from msllm.data.converters import get_converter
from msllm.data.converters.lanes import Lanes, lane_streams
from msllm.decode.engine import FREE, DecodeOptions, Engine, Row, Session
from msllm.decode.script import default_window
from msllm.errors import UserError
from msllm.weights.load import LoadedModel


class LaneText(NamedTuple):
    """A text that was generated in lanes.

    Attributes:
      text: the text, joined from its parts.
      ended: whether the model ended it.
      tokens: [R, S] int32, the table; 0 where absent.
      present: [R, S] bool.
      logprob: of all cells that the model said, in nats.
    """

    text: str
    ended: bool
    tokens: np.ndarray
    present: np.ndarray
    logprob: float


def find_lanes(model: LoadedModel) -> Lanes | None:
    """The lanes of a model whose data was made by the converter `lanes`; None: it has none."""
    config = model.run_config
    if config is None or config.data.converter != "lanes":
        return None
    streams = lane_streams(model.streams, get_converter("lanes", config.data.options)[1]["lanes"])
    delays = model.streams.delays or (0,) * model.streams.size
    return Lanes(streams, delays, model.require_tokenizer().silence_id)


def require_lanes(model: LoadedModel) -> Lanes:
    """The lanes of a model. Raises UserError if it has none."""
    lanes = find_lanes(model)
    if lanes is None:
        raise UserError(
            "the model was not trained on lanes: train one with config.data.converter = 'lanes'"
        )
    return lanes


class LaneSession:
    """Follows a session that generates a text in lanes, and ends its streams.

    Attributes:
      finished: whether the last row of the text was shown.
    """

    def __init__(self, model: LoadedModel, session: Session, begin: str = "") -> None:
        """Follows a session of a model from its first row on.

        `begin` is the beginning of the text, which the first lane must say. Raises UserError if the
        model has no lanes.
        """
        self._lanes, self._tokenizer = require_lanes(model), model.require_tokenizer()
        self._session, self._streams, self._rows = session, model.streams, list[Row]()
        self._length: int | None = None  # R, once the first lane has ended
        self.finished = False
        if begin:
            self.force(self._lanes.first, begin)

    def force(self, stream: str | int, text: str) -> None:
        """Sets what a stream says after its first row, which is silent. Raises UserError."""
        index = self._streams.index(stream) if isinstance(stream, str) else stream
        self._session.force(index, [FREE] * (self._lanes.delays[index] + 1))
        self._session.force(index, text)

    def add(self, row: Row) -> Row:
        """Takes a row that the session has shown, and returns it with the cells that are absent."""
        lanes, delays = self._lanes, np.array(self._lanes.delays)
        start = delays[lanes.first] + 1
        said = row.tokens[lanes.first]
        if self._length is None and row.index >= start and said == lanes.silence_id:
            self._length = row.index - start
        if self._length is not None:
            ended = row.index - delays > self._length
            ended[lanes.first] = row.index > start + self._length
            for stream in np.flatnonzero(ended & row.present):
                self._session.end(int(stream))
            present = row.present & ~ended
            row = row._replace(tokens=row.tokens * present, present=present)
            others = np.arange(len(delays)) != lanes.first
            self.finished = bool((row.index - delays >= self._length)[others].all())
        self._rows.append(row)
        return row

    def result(self) -> LaneText:
        """The text so far."""
        tokens = np.array([row.tokens for row in self._rows])
        present = np.array([row.present for row in self._rows])
        logprob = np.array([row.logprob for row in self._rows], np.float64)
        # Nothing predicts the first cell of a stream.
        predicted = present & (np.arange(len(tokens))[:, None] > self._lanes.delays)
        return LaneText(
            self._tokenizer.decode(self._lanes.join(tokens)),
            self._length is not None,
            tokens,
            present,
            float(np.nansum(np.where(predicted, logprob, 0))),
        )


def generate(
    model: LoadedModel,
    rows: int = 0,
    options: DecodeOptions | None = None,
    begin: str = "",
    batch: int = 1,
) -> list[LaneText]:
    """Generates texts in lanes.

    Args:
      model: a model that was trained on data of the converter `lanes`.
      rows: the most rows of a table, in which a text may stay without an end; 0: those of the
        tables that the model was trained on.
      options: None: the defaults. The seed of each text is derived from that of the options.
      begin: the beginning of the texts. The other lanes begin at the same time, so their first
        tokens cannot depend on the end of a long beginning.
      batch: the number of texts.

    Raises UserError.
    """
    require_lanes(model)
    options = options or DecodeOptions()
    rows = rows or default_window(model)
    engine = Engine(model, sessions=batch, window=max(rows, 2))
    running = {}
    for number in range(batch):
        seed = np.random.SeedSequence((options.seed % (1 << 32), number)).generate_state(1)[0]
        session = engine.open(dataclasses.replace(options, seed=int(seed)))
        running[session] = LaneSession(model, session, begin)
    texts = list(running.values())
    for _ in range(rows):
        for session, row in zip(tuple(running), engine.step(tuple(running)), strict=True):
            running[session].add(row)
            if running[session].finished:
                del running[session]
        if not running:
            break
    return [text.result() for text in texts]
