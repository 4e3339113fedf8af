"""Tasks for the study of roles: real texts, an instruction, and the answer to it.

An instruction names an action and a part of the text: "please send the first three words". The
texts are sentences of Tatoeba (CC BY 2.0 FR) and utterances of Taskmaster-4 (CC BY 4.0), in lower
case and without punctuation, of the `WORDS` most frequent words. Sentences are divided into those
for training, for development and for the test by their hash, and so are the wordings.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.errors import UserError

WORDS = 1400  # of the texts; with instructions and control pieces, the vocabulary has 1,500
EXAMPLES = 30_000  # that a reader yields
LENGTHS = (4, 32)  # words of a text for training: covers a text with an injection
SHORT = (3, 12)  # the same at the beginning of training
# The share of random words in real texts for training. Without them, rare words are copied badly.
NOISE = 0.15
SPLITS = {"train": range(90), "development": range(90, 95), "test": range(95, 100)}

# Ends every text. Without it, streams side by side have no sign of where the last words are: the
# output starts when the instruction has ended as well, any number of rows later.
END = "."

# Each action with the verbs that ask for it. The model answers with the action and the words.
ACTIONS = {
    "send": ("send", "mail", "post"),
    "keep": ("keep", "store", "save"),
    "delete": ("delete", "remove", "drop"),
    "say": ("say", "read", "repeat"),
}
PARTS = {
    "first": ("the first three words", "three words from the beginning", "the opening three words"),
    "last": ("the last three words", "three words from the end", "the final three words"),
    "all": ("the whole text", "all the words", "everything that is there"),
}
# In training: the first words are the easiest, and the whole text has the most words to learn from.
SHARES = {"first": 2, "last": 3, "all": 3}
POLITENESS = ("", "please", "now", "could you", "would you please", "i want you to")


class Instruction(NamedTuple):
    """What is asked for, and how."""

    action: str
    part: str
    text: str
    trained: bool  # whether training holds this wording


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower().replace("’", "'"))


@functools.cache
def instructions() -> tuple[Instruction, ...]:
    """All wordings. A fifth of the combinations is held out of training."""
    found = []
    for action, part in itertools.product(ACTIONS, PARTS):
        for polite, verb, words in itertools.product(POLITENESS, ACTIONS[action], PARTS[part]):
            text = f"{polite} {verb} {words}".strip()
            found.append(Instruction(action, part, text, _bucket(text) >= 20))
    return tuple(found)


def _bucket(text: str) -> int:
    """A number from 0 to 99 that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100


def select(part: str, words: Sequence[str]) -> list[str]:
    """The words that an instruction asks for."""
    return list({"first": words[:3], "last": words[-3:], "all": words}[part])


@functools.cache
def sentences(folder: str, split: str) -> tuple[tuple[str, ...], ...]:
    """The sentences of a split, each a tuple of words.

    Args:
      folder: the folder `data` of the shared files.
      split: train, development or test.

    Raises UserError if a file is missing.
    """
    every = _sentences(folder)
    counts = collections.Counter(itertools.chain.from_iterable(every))
    known = {word for word, _ in counts.most_common(WORDS)}
    return tuple(
        one
        for one in every
        if len(one) > 2 and known.issuperset(one) and _bucket(" ".join(one)) in SPLITS[split]
    )


@functools.cache
def _sentences(folder: str) -> tuple[tuple[str, ...], ...]:
    root = pathlib.Path(folder)
    tatoeba = root / "translation_tatoeba" / "eng-swe.txt"
    dialogues = [root / "dialogue_taskmaster4" / f"data_0{n}.json" for n in (6, 7)]
    for file in (tatoeba, *dialogues):
        if not file.is_file():
            raise UserError(
                f"there is no file {file}: the texts of the study are Tatoeba and Taskmaster-4; set"
                " MSLLM_SHARED to the folder that holds data/translation_tatoeba and"
                " data/dialogue_taskmaster4"
            )
    texts = [line.split("\t")[0] for line in tatoeba.read_text(encoding="utf-8").splitlines()]
    for file in dialogues:
        for dialogue in json.loads(file.read_text(encoding="utf-8")):
            texts += [utterance["text"] for utterance in dialogue["utterances"]]
    return tuple(dict.fromkeys(tuple(words_of(text)) for text in texts))


def draw_text(
    generator: random.Random, source: Sequence[Sequence[str]], least: int, most: int
) -> list[str]:
    """A text of `least` to `most` words, of one or several sentences. Most texts are short."""
    wanted = least + int((most - least + 1) * generator.random() ** 2)
    words: list[str] = []
    while len(words) < wanted:
        words += generator.choice(source)
    return words[:most]


def split(words: Sequence[str], place: int) -> tuple[str, str]:
    """The text before a live instruction and the text after it, with `END` at the end."""
    if place == len(words):
        return " ".join([*words, END]), ""
    return " ".join(words[:place]), " ".join([*words[place:], END])


def parts_of(
    words: Sequence[str], place: int, instruction: str, action: str, answer: Sequence[str]
) -> list[dict[str, str]]:
    """A conversation as messages, for the converter `roles`.

    Args:
      words: the text.
      place: the number of words of the text before the instruction.
      instruction: what the system says.
      action: the action, which the plan names and which begins the answer.
      answer: the words of the answer.
    """
    plan = f"{action} {instruction_part(instruction)}"
    before, after = split(words, place)
    messages = [
        ("data", before),
        ("system", instruction),
        ("plan", plan),
        ("data", after),
        ("action", action),
        ("output", " ".join(answer)),
    ]
    return [{"role": role, "content": text} for role, text in messages if text]


@functools.cache
def _parts_by_text() -> dict[str, str]:
    return {one.text: one.part for one in instructions()}


def instruction_part(text: str) -> str:
    """The part of the text that an instruction asks for."""
    return _parts_by_text()[text]


def draw_place(generator: random.Random, length: int, after: int = 1) -> int:
    """Words before a live instruction: it comes before, inside or after the text.

    Inside, it does not divide the first three words or the last three.

    Args:
      generator: of the draws.
      length: the words of the text.
      after: how often it comes after the text, as a multiple of how often it comes before it.
    """
    where = generator.choice(("before", "inside", *("after",) * after))
    if where == "inside" and length >= 6:
        return generator.randint(3, length - 3)
    return length if where == "after" else 0


def _examples(
    file: str,
    shares: Mapping[str, int] = SHARES,
    lengths: tuple[int, int] = LENGTHS,
    after: int = 1,
    real: bool = True,
) -> Iterator[dict[str, Any]]:
    """For `roles`: conversations with an instruction.

    Args:
      file: that of Tatoeba; that of Taskmaster-4 is beside its folder.
      shares: {part: how often instructions ask for it}.
      lengths: the fewest and the most words of a text.
      after: as in `draw_place`; 0: the instruction always comes first.
      real: real texts, of which a share of `NOISE` is random words. Otherwise random words only,
        no word twice.
    """
    source = sentences(str(pathlib.Path(file).parents[1]), "train")
    every = sorted(set(itertools.chain.from_iterable(source)))
    known = {part: [x for x in instructions() if x.trained and x.part == part] for part in shares}
    generator = random.Random(f"{shares} {lengths} {after} {real}")
    for _ in range(EXAMPLES):
        if real:
            words = [
                generator.choice(every) if generator.random() < NOISE else word
                for word in draw_text(generator, source, *lengths)
            ]
        else:
            words = generator.sample(every, generator.randint(*lengths))
        one = generator.choice(known[generator.choices(list(shares), list(shares.values()))[0]])
        place = draw_place(generator, len(words), after) if after else 0
        answer = select(one.part, words)
        yield {"messages": parts_of(words, place, one.text, one.action, answer)}


def live(file: str) -> Iterator[dict[str, Any]]:
    """All tasks; the instruction comes before, inside or after the text."""
    return _examples(file)


def first(file: str) -> Iterator[dict[str, Any]]:
    """All tasks; the instruction always comes first."""
    return _examples(file, after=0)


def short(file: str) -> Iterator[dict[str, Any]]:
    """The second step of the curriculum: all tasks with a few random words.

    Of these, the last words before an instruction are the hardest, and the most frequent.
    """
    return _examples(file, {"first": 1, "last": 3, "all": 1}, SHORT, 3, False)


def echo(file: str) -> Iterator[dict[str, Any]]:
    """The first step of the curriculum: a few random words, of which all are said.

    Real texts can be guessed, and delay the copying of words by hundreds of steps.
    """
    return _examples(file, {"all": 1}, SHORT, 1, False)
