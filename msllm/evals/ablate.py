"""What a stream is worth: the answers without it.

A stream is ablated in two ways. *Silenced*: every cell of it is silence, and the others see that
silence. *Hidden*: it goes on as before, but no other stream sees it, as if all edges to it were
`never`. A model that was never trained without a stream may fail for either reason, so the numbers
say what the model relies on, not what could be learned without the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.errors import UserError
from msllm.evals.exact_match import streams_of_kind
from msllm.evals.free_run import Examples, run
from msllm.evals.score import likelihood, pack
from msllm.streams import NEVER
from msllm.weights.load import LoadedModel


class Worth(NamedTuple):
    """The answers without a stream.

    Attributes:
      stream: its name.
      silenced: share of the examples that are answered exactly while it is silent.
      hidden: the same while no other stream sees it.
      nll: mean negative log-likelihood of what the outputs say in the examples, with the stream
        hidden, nats per token.
      silenced_right, hidden_right: [N] bool, the examples that are answered exactly.
    """

    stream: str
    silenced: float
    hidden: float
    nll: float
    silenced_right: np.ndarray
    hidden_right: np.ndarray


class Ablation(NamedTuple):
    """The answers with all streams, and without each of them.

    Attributes:
      examples: number of the examples.
      exact: share of them that are answered exactly.
      nll: mean negative log-likelihood of what the outputs say in the examples, nats per token.
      streams: the results.
    """

    examples: int
    exact: float
    nll: float
    streams: list[Worth]


def ablate(examples: Examples, streams: Sequence[str] = ()) -> Ablation:
    """Answers the examples without each stream.

    Args:
      examples: from `free_run.read_examples`.
      streams: the streams to ablate. Empty: all but the outputs.

    Raises UserError if there is no such stream.
    """
    model = examples.model
    kinds = model.streams.kinds
    chosen = [model.streams.index(name) for name in streams]
    chosen = chosen or [s for s, kind in enumerate(kinds) if kind != "output"]
    silence = model.require_tokenizer().silence_id
    results = []
    for s in chosen:

        def silenced(number: int, table: np.ndarray, stream: int = s) -> None:
            table[:, stream] = silence

        without = hide(model, s)
        quiet, unseen = run(examples, silenced).right, run(examples, model=without).right
        results.append(
            Worth(
                model.streams.names[s],
                float(quiet.mean()),
                float(unseen.mean()),
                _nll(examples, without),
                quiet,
                unseen,
            )
        )
    exact = float(run(examples).right.mean())
    return Ablation(len(examples.cases), exact, _nll(examples, model), results)


def hide(model: LoadedModel, stream: int | str) -> LoadedModel:
    """The model with a stream that no other stream sees. Raises UserError if there is none."""
    spec = model.streams
    index = spec.index(stream) if isinstance(stream, str) else stream
    for rule in spec.combine:
        if index in rule.sources and index != rule.stream:
            raise UserError(
                f"stream {spec.names[index]!r} cannot be hidden: config.streams.combine predicts"
                f" {spec.names[rule.stream]!r} from it; silence it (options.ablated) or name other"
                " streams"
            )

    def without(lags: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(
                NEVER if source == index != reader else lag for source, lag in enumerate(of_reader)
            )
            for reader, of_reader in enumerate(lags)
        )

    token_lag = without(spec.token_lag)
    has_edges = any(lag < NEVER for row in token_lag for lag in row)
    return dataclasses.replace(
        model,
        streams=dataclasses.replace(
            spec, lag=without(spec.lag), token_lag=token_lag if has_edges else ()
        ),
    )


def describe(result: Ablation) -> str:
    """The result as lines of text."""
    width = max(len("stream"), len("none"), *(len(one.stream) for one in result.streams))
    lines = [
        f"{result.examples} examples answered without a stream",
        f"{'stream':{width}}  silenced   hidden  hidden, nats/token",
        f"{'none':{width}}  {result.exact:8.1%} {result.exact:8.1%}  {result.nll:18.4f}",
    ]
    for one in result.streams:
        lines.append(
            f"{one.stream:{width}}  {one.silenced:8.1%} {one.hidden:8.1%}  {one.nll:18.4f}"
        )
    return "\n".join(lines)


def _nll(examples: Examples, model: LoadedModel) -> float:
    """The mean negative log-likelihood of what the outputs say in the examples, nats."""
    packed = pack(examples.tables)
    outputs = streams_of_kind(model.streams, "output")
    found = likelihood(model, packed.tables).logprob[:, :-1, outputs]
    targets = packed.tables["tokens"][:, 1:, outputs]
    counted = np.isfinite(found) & (targets != model.require_tokenizer().silence_id)
    return -float(found[counted].mean())


def as_json(result: Ablation) -> dict[str, Any]:
    """The result as values for JSON, without the single examples."""
    streams = [
        {name: value for name, value in one._asdict().items() if not name.endswith("_right")}
        for one in result.streams
    ]
    return {**result._asdict(), "streams": streams}
