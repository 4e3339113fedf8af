"""Progress: a bar on a terminal, and lines of text elsewhere."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from msllm.runtime.progress import Progress


def test_lines_are_rate_limited_and_estimate_the_remaining_time(clock, capsys):
    start = clock.now
    with Progress("prepare: portions", 9, 3) as shown:
        for seconds, done in ((4, 3), (12, 5), (13, 6), (3650, 7)):
            clock.now = start + seconds
            shown.show(done, f"{done * 1000:,} examples", f"{done / shown.seconds:.2f} a second")
    out, lines = capsys.readouterr()
    assert out == "" and lines.splitlines() == [
        "prepare: portions 5/9  5,000 examples  0.42 a second  ETA 0:24",
        "prepare: portions 7/9  7,000 examples  0.00 a second  ETA 30:25",
    ]


def test_lines_without_a_total_or_with_the_estimate_of_the_caller(clock, capsys):
    Progress("tokenizer", every=0).show(12, "12 texts")
    steps = Progress("step", 8, every=0, file=sys.stdout)
    steps.show(1, "loss 2.0", seconds_left=3725.9)
    steps.say("slow")
    silent = Progress("step", 8, every=0, file=sys.stdout, enabled=False)
    silent.show(2)
    silent.say("not the first process")
    silent.close()
    assert capsys.readouterr() == (
        "step 1/8  loss 2.0  ETA 1:02:05\nslow\n",
        "tokenizer  12 texts\n",
    )


CODE = """
import os, sys
from msllm.runtime.progress import Progress
with Progress("step", 8, 2, every=0, keep=True) as shown:
    shown.show(3, "loss 2.0")
    shown.say("a line of text")
    shown.show(8, "loss 1.0")
    if "exit" in sys.argv:
        os._exit(0)
"""


def on_a_terminal(*arguments, piped=False):
    """Runs CODE on a new terminal; returns (text on the terminal, stdout if it is a pipe)."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        stdout=subprocess.PIPE if piped else theirs,
        stderr=theirs,
        env=environment,
        check=True,
        timeout=60,
    )
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # Linux raises it at the end of the output
        while part := os.read(ours, 1 << 16):
            screen += part
    os.close(ours)
    return screen.decode(), done.stdout


@pytest.mark.parametrize("piped", [False, True])
def test_a_bar_does_not_break_lines_or_write_to_stdout(piped):
    screen, stdout = on_a_terminal(piped=piped)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen).replace("\r", "")
    assert "3/8 loss 2.0" in text and text.rstrip().endswith("8/8 loss 1.0  ETA 0:00")
    if piped:
        assert stdout == b"a line of text\n" and "a line" not in text
    else:
        assert "a line of text\n" in text


@pytest.mark.parametrize("end", ["close", "exit"])
def test_the_cursor_is_visible_however_the_process_ends(end):
    screen, _ = on_a_terminal(end)
    assert "8/8" in screen and screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l") >= 0
