"""Transcripts with times: WebVTT, SRT, RTTM, CTM and Praat TextGrid, as records for `timed`.

A record is {"utterances": [{"start": s, "end": s, "speaker": name, "text": text}, ...]}:

- `vtt`: the cues of a file. A voice span, `<v NAME>`, names the speaker; without one the speaker is
  "". Other tags are dropped. A line break within a cue becomes a space.
- `srt`: like `vtt`. SRT has no speakers; `timed` finds a name before a colon.
- `ctm`: words, one recording for each file and its channels. The speaker is the last of eight
  fields, or else the channel.
- `rttm`: the LEXEME lines, with words and their speakers, one recording for each file.
- `textgrid`: the intervals and points that hold a text. The name of the tier is the speaker.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from typing import Any

from msllm.data import files
from msllm.errors import UserError

FORMATS = ("vtt", "srt", "rttm", "ctm", "textgrid")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]*)>")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<[\d:.]+>")
_TIMING = re.compile(r"(?m)^[ \t]*\d[\d:.,]*[ \t]*-+>")
_COMMENTS = ("#", ";;")

_EXAMPLES = {"vtt": "00:01.500 --> 00:02.000", "srt": "00:00:01,500 --> 00:00:02,000"}

Recording = dict[str, list[dict[str, Any]]]


class Damaged(UserError):
    """A file that is not what its name says."""


def read(file: str, format: str) -> list[Recording]:
    """Returns the recordings of a file. Raises Damaged, naming the file; UserError."""
    return _READERS[format](file, files.read_text(file))


def _utterance(start: float, end: float, speaker: str, text: str) -> dict[str, Any]:
    return {"start": start, "end": end, "speaker": speaker, "text": text}


def _word(start: str, duration: str, speaker: str, word: str) -> dict[str, Any]:
    # Rounded, because the sum of 0.1 and 0.2 would be after 0.3.
    end = round(float(start) + float(duration), 6)
    return _utterance(float(start), end, speaker, word)


def _read_captions(file: str, format: str, text: str) -> list[Recording]:
    webvtt = files.import_optional("webvtt", file, "webvtt-py")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").splitlines(keepends=True)
    try:
        captions = list(webvtt.WebVTT.from_buffer(lines, format=format, strict=True))
    except (webvtt.errors.MalformedFileError, webvtt.errors.MalformedCaptionError) as error:
        raise Damaged(f"{file}: is no {format} file ({error}): correct the file") from error
    expected = len(_TIMING.findall(text.replace("\r", "\n")))
    if len(captions) != expected:  # the library skips what it does not understand
        raise Damaged(
            f"{file}: has {expected} lines with times, but {len(captions)} captions that can be"
            f" read: correct the lines with times ('{_EXAMPLES[format]}'), and the empty captions"
        )
    found = []
    for caption in captions:
        start, end = caption.start_time.in_milliseconds(), caption.end_time.in_milliseconds()
        for speaker, said in _voices(caption.raw_text):
            found.append(_utterance(start / 1000, end / 1000, speaker, said))
    return [{"utterances": found}]


def _voices(text: str) -> Iterator[tuple[str, str]]:
    """Yields (speaker, what they say) of a cue."""
    before, *voices = _VOICE.split(text)
    for speaker, said in [("", before), *zip(voices[::2], voices[1::2])]:
        said = " ".join(html.unescape(_TAG.sub("", said)).split())
        if said:
            yield html.unescape(speaker).strip(), said


def _read_vtt(file: str, text: str) -> list[Recording]:
    return _read_captions(file, "vtt", text)


def _read_srt(file: str, text: str) -> list[Recording]:
    return _read_captions(file, "srt", text)


def _read_words(
    file: str, text: str, parse: Callable[[list[str]], tuple[str, dict[str, Any]] | None]
) -> list[Recording]:
    """Returns the recordings of a file with a word per line; parse(fields) gives (name, word)."""
    recordings: dict[str, Recording] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith(_COMMENTS):
            continue
        try:
            parsed = parse(line.split())
        except (IndexError, ValueError) as error:
            raise Damaged(f"{file}:{number}: {line[:60]!r} ({error}): correct the line") from error
        if parsed is not None:
            name, word = parsed
            recordings.setdefault(name, {"utterances": []})["utterances"].append(word)
    return list(recordings.values())


def _read_ctm(file: str, text: str) -> list[Recording]:
    def parse(fields: list[str]) -> tuple[str, dict[str, Any]]:
        name, channel, start, duration, word = fields[:5]
        speaker = fields[7] if len(fields) > 7 else channel
        return name, _word(start, duration, speaker, word)

    return _read_words(file, text, parse)


def _read_rttm(file: str, text: str) -> list[Recording]:
    def parse(fields: list[str]) -> tuple[str, dict[str, Any]] | None:
        kind, name, _, start, duration, word, _, speaker = fields[:8]
        if kind != "LEXEME":
            return None
        return name, _word(start, duration, speaker, word)

    recordings = _read_words(file, text, parse)
    if not recordings and text.strip():
        raise Damaged(
            f"{file}: has no LEXEME lines: it says who speaks when, but not what; give a transcript"
            " with words, such as .ctm"
        )
    return recordings


def _read_textgrid(file: str, text: str) -> list[Recording]:
    textgrid_io = files.import_optional("praatio.utilities.textgrid_io", file, "praatio")
    try:
        tiers = textgrid_io.parseTextgridStr(text)["tiers"]
        found = [
            _utterance(float(start), float(end[0] if end else start), tier["name"], said.strip())
            for tier in tiers
            for start, *end, said in tier["entries"]
            if said.strip()
        ]
    except Exception as error:  # the library's parser raises whatever it stumbles over
        raise Damaged(f"{file}: is no TextGrid ({error!r}): correct the file") from error
    return [{"utterances": found}]


_READERS: dict[str, Callable[[str, str], list[Recording]]] = {
    "vtt": _read_vtt,
    "srt": _read_srt,
    "rttm": _read_rttm,
    "ctm": _read_ctm,
    "textgrid": _read_textgrid,
}
