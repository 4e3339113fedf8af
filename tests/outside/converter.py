"""A custom converter: the output repeats what the user says, some rows later."""

from collections.abc import Iterator

from msllm.data.converters.layout import Layout
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Table


def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """Converts {"text": text}. The option `after` is the delay of the output in rows."""
    text = record.text("text")  # raises BadRecord if there is none
    if not text:
        raise BadRecord(f"{record.where}: the text is empty")
    user = layout.say("user", 0, text)
    output = layout.say("output", layout.options["after"], text)
    yield layout.table([user, output], key=text)
