"""The tokenizer: round trips, silence that no text can spell, reproducible training, errors."""

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.config import Config, DataConfig, TokenizerConfig
from msllm.errors import UserError
from msllm.tokenizer import Tokenizer, train

CORPUS = [
    "Anna sold 48 clips,\n  then half as many. <silence>\n",
    "What is 48/2?\n\nIt is 24.\t",
] * 20
ALPHABET = sorted(set("".join(CORPUS)))
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@functools.cache
def trained(model_type):
    return train(CORPUS, TokenizerConfig(model_type=model_type, vocab_size=400))


def imported_json():
    """A byte-level BPE file of the `tokenizers` library, with special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<silence>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    return model.to_str().encode()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_round_trips(model_type, text):
    tokenizer = trained(model_type)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.silence_id not in ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(ALPHABET))
def test_characters_of_the_corpus_round_trip_one_token_each(text):
    tokenizer = trained("char")
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_the_same_token_everywhere():
    tokenizer = trained("word")
    first, *_, last = tokenizer.encode("48 clips, then 48")
    assert first == last != tokenizer.unknown_id
    assert tokenizer.decode(tokenizer.encode("half as many.")) == "half as many."
    assert tokenizer.encode("unheard") == [tokenizer.unknown_id]


@settings(max_examples=60, deadline=None)
@given(before=ANY_TEXT, after=ANY_TEXT)
def test_imported_file_round_trips_and_text_cannot_spell_special_tokens(before, after):
    tokenizer = Tokenizer.from_bytes("tokenizers", IMPORTED, "<silence>")
    ids = tokenizer.encode(f"{before}<silence><eos>{after}")
    assert tokenizer.decode(ids) == f"{before}<silence><eos>{after}"
    assert not {tokenizer.piece(i) for i in ids} & {"<silence>", "<eos>"}


IMPORTED = imported_json()


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
def test_silence_comes_from_no_text_and_is_dropped_by_decode(model_type):
    tokenizer = trained(model_type)
    assert tokenizer.silence_id not in tokenizer.encode("<silence> then<silence>")
    ids = tokenizer.encode("then half")
    assert (
        tokenizer.decode([tokenizer.silence_id, ids[0], tokenizer.silence_id, *ids[1:]])
        == "then half"
    )
    assert tokenizer.piece(tokenizer.silence_id) == "<silence>"


@settings(max_examples=40, deadline=None)
@given(before=st.text(ALPHABET), after=st.text(ALPHABET))
def test_reserved_pieces_come_from_no_text(before, after):
    tokenizer = with_reserved()
    ids = tokenizer.encode(f"{before}<turn>{after}<silence><end>")
    assert tokenizer.decode(ids) == f"{before}<turn>{after}<silence><end>"
    assert set(tokenizer.control) == {"<silence>", "<turn>", "<end>"}
    assert (
        not set(ids) & set(tokenizer.control.values()) and len(set(tokenizer.control.values())) == 3
    )


@functools.cache
def with_reserved():
    return train([*CORPUS, "<turn>"], TokenizerConfig(vocab_size=400, reserved=("<turn>", "<end>")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"reserved": ("<a>", "<a>")},
        {"reserved": ("<silence>",)},
        {"reserved": ("",)},
        {"reserved": ("<a>",), "path": "t.model"},
    ],
)
def test_wrong_reserved_pieces_are_named(wrong):
    with pytest.raises(
        UserError, match=r"config.data.tokenizer.reserved is \('.*must be different pieces"
    ):
        Config(data=DataConfig(tokenizer=TokenizerConfig(**wrong)))


def test_imported_decode_drops_silence():
    tokenizer = Tokenizer.from_bytes("tokenizers", IMPORTED, "<silence>")
    assert (
        tokenizer.decode([tokenizer.silence_id, *tokenizer.encode("half"), tokenizer.silence_id])
        == "half"
    )


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
def test_training_is_reproducible(model_type):
    again = train(list(CORPUS), TokenizerConfig(model_type=model_type, vocab_size=400))
    assert again.to_bytes() == trained(model_type).to_bytes()


def test_save_and_load(tmp_path):
    for tokenizer in (trained("unigram"), Tokenizer("tokenizers", IMPORTED, "<silence>")):
        path = tmp_path / ("t.json" if tokenizer.kind == "tokenizers" else "t.model")
        path.write_bytes(tokenizer.to_bytes())
        loaded = Tokenizer.load(path)
        assert (loaded.kind, loaded.hash, loaded.vocab_size) == (
            tokenizer.kind,
            tokenizer.hash,
            tokenizer.vocab_size,
        )
        assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match="nowhere.model.*config.data.tokenizer.path"):
        Tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json is not a tokenizers file"):
        Tokenizer.load(tmp_path / "bad.json")
    (tmp_path / "good.model").write_bytes(trained("char").to_bytes())
    with pytest.raises(
        UserError, match="good.model has no control .*'<quiet>'.*config.data.tokenizer.silence"
    ):
        Tokenizer.load(tmp_path / "good.model", "<quiet>")
    with pytest.raises(UserError, match="no control"):  # a piece, but one that text gives
        Tokenizer.from_bytes("tokenizers", IMPORTED, "h")
    with pytest.raises(UserError, match="no text to train"):
        train([], TokenizerConfig())
    with pytest.raises(UserError, match="vocab_size is 9"):
        train(CORPUS, TokenizerConfig(model_type="bpe", vocab_size=9))


def test_an_error_in_the_corpus_is_not_hidden_by_the_trainer():
    def texts():
        yield "some text"
        raise UserError("data.jsonl:3: invalid JSON")

    with pytest.raises(UserError, match="data.jsonl:3"):
        train(texts(), TokenizerConfig(model_type="word", vocab_size=50))
