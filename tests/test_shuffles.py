"""Shuffled cards: the words follow from what the streams see."""

import itertools

import numpy as np
import pytest

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import shuffles
from msllm.data.converters import convert, texts
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import train

SMALL = {"cards": 8, "moves": (1, 2), "steps": 3, "choices": (1, 3, 8), "silence": 12}


def said_in_rows(said, rows):
    """A list of `rows` words; None where nothing is said."""
    found = [None] * rows
    for row, word in said:
        assert found[row] is None
        found[row] = word
    return found


def packs(cards):
    """{move: the order of the cards after it}, made by moving a pack of cards."""
    pack = list(range(cards))
    half, pile = cards // 2, cards // 4
    return {
        "cut": pack[-pile - 1 :] + pack[: -pile - 1],
        "flip": pack[::-1],
        "swap": [card for pair in zip(pack[1::2], pack[::2]) for card in pair],
        "fold": pack[:half][::-1] + pack[half:],
        "riffle": [card for pair in zip(pack[:half], pack[half:]) for card in pair],
        "deal": [card for start in range(4) for card in pack[start::4]],
    }


def test_moves_move_a_pack_of_cards():
    for cards in (4, 8, 16):
        for move, order in packs(cards).items():
            places = [shuffles.MOVES[move](place, cards) for place in range(cards)]
            assert [places.index(place) for place in range(cards)] == order
    assert packs(8).keys() == shuffles.MOVES.keys()


def next_words(user, thought, output, cards, steps):
    """What a thought and an output say next, which see these words of the rows before.

    The last word of each list is that of the row before the next one. A cell sees the other streams
    one row later than its own.
    """
    read = [word for word in user[:-1] if word]
    moves = read.index("soon") if "soon" in read else len(read)
    if len(read) < moves + 3:
        return None, None
    first, choices = "abcdefghijklmnop".index(read[moves + 2]), int(read[moves + 1])
    candidates = ["abcdefghijklmnop"[(first + i) % cards] for i in range(choices)]
    asked = read[moves + 4 :: 2]

    def followed(words):
        """[(card, its places)], card by card, in what the thought has said."""
        found = []
        for word in filter(None, words):
            if word[1:] == "0":
                found.append((word[0], []))
            found[-1][1].append(word[0])
        return found

    own = followed(thought)
    done = {card for card, places in own if len(places) == steps + 1}
    wanted = [card for card in asked[-1:] or candidates if card not in done]
    word = None
    if wanted:
        card, places = own[-1] if own else ("", [])
        goes_on = thought[-1] is not None and len(places) <= steps
        if goes_on and card == (asked[-1] if asked else card):
            order = packs(cards)[read[(len(places) - 1) % moves][:-1]]
            place = order.index("abcdefghijklmnop".index(places[-1]))
            word = f"{'abcdefghijklmnop'[place]}{len(places)}"
        else:
            word = f"{wanted[0]}0"

    answer = None
    told = sum(word == "." for word in output)
    if output[-1] not in (None, "."):
        answer = "."
    elif told < len(asked):
        places = dict(followed(thought[:-1])).get(asked[-1], ())
        if len(places) == steps + 1:
            answer = places[-1]
    return word, answer


def test_the_words_follow_from_what_is_seen():
    """Row by row, a slow reference that reads earlier rows only says the same."""
    met = set()
    for example in shuffles.generate(300, 3, **SMALL):
        play = shuffles.play(example)
        rows = max(row for row, _ in (*play.user, *play.thought, *play.output)) + 2
        user, thought, output = (
            said_in_rows(said, rows) for said in (play.user, play.thought, play.output)
        )
        for row in range(1, rows):
            word, answer = next_words(user[:row], thought[:row], output[:row], 8, 3)
            assert output[row] == answer, (example, row)
            if row in play.held:
                assert thought[row] is None and word is not None
            else:
                assert thought[row] == word, (example, row)
        before = range(example.question_ends[0] + 2)
        met.add((bool(play.held), any(thought[row] for row in before)))
    assert met == {(False, True), (True, True), (True, False)}


def test_answers_come_sooner_after_thinking_ahead():
    """Rows from the end of the question to that of the answer, by candidate and silence."""
    found = {}
    for choices, silence, number in itertools.product((1, 4), range(17), range(4)):
        number = min(number, choices - 1)
        example = next(shuffles.generate(1, 0, choices=(choices,), questions=1))
        card = example.candidates[number]
        example = example._replace(silence=(silence,), asked=(card,), held=0)
        for held in (0, example.held_to_the_question):
            play = shuffles.play(example._replace(held=held))
            rows = play.output[-1][0] - example.question_ends[0]
            found[choices, silence, number, bool(held)] = rows
            if held:
                assert rows == shuffles.longest_answer(7) == 12
                assert play.thought[0][0] == example.question_ends[0] + 2
    assert [found[1, silence, 0, False] for silence in (0, 1, 6, 7, 16)] == [10, 9, 4, 3, 3]
    assert [found[4, 16, number, False] for number in range(4)] == [3, 3, 10, 12]
    assert [found[4, silence, 1, False] for silence in (15, 14)] == [3, 4]


def test_examples_depend_on_the_arguments_alone():
    examples = list(shuffles.generate(400, 5))
    assert examples[:7] == list(shuffles.generate(7, 5))
    assert examples[:7] != list(shuffles.generate(7, 6))
    assert {example.silence[0] for example in examples} == set(range(17))
    assert {example.choices for example in examples} == {1, 4, 16}
    assert {len(example.asked) for example in examples} == {1, 2, 3}
    assert {example.first for example in examples} == set("abcdefghijklmnop")
    assert {len(e.moves) for e in shuffles.generate(50, 5, moves=(1, 4))} == {1, 4}
    kinds = [e.held and 1 + (e.held == e.held_to_the_question) for e in examples]
    np.testing.assert_allclose(np.bincount(kinds) / 400, (0.5, 0.25, 0.25), atol=0.06)
    for example in examples:
        assert len(example.moves) == 2 and set(example.moves) <= shuffles.MOVES.keys()
        assert set(example.asked) <= set(example.candidates)
        later = [silence - shuffles.longest_answer(7) for silence in example.silence[1:]]
        assert all(0 <= silence <= shuffles.PATIENCE for silence in later)


def tables_of(**options):
    """The tables of the converter with these options, and their tokenizer."""
    streams = StreamsConfig()
    data = DataConfig(converter="shuffles", options=options, rows=160)
    config, spec = Config(streams=streams, data=data), StreamSpec.from_config(streams)
    tokenizer = train(texts(config, spec), TokenizerConfig(model_type="word", vocab_size=256))
    return list(convert(config, spec, tokenizer)), tokenizer


def test_tables_hold_the_examples_and_held_rows_have_no_loss():
    tables, tokenizer = tables_of(examples=40, **SMALL)
    some = 0
    for table, example in zip(tables, shuffles.generate(40, 0, **SMALL), strict=True):
        play = shuffles.play(example)
        for stream, said in enumerate((play.user, play.thought, play.output)):
            words = said_in_rows(said, len(table.tokens))
            ids = [tokenizer.encode_word(w)[0] if w else tokenizer.silence_id for w in words]
            assert table.tokens[:, stream].tolist() == ids
        assert table.present.all()
        if not play.held:
            assert table.weights is None
            continue
        some += 1
        assert np.argwhere(table.weights == 0).tolist() == [[row, 1] for row in play.held]
        assert len(play.held) == example.held == table.tokens.size - table.weights.sum()
    assert 10 < some < 30


def test_reactions_to_questions_may_have_another_loss_weight():
    tables, _ = tables_of(examples=20, emphasis=3.0, **SMALL)
    for table, example in zip(tables, shuffles.generate(20, 0, **SMALL), strict=True):
        rows = [end + 2 for end in example.question_ends]
        found = np.argwhere(table.weights == 3).tolist()
        assert found == [[row, stream] for row in rows for stream in (1, 2)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"examples": 0}, "examples is 0: must be at least 1"),
        ({"moves": (2, 0)}, r"moves is \[2, 0\]: must be a list of numbers from 1 on"),
        ({"steps": 0}, "steps is 0: must be at least 1"),
        ({"silence": -1}, "silence is -1: must be at least 0"),
        ({"questions": 0}, "questions is 0: must be at least 1"),
        ({"emphasis": -1.0}, "emphasis is -1.0: must be from 0 to 1000000, a loss weight"),
        ({"cards": 10}, "cards is 10: must be a multiple of 4 from 4 to 24"),
        ({"choices": ()}, r"choices is \[\]: must be a list of numbers from 1 to 16"),
        ({"choices": (1, 17)}, r"choices is \[1, 17\]: must be a list of numbers from 1 to 16"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(UserError, match=f"config.data.options.{message}"):
        tables_of(**options)
