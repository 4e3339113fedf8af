"""A converter of a user: the output repeats what the user says, some rows later."""

from collections.abc import Iterator

from msllm.data.converters.layout import Layout
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Table


def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"text": text}. The option `after` is the number of rows."""
    text = record.text("text")  # raises BadRecord if there is none
    if not text:
        raise BadRecord(f"{record.where}: the text is empty")
    heard = layout.say("user", 0, text)
    said = layout.say("output", layout.options["after"], text)
    yield layout.table([heard, said], key=text)
