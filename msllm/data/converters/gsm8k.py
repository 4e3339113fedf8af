"""GSM8K: the user asks the question, the thought solves it, and the output gives the number."""

from __future__ import annotations

import re
from collections.abc import Iterator

from msllm.data.converters.layout import Choice, Layout, check_keys, each_record
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Table

OPTIONS = {"think_after": Choice(-1, least=-1), "ignored_keys": []}
_CALCULATOR = re.compile(r"<<[^>]*>>")


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"question", "answer"}.

    The thought starts `think_after` rows after the start of the question (-1: after its end). The
    output starts when the question and the thought have ended. Without a stream `thought`, the
    output starts where the thought would, and says the worked answer with a last line
    "#### number", as in the file.
    """
    question, answer = record.text("question"), record.text("answer")
    check_keys(layout, record.value, {"question", "answer"}, record.where)
    worked, mark, number = answer.rpartition("####")
    if not mark:
        raise BadRecord(
            f"{record.where}: 'answer' has no last line '#### number': correct the record"
        )
    worked, number = _CALCULATOR.sub("", worked).rstrip("\n"), number.strip()
    asked = layout.say("user", 0, question)
    think_after = layout.draw("think_after", question)
    start = asked.end if think_after < 0 else think_after
    if "thought" in layout.spec.names:
        thought = layout.say("thought", start, worked)
        said = [thought, layout.say("output", max(asked.end, thought.end), number)]
    else:
        said = [layout.say("output", start, f"{worked}\n#### {number}")]
    yield layout.table([asked, *said], question)
