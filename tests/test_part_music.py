"""Part music as text: what is written, and which scores are refused."""

import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "configs/combine"
sys.path.insert(0, str(FOLDER))

import music  # noqa: E402
import part_music  # noqa: E402
from part_music import Note, Refused  # noqa: E402

from msllm.errors import UserError  # noqa: E402


def sounds(voices):
    """What each voice does at each sixteenth: its word, and whether a note or rest begins."""
    return [
        [(note.word, time == note.start) for note in voice for time in range(note.start, note.end)]
        for voice in voices
    ]


def sounds_in(text, voices):
    """The same, from a text."""
    found = [[] for _ in range(voices)]
    words = text.split()
    for start in range(0, len(words), voices + 1):
        *step, time = words[start : start + voices + 1]
        for voice, word in zip(found, step):
            goes_on = word == part_music.GOES_ON
            said = voice[-1][0] if goes_on else word
            voice += [(said, not goes_on), *[(said, False)] * (int(time) - 1)]
    return found


def test_the_text_holds_all_notes():
    voices = [
        [Note(0, 8, "60"), Note(8, 12, "60"), Note(12, 16, "r"), Note(16, 17, "72")],
        [Note(0, 6, "r"), Note(6, 9, "48"), Note(9, 17, "50")],
        [Note(0, 17, "40")],
    ]
    text = part_music.to_text(voices)
    assert text.startswith("60 r 40 +6 _ 48 _ +2 60 _ _ +1 _ 50 _ +3")
    assert sounds_in(text, 3) == sounds(voices)


def make_score(*parts):
    """A score of parts in music21's tiny notation."""
    music21 = pytest.importorskip("music21", reason="music21 is not installed (extra `music`)")
    score = music21.stream.Score()
    for part in parts:
        score.append(music21.converter.parse(f"tinyNotation: {part}"))
    for part in score.parts:
        part.offset = 0
    return score


def test_voices_are_read():
    score = make_score("4/4 c'2~ c'4 r8 d'8", "4/4 r2 g8 a8", "4/4 r1")
    voices = part_music.read_voices(score)
    assert len(voices) == 2  # the last part does not sound
    assert part_music.to_text(voices) == "72 r +8 _ 67 +2 _ 69 +2 r r +2 74 _ +2"


def first_measure(score):
    """The first measure of the first part."""
    return score.parts[0].recurse().notes[0].activeSite


def with_chord(music21, part):
    part.append(music21.chord.Chord(["C4", "E4"]))


def with_grace_note(music21, part):
    part.append(music21.note.Note("C4").getGrace())


def with_two_notes(music21, part):
    part.insert(0, music21.note.Note("C4"))


def with_triplet(music21, part):
    part.append(music21.note.Note("C4", quarterLength=1 / 3))


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_chord, "chords"),
        (with_grace_note, "grace notes"),
        (with_two_notes, "two notes at a time in a part"),
        (with_triplet, "notes off the grid of sixteenths"),
    ],
)
def test_a_score_that_cannot_be_written_is_refused(change, reason):
    score = make_score("4/4 c4 d4")
    change(sys.modules["music21"], first_measure(score))
    with pytest.raises(Refused, match=f"^{reason}$"):
        part_music.read_voices(score)


def test_a_score_needs_one_to_six_voices():
    with pytest.raises(Refused, match="no part sounds"):
        part_music.read_voices(make_score("4/4 r1"))
    assert len(part_music.read_voices(make_score(*["4/4 c1"] * 6))) == 6
    with pytest.raises(Refused, match="more than 6 voices"):
        part_music.read_voices(make_score(*["4/4 c1"] * 7))


def test_every_file_is_written_or_refused_by_name(tmp_path, monkeypatch, capsys):
    first, second = make_score("4/4 c4 d4", "4/4 e2"), make_score("4/4 c4 g4")
    with_chord(sys.modules["music21"], first_measure(second))
    names = ("bwv1.1", "bwv1.2", "bwv2")
    for name, score in zip(names, (first, second, first)):
        score.write("musicxml", tmp_path / f"{name}.xml")
    (tmp_path / "bwv3.rntxt").touch()
    (tmp_path / "bwv4.xml").write_text("damaged")
    files = {"bach": [*tmp_path.iterdir()], "palestrina": []}
    monkeypatch.setattr(sys.modules["music21"].corpus, "getComposer", files.get)
    part_music.write(tmp_path / "out")
    split = "held_out" if part_music.is_held_out("bach/bwv1") else "train"
    (line,) = (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
    text = "60 64 +4 62 _ +4 r r +8"
    assert json.loads(line) == {
        "name": "bach/bwv1.1.xml",
        "work": "bach/bwv1",
        "voices": 2,
        "text": text,
    }
    refused = (tmp_path / "out" / "refused.txt").read_text().splitlines()
    assert refused[:3] == [
        "bach/bwv1.2.xml: chords",
        "bach/bwv2.xml: same text as bach/bwv1.1.xml",
        "bach/bwv3.rntxt: not a score",
    ]
    assert refused[3].startswith("bach/bwv4.xml: music21 cannot read it (")
    assert "refused, by name in refused.txt: 4 files" in capsys.readouterr().out


def test_a_tenth_of_the_works_is_held_out():
    held_out = [part_music.is_held_out(f"bach/bwv{number}") for number in range(1000)]
    assert 70 < sum(held_out) < 130


def test_the_study_says_how_to_write_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("MSLLM_PART_MUSIC", str(tmp_path))
    with pytest.raises(UserError, match="train.jsonl is missing: write it with `python configs/"):
        music.get_study()
