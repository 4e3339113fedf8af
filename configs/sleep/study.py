"""How much sooner does an answer come if the thought works while the user is silent?

    msllm study configs/sleep/study.py --out=runs/sleep

The model of shuffles.py is told how 16 cards are shuffled, and which m of them the questions may be
about. After r silent rows comes the question. Arms, which measure the same checkpoint:

- `ahead`: the thought may speak in the silence.
- `kept silent`: the thought's cells are forced to be silent until it has read the question. A
  quarter of the training examples are like that, and have no loss in these cells.

All sessions run freely. The user's words come at rows that are fixed beforehand. Measured are the
rows from the last word of the question to the last of the answer, for each r and m, and the words
of the thought for three questions about the same shuffle: of one user in succession, or of three
users whose sessions are forks of one that ends with the silence.

The answer follows from two moves and a card, and training shows all of these cases. The study tells
how soon an answer comes from a thought that was taught to work step by step. It does not tell
whether a model could do without the thought.
Cost: 0.6 M parameters, 5 CPU-minutes for each of 3 seeds (an estimate).
"""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.data import shuffles
from msllm.data.shuffles import Example
from msllm.decode.engine import FREE, generate
from msllm.study import Arm, Metric, Plot, Results, Small, Study
from msllm.weights.load import LoadedModel

AHEAD, KEPT_SILENT = "ahead", "kept silent"
SEED = 1 << 20  # added to that of the training data
BATCH = 128  # sessions that are decoded together
SLACK = 4  # rows by which an answer may come later than it has to


def get_config():
    """Returns the settings of the model, without a directory of data."""
    path = pathlib.Path(__file__).with_name("shuffles.py")
    config = runpy.run_path(str(path))["get_config"]()
    config.data.dir = ""
    config.eval_every = 0
    return config


def get_study() -> Study:
    """Returns the study."""
    base = get_config()
    choices = base.data.options["choices"]
    one, three = {"kind": "one"}, {"kind": "three"}
    return Study(
        base=base,
        arms={
            AHEAD: {},
            KEPT_SILENT: Arm(after=AHEAD, train=False, options={"kept_silent": True}),
        },
        seeds=(0, 1, 2),
        seeded=("seed", "data.seed", "data.options.seed"),
        measure=measure,
        options={"examples": 100, "silences": tuple(range(0, 17, 2)), "kept_silent": False},
        metrics=(
            *(Metric(f"rows, m = {m}", "rows", one | {"m": m}, by=("r",)) for m in choices),
            Metric("exact", where=one, by=("m", "r")),
            Metric("exact, by what the thought did", "exact", one, by=("thought",)),
            Metric("exact, of three", "exact", three, by=("users", "m")),
            Metric("words a question", "words", three, by=("users", "m")),
        ),
        plots=tuple(Plot("r", f"rows, m = {m}") for m in choices),
        report=report,
        small=Small(
            settings={
                "steps": 2,
                "data.options.examples": 120,
                "data.eval_percent": 20.0,
                "model.d_model": 16,
                "model.num_layers": 1,
                "model.d_ff": 16,
            },
            options={"examples": 4, "silences": (0, 16)},
        ),
    )


class Session(NamedTuple):
    """What a model said in an example.

    Attributes:
      example: what the user said.
      thought, output: [R], the word in each row; "" where silent.
    """

    example: Example
    thought: list[str]
    output: list[str]

    def answer(self, number: int) -> tuple[bool, int]:
        """Whether the answer to a question is exact, and the rows until its last word."""
        ends = self.example.question_ends
        start = ends[number] + 1
        stop = ends[number + 1] if number + 1 < len(ends) else len(self.output)
        said = [(row, word) for row, word in enumerate(self.output[start:stop], 1) if word]
        wanted = self.example.answer(self.example.asked[number])
        exact = [word for _, word in said] == wanted
        return exact, said[-1][0] if exact else -1

    @property
    def words(self) -> np.ndarray:
        """[R] bool, the rows in which the thought says something."""
        return np.array([bool(word) for word in self.thought])

    def doing(self) -> str:
        """What the thought is doing in the last row before it can react to the first question."""
        example = self.example
        row = example.question_ends[0] + shuffles.REACTION - 1
        card, found = "", {"": 0}  # {card: words about it}
        for word in filter(None, self.thought[: row + 1]):
            if word[1:] == "0":
                card = word[0]
                found[card] = 0
            found[card] += 1
        complete = example.steps + 1
        if found.get(example.asked[0]) == complete:
            return "has followed this card"
        if not self.thought[row] or found[card] == complete:
            return "is between cards" if card else "has said nothing"
        return "follows this card" if card == example.asked[0] else "follows another card"


def run(model: LoadedModel, examples: Sequence[Example], kept_silent: bool) -> list[Session]:
    """Runs sessions in which the user says what the examples hold.

    Args:
      model: a model with the streams user, thought and output.
      examples: what the user says. `Example.held` is ignored.
      kept_silent: force the thought to be silent until it has read the first question.
    """
    tokenizer = model.require_tokenizer()
    user, thought, output = map(model.streams.index, ("user", "thought", "output"))
    rows = max(e.question_ends[-1] + shuffles.longest_answer(e.steps) for e in examples) + SLACK + 1
    ids = {
        word: tokenizer.encode_word(word)[0]
        for word in {word for example in examples for _, word in shuffles.user_words(example)}
    }
    words = [tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)]
    words[tokenizer.silence_id] = ""
    found: list[Session] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        size = min(BATCH, len(examples))
        forced = np.full((size, rows, model.streams.size), FREE, np.int32)
        for table, example in zip(forced, part):
            for row, word in shuffles.user_words(example):
                table[row, user] = ids[word]
            if kept_silent:
                table[: example.question_ends[0] + shuffles.REACTION, thought] = (
                    tokenizer.silence_id
                )
        shown = generate(model, rows, forced=forced, batch=size).shown
        for table, example in zip(shown, part):
            said = ([words[token] for token in table[:, s]] for s in (thought, output))
            found.append(Session(example, *said))
    return found


def draw(settings: Mapping[str, Any], count: int) -> dict[str, Example]:
    """{item: example with three questions}: `count` for each m.

    Each tells as many moves as an example of the training data can. The sessions are new. The
    shuffles are not, because there are few of them.

    Args:
      settings: the options of the data of a model.
      count: the number of examples for each m.
    """
    settings = {
        key: value for key, value in settings.items() if key not in ("examples", "emphasis")
    }
    settings |= {"seed": SEED + settings["seed"], "moves": (max(settings["moves"]),)}
    rng = np.random.default_rng(settings["seed"])
    found = {}
    for m in settings["choices"]:
        examples = shuffles.generate(count, **settings | {"choices": (m,)})
        for number, example in enumerate(examples):
            asked = tuple(example.candidates[i] for i in rng.integers(m, size=3))
            found[f"{settings['seed']} {m} {number}"] = example._replace(asked=asked)
    return found


def measure(model: LoadedModel, point) -> Iterator[dict[str, Any]]:
    """Yields a record per question (kind "one"), and per three questions (kind "three")."""
    options = point.options
    drawn = draw(point.config.data.options, options["examples"])
    ones = {
        (item, r): example._replace(asked=example.asked[:1], silence=(r,))
        for item, example in drawn.items()
        for r in options["silences"]
    }
    for (item, r), session in zip(ones, run(model, [*ones.values()], options["kept_silent"])):
        exact, rows = session.answer(0)
        yield {
            "kind": "one",
            "item": item,
            "m": session.example.choices,
            "r": r,
            "exact": exact,
            "rows": rows if exact else None,
            "thought": session.doing(),
        }
    yield from measure_three(model, drawn, options)


def measure_three(
    model: LoadedModel, drawn: Mapping[str, Example], options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields records of three questions about the same shuffle, after the longest silence."""
    longest = max(options["silences"])
    first = next(iter(drawn.values()))
    after = shuffles.longest_answer(first.steps) + 1
    one_user = [e._replace(silence=(longest, after, after)) for e in drawn.values()]
    for item, session in zip(drawn, run(model, one_user, options["kept_silent"])):
        yield {
            "kind": "three",
            "users": 1,
            "item": item,
            "m": session.example.choices,
            "exact": all(session.answer(number)[0] for number in range(3)),
            "words": int(session.words.sum()) / 3,
        }
    three_users = [
        example._replace(asked=(card,), silence=(longest,))
        for example in drawn.values()
        for card in example.asked
    ]
    sessions = iter(run(model, three_users, options["kept_silent"]))
    for item, forks in zip(drawn, zip(sessions, sessions, sessions)):
        example = forks[0].example
        fork = example.announced + longest + 1  # the first row after the silence
        once = int(forks[0].words[:fork].sum())
        yield {
            "kind": "three",
            "users": 3,
            "item": item,
            "m": example.choices,
            "exact": all(session.answer(0)[0] for session in forks),
            "words": (once + sum(int(session.words[fork:].sum()) for session in forks)) / 3,
        }


def report(results: Results) -> str:
    """How many times fewer rows and words there are if the thought works ahead."""
    lines = [
        "## Thinking ahead",
        "",
        f"The figure of `{KEPT_SILENT}` divided by that of `{AHEAD}`.",
        "",
        "| m | r | rows | users | words a question |",
        "|---|---|---|---|---|",
    ]
    for m, r in key_pairs(results, "one", "r"):
        lines.append(f"| {m} | {r} | {ratio(results, 'rows', kind='one', m=m, r=r)} | | |")
    for m, users in key_pairs(results, "three", "users"):
        found = ratio(results, "words", kind="three", m=m, users=users)
        lines.append(f"| {m} | | | {users} | {found} |")
    return "\n".join(lines) + "\n"


def key_pairs(results: Results, kind: str, field: str) -> list[tuple[int, int]]:
    """The values of m and of another field in the records of a kind."""
    return sorted({(record["m"], record[field]) for record in results.select({"kind": kind})})


def ratio(results: Results, field: str, **where: Any) -> str:
    """The ratio of a mean in the two arms, with its interval. The arms share their resamples."""
    metric = Metric(field, where=where)
    estimates = results.estimates(metric)
    silent, ahead = (estimates[arm][0] for arm in (KEPT_SILENT, AHEAD))
    drawn = silent.resampled / ahead.resampled
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return "none is exact" if field == "rows" else "no words"
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{silent.value / ahead.value:.2f} [{low:.2f}, {high:.2f}]"
