"""Every setting of msllm: frozen dataclasses for the program, a ConfigDict for people.

A file in `configs/` calls `default_config()`, changes values and returns the ConfigDict (of
ml_collections). The command line may override any value (`--config.optim.lr=1e-3`).
`from_config_dict` then converts the ConfigDict to a `Config`. The dataclasses below are the only
place that defines the settings, their defaults and their meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import json
import math
import operator
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from msllm.errors import UserError
from msllm.groups import expand


def _import_path(default: Any = "") -> Any:
    """A setting that may name code by its import path, or a tuple of such names."""
    return dataclasses.field(default=default, metadata={"import_path": True})


def _path(default: Any = "") -> Any:
    """A setting that is a path, or a tuple of paths. A leading `~` is expanded."""
    return dataclasses.field(default=default, metadata={"path": True})


INPUT_ONLY = ("full", "offload")  # remat policies that save only a layer's input


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Scaling of the rotary frequencies for contexts longer than those trained on."""

    # none | linear (all frequencies / factor) | llama3, yarn (only low frequencies / factor)
    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: below this many turns per context, divide by factor
    high_freq_factor: float = 4.0  # llama3: above this many turns, keep the frequency
    beta_fast: float = 32.0  # yarn: above this many turns per context, keep the frequency
    beta_slow: float = 1.0  # yarn: below this many turns, divide by factor
    # yarn: multiplies every rotated query and key; 0: 0.1 ln(factor) + 1, as in the paper
    attention_factor: float = 0.0
    original_max_position: int = 8192  # llama3, yarn: rows of the context trained on


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of the decoder: Qwen3 by default; options turn it into Llama or Qwen2.5."""

    vocab_size: int = 0  # V; 0: the tokenizer's size
    d_model: int = 256  # D: width of the hidden states
    num_layers: int = 4
    num_heads: int = 4  # N: query heads
    num_kv_heads: int = 2  # K: key and value heads; must divide num_heads
    head_dim: int = 64  # H: width of a head; must be even
    d_ff: int = 768  # F: width of the feed-forward layer
    tie_embeddings: bool = True  # use the token embedding as the output head
    qk_norm: bool = True  # RMSNorm on every head of q and k (Qwen3)
    attention_bias: bool = False  # bias on the q, k and v projections (Qwen2.5)
    stream_embedding: bool = True  # add a learned vector per stream to the token embedding
    norm_eps: float = 1e-6  # added to the mean square inside RMSNorm
    rope_theta: float = 1e6  # base of the rotary frequencies
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    # the class of the layers: package.module:Class (docs/extending/layer.md); empty: attention and
    # MLP as in Qwen3
    block: str = _import_path()
    # dtype of activations and matrix products: float32 | bfloat16; parameters are always float32
    compute_dtype: str = "float32"
    # auto (chosen for the device) | splash (TPU) | gpu | cpu | chunked (any device) |
    # reference (any device; memory O(L^2), for tests)
    attention: str = "auto"
    # number of parts, along the kv heads, in which keys and values are gathered over the stream
    # axis; more parts need less memory; must divide num_kv_heads
    kv_parts: int = 1
    # pass keys and values around the devices of the stream axis instead of gathering them
    kv_ring: bool = False
    # saved for the backward pass: none = everything; dots = matmul and attention outputs;
    # full = the layer's input; offload = the layer's input, in the host's memory
    remat: str = "dots"


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """Names, kinds and visibility of the S streams.

    An entry of `names` may be a group of interchangeable streams, such as "thread * 8" for
    thread.0, ..., thread.7 (docs/groups.md). Settings "per stream" then have one item per entry.
    """

    names: tuple[str, ...] = ("user", "thought", "output")
    kinds: tuple[str, ...] = ("input", "thought", "output")  # per stream: input | thought | output
    # number of learned vectors that tell the members of a group apart; every training example draws
    # distinct ones; 0: none, members are exactly interchangeable
    identities: int = 0
    # per stream, its weight in the loss; empty: 0 for inputs, 1 for the others
    loss_weights: tuple[float, ...] = ()
    # the lag of every edge: block_causal (1 row) | same_row (0 rows) | isolated (own stream only) |
    # package.module:function (docs/extending/visibility.md)
    visibility: str = _import_path("block_causal")
    # what the edges of `visibility` between two streams carry: latent | tokens | tokens:SET
    # (docs/design.md)
    visibility_medium: str = "latent"
    # edges that differ from `visibility`, as (reader, source, lag); lag: "3" (rows), "3 tokens"
    # (through tokens), "3 tokens:SET" (the tokens of a set pass) or "never"; "1|2|4" in place of a
    # number is drawn for every training batch, and elsewhere the first; reader and source may be
    # groups, and members such as thread@0 or, for sources, thread@i+1 (docs/groups.md)
    lags: tuple[tuple[str, str, str], ...] = ()
    # {SET: tokens that pass an edge}; each is a text that is one token, or an id (docs/flow.md)
    token_sets: Mapping[str, tuple[str | int, ...]] = dataclasses.field(default_factory=dict)
    skip_silence: bool = False  # other cells do not see silent cells
    # per stream, the number of rows by which the data is shifted down; empty: 0
    delays: tuple[int, ...] = ()
    # cells of input streams that copy what another stream said, as (input, source, lag, rows); lag:
    # "1" or more rows; rows: "5", "5:12", "5:12:2", "5:", or several with commas
    # (docs/semantics.md)
    mail: tuple[tuple[str, str, str, str], ...] = ()
    # per stream, the angle in degrees by which its token embeddings are rotated, a fixed mark of
    # the stream beside or in place of its learned vector (ASIDE, arXiv 2503.10566); empty: 0
    rotations: tuple[float, ...] = ()
    # streams whose next token follows from several streams, as (stream, mode, sources); mode: own |
    # mixture | product; sources: names with commas between (docs/semantics.md)
    combine: tuple[tuple[str, str, str], ...] = ()
    # part of the weights of `combine` that is spread evenly over the sources
    combine_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that `prepare` trains or loads."""

    # a sentencepiece .model or a tokenizers .json; empty: train one on the corpus
    path: str = _path()
    model_type: str = "bpe"  # of a trained tokenizer: bpe | unigram | word | char
    # of a trained tokenizer: at most this many pieces; 0: a number that fits the corpus
    vocab_size: int = 0
    silence: str = "<silence>"  # the piece that means "this stream says nothing now"
    # of a trained tokenizer: further control pieces; no text encodes to them
    reserved: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class VaryConfig:
    """Random changes to converted examples. Each example draws one of the values of a setting."""

    lead: tuple[int, ...] = (0,)  # silent rows before the example
    pause_percent: float = 0.0  # percent of the rows before which all streams pause
    pause_rows: tuple[int, ...] = (1,)  # lengths of a pause, in rows
    permute: tuple[str, ...] = ()  # streams whose contents change places at random
    # values to draw in place of streams.delays, each with one number of rows per stream
    delays: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Several prepared directories to train on, with the same streams, rows and tokenizer."""

    dirs: tuple[str, ...] = _path(())  # one directory per source; empty: data.dir alone
    names: tuple[str, ...] = ()  # names of the sources in metrics; empty: the directories' names
    # per source, its share of the counted tokens; the shares need not sum to 1
    weights: tuple[float, ...] = ()
    # new weights from a step on, as (step, weights) pairs
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
    # streams whose tokens count, silence excepted; empty: all streams
    streams: tuple[str, ...] = ()

    @property
    def source_names(self) -> tuple[str, ...]:
        """The name of each source: as given, or the name of its directory."""
        return self.names or tuple(pathlib.PurePath(path).name for path in self.dirs)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tables come from and how they are packed and batched (docs/data.md)."""

    # prepared data: `prepare` writes it; `train` reads it unless there is a mixture
    dir: str = _path()
    mixture: MixtureConfig = MixtureConfig()
    converter: str = _import_path()  # a name from docs/data.md, or package.module:function
    path: str = _path()  # input of the converter: a file or a glob
    # format of the input (msllm/data/sources.py), or package.module:function of a reader; empty:
    # inferred from the file names
    format: str = _import_path()
    # input of the held-out split; `path` is then training data only; empty: part of `path`
    eval_path: str = _path()
    eval_format: str = _import_path()  # format of eval_path, like `format`
    bad_percent: float = 0.0  # skip bad records up to this percentage; more are an error
    # options of the converter
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # streams that the converter writes, which include streams.names; empty: exactly those
    streams: tuple[str, ...] = ()
    vary: VaryConfig = VaryConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    rows: int = 512  # T: rows of a packed table
    batch_size: int = 8  # B: tables per step, over all hosts
    eval_percent: float = 5.0  # percent of the examples that are held out
    split: str = "hash"  # hold out by: hash (of each example) | tail (the end of the input)
    max_examples: int = 0  # use only this many examples, from the start; 0: all
    shards: int = 4  # files per split; a large input gets more
    seed: int = 0  # seed of the order of the tables
    prefetch: int = 4  # batches that the loader prepares ahead; 0: none


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate schedule."""

    # adamw | muon, or package.module:function (docs/extending/optimizer.md)
    optimizer: str = _import_path("adamw")
    lr: float = 1e-3  # peak learning rate
    # after the warm-up: cosine | wsd (constant, then linear decay) | constant
    schedule: str = "cosine"
    warmup_steps: int = 100  # steps of linear warm-up
    decay_fraction: float = 0.2  # wsd: the fraction of the steps in which it decays
    final_lr_ratio: float = 0.1  # cosine, wsd: the final learning rate as a fraction of lr
    b1: float = 0.9  # decay of the first moment; 0.95 is usual for muon
    b2: float = 0.95  # decay of Adam's second moment
    eps: float = 1e-8  # added to the square root of the second moment
    weight_decay: float = 0.1
    # no weight decay for parameters whose path contains one of these
    no_decay: tuple[str, ...] = ("norm", "bias", "stream_embedding")
    # learning rate of the stream embedding, as a multiple of lr
    stream_embedding_lr: float = 5.0
    # learning rate of the silence token's rows in the embedding and the head, as a multiple of lr
    silence_lr: float = 1.0
    clip_norm: float = 1.0  # clip the gradient to this global norm; 0: no clipping
    accumulate: int = 1  # micro-batches per step; must divide data.batch_size
    # stop after this many skipped updates in a row (loss or gradient not finite)
    max_skipped: int = 10


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Next-row cross-entropy and its options."""

    # what training minimises: empty = next-row cross-entropy with the options below; or
    # package.module:function (docs/extending/objective.md)
    objective: str = _import_path()
    label_smoothing: float = 0.0  # probability spread evenly over the vocabulary
    z_loss: float = 0.0  # weight of logsumexp(logits)^2
    chunk_tokens: int = 2048  # number of cells whose logits exist at a time
    # number of parts in which the head is gathered; more than 1 needs less memory, but computes
    # the logits twice
    vocab_chunks: int = 1


@dataclasses.dataclass(frozen=True)
class PenaltyConfig:
    """A term that training adds to the loss, and that sees a whole batch."""

    # package.module:function (docs/extending/penalty.md); empty: no penalty
    function: str = _import_path()
    weight: float = 1.0  # factor of the penalty in the loss
    # options of the function
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: all remaining devices."""

    data: int = -1  # replicas
    fsdp: int = 1  # shards parameters and optimizer state
    stream: int = 1  # shards activations by stream
    tensor: int = 1  # shards heads, ffn and vocabulary


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: int = 1000  # steps between checkpoints; 0: only at the end
    every_minutes: float = 0.0  # also save after this many minutes; 0: off
    # a directory on each host's own disk, such as /mnt/ssd, for additional, faster checkpoints;
    # empty: none
    local_dir: str = _path()
    local_every: int = 100  # steps between checkpoints in local_dir; the last two are kept
    keep_last: int = 3  # number of most recent checkpoints to keep
    keep_every: int = 0  # also keep every checkpoint at a multiple of this step; 0: none


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """Logging and profiling options."""

    # report steps slower than this multiple of the median, with the process that was late
    slow_step: float = 5.0
    examples: bool = False  # log the ids of every step's examples in WORKDIR/examples
    # first step of a profiler trace (XProf), written to WORKDIR/profile; 0: no trace
    profile_start: int = 0
    profile_steps: int = 3  # number of steps to trace
    wandb_project: str = ""  # also write metrics to this Weights & Biases project; empty: off
    # where metrics go: jsonl, tensorboard, wandb, or package.module:Class
    # (docs/extending/metrics_writer.md)
    writers: tuple[str, ...] = _import_path(("jsonl", "tensorboard"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    steps: int = 1000  # optimizer steps
    seed: int = 0  # seed of the initial parameters
    # a checkpoint to take the initial parameters from (docs/weights.md); empty: random parameters
    init_from: str = _path()
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 500  # steps between evaluations; 0: never
    # number of held-out batches to evaluate, spread evenly over the split; 0: all
    eval_batches: int = 0
    # what to evaluate: held_out (losses), or package.module:function (docs/extending/evaluation.md)
    evaluations: tuple[str, ...] = _import_path(("held_out",))
    model: ModelConfig = ModelConfig()
    streams: StreamsConfig = StreamsConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    # directory of compiled programs; auto: WORKDIR/compiled; none: compile on every start
    compilation_cache: str = _path("auto")

    def __post_init__(self) -> None:
        _validate(self)


def default_config() -> ml_collections.ConfigDict:
    """Returns all defaults as a locked ConfigDict, in which a misspelt key raises an error."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """Converts a Config to a ConfigDict, the form that people edit."""

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return ml_collections.ConfigDict(fields)
        if isinstance(value, Mapping):
            return ml_collections.ConfigDict(dict(value))
        return value

    return convert(config).lock()


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Converts a ConfigDict or nested dicts to a frozen, validated Config.

    Raises UserError, which names the key, the value and the rule that it breaks.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    return _from_dict(Config, settings, "config")


def to_json(config: Config) -> str:
    """Returns the config as JSON; `from_config_dict(json.loads(...))` gives an equal one."""
    return json.dumps(to_config_dict(config).to_dict(), indent=2, sort_keys=True)


def import_object(path: str, setting: str) -> Any:
    """Imports the class or function that `package.module:name` names.

    Args:
      path: the import path.
      setting: the name of the setting that holds the path, for messages.

    Raises UserError if the object cannot be imported, or is not callable.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{setting} is {path!r}: cannot be imported ({error}); give package.module:name"
        ) from error
    if not callable(found):
        raise UserError(f"{setting} is {path!r}: {found!r} is neither a function nor a class")
    return found


def find_object(name: str, built_in: Mapping[str, Any], setting: str) -> Any:
    """Returns the entry `name` of a table of built-in objects, or imports `package.module:name`.

    Raises UserError, which names the setting and the entries, if there is neither.
    """
    if ":" in name:
        return import_object(name, setting)
    if name not in built_in:
        raise UserError(
            f"{setting} is {name!r}: must be one of {', '.join(built_in)}, or package.module:name"
        )
    return built_in[name]


# Former names of values, which existing configs, checkpoints and exports may still hold.
_FORMER_VALUES = {"config.model.attention": {"native": "cpu"}}


def code_named_by(config: Any, setting: str = "config") -> dict[str, str]:
    """Returns the import paths in a config that point outside of msllm.

    Reading someone else's config must not run such code. Readers call this function before they
    import what a setting names.

    Args:
      config: a `Config` or a section of one.
      setting: the name of the section, for the result.

    Returns: {setting: import paths}, e.g. {"config.model.block": "mine:Block"}, separated by ", ".
    """
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{setting}.{field.name}"
        if dataclasses.is_dataclass(value):
            found |= code_named_by(value, name)
        elif field.metadata.get("import_path"):
            paths = (value,) if isinstance(value, str) else value
            foreign = [path for path in paths if ":" in path and not _belongs_to_msllm(path)]
            if foreign:
                found[name] = ", ".join(foreign)
    return found


def _belongs_to_msllm(path: str) -> bool:
    return path.partition(":")[0].split(".")[0] == "msllm"


def setting_type(path: str) -> Any:
    """Returns the declared type of a setting.

    Args:
      path: the dotted path without "config.", e.g. "optim.lr". Below free-form options, any path is
        a setting of type Any.

    Raises UserError if there is no such setting.
    """
    hint: Any = Config
    done = "config"
    for key in path.split("."):
        if typing.get_origin(hint) is not None and issubclass(typing.get_origin(hint), Mapping):
            return Any
        if not dataclasses.is_dataclass(hint):
            raise UserError(f"unknown config key {done}.{key}: {done} is not a section")
        hints = typing.get_type_hints(hint)
        _check_key(key, hints, done)
        hint, done = hints[key], f"{done}.{key}"
    return hint


def _check_key(key: str, known: Mapping[str, Any], path: str) -> None:
    """Raises UserError if a section has no such key."""
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {path}.{close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"unknown config key {path}.{key}: {hint}")


def _from_dict(cls: type, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        _check_key(key, hints, path)
    converted = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value = _convert(hints[field.name], values[field.name], f"{path}.{field.name}")
        converted[field.name] = _expand_home(value) if field.metadata.get("path") else value
    return cls(**converted)


def _expand_home(paths: Any) -> Any:
    """Replaces a leading `~` by the home directory, in a path or in each path of a tuple."""
    if isinstance(paths, tuple):
        return tuple(map(_expand_home, paths))
    return os.path.expanduser(paths)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Converts a value to the type that its field declares. Raises UserError if it cannot."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {value!r}: it is a section, set its keys instead")
        return _from_dict(hint, value, path)
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(typing.get_args(hint), value, path)
    if typing.get_origin(hint) is types.UnionType:
        kinds = typing.get_args(hint)
        if type(value) in kinds:
            return value
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{path} is {value!r}: expected {names}, got {type(value).__name__}")
    if typing.get_origin(hint) is not None:
        return _convert_mapping(typing.get_args(hint)[1], value, path)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise UserError(f"{path} is {value!r}: too large for a float") from error
    if type(value) is not hint:
        raise UserError(
            f"{path} is {value!r}: expected {hint.__name__}, got {type(value).__name__}"
        )
    return _FORMER_VALUES.get(path, {}).get(value, value)


def _convert_mapping(hint: Any, values: Any, path: str) -> dict[str, Any]:
    """Converts the values of a mapping to the type `hint`; Any: free-form options."""
    if hint is Any:
        return dict(values)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is {values!r}: expected names with their values")
    return {key: _convert(hint, value, f"{path}.{key}") for key, value in values.items()}


def _convert_tuple(hints: tuple[Any, ...], value: Any, path: str) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise UserError(f"{path} is {value!r}: expected a tuple")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise UserError(f"{path} is {value!r}: expected {len(hints)} items")
    return tuple(
        _convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value))
    )


# Validation: the rules that need no device, no data and no tokenizer.

_CHOICES = {
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "splash", "gpu", "cpu", "chunked", "reference"),
    "model.remat": ("none", "dots", "full", "offload"),
    "model.rope_scaling.kind": ("none", "linear", "llama3", "yarn"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "data.tokenizer.model_type": ("bpe", "unigram", "word", "char"),
    "data.split": ("hash", "tail"),
}
# The range of every number in the config; for a tuple, the range of each item.
_POSITIVE, _NOT_NEGATIVE = "(0, inf)", "[0, inf)"
_COUNT, _COUNT_OR_ZERO = "[1, 2147483648)", "[0, 2147483648)"  # the devices count in int32
_SEED = "[0, 4294967296)"
_RANGES = {
    "steps": _COUNT,
    "seed": _SEED,
    "log_every": _COUNT,
    "eval_every": _COUNT_OR_ZERO,
    "eval_batches": _COUNT_OR_ZERO,
    "model.vocab_size": _COUNT_OR_ZERO,
    "model.d_model": _COUNT,
    "model.num_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.num_kv_heads": _COUNT,
    "model.head_dim": _COUNT,
    "model.d_ff": _COUNT,
    "model.norm_eps": _NOT_NEGATIVE,
    "model.rope_theta": _POSITIVE,
    "model.rope_scaling.factor": _POSITIVE,
    "model.rope_scaling.low_freq_factor": _POSITIVE,
    "model.rope_scaling.high_freq_factor": _POSITIVE,
    "model.rope_scaling.beta_fast": _POSITIVE,
    "model.rope_scaling.beta_slow": _POSITIVE,
    "model.rope_scaling.attention_factor": _NOT_NEGATIVE,
    "model.rope_scaling.original_max_position": _COUNT,
    "model.kv_parts": _COUNT,
    "streams.identities": "[0, 4096]",
    "streams.loss_weights": _NOT_NEGATIVE,
    "streams.delays": _COUNT_OR_ZERO,
    "streams.token_sets": _COUNT_OR_ZERO,
    "streams.rotations": "[0, 360)",
    "streams.combine_smoothing": "[0, 1)",
    "data.mixture.weights": _NOT_NEGATIVE,
    "data.mixture.schedule": _NOT_NEGATIVE,
    "data.bad_percent": "[0, 100)",
    "data.vary.lead": _COUNT_OR_ZERO,
    "data.vary.pause_percent": "[0, 100]",
    "data.vary.pause_rows": _COUNT_OR_ZERO,
    "data.vary.delays": _COUNT_OR_ZERO,
    "data.tokenizer.vocab_size": _COUNT_OR_ZERO,
    "data.rows": "[2, 2147483648)",  # each row predicts the next
    "data.batch_size": _COUNT,
    "data.eval_percent": "[0, 100)",
    "data.max_examples": _NOT_NEGATIVE,
    "data.shards": "[1, 100000)",  # names of shards have five digits
    "data.seed": _SEED,
    "data.prefetch": "[0, 1000]",  # batches in memory
    "optim.lr": _POSITIVE,
    "optim.warmup_steps": _COUNT_OR_ZERO,
    "optim.decay_fraction": "(0, 1]",
    "optim.final_lr_ratio": "[0, 1]",
    "optim.b1": "[0, 1)",
    "optim.b2": "[0, 1)",
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.stream_embedding_lr": _NOT_NEGATIVE,
    "optim.silence_lr": _NOT_NEGATIVE,
    "optim.clip_norm": _NOT_NEGATIVE,
    "optim.accumulate": _COUNT,
    "optim.max_skipped": _COUNT,
    "loss.label_smoothing": "[0, 1)",
    "loss.z_loss": _NOT_NEGATIVE,
    "loss.chunk_tokens": _COUNT,
    "loss.vocab_chunks": _COUNT,
    "penalty.weight": _NOT_NEGATIVE,
    "mesh.data": "[-1, 2147483648)",  # and not 0, see _validate_mesh
    "mesh.fsdp": "[-1, 2147483648)",
    "mesh.stream": "[-1, 2147483648)",
    "mesh.tensor": "[-1, 2147483648)",
    "checkpoint.every": _COUNT_OR_ZERO,
    "checkpoint.every_minutes": _NOT_NEGATIVE,
    "checkpoint.local_every": _COUNT,
    "checkpoint.keep_last": _COUNT,
    "checkpoint.keep_every": _COUNT_OR_ZERO,
    "monitor.slow_step": "(1, inf)",
    "monitor.profile_start": _COUNT_OR_ZERO,
    "monitor.profile_steps": _COUNT,
}


def _validate(config: Config) -> None:
    """Raises UserError for the first setting that breaks a rule."""
    for path, choices in _CHOICES.items():
        rule = f"must be one of {', '.join(choices)}"
        _require(config, path, operator.attrgetter(path)(config) in choices, rule)
    for path, interval in _RANGES.items():
        numbers = _numbers(operator.attrgetter(path)(config))
        outside = next((x for x in numbers if not is_inside(x, interval)), None)
        rule = "" if outside is None else f"must be {describe_interval(interval, outside)}"
        _require(config, path, outside is None, rule)
    _validate_model(config)
    _validate_data(config)
    _validate_tokenizer(config)
    _validate_vary(config)
    _validate_mixture(config)
    _validate_training(config)
    _validate_mesh(config)


def _require(config: Config, path: str, ok: Any, rule: str) -> None:
    """Raises UserError with the setting `path` and its value unless `ok`."""
    if not ok:
        raise UserError(f"config.{path} is {operator.attrgetter(path)(config)!r}: {rule}")


def _numbers(value: Any) -> Iterator[float]:
    """Yields the numbers in a setting: itself, or those in its tuples and mappings."""
    if isinstance(value, tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(item)
    elif not isinstance(value, str):
        yield value


def is_inside(value: float, interval: str) -> bool:
    """Whether a finite number is in an interval such as "[0, 1)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)


def describe_interval(interval: str, value: float) -> str:
    """The rule of an interval that a value breaks, such as "positive" for -1 and "(0, inf)"."""
    low, high = interval[1:-1].split(", ")
    if isinstance(value, float) and not math.isfinite(value):
        return f"finite and {describe_interval(interval, -1)}"
    if value > float(high):
        return f"in {interval}"
    if interval.startswith("(") and high == "inf":
        return "positive" if low == "0" else f"greater than {low}"
    if high == "inf" or interval.endswith(" 2147483648)"):
        return "positive" if low == "1" else f"at least {low}"
    return f"in {interval}"


def _validate_model(config: Config) -> None:
    model, scaling = config.model, config.model.rope_scaling
    heads, kv_heads = model.num_heads, model.num_kv_heads
    rule = f"must divide model.num_heads={heads}"
    _require(config, "model.num_kv_heads", heads % kv_heads == 0, rule)
    rule = f"must divide model.num_kv_heads={kv_heads}"
    _require(config, "model.kv_parts", kv_heads % model.kv_parts == 0, rule)
    rule = "must be 1 with model.kv_ring, which gathers nothing"
    _require(config, "model.kv_parts", model.kv_parts == 1 or not model.kv_ring, rule)
    rule = "low_freq_factor must be less than high_freq_factor"
    _require(config, "model.rope_scaling", scaling.low_freq_factor < scaling.high_freq_factor, rule)
    _require(config, "model.head_dim", model.head_dim % 2 == 0, "must be even (rotary pairs)")
    rule = f"needs an even model.d_model, and it is {model.d_model}"
    rotated = any(config.streams.rotations)
    _require(config, "streams.rotations", model.d_model % 2 == 0 or not rotated, rule)
    rule = "must be package.module:Class, or empty"
    _require(config, "model.block", not model.block or ":" in model.block, rule)


def _validate_data(config: Config) -> None:
    data = config.data
    rule = "needs data.eval_path, the file to read"
    _require(config, "data.eval_format", data.eval_path or not data.eval_format, rule)


def _validate_tokenizer(config: Config) -> None:
    tokenizer = config.data.tokenizer
    if not tokenizer.reserved:
        return
    pieces = [*tokenizer.reserved, tokenizer.silence, "\n"]
    different = all(tokenizer.reserved) and len(set(pieces)) == len(pieces)
    rule = (
        "must be different pieces other than silence and newline, and only with a tokenizer that"
        " is trained here (data.tokenizer.path empty)"
    )
    _require(config, "data.tokenizer.reserved", different and not tokenizer.path, rule)


def _validate_vary(config: Config) -> None:
    vary, names = config.data.vary, config.streams.names
    roster = expand(names)
    rule = "must be one or more numbers of rows"
    _require(config, "data.vary.lead", vary.lead, rule)
    _require(config, "data.vary.pause_rows", vary.pause_rows, rule)
    rule = f"must be among streams.names={names}"
    permuted = set(roster.members(vary.permute))
    _require(config, "data.vary.permute", permuted <= set(roster.names), rule)
    fit = all(len(delays) == len(names) for delays in vary.delays)
    rule = f"each must be {len(names)} numbers of rows, one per stream"
    _require(config, "data.vary.delays", fit, rule)


def _validate_mixture(config: Config) -> None:
    mixture, path = config.data.mixture, "data.mixture"
    size = len(mixture.dirs)
    if not size:
        for field in ("names", "weights", "schedule", "streams"):
            rule = "needs data.mixture.dirs, the sources"
            _require(config, f"{path}.{field}", not getattr(mixture, field), rule)
        return
    _validate_source_names(config)
    rule = f"weights must be {size} numbers, one per directory, one of them positive"
    _require(config, f"{path}.weights", _are_weights(mixture.weights, size), rule)
    scheduled = [weights for _, weights in mixture.schedule]
    fit = all(_are_weights(weights, size) for weights in scheduled)
    _require(config, f"{path}.schedule", fit, rule)
    steps = [0, *(step for step, _ in mixture.schedule)]
    increasing = all(a < b for a, b in itertools.pairwise(steps))
    _require(config, f"{path}.schedule", increasing, "its steps must be positive and increase")
    names = expand(config.streams.names).names
    rule = f"must be among streams.names={names}"
    _require(config, f"{path}.streams", set(mixture.streams) <= set(names), rule)


def _are_weights(weights: Sequence[float], size: int) -> bool:
    return len(weights) == size and sum(weights) > 0


def _validate_source_names(config: Config) -> None:
    mixture = config.data.mixture
    names, size = mixture.source_names, len(mixture.dirs)
    rule = f"must be {size} names, one per directory of data.mixture.dirs"
    _require(config, "data.mixture.names", len(names) == size, rule)
    # The metric eval/NAME/loss of a source must not be eval/nll/STREAM of a stream.
    fit = all(re.fullmatch(r"[\w.-]+", n) and n not in ("nll", "nll_spoken") for n in names)
    path = "data.mixture.names"
    rule = "must be different names of letters, digits and _ . -, other than nll and nll_spoken"
    if not mixture.names:
        path = "data.mixture.source_names"
        rule += " (they come from data.mixture.dirs: set data.mixture.names)"
    _require(config, path, fit and len(set(names)) == size, rule)


def _validate_training(config: Config) -> None:
    optim, batch_size = config.optim, config.data.batch_size
    rule = f"must divide data.batch_size={batch_size}"
    _require(config, "optim.accumulate", batch_size % optim.accumulate == 0, rule)
    start = config.monitor.profile_start
    rule = f"must be before the last of steps={config.steps}, or 0 for no trace"
    _require(config, "monitor.profile_start", start < config.steps, rule)
    objective, parts = config.loss.objective, config.loss.vocab_chunks
    rule = "must be package.module:function, or empty"
    _require(config, "loss.objective", not objective or ":" in objective, rule)
    rule = "must be 1 with loss.objective, which needs the whole head"
    _require(config, "loss.vocab_chunks", not objective or parts == 1, rule)
    penalty = config.penalty.function
    rule = "must be package.module:function, or empty"
    _require(config, "penalty.function", not penalty or ":" in penalty, rule)
    rule = "must be 1 with penalty.function, which sees a whole batch"
    _require(config, "optim.accumulate", not penalty or optim.accumulate == 1, rule)
    modes = {mode for _, mode, _ in config.streams.combine}
    rule = "is not possible with streams.combine: its hidden states do not give the prediction"
    _require(config, "penalty.function", not penalty or modes <= {"own"}, rule)
    rule = "is not possible with a mixture in streams.combine, which has no logits of its own"
    for setting in ("objective", "label_smoothing", "z_loss"):
        given = getattr(config.loss, setting)
        _require(config, f"loss.{setting}", not given or "mixture" not in modes, rule)


def _validate_mesh(config: Config) -> None:
    sizes = dataclasses.astuple(config.mesh)
    rule = "axes must be positive, or -1 for all remaining devices"
    _require(config, "mesh", all(size > 0 or size == -1 for size in sizes), rule)
    _require(config, "mesh", sizes.count(-1) <= 1, "only one axis may be -1")
