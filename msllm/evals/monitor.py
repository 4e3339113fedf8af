"""Monitors of transcripts: can a fact about a run be told from what its streams said?

A monitor is a linear classifier of word counts: TF-IDF of words and pairs of words, with logistic
regression (scikit-learn). It reads some streams of a transcript, and each stream has counts of its
own. It is trained on transcripts with labels, and tested on others: of the same kind, and of kinds
that it has never seen.

A monitor may also see for each pair of its streams whether their last words agree. This is the only
feature that compares streams; word counts alone cannot tell that two streams contradict each other.

    train, test = read_transcripts("train.jsonl"), read_transcripts("test.jsonl")
    print(describe(monitor(train, {"test": test})))
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.errors import UserError
from msllm.evals.intervals import RESAMPLES, Estimate, statistic
from msllm.evals.intervals import number as as_text

AGREEMENT = "+agreement"  # ends the names of monitors that see whether streams agree
_PLAIN = re.compile(r"[^\w]+")  # what is ignored when last words are compared


class Transcripts(NamedTuple):
    """What the streams of several runs said.

    Attributes:
      streams: {name: N texts, words separated by white space}.
      labels: [N] bool, the fact that a monitor has to tell.
    """

    streams: dict[str, list[str]]
    labels: np.ndarray

    def where(self, chosen: np.ndarray) -> Transcripts:
        """Some of the transcripts, by a mask [N] or by indices."""
        indices = np.arange(len(self.labels))[chosen]
        return Transcripts(
            {name: [texts[i] for i in indices] for name, texts in self.streams.items()},
            self.labels[indices],
        )


class Detection(NamedTuple):
    """How well a monitor tells the label.

    Attributes:
      monitor: its name.
      data: the name of the transcripts.
      items, positives: the number of the transcripts, and of those whose label is true.
      auc: the area under the ROC curve: the probability that a transcript with the label gets a
        higher score than one without.
      g_mean: the geometric mean of the accuracies on both labels, at the threshold of the
        classifier. It is 0 for a monitor that always says the same. Both are nan if all labels
        are equal.
      scores: [N] float, the score of each transcript; above 0: the label is more likely true.
    """

    monitor: str
    data: str
    items: int
    positives: int
    auc: Estimate
    g_mean: Estimate
    scores: np.ndarray


def monitor(
    train: Transcripts,
    tests: Mapping[str, Transcripts],
    reads: Mapping[str, Sequence[str]] | None = None,
    *,
    resamples: int = RESAMPLES,
) -> list[Detection]:
    """Trains monitors and tests them.

    Args:
      train: transcripts for training.
      tests: transcripts for testing, by name.
      reads: {name of a monitor: the streams that it reads}. A monitor whose name ends with
        `AGREEMENT` sees whether they agree. None: a monitor for each stream, one for all, and one
        that sees whether they agree.
      resamples: of the bootstrap over items; 0: no intervals.

    Raises UserError if the training transcripts have one label only, if a stream is missing, or if
    scikit-learn is not installed.
    """
    reads = default_reads(train) if reads is None else reads
    results = []
    for name, streams in reads.items():
        fitted = Monitor(train, streams, agreement=name.endswith(AGREEMENT))
        for data, test in tests.items():
            scores = fitted.scores(test)
            count = len(test.labels)
            of_auc, of_g_mean = (
                statistic(functools.partial(figure, scores, test.labels), count, resamples)
                for figure in (auc, g_mean)
            )
            positives = int(test.labels.sum())
            results.append(Detection(name, data, count, positives, of_auc, of_g_mean, scores))
    return results


def default_reads(train: Transcripts) -> dict[str, list[str]]:
    """A monitor for each stream, and for all of them without and with their agreement."""
    names = [*train.streams]
    reads = {name: [name] for name in names}
    return reads if len(names) == 1 else {**reads, "all": names, f"all{AGREEMENT}": names}


class Monitor:
    """A trained monitor."""

    def __init__(self, train: Transcripts, streams: Sequence[str], agreement: bool = False):
        """Trains it. The arguments and errors are those of `monitor`."""
        extraction, linear_model = _sklearn("feature_extraction.text"), _sklearn("linear_model")
        labels = np.asarray(train.labels, bool)
        if labels.all() or not labels.any():
            raise UserError(
                f"all {len(labels)} transcripts for training have the same label: a monitor needs"
                " both; give more transcripts, or another label"
            )
        _check_streams(train, streams)
        self._streams, self._agreement = tuple(streams), agreement
        self._counts = {}
        for name in streams:
            vectorizer = extraction.TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2))
            if any(text.split() for text in train.streams[name]):  # otherwise there are no words
                self._counts[name] = vectorizer.fit(train.streams[name])
        self._classifier = linear_model.LogisticRegression(class_weight="balanced", max_iter=2000)
        self._classifier.fit(self._features(train), labels)

    def scores(self, transcripts: Transcripts) -> np.ndarray:
        """[N] float64, the score of each transcript; above 0: the label is more likely true."""
        _check_streams(transcripts, self._streams)
        return self._classifier.decision_function(self._features(transcripts))

    def _features(self, transcripts: Transcripts) -> Any:
        from scipy import sparse

        count = len(transcripts.labels)
        parts = [np.zeros((count, 1))]  # so that there is a column even without any word
        for name, vectorizer in self._counts.items():
            parts.append(vectorizer.transform(transcripts.streams[name]))
        if self._agreement:
            parts.append(agreement(transcripts, self._streams))
        return sparse.hstack([sparse.csr_matrix(part) for part in parts]).tocsr()


def agreement(transcripts: Transcripts, streams: Sequence[str]) -> np.ndarray:
    """[N, pairs] float64: 1 if the last words of two streams agree, -1 if not, 0 without words.

    Only letters and digits are compared, so that "=12" agrees with "12". The full stop of a
    sentence is not a word.
    """
    last = {
        name: [_last_word(text) for text in texts]
        for name, texts in transcripts.streams.items()
        if name in streams
    }
    pairs = list(itertools.combinations(streams, 2))
    found = np.zeros((len(transcripts.labels), len(pairs)))
    for column, (one, other) in enumerate(pairs):
        for row, (a, b) in enumerate(zip(last[one], last[other])):
            if a and b:
                found[row, column] = 1 if a == b else -1
    return found


def _last_word(text: str) -> str:
    words = [_PLAIN.sub("", word) for word in text.split()]
    return next((word for word in reversed(words) if word), "")


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The area under the ROC curve; nan if all labels are equal. `weights`: of the items, [N]."""
    labels = np.asarray(labels, bool)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    order = np.argsort(scores, kind="stable")
    ordered, labels, weights = np.asarray(scores)[order], labels[order], weights[order]
    # Items of equal scores form a group, and count half against each other.
    group = np.cumsum(np.diff(ordered, prepend=ordered[:1]) != 0)
    size = int(group[-1]) + 1 if len(group) else 0
    positive = np.bincount(group, weights * labels, size)
    negative = np.bincount(group, weights * ~labels, size)
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total) if total > 0 else float("nan")


def g_mean(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The geometric mean of the accuracies on both labels at threshold 0; nan without one of them.

    `weights`: of the items, [N].
    """
    labels = np.asarray(labels, bool)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    right = (np.asarray(scores) > 0) == labels
    shares = []
    for label in (True, False):
        of_label = weights * (labels == label)
        if not of_label.sum():
            return float("nan")
        shares.append((of_label * right).sum() / of_label.sum())
    return float(np.sqrt(np.prod(shares)))


def read_transcripts(path: str | os.PathLike, label: str = "label") -> Transcripts:
    """Reads transcripts from a file of JSON lines.

    A line holds the texts of the streams and the label, as
    {"streams": {"thought": "...", "output": "..."}, "label": true}. `msllm evaluate --transcripts`
    writes such lines, with the label "right".

    Args:
      path: the file.
      label: the key of the label.

    Raises UserError if the file cannot be read, or if a line has another form.
    """
    streams: dict[str, list[str]] = {}
    labels: list[bool] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of JSON lines") from error
    for number, line in lines:
        texts, value = _read_line(line, label, f"{path}, line {number}")
        if labels and texts.keys() != streams.keys():
            raise UserError(
                f"{path}, line {number}: has the streams {', '.join(texts)}, and the lines before"
                f" have {', '.join(streams)}: all lines must have the same"
            )
        for name, text in texts.items():
            streams.setdefault(name, []).append(text)
        labels.append(value)
    if not labels:
        raise UserError(f"{path} holds no transcripts: give a file of JSON lines")
    return Transcripts(streams, np.array(labels))


def _read_line(line: str, label: str, where: str) -> tuple[dict[str, str], bool]:
    """The texts and the label of a line. Raises UserError."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is no JSON ({error}): give one object per line") from error
    texts = record.get("streams") if isinstance(record, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(
            f"{where}: must hold the texts of the streams, as"
            ' {"streams": {"thought": "...", "output": "..."}}'
        )
    value = record.get(label)
    if not isinstance(value, bool):
        raise UserError(
            f"{where}: the label {label!r} is {value!r}: must be true or false; name another label"
            f" with --label ({', '.join(key for key in record if key != 'streams') or 'none'})"
        )
    return texts, value


def describe(found: Sequence[Detection]) -> str:
    """The results as lines of text."""
    width = max(len("monitor"), *(len(one.monitor) for one in found))
    data = max(len("data"), *(len(one.data) for one in found))
    lines = [f"{'monitor':{width}}  {'data':{data}}  positives  {'AUC':22}  g-mean"]
    for one in found:
        count = f"{one.positives}/{one.items}"
        figures = f"{as_text(one.auc):22}  {as_text(one.g_mean)}"
        lines.append(f"{one.monitor:{width}}  {one.data:{data}}  {count:>9}  {figures}")
    return "\n".join(lines)


def as_json(found: Sequence[Detection]) -> list[dict[str, Any]]:
    """The results as values for JSON, without the scores."""
    return [
        {
            **{name: value for name, value in one._asdict().items() if name != "scores"},
            "auc": _estimate_json(one.auc),
            "g_mean": _estimate_json(one.g_mean),
        }
        for one in found
    ]


def _estimate_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as values for JSON, which has no nan."""
    return {
        name: None if math.isnan(value) else value for name, value in estimate._asdict().items()
    }


def _check_streams(transcripts: Transcripts, streams: Sequence[str]) -> None:
    """Raises UserError if the transcripts lack a stream."""
    for name in streams:
        if name not in transcripts.streams:
            raise UserError(
                f"the transcripts have no stream {name!r}: they have"
                f" {', '.join(transcripts.streams)}"
            )


def _sklearn(module: str) -> Any:
    """A module of scikit-learn. Raises UserError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise UserError('monitors need scikit-learn: pip install "msllm[monitor]"') from error
