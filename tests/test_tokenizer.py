"""The tokenizer: round trips, control pieces, reproducible training, and errors."""

import functools
import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.bench.texts import texts
from msllm.config import Config, DataConfig, TokenizerConfig
from msllm.errors import UserError
from msllm.tokenizer import SPACE, TextError, Tokenizer, list_words, train

CORPUS = [
    "Anna sold 48 clips,\n  then half as many. <silence>\n",
    "What is 48/2?\n\nIt is 24.\t",
] * 20
ALPHABET = sorted(set("".join(CORPUS)))
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@functools.cache
def trained(model_type):
    return train(CORPUS, TokenizerConfig(model_type=model_type, vocab_size=400))


@functools.cache
def imported():
    """A tokenizer from a byte-level BPE file of the `tokenizers` library with special tokens."""
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
    return Tokenizer.from_bytes("tokenizers", model.to_str().encode(), "<silence>")


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
def test_a_char_tokenizer_has_one_token_per_character(text):
    tokenizer = trained("char")
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_has_the_same_token_everywhere():
    tokenizer = trained("word")
    first, *_, last = tokenizer.encode("48 clips, then 48")
    assert first == last != tokenizer.unknown_id
    assert tokenizer.decode(tokenizer.encode("half as many.")) == "half as many."
    assert tokenizer.encode("unheard") == [tokenizer.unknown_id]


@settings(max_examples=60, deadline=None)
@given(before=ANY_TEXT, after=ANY_TEXT)
def test_an_imported_file_round_trips_and_text_cannot_spell_special_tokens(before, after):
    tokenizer = imported()
    ids = tokenizer.encode(f"{before}<silence><eos>{after}")
    assert tokenizer.decode(ids) == f"{before}<silence><eos>{after}"
    assert not {tokenizer.piece(i) for i in ids} & {"<silence>", "<eos>"}


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
def test_text_cannot_spell_silence_and_decode_drops_it(model_type):
    tokenizer = trained(model_type)
    assert tokenizer.silence_id not in tokenizer.encode("<silence> then<silence>")
    first, *rest = tokenizer.encode("then half")
    tokens = [tokenizer.silence_id, first, tokenizer.silence_id, *rest]
    assert tokenizer.decode(tokens) == "then half"
    assert tokenizer.piece(tokenizer.silence_id) == "<silence>"


@settings(max_examples=40, deadline=None)
@given(before=st.text(ALPHABET), after=st.text(ALPHABET))
def test_text_cannot_spell_reserved_pieces(before, after):
    tokenizer = with_reserved()
    ids = tokenizer.encode(f"{before}<turn>{after}<silence><end>")
    assert tokenizer.decode(ids) == f"{before}<turn>{after}<silence><end>"
    assert set(tokenizer.control) == {"<silence>", "<turn>", "<end>"}
    control_ids = set(tokenizer.control.values())
    assert len(control_ids) == 3 and not set(ids) & control_ids


@functools.cache
def with_reserved():
    return train([*CORPUS, "<turn>"], TokenizerConfig(vocab_size=400, reserved=("<turn>", "<end>")))


@pytest.mark.parametrize(
    "invalid",
    [
        {"reserved": ("<a>", "<a>")},
        {"reserved": ("<silence>",)},
        {"reserved": ("",)},
        {"reserved": ("<a>",), "path": "t.model"},
    ],
)
def test_invalid_reserved_pieces_are_refused(invalid):
    with pytest.raises(
        UserError, match=r"config.data.tokenizer.reserved is \('.*must be different pieces"
    ):
        Config(data=DataConfig(tokenizer=TokenizerConfig(**invalid)))


def test_decode_of_an_imported_file_drops_silence():
    tokenizer = imported()
    tokens = [tokenizer.silence_id, *tokenizer.encode("half"), tokenizer.silence_id]
    assert tokenizer.decode(tokens) == "half"


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "word", "char"])
def test_training_is_reproducible(model_type):
    again = train(list(CORPUS), TokenizerConfig(model_type=model_type, vocab_size=400))
    assert again.to_bytes() == trained(model_type).to_bytes()


def test_save_and_load(tmp_path):
    for tokenizer in (trained("unigram"), imported()):
        path = tmp_path / ("t.json" if tokenizer.kind == "tokenizers" else "t.model")
        path.write_bytes(tokenizer.to_bytes())
        loaded = Tokenizer.load(path)
        for name in ("kind", "hash", "vocab_size"):
            assert getattr(loaded, name) == getattr(tokenizer, name), name
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
    with pytest.raises(UserError, match="no control"):  # an ordinary piece
        Tokenizer.from_bytes("tokenizers", imported().to_bytes(), "h")
    with pytest.raises(UserError, match="no text to train"):
        train([], TokenizerConfig())
    with pytest.raises(UserError, match="vocab_size is 9"):
        train(CORPUS, TokenizerConfig(model_type="bpe", vocab_size=9))


def test_the_default_keeps_the_words_of_a_templated_corpus_whole():
    """A unigram model has no piece for a string that occurs in one word only."""
    corpus = list(texts("orders"))
    words = sum(len(text.split()) for text in corpus)
    tokens = {
        kind: sum(len(train(corpus, settings).encode(text)) for text in corpus)
        for kind, settings in (
            ("default", TokenizerConfig()),
            ("unigram", TokenizerConfig(model_type="unigram")),
        )
    }
    assert tokens["default"] < 1.1 * words < 2 * words < tokens["unigram"]


def test_the_size_of_a_vocabulary_fits_the_corpus():
    chinese = texts("chinese")
    alphabet = len(set("".join(chinese)))
    small = train(chinese[:600], TokenizerConfig())
    large = train(chinese * 5, TokenizerConfig())
    assert 256 + alphabet < small.vocab_size < 1024 < large.vocab_size <= 256 + alphabet + 4096 + 80
    assert train(chinese[:600], TokenizerConfig(vocab_size=700)).vocab_size == 700
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 6000)))  # more characters than 4096
    for kind in ("bpe", "unigram", "char"):
        tokenizer = train([many], TokenizerConfig(model_type=kind))
        assert len(tokenizer.encode(many[::7])) == len(many[::7])


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from([*ALPHABET, " ", "\n", "\t", "é", "天", "\u00a0"])))
def test_a_text_is_encoded_in_parts_as_a_whole_is(text):
    model = trained("bpe")
    whole = sentencepiece.SentencePieceProcessor(model_proto=model.to_bytes())
    assert model._model._merges_in_parts
    assert model.encode(text) == whole.encode(text)


def test_a_text_is_not_divided_where_pieces_span_spaces():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["in the end of the day in the house"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        split_by_whitespace=False,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<silence>"],
        user_defined_symbols=["\n"],
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = Tokenizer("sentencepiece", model.getvalue(), "<silence>")
    whole = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert any(
        "\u2581" in piece[1:] for piece in map(tokenizer.piece, tokenizer.encode("in the end"))
    )
    assert tokenizer.encode("in the end") == whole.encode("in the end")


def test_an_error_in_the_corpus_is_not_hidden_by_the_trainer():
    def damaged():
        yield "some text"
        raise UserError("data.jsonl:3: invalid JSON")

    with pytest.raises(UserError, match="data.jsonl:3"):
        train(damaged(), TokenizerConfig(model_type="word", vocab_size=50))


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_spaces_survive_a_corpus_without_any(model_type):
    tokenizer = train(["天气很好天气"] * 9, TokenizerConfig(model_type=model_type, vocab_size=300))
    for text in ("天 气", " 天", "天  气 "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.compare(text, ids) == "same"


def test_a_vocabulary_without_a_space_expresses_it_by_bytes():
    """Vocabularies of earlier versions lack a piece with a space if their corpus had none."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["天气很好天气"] * 9),
        model_writer=model,
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<silence>"],
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = Tokenizer("sentencepiece", model.getvalue(), "<silence>")
    assert SPACE not in map(tokenizer.piece, range(tokenizer.vocab_size))
    assert tokenizer.decode(tokenizer.encode("天 气 \u2581")) == "天 气 \u2581"


def test_lines_with_a_reserved_character_are_trained_on():
    tokenizer = train(["sun \u2585 moon"], TokenizerConfig(model_type="word", vocab_size=64))
    assert tokenizer.unknown_id not in tokenizer.encode("sun moon")


def test_half_of_a_surrogate_pair_is_named():
    for tokenizer in (trained("bpe"), imported()):
        with pytest.raises(TextError, match=r"character 4 .*half of a surrogate pair: 'cut "):
            tokenizer.encode("cut \ud83d")
    with pytest.raises(TextError, match="half of a surrogate pair"):
        train(["cut \ud83d"], TokenizerConfig())


def test_each_unknown_word_or_character_is_a_token():
    for model_type, text in (("word", "xx yy half zz"), ("char", "λμaν")):
        tokenizer = trained(model_type)
        ids, unknown = tokenizer.encode(text), tokenizer.unknown_id
        assert [i == unknown for i in ids] == [True, True, False, True]
        assert tokenizer.compare(text, ids) == "unknown"


def test_unknown_words_are_named():
    words = trained("word")
    assert words.unknown_words("xx half yy xx zz half?") == ["xx", "yy", "zz", "half?"]
    assert words.unknown_words("half half") == words.unknown_words("") == []
    assert words.unknown_words("half\nhalf") == ["half\nhalf"]  # one word for this tokenizer
    assert trained("bpe").unknown_words("xx half λμ") == []  # it spells them by bytes
    assert list_words(["a", "b\n"]) == "'a', 'b\\n'"
    assert list_words(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"


def test_a_text_that_does_not_survive_is_named():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<silence>"], show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer("tokenizers", model.to_str().encode(), "<silence>")
    assert not tokenizer.lossless and trained("unigram").lossless
    with pytest.raises(TextError, match="'half é many' comes back as 'half *many'"):
        tokenizer.compare("half é many", tokenizer.encode("half é many"))


def with_prefix():
    """Tokenizers that put a space before a text, and drop it when they decode."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        control_symbols=["<silence>"],
        minloglevel=2,
    )
    yield Tokenizer("sentencepiece", model.getvalue(), "<silence>")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<silence>"], show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    yield Tokenizer("tokenizers", model.to_str().encode(), "<silence>")
    model.pre_tokenizer = None
    model.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(SPACE), tokenizers.normalizers.Replace(" ", SPACE)]
    )
    yield Tokenizer("tokenizers", model.to_str().encode(), "<silence>")


@pytest.mark.parametrize("number", range(3))
def test_pieces_encoded_apart_gain_no_space(number):
    tokenizer = list(with_prefix())[number]
    text = "Anna sold half as many"
    words = ["Anna", " sold", " half as", " many"]
    ids = [i for n, word in enumerate(words) for i in tokenizer.encode_word(word, n == 0)]
    assert tokenizer.decode(ids) == text and tokenizer.compare(text, ids) == "same"
    assert tokenizer.decode(tokenizer.encode("Anna") + tokenizer.encode_next("s")) == "Annas"
    if number == 0:
        assert tokenizer.compare(text, tokenizer.encode(text)) == "same"


@functools.cache
def lossless_one(kind):
    if kind == "prefix":
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            byte_fallback=True,
            control_symbols=["<silence>"],
            minloglevel=2,
        )
        return Tokenizer("sentencepiece", model.getvalue(), "<silence>")
    return Tokenizer("tokenizers", json.dumps(divided()).encode(), "<silence>")


def divided():
    """The settings of a byte-level tokenizer that divides texts, with all that keeps them."""
    settings = json.loads(imported().to_bytes())
    split = {"String": "l"}
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            settings["pre_tokenizer"],
        ],
    }
    settings["added_tokens"].append(
        settings["added_tokens"][0] | {"id": 300, "content": "<call it>", "special": False}
    )
    return settings


@pytest.mark.parametrize("kind", ["prefix", "divided"])
@settings(max_examples=60, deadline=None)
@given(before=ANY_TEXT, after=ANY_TEXT)
def test_lossless_tokenizers_give_any_text_back(kind, before, after):
    tokenizer = lossless_one(kind)
    assert tokenizer.lossless
    for text in (before, f"{before} \u2581 12half<call it>{after}"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.compare(text, ids) == "same"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(normalizer={"type": "NFC"}),
        lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda s: s["pre_tokenizer"]["pretokenizers"][2].update(add_prefix_space=True),
        lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}),
        lambda s: s.update(pre_tokenizer=None),
        lambda s: s.update(decoder={"type": "Fuse"}),
        lambda s: s["added_tokens"][-1].update(lstrip=True),
        lambda s: s["added_tokens"][-1].update(content="\u00e9"),
        lambda s: s["model"]["vocab"].pop("\u0120"),
    ],
)
def test_what_may_lose_text_is_not_called_lossless(change):
    settings = divided()
    settings["model"]["merges"] = []
    change(settings)
    assert not Tokenizer("tokenizers", json.dumps(settings).encode(), "<silence>").lossless


def test_truncation_and_padding_of_an_imported_file_are_off():
    settings = json.loads(imported().to_bytes())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    settings["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<eos>",
    }
    tokenizer = Tokenizer("tokenizers", json.dumps(settings).encode(), "<silence>")
    for encode in (tokenizer.encode, tokenizer.encode_next):
        assert tokenizer.decode(encode(CORPUS[0])) == CORPUS[0]
