"""Part music as text: the scores of Bach and Palestrina in the corpus of music21.

    pip install "msllm[music]"
    python configs/combine/part_music.py --out=data/part_music

writes to the folder `--out`:

- `train.jsonl` and `held_out.jsonl`: a line per score, {"name", "work", "voices", "text"}. A tenth
  of the works is held out: of Bach by BWV number, of Palestrina by the title of the mass, so that
  movements of one work are never on both sides.
- `refused.txt`: a line for each file that is not used, with its name and the reason.

The text has one step for each moment at which a voice begins a note or a rest. A step has a word
per voice, from the first part of the score to the last, and then the time to the next step. The
word is the MIDI number of the pitch, `r` for a rest, or `_` if the voice goes on with what it did.
The time is `+n`, n sixteenths:

    67 62 59 43 +2 _ 64 _ _ +2 r _ _ 48 +4

This keeps the pitch, beginning and length of each note, and nothing else: no words, bars, keys,
clefs, fermatas or spelling of accidentals. Tied notes are one note, repeats are written once, and a
part without notes is left out.

A score is refused if it has no part or more than MOST_VOICES with notes, if a part has chords,
grace notes or two notes at a time, or if a note does not begin or end on a sixteenth. A score that
music21 cannot read, and one with the same text as a score before it, are refused as well.

The corpus is part of the package music21 and is read from there, without a download. music21 is
under the BSD license. The encodings have licenses of their own (`corpus/license.txt` in the
package): those of Palestrina are copyright 2000 John Miller, who reserves the rights to derivative
formats. Do not publish the text.

Cost: about five CPU-minutes for 1,751 files. Studies read the text alone.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

COMPOSERS = ("bach", "palestrina")
MOST_VOICES = 6
PER_QUARTER = 4  # steps of the grid: sixteenths
REST, GOES_ON = "r", "_"
HELD_OUT = 10  # one work of this number is held out
SCORES = (".krn", ".mxl", ".xml")  # other files of the corpus are analyses of these scores


class Refused(Exception):
    """A score that cannot be written as text."""


class Note(NamedTuple):
    """A note or a rest of a voice, in sixteenths from the start of the score."""

    start: int
    end: int
    word: str


def to_text(voices: Sequence[Sequence[Note]]) -> str:
    """Returns the text of voices, each of which is a list of notes without gaps."""
    begins = [{note.start: note.word for note in voice} for voice in voices]
    last = max(voice[-1].end for voice in voices)
    times = [*sorted({start for voice in begins for start in voice}), last]
    words: list[str] = []
    for now, after in zip(times, times[1:]):
        words += [voice.get(now, GOES_ON) for voice in begins]
        words.append(f"+{after - now}")
    return " ".join(words)


def read_voices(score: Any) -> list[list[Note]]:
    """Returns the voices of a `music21.stream.Score` that sound. Raises Refused."""
    found = [_read_part(part) for part in score.parts]
    voices = [voice for voice in found if any(note.word != REST for note in voice)]
    if not voices:
        raise Refused("no part sounds")
    if len(voices) > MOST_VOICES:
        raise Refused(f"more than {MOST_VOICES} voices")
    last = max(voice[-1].end for voice in voices)
    return [list(_fill(voice, last)) for voice in voices]


def _read_part(part: Any) -> list[Note]:
    """The notes and rests of a part, with tied notes as one. Raises Refused."""
    found: list[Note] = []
    tied = False  # the last note is tied to the next one
    for element in part.flatten().notesAndRests:  # sorted by time
        start = Fraction(element.offset * PER_QUARTER)
        end = start + Fraction(element.quarterLength * PER_QUARTER)
        if element.isChord:
            raise Refused("chords")
        if start == end:
            raise Refused("grace notes")
        if start.denominator > 1 or end.denominator > 1:
            raise Refused("notes off the grid of sixteenths")
        if not (element.isNote or element.isRest):
            raise Refused("unpitched notes")
        if found and start < found[-1].end:
            raise Refused("two notes at a time in a part")
        word = str(element.pitch.midi) if element.isNote else REST
        if tied and (found[-1].end, found[-1].word) == (start, word):
            found[-1] = found[-1]._replace(end=int(end))
        else:
            found.append(Note(int(start), int(end), word))
        tied = element.isNote and element.tie is not None and element.tie.type != "stop"
    return found


def _fill(voice: Sequence[Note], last: int) -> Iterator[Note]:
    """Yields the notes, with rests where the score has nothing, until `last`."""
    now = 0
    for note in voice:
        if note.start > now:
            yield Note(now, note.start, REST)
        yield note
        now = note.end
    if last > now:
        yield Note(now, last, REST)


def is_held_out(work: str) -> bool:
    """Whether the scores of a work are held out."""
    return int(hashlib.sha256(work.encode()).hexdigest(), 16) % HELD_OUT == 0


def work_of(composer: str, name: str, score: Any) -> str:
    """The work that a score is a movement of."""
    if composer == "palestrina":
        return f"{composer}/{score.metadata.parentTitle}"  # of the mass
    return f"{composer}/{re.split('[.-]', name)[0]}"  # the BWV number


def read_corpus() -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Returns ({split: records}, {name: why it is refused}) of all files."""
    from music21 import corpus

    records: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    refused: dict[str, str] = {}
    names: dict[str, str] = {}  # of the scores, by text
    for composer in COMPOSERS:
        paths = sorted(corpus.getComposer(composer))
        for number, path in enumerate(paths, 1):
            name = f"{composer}/{path.name}"
            try:
                record = read_score(path, composer)
                text = record["text"]
                if text in names:
                    raise Refused(f"same text as {names[text]}")
            except Refused as error:
                refused[name] = str(error)
            else:
                names[text] = name
                split = "held_out" if is_held_out(record["work"]) else "train"
                records[split].append({"name": name, **record})
            if number % 100 == 0 or number == len(paths):
                print(f"{composer}: {number} of {len(paths)} files", file=sys.stderr, flush=True)
    return records, refused


def read_score(path: pathlib.Path, composer: str) -> dict[str, Any]:
    """Returns {"work", "voices", "text"} of a file. Raises Refused."""
    from music21 import converter, stream

    if path.suffix not in SCORES:
        raise Refused("not a score")
    try:
        score = converter.parse(path, forceSource=True, storePickle=False)
    except Exception as error:  # music21 raises errors of any type
        raise Refused(f"music21 cannot read it ({type(error).__name__})") from error
    if not isinstance(score, stream.Score):
        raise Refused("a file of several scores")
    voices = read_voices(score)
    work = work_of(composer, path.name, score)
    return {"work": work, "voices": len(voices), "text": to_text(voices)}


def write(out: pathlib.Path) -> None:
    """Writes the files and prints what is in them."""
    out.mkdir(parents=True, exist_ok=True)
    records, refused = read_corpus()
    for split, found in records.items():
        lines = [json.dumps(record) + "\n" for record in found]
        (out / f"{split}.jsonl").write_text("".join(lines))
    (out / "refused.txt").write_text("".join(f"{name}: {why}\n" for name, why in refused.items()))
    print("\n".join(describe(records, refused)))


def describe(records: dict[str, list[dict[str, Any]]], refused: dict[str, str]) -> Iterator[str]:
    """Yields lines that say what is written and what is not."""
    for split, found in records.items():
        for composer in COMPOSERS:
            mine = [record for record in found if record["work"].startswith(composer)]
            words = sum(len(record["text"].split()) for record in mine)
            voices = sorted(collections.Counter(record["voices"] for record in mine).items())
            works = len({record["work"] for record in mine})
            yield (
                f"{split}, {composer}: {len(mine):,} scores of {works:,} works, {words:,} words;"
                f" scores by number of voices: {', '.join(f'{n}: {count}' for n, count in voices)}"
            )
    yield f"refused, by name in refused.txt: {len(refused):,} files"
    reasons = collections.Counter(why.partition(" as ")[0] for why in refused.values())
    yield from (f"  {count:,}: {why}" for why, count in reasons.most_common())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("data/part_music"))
    options = parser.parse_args()
    try:
        write(options.out)
    except ModuleNotFoundError as error:
        parser.error(f'{error}: pip install "msllm[music]"')
    except OSError as error:
        parser.error(f"--out is {options.out}, which cannot be written ({error}): choose another")
