"""The flow certificate: which streams can influence which, how fast and through how many bits.

An edge between two streams is latent or goes through tokens (docs/design.md). What a reader sees
of a source over a latent edge includes whatever the source saw in others, so a missing edge alone
does not keep two streams apart. `certificate` follows all paths. docs/flow.md describes what its
result guarantees.

**Nodes.** At each row, a stream s has a token X[s], hidden states H[s], and the logits P[s] for its
next token. A stream that others see through tokens also has a relay R[s].

**Edges.** They follow from the visibility rule. Nothing else enters a hidden state.

- X[s] -> H[s], in the same row: the token is embedded.
- H[s] -> H[r], `lag[r][s]` rows later or more: a latent edge.
- X[s] -> R[s] -> H[r], `token_lag[r][s]` rows later or more: an edge through tokens. A relay
  attends only to itself, so it depends on the token and the presence of one cell alone. If only a
  set of tokens passes, it depends on which of them the token is, if any.
- H[s] -> P[s], in the same row; and H[c] -> P[s] for each source c of a rule by which s is combined
  (msllm/combine.py). Over such an edge, c influences what s says, but not the hidden states of s.
- P[s] -> X[s], in the next row, if s is generated: the model chooses its next token. This edge does
  not exist for streams of the kind `input`.
- X[s] -> X[r], `lag` rows later: mail copies tokens of s to the input r.

The last two edges do not exist where all tokens are given, as in training and scoring.

**Influence.** A influences B if a path leads from X[A] to P[B]. Conversely, suppose that there is
no such path, and let U be the set of all nodes that a path from X[A] reaches. By induction over
rows, and over layers within a row, every node outside of U is a function of nodes outside of U, the
weights and the random numbers of its own stream. Whatever A says or holds, no node outside of U
changes, and P[B] is one of these.

**Rows.** The length of a path is the sum of the rows that its edges take. The shortest length is a
lower bound: a model with few layers may need more rows, since a layer follows one edge at a time.

**Bits.** If a path of latent edges leads from H[A] to P[B], then B can see a continuous function of
A's hidden states, and no number of bits bounds that. Otherwise every path passes tokens: a relay,
or a token X[s]. A set of these that meets every path is a cut. Each has one of N symbols per row,
which is log2 N bits. Readers of a source through the same set share a relay, which counts once. The
streams behind the cut are a function of the symbols in the cut, and of the inputs and random
numbers that come from elsewhere. After n rows they are therefore in one of 2^(n * bits) states at
most, and their mutual information with A is at most n * bits. The streams behind the cut may also
answer A: this adds nothing, because their answers are such a function too. The best bound is that
of the smallest cut, which equals the maximum flow.

**Symbols.** Silence is a token. It carries information, and so does the row in which a token
stands: the bound counts all sequences of symbols, with any timing. An absent cell is one more
symbol. A token that does not pass is seen as silence. `skip_silence` hides silent cells from latent
edges only. Across an edge through tokens, silence is seen as the token that it is.
"""

from __future__ import annotations

import collections
import functools
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.combine import sources_of
from msllm.streams import NEVER, Relay, StreamSpec

LATENT, TOKENS = "latent", "tokens"
_SHOWN = 6  # pairs that a line of `summary` names
_UNKNOWN = 1e9  # stands for the bits of a token if the vocabulary's size is unknown
_DUST = 1e-6  # capacities below this are rounding errors

Node = tuple[str, int]  # ("X", "H" or "P", stream)


class Flow(NamedTuple):
    """How one stream influences another.

    Attributes:
      rows: the fewest rows from a token of the source to logits of the reader that depend on it.
      medium: latent: the reader sees a function of the source's hidden states. tokens: it sees
        tokens that the source, or a stream between them, said.
      bits: the most bits that pass per row. None: unbounded (latent), or unknown because the size
        of the vocabulary is.
      path: the streams on a fastest path of this medium, with both ends. `rows` counts paths of
        both media.
      cut: the streams whose tokens all influence must pass; empty if it is latent.
    """

    rows: int
    medium: str
    bits: float | None
    path: tuple[str, ...]
    cut: tuple[str, ...]

    def __str__(self) -> str:
        """A cell of the table, such as "12.0 bits, 2 rows"."""
        return f"{self.how}, {count_rows(self.rows)}"

    @property
    def how(self) -> str:
        """The bits as text, rounded up because they are a bound; or the medium."""
        return self.medium if self.bits is None else f"{math.ceil(self.bits * 10) / 10:.1f} bits"


class Certificate(NamedTuple):
    """The influences between all streams.

    Attributes:
      names: the streams.
      generated: whether the model chooses the tokens of its streams; otherwise all are given.
      flows: flows[source][reader]; None: the source never influences the reader. What a stream does
        to itself is not listed, so the diagonal is None.
    """

    names: tuple[str, ...]
    generated: bool
    flows: tuple[tuple[Flow | None, ...], ...]

    def flow(self, source: str, reader: str) -> Flow | None:
        """The influence of one stream on another, by name."""
        return self.flows[self.names.index(source)][self.names.index(reader)]

    def pairs(self) -> list[tuple[str, str, Flow | None]]:
        """(source, reader, flow) of all pairs of different streams, by source."""
        return [
            (source, reader, self.flows[a][b])
            for a, source in enumerate(self.names)
            for b, reader in enumerate(self.names)
            if a != b
        ]


def certificate(spec: StreamSpec, vocab_size: int = 0, *, generated: bool = True) -> Certificate:
    """Follows all paths between the streams.

    Args:
      spec: the streams and their edges.
      vocab_size: the number of tokens, with silence. 0: unknown, so that bits are as well.
      generated: whether the model chooses the tokens of streams other than inputs, as in
        generation. Otherwise all tokens are given, as in training and scoring.

    A lag that training draws counts with its smallest value.
    """
    spec = spec.with_least_lags()
    edges = _edges(spec, generated)
    latent_edges = {
        node: [(other, rows) for other, rows in others if node[0] == "H"]
        for node, others in edges.items()
    }
    capacity, streams = _capacities(spec, vocab_size, generated)
    flows = []
    for source in range(spec.size):
        rows, before = _fastest(edges, ("X", source))
        latent_rows, latent_before = _fastest(latent_edges, ("H", source))
        row: list[Flow | None] = []
        for reader in range(spec.size):
            end = ("P", reader)
            if reader == source or end not in rows:
                row.append(None)
            elif end in latent_rows:
                path = _path_names(spec, latent_before, end)
                row.append(Flow(rows[end], LATENT, None, path, ()))
            else:
                bits, cut = _smallest_cut(capacity, streams, source, reader)
                names = tuple(spec.names[s] for s in cut)
                row.append(Flow(rows[end], TOKENS, bits, _path_names(spec, before, end), names))
        flows.append(tuple(row))
    return Certificate(spec.names, generated, tuple(flows))


@functools.lru_cache(maxsize=64)
def latent_influence(spec: StreamSpec) -> np.ndarray:
    """[source, reader] bool: whether a path of latent edges leads to the reader's logits."""
    reached = (spec.lag_array < NEVER).T | np.eye(spec.size, dtype=bool)
    for through in range(spec.size):
        reached |= reached[:, through, None] & reached[through]
    of_states = reached.copy()
    for rule in spec.combine:
        reached[:, rule.stream] |= of_states[:, list(rule.sources)].any(1)
    return reached


def is_restricted(spec: StreamSpec) -> bool:
    """Whether some edge between two streams is `never` or goes through tokens."""
    others = ~np.eye(spec.size, dtype=bool)
    return bool((spec.lag_array[others] == NEVER).any())


def count_rows(rows: int) -> str:
    """A number of rows as text."""
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def table(found: Certificate) -> list[list[str]]:
    """A certificate as rows of texts, with a header: a row per source, a column per reader."""
    cells = [["source \\ reader", *found.names]]
    for a, source in enumerate(found.names):
        flows = found.flows[a]
        texts = [
            "-" if a == b else "never" if flow is None else str(flow)
            for b, flow in enumerate(flows)
        ]
        cells.append([source, *texts])
    return cells


def summary(spec: StreamSpec, vocab_size: int = 0) -> list[str]:
    """The certificate of generation in a few lines; none if all edges are latent.

    The lines name the pairs without influence, those with influence through tokens only, and those
    whose influence through other streams exceeds the edge between them.
    """
    if not is_restricted(spec):
        return []
    found = certificate(spec, vocab_size)
    lines = []
    never = [(a, b) for a, b, flow in found.pairs() if flow is None]
    if never:
        lines.append(f"flow: no influence: {_listed(f'{a} -> {b}' for a, b in never)}")
    by_bits: dict[str, list[str]] = {}
    for a, b, flow in found.pairs():
        if flow and flow.medium == TOKENS:
            bound = "" if flow.bits is None else f", at most {flow.how} a row"
            by_bits.setdefault(bound, []).append(f"{a} -> {b}")
    lines += [
        f"flow: through tokens only{bound}: {_listed(pairs)}" for bound, pairs in by_bits.items()
    ]
    indirect = []
    for a, b, flow in found.pairs():
        reader, source = spec.index(b), spec.index(a)
        is_latent = spec.lag[reader][source] < NEVER or (reader, source) in sources_of(spec.combine)
        expected = LATENT if is_latent else TOKENS
        gets_mail = any((rule.reader, rule.source) == (reader, source) for rule in spec.mail)
        if not gets_mail and spec.token_lag_array[reader, source] == NEVER and expected == TOKENS:
            expected = ""
        if flow and flow.medium != expected and expected != LATENT:
            through = ", ".join(flow.path[1:-1])
            indirect.append(f"{a} -> {b} through {through} ({flow.how})")
    if indirect:
        lines.append(f"flow: more than the edge between them: {_listed(indirect)}")
    return lines


def as_json(spec: StreamSpec, vocab_size: int = 0) -> dict[str, Any]:
    """Both certificates as values for JSON.

    Args:
      spec, vocab_size: as for `certificate`.

    Returns:
      {"streams", "kinds", "vocab_size", "passing", "generated", "given"}. `passing` is a list of
      {"source", "reader", "set", "tokens"} of the edges that only some tokens pass, besides
      silence. The last two are lists of {"source", "reader", "influence"} with, if there is an
      influence, the fields of `Flow`.
    """
    result: dict[str, Any] = {
        "streams": list(spec.names),
        "kinds": list(spec.kinds),
        "vocab_size": vocab_size or None,
        "passing": [
            {
                "source": spec.names[source],
                "reader": spec.names[reader],
                "set": one.name,
                "tokens": list(one.tokens),
            }
            for reader, source, one in spec.passing
        ],
    }
    for name, generated in (("generated", True), ("given", False)):
        result[name] = [
            {"source": a, "reader": b, "influence": flow is not None}
            | (flow._asdict() if flow else {})
            for a, b, flow in certificate(spec, vocab_size, generated=generated).pairs()
        ]
    return result


def _listed(texts: Iterable[str]) -> str:
    """At most `_SHOWN` of the texts, and the number of the others."""
    texts = list(texts)
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _edges(spec: StreamSpec, generated: bool) -> dict[Node, list[tuple[Node, int]]]:
    """{node: [(next node, rows)]} of X, H and P. Relays take no rows and are left out."""
    edges: dict[Node, list[tuple[Node, int]]] = collections.defaultdict(list)
    for s, kind in enumerate(spec.kinds):
        edges["X", s].append((("H", s), 0))
        edges["H", s].append((("P", s), 0))
        if generated and kind != "input":
            edges["P", s].append((("X", s), 1))
    for stream, source in sources_of(spec.combine):
        if source != stream:
            edges["H", source].append((("P", stream), 0))
    for rule in spec.mail if generated else ():
        edges["X", rule.source].append((("X", rule.reader), rule.lag))
    for node, lags in (("H", spec.lag_array), ("X", spec.token_lag_array)):
        for reader, source in np.argwhere(lags < NEVER).tolist():
            edges[node, source].append((("H", reader), int(lags[reader, source])))
    return edges


def _fastest(
    edges: Mapping[Node, Sequence[tuple[Node, int]]], start: Node
) -> tuple[dict[Node, int], dict[Node, Node]]:
    """The fewest rows from `start` to each node, and each node's predecessor on such a path.

    Among equally fast paths, those with the fewest edges are taken.
    """
    best: dict[Node, tuple[int, int]] = {start: (0, 0)}
    before: dict[Node, Node] = {}
    waiting = [(0, 0, start)]
    while waiting:
        rows, length, node = heapq.heappop(waiting)
        if (rows, length) > best[node]:
            continue
        for other, more in edges.get(node, ()):
            reached = rows + more, length + 1
            if other not in best or reached < best[other]:
                best[other], before[other] = reached, node
                heapq.heappush(waiting, (*reached, other))
    return {node: rows for node, (rows, _) in best.items()}, before


def _path_names(spec: StreamSpec, before: Mapping[Node, Node], node: Node) -> tuple[str, ...]:
    """The names of the streams on the path to a node."""
    streams = [node[1]]
    while node in before:
        node = before[node]
        if streams[-1] != node[1]:
            streams.append(node[1])
    return tuple(spec.names[s] for s in reversed(streams))


def _capacities(spec: StreamSpec, vocab_size: int, generated: bool) -> tuple[np.ndarray, list[int]]:
    """The graph through which bits flow.

    The nodes of stream s are H[s] (s), X[s] before (S + s) and after (2 S + s) the limit of one
    token per row, P[s] (3 S + s), and the relays that only some of its tokens pass.

    Returns:
      capacity [N, N] float64, the bits per row from one node to another; and the stream of each
      node.
    """
    size = spec.size
    streams = [*range(size)] * 4
    token = math.log2(vocab_size + 1) if vocab_size else _UNKNOWN
    edges = [(size + s, 2 * size + s, token) for s in range(size)]
    edges += [(2 * size + s, s, math.inf) for s in range(size)]
    edges += [(s, 3 * size + s, math.inf) for s in range(size)]
    edges += [(source, 3 * size + s, math.inf) for s, source in sources_of(spec.combine)]
    if generated:
        edges += [
            (3 * size + s, size + s, math.inf) for s in range(size) if spec.kinds[s] != "input"
        ]
        edges += [(2 * size + rule.source, size + rule.reader, math.inf) for rule in spec.mail]
    for reader, source in np.argwhere(spec.lag_array < NEVER).tolist():
        if reader != source:
            edges.append((source, reader, math.inf))
    seen: dict[Relay, int] = {}
    for relay in spec.relays:
        seen[relay] = 2 * size + relay.source
        if relay.passing is not None:
            symbols = len(relay.passing) + 2  # with silence, and an absent cell
            edges.append((seen[relay], len(streams), math.log2(symbols)))
            seen[relay] = len(streams)
            streams.append(relay.source)
    edges += [(seen[relay], reader, math.inf) for (reader, _), relay in spec.edge_relays.items()]
    capacity = np.zeros((len(streams), len(streams)))
    for start, end, bits in edges:
        capacity[start, end] = bits
    return capacity, streams


def _smallest_cut(
    capacity: np.ndarray, streams: Sequence[int], source: int, reader: int
) -> tuple[float | None, tuple[int, ...]]:
    """The smallest cut between two streams that no latent path connects.

    Args:
      capacity, streams: from `_capacities`.
      source, reader: the streams.

    Returns: its bits per row, or None if they are unknown; and the streams whose tokens it cuts.
    """
    size = streams.index(0, 1)
    # Everything in the source varies: its hidden states, and its tokens even if they are generated.
    capacity, start = np.pad(capacity, (0, 1)), len(capacity)
    capacity[start, [source, size + source]] = math.inf
    side = _source_side(capacity, start, 3 * size + reader)
    crossing = np.argwhere((capacity > 0) & side[:, None] & ~side).tolist()
    bits = sum(float(capacity[a, b]) for a, b in crossing)
    return bits if bits < _UNKNOWN else None, tuple(sorted({streams[a] for a, _ in crossing}))


def _source_side(capacity: np.ndarray, source: int, sink: int) -> np.ndarray:
    """[N] bool: the nodes on the source's side of a smallest cut (Edmonds and Karp's method).

    Args:
      capacity: [N, N] float64. Every path from the source to the sink has a finite capacity.
    """
    left = capacity.copy()
    while True:
        before = {source: source}
        waiting = collections.deque([source])
        while waiting and sink not in before:
            node = waiting.popleft()
            for other in np.flatnonzero(left[node] > _DUST).tolist():
                if other not in before:
                    before[other] = node
                    waiting.append(other)
        if sink not in before:
            return np.isin(np.arange(len(capacity)), list(before))
        path = [sink]
        while path[-1] != source:
            path.append(before[path[-1]])
        ends, starts = path[:-1], path[1:]
        least = left[starts, ends].min()
        left[starts, ends] -= least
        left[ends, starts] += least
