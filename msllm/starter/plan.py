"""Chooses rows, batch, model and number of steps that fit the data and this machine."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from msllm import tokenizer as tokenizer_lib
from msllm.config import Config, DataConfig, ModelConfig, StreamsConfig, TokenizerConfig
from msllm.data import converters, files, sources
from msllm.data.converters.layout import Recorder
from msllm.data.sources import BadRecords
from msllm.data.tables import Table, held_out
from msllm.errors import UserError
from msllm.runtime.compiler import compile_step
from msllm.runtime.flops import train_flops
from msllm.sharding import make_mesh
from msllm.starter.survey import SHORT_SILENCES, Survey
from msllm.step import Program
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

log = logging.getLogger("msllm")

_TEXT_CHARACTERS = 4_000_000  # of the sample, to train a tokenizer on
_SAMPLE_EXAMPLES = 20_000
_LEAST_ROWS, _ROUND = 64, 32
_MOST_ROWS = {"cpu": 512}
_MOST_ROWS_ELSEWHERE = 2048
_ROWS_PER_STEP = {"cpu": 512}
_ROWS_PER_STEP_ELSEWHERE = 8192  # per device
_MINUTES = {"cpu": 4.0}
_MINUTES_ELSEWHERE = 60.0
_STARTUP_SECONDS = 20.0  # of the minutes: imports, preparing, compiling
_TIMED_STEPS = 10
# A model copies from its context only after some hundred thousand rows, however few the examples.
_LEAST_TRAINED_ROWS = 500_000
_MOST_EPOCHS = 150  # even of few examples
_LEAST_STEPS = 200
_EVAL_PERCENT = ((1000, 10.0), (20_000, 5.0))  # below this number of examples
_EVAL_PERCENT_ABOVE = 1.0


class _Size(NamedTuple):
    """A model for up to `tokens` tokens of data, with the epochs that suit them."""

    tokens: float
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lr: float
    epochs: int

    @property
    def model(self) -> dict[str, Any]:
        """Settings of `config.model`."""
        sizes = {name: getattr(self, name) for name in self._fields[1:6]}
        return {**sizes, "d_ff": 3 * self.d_model, "rope_theta": 1e4}


_SIZES = (
    _Size(1e5, 128, 3, 4, 2, 32, 3e-3, 40),
    _Size(1e6, 192, 4, 6, 2, 32, 2e-3, 20),
    _Size(1e7, 256, 6, 4, 2, 64, 1.5e-3, 8),
    _Size(2e8, 512, 8, 8, 4, 64, 1e-3, 4),
    _Size(math.inf, 768, 12, 12, 4, 64, 6e-4, 2),
)


@dataclasses.dataclass
class Plan:
    """A config for the data, with what it is based on.

    Attributes:
      config: all settings. `data.dir` and `data.path` are those of the data.
      facts: what the sample says: {name: number}.
      reasons: {dotted setting: why it has its value}, as sentences.
      minutes: estimated training time: CPU-minutes on a CPU, else minutes.
      rows: rows that an example takes, for `msllm generate`.
    """

    config: Config
    facts: dict[str, float]
    reasons: dict[str, str]
    minutes: float
    rows: int


class _Sample(NamedTuple):
    """What the sampled examples say about all of them."""

    lengths: list[int]  # rows of each example
    ids: list[str]
    examples: int  # estimates for the whole input
    rows: int
    tokens: int
    pieces: int
    tokens_per_word: float
    spoken: int  # rows in which a stream speaks, in most examples at most


def make_plan(found: Survey, directory: str, minutes: float = 0.0) -> Plan:
    """Returns a config for the input of a survey.

    Args:
      found: the survey.
      directory: `config.data.dir`.
      minutes: how long training should take at most: CPU-minutes on a CPU, else minutes. 0: 4 on a
        CPU, and 60 elsewhere.

    Raises UserError if the input gives no example, or a record cannot be used.
    """
    platform = jax.devices()[0].platform
    minutes = minutes or _MINUTES.get(platform, _MINUTES_ELSEWHERE)
    streams = StreamsConfig(
        names=tuple(found.streams),
        kinds=tuple(found.streams.values()),
        skip_silence=len(found.streams) > 1,
    )
    most = _MOST_ROWS.get(platform, _MOST_ROWS_ELSEWHERE)
    data = DataConfig(
        dir=directory,
        path=found.path,
        format=found.format,
        converter=found.converter,
        options=found.options,
        rows=1 << 20 if found.converter != "single" else most // 2,
    )
    take = _sample_text if found.converter == "single" else _sample_examples
    sample, tokenizer = take(found, Config(data=data, streams=streams))
    if "silence" in found.options and max(sample.lengths) > most:
        found.options["silence"] = list(SHORT_SILENCES)
        sample, tokenizer = take(found, Config(data=data, streams=streams))
    reasons: dict[str, str] = {}
    rows, reasons["data.rows"] = _choose_rows(sample, data, most)
    batch_size = _choose_batch(sample, rows, platform)
    reasons["data.batch_size"] = f"{batch_size * rows:,} rows a step"
    split = "tail" if found.converter == "single" and found.records < 20 else "hash"
    percent = _eval_percent(sample, split)
    reasons["data.eval_percent"] = (
        "held out of training, to measure what the model has learnt"
        if percent
        else "nothing is held out: there are too few different examples"
    )
    chosen: dict[str, Any] = {
        "rows": rows,
        "batch_size": batch_size,
        "eval_percent": percent,
        "split": split,
    }
    data = dataclasses.replace(data, **chosen, shards=1 if sample.tokens < 1e7 else 4)
    trained = sample.rows * (1 - percent / 100)
    # Packed tables are filled to about nine tenths.
    tables = max(math.ceil(trained / rows / (1.0 if found.converter == "single" else 0.9)), 1)
    config = Config(data=data, streams=streams)
    size, steps, seconds = _choose_size(config, sample, tables, tokenizer, minutes, platform)
    config = _with_training(config, size, steps, platform, bool(percent))
    reasons |= _reasons(sample, size, steps, tables, batch_size)
    facts = {
        "examples": sample.examples,
        "rows": sample.rows,
        "tokens": sample.tokens,
        "pieces": sample.pieces,
        "tokens_per_word": sample.tokens_per_word,
        "tables": tables,
        "step_seconds": seconds,
        "parameters": _count_parameters(config, tokenizer),
    }
    return Plan(config, facts, reasons, steps * seconds / 60, min(max(sample.spoken, 16), rows))


def _sample_examples(found: Survey, config: Config) -> tuple[_Sample, Tokenizer]:
    """Converts the sampled records as `prepare` does, with a tokenizer trained on them."""
    spec = StreamSpec.from_config(config.streams)
    recorder, texts, taken = Recorder(), [""], 0
    for _ in _tables(found, config, spec, recorder):
        texts += recorder.take()
        taken += len(texts[-1])
        if taken > _TEXT_CHARACTERS:
            break
    tokenizer, tokens_per_word = _train(found, texts + recorder.take())
    lengths, ids, spoken, tokens, bad = [], [], [], 0, BadRecords()
    for table in _tables(found, config, spec, tokenizer, bad):
        lengths.append(len(table.tokens))
        ids.append(table.example)
        cells = table.present & (table.tokens != tokenizer.silence_id)
        spoken.append(int(cells.any(axis=1).sum()))
        tokens += int(cells.sum())
        if len(lengths) == _SAMPLE_EXAMPLES:
            break
    if not lengths or max(lengths) < 2:
        raise UserError(f"--from is {found.path!r}: it gives no example of at least 2 rows")
    share = found.share
    if len(lengths) == _SAMPLE_EXAMPLES:
        share *= min(bad.records / max(found.records, 1), 1.0)
    sample = _Sample(
        lengths=lengths,
        ids=ids,
        examples=round(len(lengths) / share),
        rows=round(sum(lengths) / share),
        tokens=round(tokens / share),
        pieces=tokenizer.vocab_size,
        tokens_per_word=tokens_per_word,
        spoken=sorted(spoken)[len(spoken) * 9 // 10] + 2,
    )
    return sample, tokenizer


def _sample_text(found: Survey, config: Config) -> tuple[_Sample, Tokenizer]:
    """Reads the beginning of the text of each sampled part."""
    texts, taken, read, stopped = [""], 0, 0, False
    for part, records in found.parts:
        limit = _TEXT_CHARACTERS / len(found.parts)
        of_part, bad = 0, BadRecords()
        for _, blocks in sources.texts(part, config.data.options.get("key", "text"), bad):
            for block in blocks:
                texts.append(block)
                of_part += len(block.encode(errors="replace"))
                if of_part > limit:
                    break
            if of_part > limit or bad.records == records:
                break
        taken += of_part
        read += bad.records
        stopped |= of_part > limit
    tokenizer, tokens_per_word = _train(found, texts)
    share = found.share
    if stopped and part.format == "text":
        total = sum(files.file_sizes(files.input_files(found.path)).values())
        share = min(taken / max(total, 1), 1.0)
    elif stopped:
        share *= min(read / max(found.records, 1), 1.0)
    tokens = round(sum(len(tokenizer.encode(text)) for text in texts) / share)
    if tokens < 2:
        raise UserError(f"--from is {found.path!r}: it gives no example of at least 2 rows")
    examples = math.ceil(tokens / config.data.rows)
    sample = _Sample(
        lengths=[config.data.rows],
        ids=[],
        examples=max(examples, round(read / share)),
        rows=tokens,
        tokens=tokens,
        pieces=tokenizer.vocab_size,
        tokens_per_word=tokens_per_word,
        spoken=config.data.rows,
    )
    return sample, tokenizer


def _train(found: Survey, texts: Sequence[str]) -> tuple[Tokenizer, float]:
    """Returns a tokenizer trained on texts, and its tokens per word."""
    if not any(text.strip() for text in texts):
        raise UserError(f"--from is {found.path!r}: there is no text in its records")
    tokenizer = tokenizer_lib.train(texts, TokenizerConfig())
    words = sum(len(text.split()) for text in texts)
    return tokenizer, sum(len(tokenizer.encode(text)) for text in texts) / max(words, 1)


def _tables(
    found: Survey,
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer | Recorder,
    bad: BadRecords | None = None,
) -> Iterator[Table]:
    """Yields the tables of the records that the survey looked at."""
    bad = bad or BadRecords()
    for part, records in found.parts:
        before = bad.records
        for table in converters.convert_part(config, spec, tokenizer, part, bad):
            if bad.records - before > records:
                break
            yield table


def _choose_rows(sample: _Sample, data: DataConfig, most: int) -> tuple[int, str]:
    """Returns T, and why."""
    if data.converter == "single":
        rows = min(data.rows, max(_round_up(sample.rows // 8), _LEAST_ROWS))
        return rows, "the text is cut to pieces of this length"
    lengths = sorted(sample.lengths)
    longest, typical = lengths[-1], lengths[len(lengths) // 2]
    if longest <= most:
        rows = min(max(_round_up(longest + typical), _LEAST_ROWS), most)
        return rows, (
            f"examples have {typical} rows (median) to {longest}; a table holds several, and none"
            " is cut"
        )
    cut = sum(length > most for length in lengths) / len(lengths)
    what = "are divided" if converters.CONVERTERS[data.converter].pieces else "lose their ends"
    return most, (
        f"examples have {typical} rows (median) to {longest:,}; {cut:.1%} of them are longer than"
        f" this and {what}: increase it if they matter, at the cost of time"
    )


def _round_up(rows: int) -> int:
    return -(-rows // _ROUND) * _ROUND


def _choose_batch(sample: _Sample, rows: int, platform: str) -> int:
    """Returns B: a multiple of the number of devices."""
    devices = jax.device_count()
    wanted = _ROWS_PER_STEP.get(platform, _ROWS_PER_STEP_ELSEWHERE * devices)
    wanted = min(wanted, max(sample.rows // 8, rows))
    return max(round(wanted / rows / devices), 1) * devices


def _eval_percent(sample: _Sample, split: str) -> float:
    percent = next((p for n, p in _EVAL_PERCENT if sample.examples < n), _EVAL_PERCENT_ABOVE)
    if split == "tail" or not sample.ids:
        return percent if sample.examples * percent >= 100 else 0.0
    held = sum(held_out(example, percent) for example in sample.ids)
    return percent if 0 < held < len(sample.ids) else 0.0


def _choose_size(
    config: Config,
    sample: _Sample,
    tables: int,
    tokenizer: Tokenizer,
    minutes: float,
    platform: str,
) -> tuple[_Size, int, float]:
    """Returns the model, the number of steps, and the seconds of a step on this machine."""
    first = next(i for i, size in enumerate(_SIZES) if sample.tokens <= size.tokens)
    spec = StreamSpec.from_config(config.streams)
    budget = max(minutes * 60 - _STARTUP_SECONDS, 10.0)
    batch = config.data.batch_size

    def work(size: _Size) -> int:
        model = ModelConfig(**size.model, vocab_size=sample.pieces)
        return train_flops(model, spec, batch, config.data.rows)

    # Timing a small model takes seconds; larger ones take longer in proportion to their work.
    timed = _SIZES[min(first, 1)]
    rate = measure_step(_with_training(config, timed, 10, platform, True), tokenizer) / work(timed)
    for size in reversed(_SIZES[: first + 1]):
        seconds = rate * work(size)
        epoch = math.ceil(tables / batch)
        least = _LEAST_TRAINED_ROWS // (batch * config.data.rows)
        wanted = max(size.epochs * epoch, min(least, _MOST_EPOCHS * epoch), _LEAST_STEPS)
        possible = int(budget / seconds)
        if possible >= min(wanted, max(2 * epoch, wanted // 4)):
            break
    return size, _nice(max(min(wanted, possible), 20), digits=2), seconds


def measure_step(config: Config, tokenizer: Tokenizer) -> float:
    """Returns the seconds of a train step on random tokens: CPU-seconds on a CPU, else seconds."""
    spec = StreamSpec.from_config(config.streams)
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    level = log.level
    log.setLevel(logging.WARNING)  # the choice of the attention backend is of no interest here
    try:
        program = Program(config, spec, make_mesh(config.mesh), tokenizer.silence_id)
    finally:
        log.setLevel(level)
    step = compile_step(program.step, program.abstract_state, program.abstract_batch)
    state, batch = program.init(), _random_batch(program.abstract_batch, tokenizer.vocab_size)
    clock = time.process_time if jax.devices()[0].platform == "cpu" else time.monotonic
    times = []
    for _ in range(_TIMED_STEPS + 1):
        start = clock()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(clock() - start)
    # Other work on the machine makes steps slower, in CPU-seconds as well, and never faster.
    return max(min(times[1:]), 1e-6)


def _random_batch(abstract: Mapping[str, jax.ShapeDtypeStruct], vocab: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.integers(0, vocab, abstract["tokens"].shape).astype(np.int32),
        "present": np.ones(abstract["present"].shape, bool),
        "segment": np.ones(abstract["segment"].shape, np.int32),
    }
    return {name: jax.device_put(arrays[name], abstract[name].sharding) for name in abstract}


def _with_training(
    config: Config, size: _Size, steps: int, platform: str, evaluates: bool
) -> Config:
    """Returns the config with a model, and the settings of its training."""
    dtype = "float32" if platform == "cpu" else "bfloat16"
    model = ModelConfig(**size.model, compute_dtype=dtype)
    optim = dataclasses.replace(
        config.optim, lr=size.lr, warmup_steps=min(max(steps // 20, 1), 500)
    )
    often = _nice(max(steps // 5, 1))
    return dataclasses.replace(
        config,
        steps=steps,
        log_every=_nice(max(steps // 40, 1)),
        eval_every=often if evaluates else 0,
        model=model,
        optim=optim,
        checkpoint=dataclasses.replace(config.checkpoint, every=often),
    )


def _nice(number: int, digits: int = 1) -> int:
    """Returns the largest number of some digits, and then zeros, that is not larger."""
    scale = 10 ** max(len(str(number)) - digits, 0)
    return number // scale * scale


def _count_parameters(config: Config, tokenizer: Tokenizer) -> int:
    from msllm.model.model import abstract_model

    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    _, shapes, _ = abstract_model(model, StreamSpec.from_config(config.streams))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _reasons(
    sample: _Sample, size: _Size, steps: int, tables: int, batch_size: int
) -> dict[str, str]:
    epochs = steps * batch_size / tables
    fits = next(s for s in _SIZES if sample.tokens <= s.tokens)
    model = f"fits about {sample.tokens:,} tokens"
    if fits != size:
        model = (
            f"{sample.tokens:,} tokens deserve a width of {fits.d_model}, but it would not be"
            " trained within --minutes"
        )
    taken = f"{epochs:,.1f} epochs of about {tables:,} tables"
    if epochs < size.epochs:
        taken += f", which --minutes allows; {size.epochs} or more would be better"
    return {
        "data.tokenizer": (
            f"trained on the data: about {sample.pieces:,} pieces, {sample.tokens_per_word:.2f}"
            " tokens per word"
        ),
        "model": model,
        "steps": taken,
    }
