"""Importing Hugging Face folders with inconsistent, damaged, missing or additional contents."""

import json
import logging
import shutil

import hf_models
import numpy as np
import pytest
import sentencepiece
import tokenizers
from safetensors.numpy import load_file, save_file

from msllm.config import TokenizerConfig
from msllm.errors import UserError
from msllm.evals.score import score
from msllm.tokenizer import train as train_tokenizer
from msllm.weights import hf, hf_config
from msllm.weights.convert import from_hf, to_hf
from msllm.weights.load import load
from msllm.weights.vocabulary import TokenizerFile, with_silence

IM_START, IM_END = "<|im_start|>", "<|im_end|>"


@pytest.fixture
def folder(tmp_path):
    """A copy of a recorded Llama model: 40 tokens, bfloat16, untied embeddings."""
    path = tmp_path / "llama"
    shutil.copytree(hf_models.RECORDED / "llama", path)
    return path


@pytest.fixture
def change_config(folder):
    """A function change_config(key=value, ...) that changes keys of the folder's config.json."""

    def change(**values):
        path = folder / hf.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.fixture(scope="module")
def sentencepiece_file():
    """The bytes of a sentencepiece model of 38 pieces, without silence."""
    text = ["take 4 add 3 no wait add 2 ?", "the total is 6", "0 1 2 3 4 5 6 7 8 9"] * 5
    config = TokenizerConfig(model_type="char", vocab_size=38)
    trained = TokenizerFile("sentencepiece", train_tokenizer(text, config).to_bytes(), "here")
    model = trained._proto()
    silence = next(i for i, p in enumerate(model.pieces) if p.piece == config.silence)
    del model.pieces[silence]
    while len(model.pieces) < 38:
        model.pieces.add(piece=f"word{len(model.pieces)}", score=-20.0, type=1)
    return model.SerializeToString()


def logits(path):
    """The logits of the model in a folder, for the recorded tokens."""
    recorded = np.load(hf_models.RECORDED / "llama" / "logits.npz")
    return score(load(path), {"tokens": recorded["tokens"][None, :, None]}).logits[0, :, 0]


def test_a_head_is_tied_only_if_it_equals_the_embedding(folder, change_config, caplog):
    expected = np.load(folder / "logits.npz")["logits"]
    change_config(tie_word_embeddings=True)  # as some fine-tuning tools leave it
    with caplog.at_level(logging.WARNING, "msllm"):
        config, _, _ = hf.read_folder(folder)
    assert not config.tie_embeddings and "lm_head.weight differs" in caplog.text
    np.testing.assert_allclose(logits(folder), expected, rtol=0, atol=1e-4)

    caplog.clear()
    tensors = load_file(folder / hf.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / hf.WEIGHTS)
    config, _, parameters = hf.read_folder(folder)
    assert config.tie_embeddings and "head" not in parameters
    assert not caplog.text


def test_a_single_weights_file_takes_precedence_over_an_index(folder, caplog):
    expected = np.load(folder / "logits.npz")["logits"]
    tensors = load_file(folder / hf.WEIGHTS)
    save_file({name: 0 * x for name, x in tensors.items()}, folder / "model-1.safetensors")
    places = dict.fromkeys(tensors, "model-1.safetensors")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": places}))
    with caplog.at_level(logging.WARNING, "msllm"):
        np.testing.assert_allclose(logits(folder), expected, rtol=0, atol=1e-4)
    assert "only the first is read" in caplog.text

    (folder / hf.WEIGHTS).unlink()
    assert not hf.read_folder(folder)[2]["final_norm"].any()
    places["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="must be a file of the same folder"):
        hf.read_folder(folder)


def test_files_that_hold_no_weights_or_config_are_named(folder, change_config):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17872\n"
    whole = (folder / hf.WEIGHTS).read_bytes()
    (folder / hf.WEIGHTS).write_bytes(pointer)
    with pytest.raises(UserError, match="model.safetensors is a Git LFS pointer"):
        hf.read_folder(folder)
    (folder / hf.WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        hf.read_folder(folder)
    (folder / hf.WEIGHTS).write_bytes(whole)
    change_config(num_hidden_layers=10**9)
    with pytest.raises(UserError, match="too few for the 1,000,000,000 layers"):
        hf.read_folder(folder)
    (folder / hf.CONFIG).write_bytes(pointer)
    with pytest.raises(UserError, match="config.json is a Git LFS pointer"):
        hf.read_folder(folder)
    (folder / hf.CONFIG).write_text("[" * 100_000)
    with pytest.raises(UserError, match="config.json is damaged or no JSON"):
        hf.read_folder(folder)


def test_8_bit_floats_are_named(folder):
    # numpy has no 8-bit floats: store bytes, and change their type in the header.
    tensors, name = load_file(folder / hf.WEIGHTS), "model.norm.weight"
    save_file(tensors | {name: tensors[name].astype(np.uint8)}, folder / hf.WEIGHTS)
    raw = (folder / hf.WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[name]["dtype"] = "F8_E4M3"
    changed = json.dumps(header).encode()
    (folder / hf.WEIGHTS).write_bytes(
        len(changed).to_bytes(8, "little") + changed + raw[8 + size :]
    )
    with pytest.raises(UserError, match="has type F8_E4M3: must be one of F64, F32, BF16, F16"):
        hf.read_folder(folder)


def test_tokens_that_a_sentencepiece_folder_adds_are_kept(folder, sentencepiece_file, tmp_path):
    (folder / "tokenizer.model").write_bytes(sentencepiece_file)
    (folder / "added_tokens.json").write_text(json.dumps({IM_START: 38, "<tool>": 39}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": IM_START}))
    from_hf(folder, tmp_path / "out", streams="user,output")
    model = load(tmp_path / "out")
    tokenizer, before = model.tokenizer, hf.read_folder(folder)[2]["embedding"]
    assert tokenizer.silence_id == 40 and model.config.vocab_size == 41
    np.testing.assert_array_equal(np.asarray(model.parameters["embedding"])[:40], before)
    assert tokenizer.control[IM_START] == 38 and tokenizer.piece(39) == "<tool>"
    # Text that spells a special token stays text. Text that spells another added token is encoded
    # as that token.
    assert 38 not in tokenizer.encode(f"take {IM_START} 4")
    assert tokenizer.encode("take <tool> 4").count(39) == 1
    # Text without added tokens is encoded as sentencepiece encodes it.
    plain = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_file)
    assert tokenizer.encode("take 4 add 3") == plain.encode("take 4 add 3")

    from_hf(folder, tmp_path / "one")
    to_hf(tmp_path / "one", tmp_path / "back")
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "added, details, message",
    [
        ({IM_START: 39}, {}, "adds the token '<|im_start|>' with the id 39"),
        ({IM_START: 3}, {}, "has '.*' there"),
        ({IM_START: "38"}, {}, "must be an id"),
        ({IM_START: 38}, {"38": {"content": IM_END}}, "is '<|im_start|>' in added_tokens.json"),
        ({}, {"x": {"content": IM_END}}, "must be an id and"),
        ({}, {"38": {"special": True}}, "must be an id and"),
    ],
    ids=str,
)
def test_added_tokens_that_do_not_fit_are_refused(
    added, details, message, folder, sentencepiece_file, tmp_path
):
    (folder / "tokenizer.model").write_bytes(sentencepiece_file)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = {"added_tokens_decoder": details}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        from_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_change_the_tokens_are_refused(folder, sentencepiece_file, tmp_path):
    (folder / "tokenizer.model").write_bytes(sentencepiece_file)
    for settings in ({"do_lower_case": True}, {"add_prefix_space": True}):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"{next(iter(settings))} is True"):
            from_hf(folder, tmp_path / "out")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False}))
    from_hf(folder, tmp_path / "out")


def byte_level(vocabulary, added):
    """A tokenizers file with this number of ordinary tokens, and with added special tokens."""
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({chr(33 + i): i for i in range(vocabulary)}, [])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(added)
    return model.to_str()


def test_an_added_token_beyond_the_embedding_table_gets_a_row(folder, tmp_path):
    (folder / "tokenizer.json").write_text(byte_level(40, ["<pad>"]))
    report = from_hf(folder, tmp_path / "out", streams="user,output")
    assert "rows added for tokens that had none: <pad>\n" in report
    model = load(tmp_path / "out")
    assert model.config.vocab_size == 42 and model.tokenizer.silence_id == 41
    table = np.asarray(model.parameters["embedding"])
    np.testing.assert_allclose(table[40], table[:40].mean(0), rtol=1e-5, atol=1e-6)
    from_hf(folder, tmp_path / "one")
    to_hf(tmp_path / "one", tmp_path / "back")
    assert hf.read_settings(tmp_path / "back")["vocab_size"] == 40
    # If ordinary tokens have no row, the tokenizer belongs to another model.
    (folder / "tokenizer.json").write_text(byte_level(41, ["<pad>"]))
    with pytest.raises(UserError, match="name the model.s own tokenizer"):
        from_hf(folder, tmp_path / "other")


def test_unsupported_tokenizer_files_are_named(folder, tmp_path):
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="vocab.json and merges.txt, which msllm does not read"):
        from_hf(folder, tmp_path / "out")


def test_added_tokens_must_match_tokenizer_json(folder, tmp_path):
    (folder / "tokenizer.json").write_text(byte_level(39, ["<pad>"]))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 39}))
    from_hf(folder, tmp_path / "out")
    (folder / "added_tokens.json").write_text(json.dumps({IM_END: 39}))
    with pytest.raises(UserError, match="but its tokenizer.json has '<pad>' there"):
        from_hf(folder, tmp_path / "other")


def test_unknown_keys_are_refused_and_keys_of_recorded_configs_are_known():
    for variant in hf_models.VARIANTS:
        settings = hf.read_settings(hf_models.RECORDED / variant)
        with pytest.raises(UserError, match="new_key is 1: this setting is unknown"):
            hf_config.from_hf(settings | {"new_key": 1})
        hf_config.from_hf(settings | {"new_key": None})


def test_with_silence_keeps_the_ids_of_added_tokens(sentencepiece_file, folder):
    (folder / "tokenizer.model").write_bytes(sentencepiece_file)
    (folder / "added_tokens.json").write_text(json.dumps({IM_START: 38}))
    file = TokenizerFile.read(folder / "tokenizer.model", "here")
    tokenizer, added = with_silence(file, "")
    assert added and tokenizer.silence_id == file.vocab_size() == 39
