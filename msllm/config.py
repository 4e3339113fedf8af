"""Every setting of msllm: frozen dataclasses for the program, an ml_collections ConfigDict for people.

A file in `configs/` calls `default_config()`, changes values and returns the ConfigDict; the command line may
override any of them (`--config.optim.lr=1e-3`); `from_config_dict` then turns it, once, into a `Config`. The
dataclasses below are the only place where a setting, its default and its meaning are written.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import operator
import pathlib
import re
import typing
from collections.abc import Callable
from typing import Any

import ml_collections

from msllm.errors import UserError

INPUT_ONLY = ("full", "offload")  # remat policies that keep nothing of a layer but its input


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Change of the rotary frequencies for contexts longer than the ones trained on."""

    kind: str = "none"  # none | linear (positions / factor) | llama3 | yarn (slow pairs / factor): msllm/model/rope.py
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # yarn: of every rotated query and key; 0: by the paper's formula
    original_max_position: int = 8192  # rows of the context trained on


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder (Qwen3's form; options turn it into Llama or Qwen2.5)."""

    vocab_size: int = 0  # V; 0: the tokenizer's size
    d_model: int = 256  # D
    num_layers: int = 4
    num_heads: int = 4  # N
    num_kv_heads: int = 2  # K
    head_dim: int = 64  # H
    d_ff: int = 768  # F
    tie_embeddings: bool = True
    qk_norm: bool = True  # RMSNorm on every head of q and k (Qwen3)
    attention_bias: bool = False  # bias on the q, k and v projections (Qwen2.5)
    stream_embedding: bool = True  # a learned vector per stream, added to the token embedding
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    compute_dtype: str = "float32"  # float32 | bfloat16; parameters are float32 always
    attention: str = "auto"  # auto | splash (TPU) | gpu | native (CPU) | chunked (anywhere) | reference (O(L^2), for tests)
    kv_parts: int = 1  # parts of the kv heads whose keys and values are gathered over streams at a time; more: less memory
    kv_ring: bool = (
        False  # keys and values go round the devices of the stream axis instead of being gathered
    )
    remat: str = "dots"  # a layer keeps: none all | dots products, attention | full its input | offload that on the host


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """Names, kinds and visibility of the S streams (design: contract 1)."""

    names: tuple[str, ...] = ("user", "thought", "output")
    kinds: tuple[str, ...] = ("input", "thought", "output")
    loss_weights: tuple[float, ...] = ()  # per stream; empty: 0 for inputs, 1 for the others
    visibility: str = "block_causal"  # block_causal | same_row | isolated
    lags: tuple[
        tuple[str, str, str], ...
    ] = ()  # (reader, source, "3" | "never"): edges that differ from the preset
    skip_silence: bool = False  # silence cells are not seen as keys
    delays: tuple[
        int, ...
    ] = ()  # rows by which each stream is shifted down in the data; empty: none


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that `prepare` trains or takes."""

    path: str = ""  # a sentencepiece .model or a tokenizers .json; empty: train one on the corpus
    model_type: str = "unigram"  # unigram | bpe | word | char
    vocab_size: int = 4096
    silence: str = "<silence>"  # the piece that means "this stream says nothing now"
    reserved: tuple[
        str, ...
    ] = ()  # further pieces that no text gives, for a tokenizer trained here


@dataclasses.dataclass(frozen=True)
class VaryConfig:
    """What is done to every table after its converter. Of several values each example draws one, by its id."""

    lead: tuple[int, ...] = (0,)  # silent rows before the example
    pause_percent: float = 0.0  # of the rows: before them all streams pause
    pause_rows: tuple[int, ...] = (1,)  # lengths of pauses
    permute: tuple[str, ...] = ()  # streams whose contents change places at random
    delays: tuple[
        tuple[int, ...], ...
    ] = ()  # in place of streams.delays, each a number of rows per stream


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Several prepared directories to train on at once, all of the same streams, rows and tokenizer."""

    dirs: tuple[str, ...] = ()  # one per source; empty: data.dir alone
    names: tuple[str, ...] = ()  # of the sources, in metrics; empty: those of the directories
    weights: tuple[float, ...] = ()  # shares of the tokens that the sources should have, of any sum
    schedule: tuple[
        tuple[int, tuple[float, ...]], ...
    ] = ()  # (step, weights from this step on), ...
    streams: tuple[
        str, ...
    ] = ()  # those whose tokens, silence left out, the weights share out; empty: all

    @property
    def source_names(self) -> tuple[str, ...]:
        return self.names or tuple(pathlib.PurePath(path).name for path in self.dirs)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tables come from and how they are packed and batched."""

    dir: str = ""  # the prepared data: what `prepare` writes and, without a mixture, `train` reads
    mixture: MixtureConfig = MixtureConfig()
    converter: str = ""  # see docs/data.md; or package.module:function
    path: str = ""  # input of the converter: a file or a glob
    format: str = ""  # of the input (msllm/data/sources.py); empty: by the names of the files
    eval_path: str = ""  # input of the held-out split, if it has one of its own; then all of `path` is trained on
    eval_format: str = ""  # and its format
    bad_percent: float = 0.0  # share of the records that may be bad: they are left out
    options: typing.Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # arguments of the converter
    streams: tuple[
        str, ...
    ] = ()  # those the converter writes, of which streams.names are taken; empty: the same
    vary: VaryConfig = VaryConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    rows: int = 512  # T: rows of a packed table
    batch_size: int = 8  # B: tables per step, over all hosts
    eval_percent: float = 5.0  # share of the examples held out
    split: str = (
        "hash"  # hash (held out by the hash of each example) | tail (the last ones, in input order)
    )
    max_examples: int = 0  # 0: all
    shards: int = 4  # of each split; large inputs give more of them
    seed: int = 0  # order of the tables
    prefetch: int = 4  # batches made ahead by the loader


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with decoupled weight decay and a schedule."""

    lr: float = 1e-3
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, linear decay) | constant
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd: the share of all steps that decays
    final_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = (
        "norm",
        "bias",
        "stream_embedding",
    )  # parameters whose path contains one of these
    stream_embedding_lr: float = 5.0  # learning rate of the stream embedding, as a multiple of lr
    silence_lr: float = (
        1.0  # learning rate of silence's rows of embedding and head, as a multiple of lr
    )
    clip_norm: float = 1.0  # 0: no clipping
    accumulate: int = 1  # micro-batches per step
    max_skipped: int = (
        10  # updates skipped in a row, for non-finite loss or gradient, before the run stops
    )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Next-row cross-entropy and its options."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of logsumexp(logits)^2
    chunk_tokens: int = 2048  # cells whose logits exist at one time
    vocab_chunks: int = (
        1  # parts in which the head is gathered; more than 1: less memory, logits computed twice
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    stream: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which ones stay."""

    every: int = 1000  # steps; 0: only the last step
    every_minutes: float = 0.0  # and so many minutes after the last one; 0: by steps only
    local_dir: str = (
        ""  # a disk of each host, e.g. /mnt/ssd, for quick checkpoints beside those in the workdir
    )
    local_every: int = 100  # steps between them; two stay
    keep_last: int = 3
    keep_every: int = 0  # steps whose checkpoints stay for good; 0: none


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What a run tells of itself besides its metrics."""

    slow_step: float = 5.0  # steps that take this many times the median are reported, with the process that was late
    examples: bool = False  # log the ids of the examples of every step, in WORKDIR/examples
    profile_start: int = 0  # trace for XProf, in WORKDIR/profile: the first step of it; 0: none
    profile_steps: int = 3
    wandb_project: str = ""  # write metrics to Weights & Biases, too


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    steps: int = 1000
    seed: int = 0  # initial parameters
    init_from: str = ""  # a checkpoint whose parameters a new run starts with (docs/weights.md); empty: at random
    log_every: int = 10
    eval_every: int = 500  # 0: never
    eval_batches: int = 0  # evenly spread over the held-out split; 0: all of it
    model: ModelConfig = ModelConfig()
    streams: StreamsConfig = StreamsConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    compilation_cache: str = (
        "auto"  # a directory for compiled programs; auto: WORKDIR/compiled; none: compile always
    )

    def __post_init__(self):
        _validate(self)


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults, as a locked ConfigDict: a misspelt key raises."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The ConfigDict of a Config: what people edit, what a checkpoint stores."""

    def convert(value):
        if dataclasses.is_dataclass(value):
            return ml_collections.ConfigDict(
                {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, typing.Mapping):
            return ml_collections.ConfigDict(dict(value))
        return value

    return convert(config).lock()


def from_config_dict(settings: typing.Mapping[str, Any]) -> Config:
    """The frozen, validated Config of a ConfigDict or of nested dicts. Raises UserError naming what is wrong."""
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    return _from_dict(Config, settings, "config")


def to_json(config: Config) -> str:
    """The config as JSON; `from_config_dict(json.loads(...))` gives an equal one."""
    return json.dumps(to_config_dict(config).to_dict(), indent=2, sort_keys=True)


def import_object(path: str, setting: str) -> Any:
    """The class or function that `package.module:name` names, for the setting that holds it.

    Raises UserError if it cannot be imported or called.
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


def _from_dict(cls: type, values: typing.Mapping[str, Any], path: str):
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {path}.{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise UserError(f"unknown config key {path}.{key}: {hint}")
    return cls(
        **{key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()}
    )


def _convert(hint: Any, value: Any, path: str):
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, typing.Mapping):
            raise UserError(f"{path} is {value!r}: it is a section, set its keys instead")
        return _from_dict(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path} is {value!r}: expected a tuple")
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_convert(inner[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(inner):
            raise UserError(f"{path} is {value!r}: expected {len(inner)} items")
        return tuple(
            _convert(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(inner, value))
        )
    if typing.get_origin(hint) is not None:  # Mapping: free-form options, checked by who takes them
        return dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(
            f"{path} is {value!r}: expected {hint.__name__}, got {type(value).__name__}"
        )
    return value


_CHOICES = {
    "model.compute_dtype": "float32 bfloat16",
    "model.attention": "auto splash gpu native chunked reference",
    "model.remat": "none dots full offload",
    "model.rope_scaling.kind": "none linear llama3 yarn",
    "optim.schedule": "cosine wsd constant",
    "data.tokenizer.model_type": "unigram bpe word char",
    "data.split": "hash tail",
}
_POSITIVE = """
steps log_every model.d_model model.num_layers model.num_heads model.num_kv_heads model.head_dim model.d_ff model.kv_parts
data.batch_size data.shards optim.lr optim.accumulate loss.vocab_chunks loss.chunk_tokens checkpoint.local_every
checkpoint.keep_last monitor.profile_steps
""".split()


def _validate(config: Config) -> None:
    """Rules that need no device, no data and no tokenizer."""
    model, data, vary, optim, names = (
        config.model,
        config.data,
        config.data.vary,
        config.optim,
        config.streams.names,
    )

    def check(path: str, ok: bool, rule: str) -> None:
        if not ok:
            raise UserError(f"config.{path} is {operator.attrgetter(path)(config)!r}: {rule}")

    for path, choices in _CHOICES.items():
        check(
            path,
            operator.attrgetter(path)(config) in choices.split(),
            f"must be one of {', '.join(choices.split())}",
        )
    for path in _POSITIVE:
        check(path, operator.attrgetter(path)(config) > 0, "must be positive")
    check(
        "model.vocab_size", model.vocab_size >= 0, "must be positive, or 0 for the tokenizer's size"
    )
    heads, kv_heads = model.num_heads, model.num_kv_heads
    check("model.num_kv_heads", heads % kv_heads == 0, f"must divide model.num_heads={heads}")
    check(
        "model.kv_parts",
        kv_heads % model.kv_parts == 0,
        f"must divide model.num_kv_heads={kv_heads}",
    )
    check(
        "model.kv_parts",
        model.kv_parts == 1 or not model.kv_ring,
        "must be 1 with model.kv_ring: nothing is gathered",
    )
    check("model.rope_scaling.factor", model.rope_scaling.factor > 0, "must be positive")
    bands = model.rope_scaling.low_freq_factor < model.rope_scaling.high_freq_factor
    check("model.rope_scaling", bands, "low_freq_factor must be less than high_freq_factor")
    check("model.head_dim", model.head_dim % 2 == 0, "must be even (rotary pairs)")
    check("data.rows", data.rows > 1, "must be at least 2 (each row predicts the next)")
    check("data.eval_percent", 0 <= data.eval_percent < 100, "must be in [0, 100)")
    check(
        "data.eval_format",
        data.eval_path or not data.eval_format,
        "needs data.eval_path: which file to read",
    )
    check("data.bad_percent", 0 <= data.bad_percent < 100, "must be in [0, 100)")
    reserved = data.tokenizer.reserved
    different = (
        all(reserved) and len({*reserved, data.tokenizer.silence, "\n"}) == len(reserved) + 2
    )
    rule = "must be different pieces, none that of silence, of a tokenizer that is trained (data.tokenizer.path empty)"
    check("data.tokenizer.reserved", not reserved or (different and not data.tokenizer.path), rule)
    for field in ("lead", "pause_rows"):
        values = getattr(vary, field)
        check(
            f"data.vary.{field}",
            values and min(values) >= 0,
            "must be one number of rows >= 0, or more",
        )
    check("data.vary.pause_percent", 0 <= vary.pause_percent <= 100, "must be in [0, 100]")
    check("data.vary.permute", set(vary.permute) <= set(names), f"must be of streams.names={names}")
    fit = all(len(delays) == len(names) and min(delays) >= 0 for delays in vary.delays)
    check(
        "data.vary.delays", fit, f"each must be {len(names)} numbers of rows >= 0, one per stream"
    )
    check(
        "optim.accumulate",
        data.batch_size % optim.accumulate == 0,
        f"must divide data.batch_size={data.batch_size}",
    )
    check("optim.decay_fraction", 0 < optim.decay_fraction <= 1, "must be in (0, 1]")
    check("loss.label_smoothing", 0 <= config.loss.label_smoothing < 1, "must be in [0, 1)")
    sizes = dataclasses.astuple(config.mesh)
    check(
        "mesh",
        all(n > 0 or n == -1 for n in sizes),
        "axes must be positive, or -1 for all that remain",
    )
    check("mesh", sizes.count(-1) <= 1, "only one axis may be -1")
    check("checkpoint.every_minutes", config.checkpoint.every_minutes >= 0, "must be >= 0")
    check("monitor.slow_step", config.monitor.slow_step > 1, "must be over 1")
    _validate_mixture(data.mixture, names, check)


def _validate_mixture(
    mixture: MixtureConfig, streams: tuple[str, ...], check: Callable[[str, bool, str], None]
) -> None:
    size, names, own = len(mixture.dirs), mixture.source_names, "data.mixture."
    if not size:
        for field in ("names", "weights", "schedule", "streams"):
            check(own + field, not getattr(mixture, field), "needs data.mixture.dirs: the sources")
        return
    check(
        own + "names", len(names) == size, f"must be one per directory, of which there are {size}"
    )
    # A name becomes part of a metric's: eval/NAME/loss must not be that of a stream.
    fit = all(
        re.fullmatch(r"[\w.-]+", name) and name not in ("nll", "nll_spoken") for name in names
    )
    rule = "must be different, of letters, digits and _ . -, and not nll or nll_spoken"
    rule += (
        "" if mixture.names else " (they are those of data.mixture.dirs: set data.mixture.names)"
    )
    check(
        own + ("names" if mixture.names else "source_names"), fit and len(set(names)) == size, rule
    )
    for field, weights in (
        ("weights", mixture.weights),
        *(("schedule", weights) for _, weights in mixture.schedule),
    ):
        ok = len(weights) == size and all(0 <= w < math.inf for w in weights) and sum(weights) > 0
        check(
            own + field,
            ok,
            f"weights must be {size} numbers >= 0, one per directory, one of them positive",
        )
    steps = [0, *(step for step, _ in mixture.schedule)]
    check(
        own + "schedule",
        all(a < b for a, b in zip(steps, steps[1:])),
        "its steps must be positive and grow",
    )
    check(
        own + "streams", set(mixture.streams) <= set(streams), f"must be of streams.names={streams}"
    )
