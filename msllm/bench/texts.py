"""Small corpora of different kinds, on which tokenizers are compared.

Some are generated from templates, one is the source code of msllm, and the others are public
corpora in the folder of `shared_file` (msllm/data/files.py).
"""

from __future__ import annotations

import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import msllm
from msllm.data import corpora
from msllm.data.files import input_files, lines, shared_file

_ITEMS = "coffee tea juice water soup salad bagel muffin".split()
_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_SIZES = ("small", "medium", "large")
_PLACES = {"to go": "to go", "for here": "here"}
_ASKED = (
    "i would like {count} {size} {item} {place} please",
    "can i have {count} {size} {item} {place} ?",
    "hello , {count} {item} , {size} , {place}",
)
_CITIES = "Rome Oslo Paris Lima Cairo Delhi Quito Berlin Madrid Athens".split()
_WEATHERS = "sunny rainy cloudy windy snowy".split()
_QUESTIONS = (
    "what is the weather in {} ?",
    "how is the weather in {} today ?",
    "tell me the weather in {} please",
)


def orders(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yields chats at a counter, for the converter `chat`: an order, and in half of them a change.

    The answer follows from the questions. It has a format of its own, such as
    "order : tea x 2 | large | to go".
    """
    rng = random.Random(seed)
    for _ in range(count):
        order = {
            "count": rng.choice(list(_COUNTS)),
            "size": rng.choice(_SIZES),
            "item": rng.choice(_ITEMS),
            "place": rng.choice(list(_PLACES)),
        }
        messages = [*_exchange(rng.choice(_ASKED).format(**order), order)]
        if rng.random() < 0.5:
            order["count"] = rng.choice(list(_COUNTS))
            messages += _exchange(f"make that {order['count']} please", order)
        yield {"messages": messages}


def _exchange(question: str, order: dict[str, str]) -> list[dict[str, str]]:
    answer = (
        f"order : {order['item']} x {_COUNTS[order['count']]} | {order['size']}"
        f" | {_PLACES[order['place']]}"
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _orders(count: int) -> Iterator[str]:
    for chat in orders(count):
        yield from (message["content"] for message in chat["messages"])


def _weather(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        city = rng.choice(_CITIES)
        yield rng.choice(_QUESTIONS).format(city)
        yield (
            f"weather report for {city} : {rng.choice(_WEATHERS)} , {rng.randint(-5, 35)} degrees ."
        )


def _chinese(count: int) -> Iterator[str]:
    rng = random.Random(0)
    people = "我 你 他 她 我们 老师 学生 朋友 妈妈 爸爸".split()
    times = "今天 明天 昨天 早上 晚上 周末 下午 去年".split()
    places = "北京 上海 学校 图书馆 公园 商店 机场 家里 医院 餐厅".split()
    actions = "学习 工作 吃饭 看书 买东西 散步 见朋友 喝咖啡 看电影 做作业".split()
    moods = "很高兴 有点累 非常忙 不太舒服 很开心".split()
    for _ in range(count):
        person, time, place, action, mood = map(rng.choice, (people, times, places, actions, moods))
        yield f"{time}{person}在{place}{action}{rng.choice(['吗', '呢', '吧', ''])}？"
        yield f"{person}{time}要去{place}{action}，因为{rng.choice(people)}{mood}。"


def _source_code() -> Iterator[str]:
    for path in sorted(pathlib.Path(msllm.__file__).parent.rglob("*.py")):
        yield path.read_text()


def _mixed() -> Iterator[str]:
    yield from itertools.islice(_source_code(), 10)
    yield from itertools.chain(_chinese(300), _weather(300), _orders(300))
    for name in ("gsm8k", "tatoeba", "switchboard"):
        if _exists(name):
            yield from itertools.islice(_SHARED[name][1](_file(name)), 1500)


def _records(*keys: str) -> Callable[[str], Iterator[str]]:
    """Returns a function that yields the texts under some keys of a file of JSON lines."""

    def read(file: str) -> Iterator[str]:
        for line in pathlib.Path(file).read_text().splitlines():
            record = json.loads(line)
            yield from (_text(record[key]) for key in keys if key in record)

    return read


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _taskmaster(file: str) -> Iterator[str]:
    for record in corpora.taskmaster4(file):
        yield from (m["content"] for m in record["messages"] if m["content"])


def _switchboard(file: str) -> Iterator[str]:
    for record in corpora.switchboard(file):
        yield from (utterance["text"] for utterance in record["utterances"])


def _prosqa(file: str) -> Iterator[str]:
    for record in json.loads(pathlib.Path(file).read_text()):
        yield from (record["question"], " ".join(record["steps"]), record["answer"])


def _tatoeba(file: str) -> Iterator[str]:
    for record in corpora.tatoeba(file):
        yield from (record["source"], record["target"])


def _paragraphs(file: str) -> Iterator[str]:
    yield from pathlib.Path(file).read_text().split("\n\n")


_BUILT_IN: dict[str, Callable[[], Iterator[str]]] = {
    "orders": lambda: _orders(150),
    "weather": lambda: _weather(5000),
    "chinese": lambda: _chinese(3000),
    "source_code": _source_code,
    "mixed": _mixed,
}
_SHARED: dict[str, tuple[str, Callable[[str], Iterator[str]]]] = {
    "taskmaster4": ("data/dialogue_taskmaster4/data_07.json", _taskmaster),
    "gsm8k": ("data/gsm8k/train.jsonl", _records("question", "answer")),
    "switchboard": ("data/timed_switchboard_sample/timed-transcript", _switchboard),
    "bfcl": ("data/tools_bfcl/BFCL_v4_multiple.json", _records("question", "function")),
    "prosqa": ("data/prosqa/prosqa_valid.json", _prosqa),
    "shakespeare": ("data/tinyshakespeare/input.txt", _paragraphs),
    "tatoeba": ("data/translation_tatoeba/eng-swe.txt", _tatoeba),
}


def _file(name: str) -> str:
    package = pathlib.Path(msllm.__file__)
    return shared_file(_SHARED[name][0], str(package))


def _exists(name: str) -> bool:
    return pathlib.Path(_file(name)).is_file()


def names() -> list[str]:
    """Returns the names of the corpora that are available here."""
    return [*_BUILT_IN, *filter(_exists, _SHARED)]


def texts(name: str) -> list[str]:
    """Returns the texts of a corpus that are not empty: one of `names`, or the lines of files.

    Args:
      name: a name, or a path or glob. Raises UserError if there is no such file.
    """
    if name in _BUILT_IN:
        found = _BUILT_IN[name]()
    elif name in _SHARED:
        found = _SHARED[name][1](_file(name))
    else:
        found = (
            line.decode(errors="replace").rstrip("\n")
            for file in input_files(name)
            for _, line in lines(file)
        )
    return [text for text in found if text.strip()]
