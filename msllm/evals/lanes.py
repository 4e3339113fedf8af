"""The likelihood of held-out text in bits per byte, for models that read it in lanes.

The figure does not depend on how a text is cut, so models of different numbers of lanes, tokens and
rows can be compared. All that the model says counts: the text, the silence that ends it, and other
streams that it generates, such as a plan. Only the bytes of the lanes are counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from msllm.decode.lanes import require_lanes
from msllm.evals.likelihood import Likelihoods, evaluate, report
from msllm.weights.load import LoadedModel


class TextLikelihood(NamedTuple):
    """The likelihood of each text, or piece of a text, in the order of the data.

    Attributes:
      bits: [units] float64.
      bytes: [units] float64, of UTF-8.
    """

    bits: np.ndarray
    bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """The mean over all bytes."""
        return float(self.bits.sum() / self.bytes.sum())

    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the means of resampled texts."""
        bits, counts = self.bits[:, None], self.bytes[:, None]
        found = report(Likelihoods(bits, counts, counts, bits, bits, counts), ("text",))["all"]
        return found["low"], found["high"]


def text_likelihood(model: LoadedModel, data: str = "", split: str = "eval") -> TextLikelihood:
    """Measures the likelihood of the texts of a split.

    Args:
      model: a model that was trained on data of the converter `lanes`.
      data: the prepared directory. Empty: the one that the model was trained on.
      split: the split of the data.

    Raises UserError if the model has no lanes, or if the data does not fit it.
    """
    lanes = require_lanes(model)
    units = evaluate(model, data, split)
    said = [s for s, kind in enumerate(model.streams.kinds) if kind != "input"]
    bits = units.nll[:, said].sum(1) / np.log(2)
    return TextLikelihood(bits, units.bytes[:, list(lanes.streams)].sum(1))
