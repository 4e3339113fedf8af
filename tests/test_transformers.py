"""Exchange of models with the `transformers` library, where it and torch are installed.

CI has neither. It uses recordings of the same models in tests/hf, see tests/hf_models.py.
"""

import io
import json

import hf_models
import numpy as np
import pytest
import sentencepiece
import tokenizers
from test_convert import TEXTS, tokenizer_file

from msllm.evals.score import score
from msllm.weights import hf
from msllm.weights.convert import from_hf, to_hf
from msllm.weights.gguf import PATTERNS
from msllm.weights.load import load
from msllm.weights.vocabulary import TokenizerFile, add_rows, with_silence

pytest.importorskip("torch", reason="torch is not installed; test_hf.py uses recordings instead")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", hf_models.VARIANTS)
def test_an_imported_model_gives_the_logits_of_transformers(variant, tmp_path):
    hf_models.make(variant, tmp_path / "theirs")
    recorded = np.load(tmp_path / "theirs" / "logits.npz")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(tokenizer_file(hf_models.VOCABULARY))
    from_hf(tmp_path / "theirs", tmp_path / "ours", streams="user,output")
    model = load(tmp_path / "ours")
    tokens = np.random.default_rng(1).integers(0, hf_models.VOCABULARY, (1, hf_models.ROWS, 2))
    tokens[0, :, 1] = recorded["tokens"]
    logits = score(model, {"tokens": tokens}).logits[0, :, 1, : hf_models.VOCABULARY]
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4)

    from_hf(tmp_path / "theirs", tmp_path / "one")
    for dtype in ("", "float32"):
        to_hf(tmp_path / "one", tmp_path / f"back{dtype}", dtype)
        again = hf_models.logits(tmp_path / f"back{dtype}", recorded["tokens"])
        np.testing.assert_array_equal(again, recorded["logits"])


FAMILIES = {
    "qwen3": {"qk_norm": True},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "llama": {"qk_norm": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_an_exported_model(family, make_model, tmp_path):
    model = make_model(1, stream_embedding=False, tie_embeddings=False, **FAMILIES[family])
    files = {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    }
    hf.write_folder(tmp_path / "out", model.config, 1, model.parameters, files=files)
    tokens = np.random.default_rng(0).integers(0, 32, 20).astype(np.int32)
    ours = score(model, {"tokens": tokens[None, :, None]}).logits[0, :, 0]
    np.testing.assert_allclose(hf_models.logits(tmp_path / "out", tokens), ours, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"{TEXTS[0]}<silence>{TEXTS[1]}"
    expected = tokenizers.Tokenizer.from_str(byte_level().decode()).encode(text).ids
    assert tokenizer(text).input_ids == expected
    assert tokenizer.convert_tokens_to_ids("<silence>") in tokenizer(text).input_ids


ADDED = (
    tokenizers.AddedToken("<|im_end|>", special=True, normalized=False),
    tokenizers.AddedToken("<|call|>", special=False, normalized=False),
    tokenizers.AddedToken("<Word>", special=False, normalized=True),
    tokenizers.AddedToken("<pad>", special=False, lstrip=True, rstrip=True),
)
WITH_ADDED = (
    "say <|call|> x",
    "<|call|><|call|>",
    "a <Word> <word>b",
    "x <pad> y",
    "",
    "\n ü 你好 🙂",
)


def folder_with_tokenizer(path, files, size, added):
    """A folder of a recorded model with `size` tokens and the files of a tokenizer."""
    config, _, parameters = hf.read_folder(hf_models.RECORDED / "llama")
    config, parameters = add_rows(config, parameters, size, config.vocab_size)
    details = {
        str(i): {"content": token.content, "special": token.special, "normalized": token.normalized}
        | {"lstrip": token.lstrip, "rstrip": token.rstrip}
        for i, token in added.items()
    }
    settings = {"added_tokens_decoder": details, "eos_token": "<|im_end|>", "legacy": False}
    files = files | {"tokenizer_config.json": settings}
    contents = {n: json.dumps(x).encode() if isinstance(x, dict) else x for n, x in files.items()}
    hf.write_folder(path, config, 1, parameters, files=contents)
    from_hf(path, path.with_name("ours"))
    return load(path.with_name("ours")).tokenizer, transformers.AutoTokenizer.from_pretrained(path)


def assert_same_ids(ours, theirs, texts):
    for text in texts:
        assert list(ours.encode(text)) == theirs(text, add_special_tokens=False).input_ids, text
    special = theirs.convert_tokens_to_ids("<|im_end|>")
    assert ours.control["<|im_end|>"] == special
    # A text that spells a special token does not get it.
    assert special not in ours.encode("<|im_end|>") and special in theirs("<|im_end|>").input_ids


@pytest.mark.parametrize("normalizer", [None, tokenizers.normalizers.NFC()])
def test_a_tokenizer_json_with_added_tokens_gives_the_ids_of_transformers(normalizer, tmp_path):
    model = tokenizers.Tokenizer.from_str(byte_level().decode())
    model.normalizer = normalizer
    model.add_tokens(list(ADDED))
    files = {"tokenizer.json": model.to_str().encode()}
    size, added = model.get_vocab_size(), model.get_added_tokens_decoder()
    ours, theirs = folder_with_tokenizer(tmp_path / "theirs", files, size, added)
    assert_same_ids(ours, theirs, [*TEXTS, *WITH_ADDED])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_folder_with_added_tokens_gives_the_ids_of_transformers(kind, tmp_path):
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=stream,
        model_type=kind,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    size = processor.get_piece_size()
    added = {size: ADDED[0], size + 1: ADDED[1]}
    files = {
        "tokenizer.model": stream.getvalue(),
        "added_tokens.json": {token.content: i for i, token in added.items()},
    }
    ours, theirs = folder_with_tokenizer(tmp_path / "theirs", files, size + 2, added)
    # At the beginning of a text, before a space or an added token, sentencepiece puts another
    # space. transformers does not. There msllm follows sentencepiece.
    assert_same_ids(
        ours, theirs, [*TEXTS, "say <|call|> x", "x<|call|>y", "two  spaces ", "ü 你好 🙂"]
    )


def byte_level() -> bytes:
    """A byte-level BPE file with silence.

    It splits text as Qwen does, because `transformers` does so for every qwen2 folder, whatever its
    file says.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS["qwen2"]), "isolated")
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, plain])
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    file = TokenizerFile("tokenizers", model.to_str().encode(), "here")
    return with_silence(file, "")[0].to_bytes()
