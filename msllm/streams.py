"""Streams and the visibility rule, which says which cells see which (docs/semantics.md).

The rule is `visible()`, a predicate on integers that runs on NumPy and JAX arrays. Every attention
backend, decoding and every picture of a mask derives from it. `Visibility` holds the arguments of
the predicate for attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from msllm.combine import Combine, check_edges, parse_combine
from msllm.config import Config, StreamsConfig, import_object
from msllm.errors import UserError
from msllm.groups import Group, Roster, expand
from msllm.mail import Mail, parse_mail

Array: TypeAlias = Any  # a NumPy array or a jax.Array: all functions here accept both

NEVER = 1 << 30  # a lag that no row can reach: the reader never sees the source
KINDS = ("input", "output", "thought")
PRESETS = ("block_causal", "same_row", "isolated")


def visible(
    q_row: int | Array,
    q_stream: int | Array,
    q_segment: int | Array,
    q_present: bool | Array,
    k_row: int | Array,
    k_stream: int | Array,
    k_segment: int | Array,
    k_seen: bool | Array,
    lag: int | Array,
) -> Array:
    """True where the cell (q_row, q_stream) sees the cell (k_row, k_stream).

    A cell sees itself, and every present cell of its segment that lies at least `lag` rows back.
    The arguments are integers unless noted, and broadcast against each other.

    Args:
      q_row, q_stream, q_segment: the query's row in the table, its stream and its segment.
      q_present: bool, whether the query's cell is present.
      k_row, k_stream, k_segment: the same for the key.
      k_seen: bool, whether the key's cell is present (and, with skip_silence, not silent).
      lag: lag[q_stream, k_stream]. The caller looks it up, because a gather inside a kernel is
        slow.

    Returns: bool, of the broadcast shape.
    """
    itself = (q_row == k_row) & (q_stream == k_stream)
    earlier = (k_row <= q_row - lag) & (q_segment == k_segment) & k_seen & q_present
    return itself | earlier


class Cells(NamedTuple):
    """What attention needs to know about the cells of a batch, apart from their contents."""

    row: Array  # [B, T] int32: row in the table
    segment: Array  # [B, T] int32: number of the packed example; 0: an empty row
    present: Array  # [B, T, S] bool: the cell exists
    seen: Array  # [B, T, S] bool: other cells may see it as a key


class Visibility(NamedTuple):
    """Everything that attention needs to decide which queries see which keys. A pytree.

    Attributes:
      queries: cells of the queries, [B, Tq] and [B, Tq, Sq].
      keys: cells of the keys, [B, Tk] and [B, Tk, Sk].
      lag: [S, S] int32, lag[reader, source] of all streams. Kernels that compile it in need a NumPy
        array.
      query_streams: [Sq] int32, the stream of each column of the queries. May be traced.
      key_offset: [] int32, the stream of the first column of the keys; the others follow in order.
        None: the keys belong to the queries' own streams. Backends can test for None at trace
        time.
    """

    queries: Cells
    keys: Cells
    lag: Array
    query_streams: Array
    key_offset: int | Array | None = 0

    @property
    def first_key_stream(self) -> int | Array:
        """The stream of the first column of the keys."""
        return self.query_streams[0] if self.key_offset is None else self.key_offset

    @property
    def key_streams(self) -> Array:
        """[Sk] int32, the stream of each column of the keys."""
        return self.first_key_stream + np.arange(self.keys.seen.shape[2], dtype=np.int32)

    def narrowed(self) -> Visibility:
        """A copy in which `lag` has only the columns of the keys, [S, Sk].

        Its `key_offset` is not None.
        """
        size = self.keys.seen.shape[2]
        if self.lag.shape[1] == size:
            return self._replace(key_offset=self.first_key_stream)
        import jax

        lag = jax.lax.dynamic_slice_in_dim(self.lag, self.first_key_stream, size, axis=1)
        return self._replace(lag=lag, key_offset=self.first_key_stream)

    def pair_lags(self) -> Array:
        """[Sq, Sk] int32, the lag from each column of the queries to each column of the keys."""
        lag = self.narrowed().lag
        return _array_module(lag, self.query_streams).asarray(lag)[self.query_streams]

    def mask(self) -> Array:
        """`visible()` for each query and each key, [B, Tq, Sq, Tk, Sk] bool.

        This materialises all pairs. Backends call it on small blocks only.
        """
        return visible(
            self.queries.row[:, :, None, None, None],
            self.query_streams[:, None, None],
            self.queries.segment[:, :, None, None, None],
            self.queries.present[:, :, :, None, None],
            self.keys.row[:, None, None, :, None],
            self.key_streams,
            self.keys.segment[:, None, None, :, None],
            self.keys.seen[:, None, None],
            self.pair_lags()[:, None, :],
        )


class TokenSet(NamedTuple):
    """The tokens that pass an edge, besides silence.

    Attributes:
      name: the key in `config.streams.token_sets`.
      tokens: ids, and the texts that `tokenizer.resolve_token_sets` has not replaced yet; sorted.
    """

    name: str
    tokens: tuple[int | str, ...]


class Relay(NamedTuple):
    """What the readers of an edge through tokens see of its source (msllm/model/relays.py).

    Attributes:
      source: the stream.
      passing: the tokens that pass, as in `TokenSet`; None: all. Others are seen as silence.
    """

    source: int
    passing: tuple[int | str, ...] | None


class DrawnLag(NamedTuple):
    """A lag that training draws for every batch, and that all these edges share.

    Attributes:
      edges: pairs (reader, source).
      medium: latent or tokens.
      values: the lags in rows, of which one is drawn. Where none is drawn, the first one holds.
    """

    edges: tuple[tuple[int, int], ...]
    medium: str
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """The S streams of a model: names, kinds, loss weights, lag matrix, delays and mail."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    loss_weights: tuple[float, ...]
    lag: tuple[tuple[int, ...], ...]  # lag[reader][source] in rows, or NEVER
    skip_silence: bool = False
    delays: tuple[int, ...] = ()  # rows by which each stream's data is shifted down
    # Like `lag`, for the edges through tokens; NEVER where there is none. Empty: there are none.
    token_lag: tuple[tuple[int, ...], ...] = ()
    mail: tuple[Mail, ...] = ()  # what is copied into input streams
    # Degrees by which the token embeddings of each stream are rotated. Empty: none are.
    rotations: tuple[float, ...] = ()
    # (reader, source, set) of the edges through tokens that only some tokens pass
    passing: tuple[tuple[int, int, TokenSet], ...] = ()
    combine: tuple[Combine, ...] = ()  # streams that are predicted from several streams
    combine_smoothing: float = 0.0  # part of their weights that is spread evenly
    groups: tuple[Group, ...] = ()  # the groups of streams that share their parameters
    identities: int = 0  # K, the number of vectors that tell the members of a group apart
    drawn_lags: tuple[DrawnLag, ...] = ()
    # The settings that `from_config` resolved; None: the spec was made in another way.
    settings: StreamsConfig | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def from_config(cls, config: StreamsConfig) -> StreamSpec:
        """Builds the spec from settings, and resolves the visibility preset. Imports no code.

        Raises UserError if a setting is invalid.
        """
        roster, entries = expand(config.names), len(config.names)
        names = roster.names
        if not names or len({*names, *roster.class_names}) != len(names) + len(roster.groups):
            raise UserError(
                f"config.streams.names is {config.names}: give at least one name, and each name"
                " once"
            )
        for field in ("kinds", "loss_weights", "delays", "rotations"):
            values = getattr(config, field)
            if len(values) != entries and (values or field == "kinds"):
                raise UserError(
                    f"config.streams.{field} has {len(values)} items: names has {entries}, give one"
                    " per stream"
                )
        for kind in config.kinds:
            if kind not in KINDS:
                raise UserError(
                    f"config.streams.kinds holds {kind!r}: must be one of {', '.join(KINDS)}"
                )
        weights = config.loss_weights or tuple(float(kind != "input") for kind in config.kinds)
        if any(w < 0 for w in weights) or not any(weights):
            raise UserError(
                f"config.streams.loss_weights is {weights}: must be >= 0, and one of them positive"
            )
        if any(d < 0 for d in config.delays):
            raise UserError(f"config.streams.delays is {config.delays}: must be >= 0 rows")
        _check_identities(config.identities, roster)
        kinds = roster.per_stream(config.kinds)
        edges = _config_lags(config, roster)
        has_token_edges = bool((edges.token_lag < NEVER).any())
        combine = parse_combine(config.combine, names, kinds, roster.groups)
        check_edges(combine, roster, config.lags, config.visibility_medium)
        return cls(
            names,
            kinds,
            roster.per_stream(weights),
            tuple(map(tuple, edges.lag.tolist())),
            config.skip_silence,
            roster.per_stream(config.delays) if config.delays else (0,) * len(names),
            tuple(map(tuple, edges.token_lag.tolist())) if has_token_edges else (),
            parse_mail(config.mail, names, kinds, roster.groups),
            roster.per_stream(config.rotations) if any(config.rotations) else (),
            edges.passing,
            combine,
            config.combine_smoothing if combine else 0.0,
            roster.groups,
            config.identities,
            edges.drawn,
            config,
        )

    @functools.cached_property
    def roster(self) -> Roster:
        """The names of the streams, with their groups."""
        return Roster(self.names, self.groups)

    @functools.cached_property
    def classes(self) -> tuple[int, ...]:
        """[S], the class of each stream. The members of a group are of one class."""
        return self.roster.classes

    @property
    def num_classes(self) -> int:
        """The number of classes: every stream in no group and every group is one."""
        return self.classes[-1] + 1

    @property
    def largest_group(self) -> int:
        """The number of members of the largest group; 0: there is none."""
        return max((group.size for group in self.groups), default=0)

    def with_least_lags(self) -> StreamSpec:
        """The spec in which every lag that is drawn has its smallest value."""
        if not self.drawn_lags:
            return self
        lag, token_lag = self.lag_array, self.token_lag_array
        for drawn in self.drawn_lags:
            readers, sources = zip(*drawn.edges)
            (token_lag if drawn.medium == "tokens" else lag)[readers, sources] = min(drawn.values)
        return dataclasses.replace(
            self,
            lag=tuple(map(tuple, lag.tolist())),
            token_lag=tuple(map(tuple, token_lag.tolist())) if self.token_lag else (),
            drawn_lags=(),
        )

    @property
    def size(self) -> int:
        """S, the number of streams."""
        return len(self.names)

    @property
    def lag_array(self) -> np.ndarray:
        """[S, S] int32, lag[reader, source]."""
        return np.array(self.lag, np.int32)

    @property
    def token_lag_array(self) -> np.ndarray:
        """[S, S] int32, the lags of the edges through tokens; NEVER where there is none."""
        if not self.token_lag:
            return np.full((self.size, self.size), NEVER, np.int32)
        return np.array(self.token_lag, np.int32)

    @property
    def nearest_lag_array(self) -> np.ndarray:
        """[S, S] int32, the lag from which a reader sees the tokens of a source by any edge."""
        return np.minimum(self.lag_array, self.token_lag_array)

    @property
    def prediction_lag_array(self) -> np.ndarray:
        """[S, S] int32, the lag from which a stream's prediction sees the tokens of a source.

        It is `nearest_lag_array`, except for streams that are predicted from others.
        """
        nearest = self.nearest_lag_array
        result = nearest.copy()
        np.fill_diagonal(nearest, 0)  # a source sees its own cell
        for rule in self.combine:
            result[rule.stream] = nearest[list(rule.sources)].min(0)
        return result

    @property
    def relays(self) -> tuple[Relay, ...]:
        """A relay for each stream that others see through tokens, and each set that passes."""
        found = set(self.edge_relays.values())
        return tuple(sorted(found, key=lambda relay: (relay.source, str(relay.passing or ""))))

    @functools.cached_property
    def edge_relays(self) -> dict[tuple[int, int], Relay]:
        """{(reader, source): relay} of the edges through tokens."""
        sets = {(reader, source): one.tokens for reader, source, one in self.passing}
        edges = np.argwhere(self.token_lag_array < NEVER).tolist()
        return {(r, s): Relay(s, sets.get((r, s))) for r, s in edges}

    def check_token_sets(self, vocab_size: int) -> None:
        """Raises UserError unless the tokens that pass are ids below `vocab_size`."""
        for name, tokens in dict.fromkeys(one for _, _, one in self.passing):
            for token in tokens:
                if isinstance(token, str):
                    raise UserError(
                        f"config.streams.token_sets[{name!r}] holds the text {token!r}, and no"
                        " tokenizer has turned it into an id: give ids, or call"
                        " msllm.tokenizer.resolve_token_sets(config, tokenizer) first"
                    )
                if token >= vocab_size:
                    raise UserError(
                        f"config.streams.token_sets[{name!r}] holds {token}: must be an id below"
                        f" {vocab_size}, the size of the vocabulary"
                    )

    @property
    def mail_settings(self) -> list[tuple[str, str, str, str]]:
        """The mail as in `config.streams.mail`."""
        return [rule.describe(self.names) for rule in self.mail]

    def index(self, name: str) -> int:
        """The index of the stream `name`. Raises UserError if there is none."""
        if name not in self.names:
            raise UserError(f"there is no stream {name!r}: {self.roster.describe()}")
        return self.names.index(name)

    def members(self, name: str) -> range:
        """The streams that a name means: one stream, or the members of a group.

        Raises UserError if there is neither.
        """
        group = None if name in self.names else self.roster.find_group(name)
        return group.members if group else range(index := self.index(name), index + 1)


def lag_matrix(visibility: str, size: int) -> np.ndarray:
    """The lag matrix [S, S] int32 of a preset.

    With `block_causal` a cell sees the earlier rows of all streams, with `same_row` also its own
    row of all streams, and with `isolated` only the earlier rows of its own stream.

    Raises UserError if there is no such preset.
    """
    if visibility == "block_causal":
        return np.ones((size, size), np.int32)
    if visibility == "same_row":
        return np.zeros((size, size), np.int32)
    if visibility == "isolated":
        return np.where(np.eye(size, dtype=bool), 1, NEVER).astype(np.int32)
    raise UserError(f"visibility is {visibility!r}: must be one of {', '.join(PRESETS)}")


def resolve_visibility(config: Config) -> Config:
    """Replaces a visibility function in a config by a preset and lags.

    `config.streams.visibility` may be an import path, `package.module:function`. The function gets
    the names and the kinds of the streams, and returns the lag matrix [S, S] (reader, source):
    numbers of rows >= 0, or "never". `config.streams.lags` overrides the function for the edges
    that it lists.

    Only `train`, `prepare`, `aot` and `flow` call this, on the config of a run. The config in a
    checkpoint therefore never names a function, and reading it runs no code.

    Raises UserError if the function cannot be imported, or returns anything else.
    """
    streams = config.streams
    if ":" not in streams.visibility:
        return config
    function = import_object(streams.visibility, "config.streams.visibility")
    StreamSpec.from_config(dataclasses.replace(streams, visibility=PRESETS[0]))  # checks the rest
    roster = expand(streams.names)
    kinds = roster.per_stream(streams.kinds)
    lag = _read_lags(function(roster.names, kinds), streams.visibility, roster.names)
    different = {preset: lag != lag_matrix(preset, len(lag)) for preset in PRESETS}
    # The preset that leaves the fewest edges to list.
    preset = min(PRESETS, key=lambda preset: different[preset].sum())
    lags = tuple(
        (
            roster.names[reader],
            roster.names[source],
            "never" if lag[reader, source] == NEVER else str(lag[reader, source]),
        )
        for reader, source in np.argwhere(different[preset])
    )
    resolved = dataclasses.replace(streams, visibility=preset, lags=lags + streams.lags)
    return dataclasses.replace(config, streams=resolved)


def _read_lags(matrix: Any, visibility: str, names: Sequence[str]) -> np.ndarray:
    """Converts what a visibility function returned to a lag matrix [S, S] int32.

    Raises UserError if it is not one.
    """
    setting, size = f"config.streams.visibility is {visibility!r}", len(names)
    remedy = f"return {size} x {size} lags (reader, source)"
    try:
        rows = [list(row) for row in matrix]
    except TypeError as error:
        raise UserError(f"{setting}: it returned {matrix!r}; {remedy}") from error
    if [len(row) for row in rows] != [size] * size:
        raise UserError(f"{setting}: it returned rows of {[len(row) for row in rows]}; {remedy}")
    lag = np.empty((size, size), np.int32)
    for reader, source in np.ndindex(size, size):
        value = rows[reader][source]
        is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (is_number and value >= 0 or isinstance(value, str) and value == "never"):
            raise UserError(
                f"{setting}: its lag from {names[reader]!r} to {names[source]!r} "
                f"is {value!r}; return a number of rows >= 0, or 'never'"
            )
        lag[reader, source] = min(value, NEVER) if is_number else NEVER
    return lag


class _Edges(NamedTuple):
    """The edges of `StreamsConfig`, in the form of `StreamSpec`."""

    lag: np.ndarray
    token_lag: np.ndarray
    passing: tuple[tuple[int, int, TokenSet], ...]
    drawn: tuple[DrawnLag, ...]


def _config_lags(config: StreamsConfig, roster: Roster) -> _Edges:
    """The lags of a preset with the edges that differ from it, latent and through tokens.

    A pair has a lag in one of the two matrices at most. Raises UserError if the settings are
    invalid.
    """
    if ":" in config.visibility:
        raise UserError(
            f"config.streams.visibility is {config.visibility!r}: a function, which only a run's"
            " own config may name; call msllm.streams.resolve_visibility(config) first"
        )
    lag = lag_matrix(config.visibility, len(roster.names))
    token_lag = np.full_like(lag, NEVER)
    sets = _token_sets(config)
    passing: dict[tuple[int, int], TokenSet] = {}
    drawn: dict[tuple[int, int], int] = {}  # the setting from which the edge has a drawn lag
    medium, _, chosen = config.visibility_medium.partition(":")
    if medium == "tokens":
        others = ~np.eye(len(lag), dtype=bool)
        token_lag[others], lag[others] = lag[others], NEVER
        if config.visibility_medium != medium:
            one = _find_set(sets, chosen, "visibility_medium", config.visibility_medium)
            for reader, source in np.argwhere(token_lag < NEVER).tolist():
                passing[reader, source] = one
    elif config.visibility_medium != "latent":
        raise UserError(
            f"config.streams.visibility_medium is {config.visibility_medium!r}: must be latent or"
            " tokens, or tokens:SET for the tokens of a set"
        )
    for number, (reader, source, value) in enumerate(config.lags):
        pairs = roster.pairs(reader, source, "config.streams.lags")
        rows, how = _parse_lag(value)
        medium, _, chosen = how.partition(":")
        if medium == "tokens" and any(a == b for a, b in pairs):
            raise UserError(
                f"config.streams.lags holds {value!r} from {reader!r} to itself: a stream sees its"
                " own cells, so this edge is latent"
            )
        one = _find_set(sets, chosen, "lags", value) if how != medium else None
        for edge in pairs:
            lag[edge] = token_lag[edge] = NEVER
            for found in (passing, drawn):
                found.pop(edge, None)
            if rows:
                (token_lag if medium == "tokens" else lag)[edge] = rows[0]
            if len(rows) > 1:
                drawn[edge] = number
            if one is not None:
                passing[edge] = one
    numbers = dict.fromkeys(sorted(drawn.values()))
    return _Edges(
        lag,
        token_lag,
        tuple((r, s, one) for (r, s), one in sorted(passing.items())),
        tuple(_drawn_lag(config.lags[n][2], [e for e in drawn if drawn[e] == n]) for n in numbers),
    )


def _parse_lag(value: str) -> tuple[tuple[int, ...], str]:
    """The rows of a lag, none for never, and its medium as text. Raises UserError."""
    text, _, how = value.partition(" ")
    rows = text.split("|")
    is_medium = how in ("", "latent") or how.partition(":")[0] == "tokens"
    if value == "never":
        return (), ""
    if not (is_medium and all(part.isdecimal() and part.isascii() for part in rows)):
        raise UserError(
            f"config.streams.lags holds lag {value!r}: must be a number of rows >= 0, or several"
            " to draw from, such as '1|2|4', or the same with the medium, such as '1 tokens' or"
            " '1 tokens:SET', or 'never'"
        )
    return tuple(min(int(part), NEVER) for part in rows), how


def _drawn_lag(value: str, edges: list[tuple[int, int]]) -> DrawnLag:
    """The draw of a setting for these edges. Raises UserError if it has lags without end."""
    values, how = _parse_lag(value)
    if max(values) >= NEVER:
        raise UserError(
            f"config.streams.lags holds lag {value!r}: lags that are drawn must be below {NEVER}"
            " rows; leave that one out"
        )
    return DrawnLag(tuple(sorted(edges)), how.partition(":")[0] or "latent", values)


def _check_identities(identities: int, roster: Roster) -> None:
    """Raises UserError unless there are identities for all members of a group."""
    if identities and not roster.groups:
        raise UserError(
            f"config.streams.identities is {identities}: they are for groups, and there is none in"
            f" {', '.join(roster.names)}; name a group, such as 'thread * 8', or set it to 0"
        )
    for group in roster.groups:
        if 0 < identities < group.size:
            raise UserError(
                f"config.streams.identities is {identities}, and the group {group.name!r} has"
                f" {group.size} members: each needs an identity of its own; use at most"
                f" {identities} members, or train with more identities"
            )


def _token_sets(config: StreamsConfig) -> dict[str, TokenSet]:
    """The sets of `config.token_sets` by name. Raises UserError if one is invalid."""
    found = {}
    for name, tokens in config.token_sets.items():
        setting = f"config.streams.token_sets[{name!r}]"
        if not name or not tokens:
            raise UserError(f"{setting} is {tokens!r}: give a name, and one token or more")
        for token in tokens:
            is_text, is_id = isinstance(token, str) and token, type(token) is int and token >= 0
            if not (is_text or is_id):
                raise UserError(f"{setting} holds {token!r}: must be texts, or ids >= 0")
        ids = sorted(set(tokens), key=lambda token: (isinstance(token, str), token))
        found[name] = TokenSet(name, tuple(ids))
    return found


def _find_set(sets: Mapping[str, TokenSet], name: str, setting: str, value: str) -> TokenSet:
    if name not in sets:
        raise UserError(
            f"config.streams.{setting} holds {value!r}: there is no set {name!r} in"
            f" config.streams.token_sets ({', '.join(sets) or 'it is empty'}); name one that is"
        )
    return sets[name]


def pad_lag(lag: np.ndarray, size: int) -> np.ndarray:
    """Appends absent streams to a lag matrix, [size, size].

    They see no other stream, and no other stream sees them.
    """
    missing = size - lag.shape[0]
    return np.pad(lag, (0, missing), constant_values=NEVER) if missing else lag


def make_cells(present: Array, segment: Array, silent: Array | None = None) -> Cells:
    """The Cells of tables that start at row 0.

    Args:
      present: [B, T, S] bool.
      segment: [B, T] int32; rows of segment 0 count as absent.
      silent: [B, T, S] bool, cells that other cells do not see even if they are present
        (skip_silence); None: no such cells.
    """
    present = present & (segment > 0)[:, :, None]
    rows = np.broadcast_to(np.arange(segment.shape[1], dtype=np.int32), segment.shape)
    return Cells(rows, segment, present, present if silent is None else present & ~silent)


def positions(segment: Array) -> Array:
    """RoPE positions [B, T] int32: the row within its segment. A segment is a run of equal ids."""
    xp = _array_module(segment)
    row = xp.arange(segment.shape[1], dtype=np.int32)[None, :]
    start = xp.concatenate(
        [xp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1
    )
    return row - _cumulative_max(xp.where(start, row, 0), axis=1)


def target_mask(present: Array, segment: Array) -> Array:
    """Which cells predict their stream's cell in the next row, [B, T, S] bool.

    A cell does if both cells are present and in the same segment.

    Args:
      present: [B, T, S] bool.
      segment: [B, T] int32.
    """
    xp = _array_module(present)
    present = present & (segment > 0)[:, :, None]
    both = present[:, :-1] & present[:, 1:] & (segment[:, :-1] == segment[:, 1:])[:, :, None]
    return xp.concatenate([both, xp.zeros_like(present[:, :1])], axis=1)


def visibility_table(cells: Cells, lag: np.ndarray, batch: int = 0) -> np.ndarray:
    """The visibility of one table, [T, S, T, S] bool: query row and stream, key row and stream.

    For tests and pictures.

    Args:
      cells: the cells of B tables.
      lag: [S, S] int.
      batch: the index of the table.
    """
    table = Cells(*(np.asarray(x)[batch : batch + 1] for x in cells))
    return Visibility(table, table, np.asarray(lag), np.arange(lag.shape[0])).mask()[0]


def _array_module(*arrays: Array) -> Any:
    """numpy if all arrays are NumPy arrays, otherwise jax.numpy."""
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np
    import jax.numpy as jnp  # here, because data preparation runs without jax

    return jnp


def _cumulative_max(array: Array, axis: int) -> Array:
    if isinstance(array, np.ndarray):
        return np.maximum.accumulate(array, axis=axis)
    import jax

    return jax.lax.cummax(array, axis=axis)
