"""Tiny benchmarks: the output lines, and the relations between their numbers."""

import importlib.util
import json
import subprocess
import sys
import types

import jax
import pytest

from msllm.bench import attention as bench_attention
from msllm.bench import loader as bench_loader
from msllm.bench.runner import make_cases
from msllm.bench.timing import Times
from msllm.bench.train import accelerator_rates
from msllm.kernels import cpu as cpu_kernels
from msllm.runtime.flops import attention_flops, visible_pairs
from msllm.streams import lag_matrix

pytestmark = pytest.mark.slow

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
NO_TORCH = "not installed: pip install"


def bench(*options):
    """Runs `msllm bench` and returns (parsed output lines, standard error, exit status)."""
    line = [sys.executable, "-m", "msllm", "bench", *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    return [json.loads(text) for text in done.stdout.splitlines()], done.stderr, done.returncode


def test_attention_compares_the_available_backends():
    lines, errors, status = bench(
        "attention", "--rows=9,4", "--batch=2,1", "--streams=3", "--steps=2", "--head_dim=8"
    )
    assert status == 0, errors
    names = ["chunked", "reference"]
    if not cpu_kernels.unavailable_reason():
        names.insert(0, "cpu")
    assert [(line["rows"], line["backend"]) for line in lines] == [
        (rows, name) for rows in (9, 4) for name in names
    ]
    for line in lines:
        assert line["device_kind"] == "cpu"
        pairs = visible_pairs(lag_matrix("block_causal", 3), line["rows"])
        assert line["visible_pairs"] == line["batch"] * pairs
        assert line["both_temporary_mib"] > 0 and line["both_wall_seconds"] > 0
        nanoseconds = line["both_cpu_seconds"] / line["visible_pairs"] * 1e9
        assert line["both_cpu_ns_per_pair"] == pytest.approx(nanoseconds, rel=1e-3)
        assert "both_share_of_peak" not in line  # the peak of a CPU is not known
    assert [line["both_speedup"] for line in lines if line["backend"] == "reference"] == [1.0, 1.0]


CASE = {
    "rows": 16,
    "batch": 1,
    "streams": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "compute_dtype": "bfloat16",
    "steps": 3,
    "backends": ["reference", "chunked"],
    "memory_gib": 1.0,
}


def test_a_backend_that_does_not_fit_is_compiled_and_not_run():
    dense, chunked = bench_attention.attention_case(CASE | {"rows": 512, "memory_gib": 0.015})
    assert (dense["backend"], chunked["backend"]) == ("reference", "chunked")
    assert dense["not_run"] == "temporary buffers exceed --memory_gib=0.015"
    assert dense["both_temporary_mib"] > 15.4 > chunked["both_temporary_mib"]
    assert "both_wall_seconds" in chunked and "both_wall_seconds" not in dense
    assert "both_speedup" not in chunked  # there is nothing to compare it with


def test_rates_are_useful_work_by_time_and_peak(monkeypatch):
    """Uses a fake GPU with known times."""
    card = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(
        bench_attention, "_backends", lambda case, lag: {"reference": None, "gpu": None}
    )
    nothing = jax.jit(lambda x: x).lower(1.0).compile()

    def compiled(*_):
        return {"forward": nothing, "both": nothing}

    monkeypatch.setattr(bench_attention, "_compiled", compiled)
    times = {("reference", "forward"): Times(1.0, 4e-3), ("gpu", "forward"): Times(1.0, 1e-3)}
    times |= {("reference", "both"): Times(1.0, 9e-3), ("gpu", "both"): Times(1.0, 2e-3)}
    monkeypatch.setattr(bench_attention, "_interleaved", lambda *_: times)
    monkeypatch.setattr(bench_attention, "_device", lambda: card)
    _, line = bench_attention.attention_case(CASE)
    flops = attention_flops(2, 8, visible_pairs(lag_matrix("block_causal", 2), 16))
    assert flops == 2 * 2 * 2 * 8 * (4 * 15 * 16 // 2 + 32)
    assert line["both_gflop_per_second"] == round(3 * flops / 2e-3 / 1e9, 1)
    assert line["both_share_of_peak"] == round(3 * flops / 2e-3 / 989.5e12, 4)
    assert (line["forward_speedup"], line["both_speedup"]) == (4.0, 4.5)
    assert accelerator_rates(card, 494.75e12, "bfloat16") == {
        "tflop_per_second_per_device": 494.75,
        "mfu": 0.5,
    }
    assert "mfu" not in accelerator_rates(card, 494.75e12, "float32")


def test_train_reports_rates():
    sizes = ("--d_model=16", "--d_ff=32", "--num_layers=1", "--head_dim=8", "--vocab_size=64")
    (line,), errors, status = bench(
        *("train", "--rows=8", "--batch=8", "--streams=2", "--steps=2", *sizes),
        *("--compute_dtype=bfloat16", "--attention=reference", "--medium=tokens"),
    )
    assert status == 0, errors
    assert line["compute_dtype"] == "bfloat16"
    assert (line["attention"], line["device_kind"]) == ("reference", "cpu")
    assert line["tokens_per_step"] == 128
    assert line["tokens_per_second"] > 0 and line["share_of_matmul"] > 0
    assert "mfu" not in line
    assert line["time_to_latent_cpu"] == pytest.approx(
        line["cpu_seconds_per_step"] / line["latent_cpu_seconds_per_step"], rel=0.05
    )
    assert 1 < line["most_distinct_tokens_of_a_stream"] <= 8


@pytest.mark.parametrize("sources", [1, 2])
def test_loader_rates_count_the_cells_of_batches(sources):
    case = {
        "rows": 64,
        "batch": 8,
        "streams": 3,
        "tables": 50,
        "sources": sources,
        "silence": 60,
        "epochs": 2,
    }
    (line,) = bench_loader.loader_case(case)
    assert 180 < line["cells_per_table"] <= 192 and line["bytes_per_table"] > 0
    assert line["spoken_per_table"] == pytest.approx(0.4 * line["cells_per_table"], rel=0.1)
    rate = line["spoken_per_table"] / line["cpu_us_per_table"] * 1e6
    assert line["spoken_tokens_per_cpu_second"] == pytest.approx(rate, rel=0.01)


def test_prepare_counts_its_output():
    (line,), errors, status = bench("prepare", "--size_mb=1", "--processes=1", "--converter=wait_k")
    assert status == 0, errors
    assert line["bytes"] == pytest.approx(1e6, rel=0.01) and line["examples"] > 300
    assert 3 < line["bytes"] / line["tokens"] < 8 and 0.1 < line["silence_rate"] < 0.7
    assert line["tokens_per_cpu_minute"] == pytest.approx(
        60 * line["tokens"] / line["cpu_seconds"], rel=0.1
    )
    assert line["first_process_peak_mib"] > 30
    assert line["worker_peak_mib"] == 0  # there was no worker process


def test_tokenizer_compares_types_on_corpora(tmp_path):
    lines = [
        f"the {word} is {number} metres away"
        for word in "house tree gate".split()
        for number in range(10)
    ]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    names = f"orders,{tmp_path}/mine.txt"
    lines, errors, status = bench("tokenizer", f"--texts={names}", "--vocab_sizes=0")
    assert status == 0, errors
    assert [(line["texts"], line["model_type"]) for line in lines] == [
        (name, kind) for name in names.split(",") for kind in ("unigram", "bpe")
    ]
    for unigram, bpe in (lines[:2], lines[2:]):
        assert bpe["tokens_per_word"] < unigram["tokens_per_word"]
        assert 0 < bpe["bits_per_character"] < unigram["bits_per_character"]
    _, errors, status = bench("tokenizer", f"--texts={tmp_path}/none.txt")
    assert status == 2 and "none.txt" in errors


def test_serve_measures_rows_over_loopback():
    sizes = ("--d_model=16", "--d_ff=32", "--num_layers=1", "--head_dim=8", "--vocab_size=512")
    load = ("--sessions=3", "--window=8", "--beat_ms=50", "--seconds=3", "--churn=6000")
    lines, errors, status = bench("serve", *load, *sizes)
    assert status == 0, errors
    (line,) = lines
    assert line["rows"] > 30 and 0 <= line["on_time"] <= 1 and line["late_p99_ms"] > 0
    assert line["opened"] > 3 and line["dropped"] == 0  # sessions of a second each
    assert 0 <= line["latency_p50_ms"] <= line["latency_p99_ms"]


def test_decode_measures_each_data_type_of_the_cache():
    cases = make_cases("decode", {"cache_dtype": ["int8", "float32"]})
    assert [case["cache_dtype"] for case in cases] == ["int8", "float32"]


def test_decode_compares_several_streams_with_one_and_with_latent_edges():
    sizes = ("--d_model=16", "--d_ff=32", "--num_layers=1", "--num_heads=2", "--num_kv_heads=1")
    sizes += ("--head_dim=8", "--vocab_size=64", "--cache_dtype=int8")
    lines, errors, status = bench(
        *("decode", "--medium=tokens", "--rows=24", "--prefill=9", "--streams=3", "--steps=3"),
        *sizes,
    )
    assert status == 0, errors
    kinds = [(line["streams"], line["medium"]) for line in lines]
    assert kinds == [(3, "tokens"), (3, "latent"), (1, "latent")]
    many, *others = lines
    for name, other in zip(("time_to_latent_cpu", "cost_of_one_stream_cpu"), others):
        ratio = many["cpu_ms_per_row"] / other["cpu_ms_per_row"]
        assert many[name] == pytest.approx(ratio, abs=0.01)
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(
            line["streams"] * 1e3 / line["wall_ms_per_row"], rel=0.01
        )
        assert line["compiled_meanwhile"] == 0
        assert 0 < line["host_share"] < 1 and line["run_cpu_ms_per_row"] > 0


@pytest.mark.skipif(not TORCH, reason="torch or transformers is not installed")
def test_the_model_in_torch_is_the_same():
    sizes = ("--d_model=16", "--d_ff=32", "--num_layers=2", "--num_heads=4", "--num_kv_heads=2")
    sizes += ("--head_dim=8", "--vocab_size=64")
    (line,), errors, status = bench(
        "train", "--torch", "--rows=9", "--batch=8", "--streams=3", "--steps=2", *sizes
    )
    assert status == 0, errors
    assert line["torch_loss_difference"] < 1e-5
    assert line["torch_gradient_norm_relative_difference"] < 1e-4
    ratio = line["torch_cpu_seconds_per_step"] / line["cpu_seconds_per_step"]
    assert line["torch_time_to_ours_cpu"] == pytest.approx(ratio, rel=0.05)
    lines, errors, status = bench(
        "decode", "--torch", "--rows=20", "--prefill=9", "--streams=3", "--steps=1", *sizes
    )
    assert status == 0, errors
    same_rows = [line["torch_same_rows"] for line in lines if line["cache_dtype"] == "float32"]
    assert same_rows == [11, 11]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("sleep",),
            "invalid choice: 'sleep' (choose from",
        ),
        (
            ("attention", "--rows=4", "--batch=1,2"),
            "both need one number for each case",
        ),
        (
            ("decode", "--cache_dtype=int8,int4"),
            "--cache_dtype is ['int8', 'int4']: must be some of int8, bfloat16, float32",
        ),
        (("prepare", "--size_mb=0"), "--size_mb is 0: must be at least 1"),
        (("attention", "--rows=4", "--batch=1", "--backends=splash"), "'splash': it needs a TPU"),
        (
            ("train", "--torch", "--compute_dtype=bfloat16"),
            "must be float32 with --torch" if TORCH else NO_TORCH,
        ),
    ],
    ids=["benchmark", "cases", "caches", "sizes", "backend", "torch"],
)
def test_wrong_options_are_refused(options, message):
    lines, errors, status = bench(*options)
    assert lines == [] and status == 2 and message in errors
