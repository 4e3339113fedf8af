"""Graph: which of two things can be reached from a root? As in ProsQA (arXiv 2412.06769).

    Every shumpus is a rempus. Every terpus is a fompus. Tom is a terpus. ... Is Tom a lempus or
    scrompus?

Each fact goes to a thread of its own. All threads read their facts at the same time, one word a
row, while the question comes in another stream. Then each thread whose subject is known to follow
says what its fact concludes, from the next row on: in row READ what follows in one step, in row
READ + 1 what follows in two, and so on. The output says the answer as soon as a thread has said it.
A problem of d steps is answered d + 1 rows after the end of the question.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.data.converters.layout import Layout, generator
from msllm.data.tables import Table, example_hash
from msllm.errors import UserError
from msllm.streams import StreamSpec

NAMES = (
    "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
).split()
CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus"
    " jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus"
    " sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()
WORDS = ("Every", "is", "a", "Is", "or", *NAMES, *CONCEPTS)
READ = 6  # rows of the question; facts are shorter
STEPS = (3, 4, 5, 6)  # of a proof in ProsQA, and how often each occurs
SHARES = (40, 43, 14, 2)
NODES = (18, 28)  # of a graph, in ProsQA
_FACT = re.compile(r"(?:Every (\w+)|(\w+)) is a (\w+)\.")
_QUESTION = re.compile(r"Is (\w+) a (\w+) or (\w+)\?")
_TRIES = 20_000  # graphs without a proof of the wanted length, one after the other

OPTIONS: Mapping[str, Any] = {
    "nodes": list(NODES),
    "steps": list(STEPS),
    "shares": list(SHARES),
    "most_facts": 40,
    "examples": 8_000,
    "seed": 0,
}


class Problem(NamedTuple):
    """A question.

    Attributes:
      facts: (subject, conclusion) of each fact.
      root: whom the question is about.
      choices: the two answers.
      answer: the one that follows.
    """

    facts: tuple[tuple[str, str], ...]
    root: str
    choices: tuple[str, str]
    answer: str

    @property
    def distances(self) -> dict[str, int]:
        """Steps from the root to everything that follows."""
        after = collections.defaultdict(list)
        for subject, conclusion in self.facts:
            after[subject].append(conclusion)
        found, queue = {self.root: 0}, [self.root]
        for word in queue:
            for other in after[word]:
                if other not in found:
                    found[other] = found[word] + 1
                    queue.append(other)
        return found

    @property
    def steps(self) -> int:
        """Steps of the proof."""
        return self.distances[self.answer]


def draw_graph(rng: random.Random, nodes: int) -> tuple[list[tuple[int, int]], list[int]]:
    """A graph as in ProsQA (algorithm 1 of the paper).

    Every new node gets a number of edges (Poisson, mean 1.5) from earlier ones, mostly from such as
    are not reached from both roots, 0 and 1. In the published problems, few nodes have none. Here
    most that would have none get one, or another number.

    Returns: the edges, and for every node from which roots it is reached: 1, 2, 3 (both), 0 (none).
    """
    edges, labels, depths = [], [1, 2], [0, 0]
    for node in range(2, nodes):
        drawn = rng.random()
        one = 1 if drawn <= 0.35 else 2 if drawn <= 0.7 else None
        candidates = [n for n in range(node) if one is None or labels[n] in (0, one)]
        weights = [1.5 * depths[n] + 1 for n in candidates]
        chosen: set[int] = set()
        number = _poisson(rng, 1.5)
        if not number and rng.random() > 0.1:
            number = 1 if rng.random() < 0.5 else _poisson(rng, 1.5)
        for _ in range(min(number, len(candidates))):
            left = [w if n not in chosen else 0 for n, w in zip(candidates, weights)]
            chosen.add(rng.choices(candidates, left)[0])
        edges += [(n, node) for n in chosen]
        labels.append(functools.reduce(int.__or__, (labels[n] for n in chosen), 0))
        depths.append(1 + min((depths[n] for n in chosen), default=-1))
    return edges, labels


def _poisson(rng: random.Random, mean: float) -> int:
    """A number of events (Knuth)."""
    least, product, count = np.exp(-mean), rng.random(), 0
    while product > least:
        product *= rng.random()
        count += 1
    return count


def draw_problem(
    rng: random.Random, steps: int, nodes: tuple[int, int], most_facts: int
) -> Problem:
    """A problem whose proof has a number of steps. Both choices are leaves.

    Raises UserError if there is none in many graphs.
    """
    for _ in range(_TRIES):
        number = rng.randint(*nodes)
        edges, labels = draw_graph(rng, number)
        if len(edges) > most_facts:
            continue
        root = rng.randrange(2)
        inner = {a for a, _ in edges}
        leaves = [n for n in range(2, number) if n not in inner]
        distances = Problem(tuple(edges), root, (0, 0), 0).distances
        right = [n for n in leaves if labels[n] == root + 1 and distances[n] == steps]
        wrong = [n for n in leaves if labels[n] == 2 - root]
        if not right or not wrong:
            continue
        pair = [rng.choice(right), rng.choice(wrong)]
        begins = set(range(number)) - {b for _, b in edges}
        if len(begins) > len(NAMES) or number - len(begins) > len(CONCEPTS):
            continue
        names, concepts = rng.sample(NAMES, len(NAMES)), rng.sample(CONCEPTS, len(CONCEPTS))
        words = [names.pop() if n in begins else concepts.pop() for n in range(number)]
        facts = [(words[a], words[b]) for a, b in edges]
        rng.shuffle(facts)
        choices = [words[n] for n in pair]
        answer = choices[0]
        rng.shuffle(choices)
        return Problem(tuple(facts), words[root], tuple(choices), answer)
    raise UserError(
        f"no proof of {steps} steps in {_TRIES} graphs of {nodes} nodes and at most {most_facts}"
        " facts: allow more nodes or facts"
    )


def draw(options: Mapping[str, Any], count: int, seed: int) -> Iterator[Problem]:
    """Draws problems; `options` as in OPTIONS."""
    options = dict(OPTIONS) | dict(options)
    rng = random.Random(f"graph {seed}")
    for _ in range(count):
        steps = rng.choices(options["steps"], options["shares"])[0]
        yield draw_problem(rng, steps, tuple(options["nodes"]), options["most_facts"])


def read_prosqa(file: str) -> list[Problem]:
    """The problems of a file of ProsQA. Raises UserError if there is no such file."""
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(
            f"there is no file {file}: set MSLLM_SHARED to the folder that holds data/prosqa"
        )
    found = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        text = record["question"]
        facts = tuple((a or b, c) for a, b, c in _FACT.findall(text))
        root, *choices = _QUESTION.search(text).groups()
        answer = record["answer"].rstrip(".").split()[-1]
        found.append(Problem(facts, root, tuple(choices), answer))
    return found


def rows_of(steps: int) -> int:
    """Rows that a problem of this many steps needs."""
    return READ + steps + 1


def sentence(subject: str, conclusion: str) -> list[str]:
    """A fact as words."""
    return [*(["Every"] if subject in CONCEPTS else []), subject, "is", "a", conclusion]


def table(
    problem: Problem,
    spec: StreamSpec,
    rows: int,
    ids: Mapping[str, int],
    silence: int,
    said: bool = True,
) -> Table:
    """A problem as a table. Threads without a fact are silent.

    Args:
      problem: has at most as many facts as there are threads.
      spec: the groups `fact` and `thread`, and the streams `question` and `output`.
      rows: T.
      ids: the token of every word.
      silence: the silence token.
      said: whether threads say what follows; otherwise they are silent.
    """
    facts, threads = spec.members("fact"), spec.members("thread")
    cells = np.full((rows, spec.size), silence, np.int32)
    distances = problem.distances
    for (subject, conclusion), fact, thread in zip(problem.facts, facts, threads):
        words = [ids[word] for word in sentence(subject, conclusion)]
        cells[: len(words), fact] = words
        if said and subject in distances:
            cells[READ + distances[subject] :, thread] = ids[conclusion]
    question = ["Is", problem.root, "a", problem.choices[0], "or", problem.choices[1]]
    cells[:READ, spec.index("question")] = [ids[word] for word in question]
    cells[READ + problem.steps :, spec.index("output")] = ids[problem.answer]
    return Table(cells, np.ones(cells.shape, bool), example_hash(repr(problem)))


def tables(
    problems: Iterable[Problem],
    spec: StreamSpec,
    rows: int,
    ids: Mapping[str, int],
    silence: int,
    said: bool = True,
) -> list[Table]:
    """Problems as tables, see `table`."""
    return [table(problem, spec, rows, ids, silence, said) for problem in problems]


@generator
def convert(layout: Layout) -> Iterator[Table]:
    """The converter: problems in which threads say what follows."""
    return _convert(layout, said=True)


@generator
def convert_blank(layout: Layout) -> Iterator[Table]:
    """The same problems with silent threads: only the answer is supervised."""
    return _convert(layout, said=False)


def _convert(layout: Layout, said: bool) -> Iterator[Table]:
    options = dict(OPTIONS) | dict(layout.options)
    ids = {word: layout.one_token(word, "graph") for word in WORDS}
    silence = layout.tokenizer.silence_id
    for problem in draw(options, options["examples"], options["seed"]):
        yield table(problem, layout.spec, layout.rows, ids, silence, said)


def most_facts(problems: Sequence[Problem]) -> int:
    """The largest number of facts of a problem."""
    return max(len(problem.facts) for problem in problems)
