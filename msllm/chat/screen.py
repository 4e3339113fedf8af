"""The screen of `msllm chat`, which draws a player's rows and passes keys to the player.

It needs Textual (extra `chat`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input, Static

from msllm.chat.player import Live, Player
from msllm.chat.recording import free_name
from msllm.errors import UserError
from msllm.tokenizer import list_words
from msllm.view import cells

COLUMN, TEXT_COLUMN = 24, 60  # the largest width of a stream in characters, as cells and as text
TEXT_ROWS = 1000  # the text view shows this many of the last rows
# What the input line shows for characters that would break it.
SIGNS = {ord("\n"): "\N{RETURN SYMBOL}", ord("\t"): "\N{RIGHTWARDS ARROW TO BAR}"}
TARGET, MUTED = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", "\N{MULTIPLICATION X}"


class Key(NamedTuple):
    """A group of keys with one entry in the help line."""

    actions: dict[str, str]  # {key in Textual's spelling: action}
    shown: str  # names of the keys in the help line
    does: str  # description of the actions in the help line
    live: bool = False  # only for live sessions, not for recordings

    @property
    def names(self) -> set[str]:
        """The actions without their arguments."""
        return {action.partition("(")[0] for action in self.actions.values()}


KEYS = (
    Key({"enter": "send"}, "Enter", "send", live=True),
    Key({"tab": "target(1)", "shift+tab": "target(-1)"}, "Tab", "next input", live=True),
    Key({"escape": "drop"}, "Esc", "drop waiting input", live=True),
    Key({"ctrl+p": "pause"}, "^P", "pause, resume"),
    Key({"ctrl+n": "step"}, "^N", "one row"),
    Key({"up": "pace(1)", "down": "pace(-1)"}, "↑↓", "pace"),
    Key({f"f{n + 1}": f"mute({n})" for n in range(12)}, "F1-F12", "mute stream", live=True),
    Key({"ctrl+f": "fork"}, "^F", "fork", live=True),
    Key({"ctrl+o": "branch"}, "^O", "other fork"),
    Key({"ctrl+t": "text"}, "^T", "text, cells"),
    Key({"pageup": "scroll(1)", "pagedown": "scroll(-1)"}, "PgUp PgDn", "scroll"),
    Key({"ctrl+s": "save"}, "^S", "save", live=True),
    Key({"ctrl+q": "leave", "ctrl+c": "leave"}, "^Q ^C", "quit"),
)
ACTIONS = {key: action for bound in KEYS for key, action in bound.actions.items()}


class Line(Input):
    """The input line.

    It handles all keys itself, in order, so that Enter and Tab act on the text typed before them.
    """

    def _on_paste(self, event: events.Paste) -> None:
        """Inserts all lines of pasted text. Textual calls it; `Input` would keep the first one."""
        text = re.sub("\r\n?", "\n", event.text)  # terminals paste a line break as \r
        self.replace(text, *self.selection)
        event.prevent_default()  # of `Input`, whose handler Textual would call as well
        event.stop()

    @property
    def _value(self) -> Text:
        """The text on one line, as `Input` draws it."""
        return Text(self.value.translate(SIGNS), no_wrap=True, overflow="ignore", end="")

    def _position_to_cell(self, position: int) -> int:
        """The column of a character on the screen, for `Input`."""
        return cell_len(self.value[:position].translate(SIGNS))

    async def on_key(self, event: events.Key) -> None:
        if action := ACTIONS.get(event.key):
            event.stop()
            event.prevent_default()
            await self.app.run_action(action)


class Columns(Widget):
    """A column for each stream, with one cell per line or with text. The newest line is last.

    Attributes:
      player: the player whose rows are shown.
      target: input stream that receives typed text; empty: there is no input stream.
      as_text: whether the columns hold text instead of cells.
      back: number of lines scrolled back from the newest line.
    """

    DEFAULT_CSS = "Columns { height: 1fr; }"

    def __init__(self, player: Player, target: str):
        super().__init__()
        self.player, self.target, self.as_text, self.back = player, target, False, 0
        # The number of lines and the branch at the last update.
        self._last_count = self._last_branch = 0
        # The lines of each stream as text, made at most once per update. None: not made yet.
        self._text: list[list[Text]] | None = None

    def follow(self) -> None:
        """Draws the player's current rows. Keeps the scroll position."""
        self._text = None
        if self.back:
            before, self._last_count = self._last_count, self._count()
            added = max(self._last_count - before, 0)
            self.back = self.back + added if self.player.branch == self._last_branch else 0
        self._last_branch = self.player.branch
        self.refresh()

    def scroll(self, lines: int) -> None:
        """Scrolls up by `lines` lines, or down if `lines` is negative."""
        self._last_count = self._count()
        self.back = max(0, min(self.back + lines, self._last_count - self._height()))
        self.refresh()

    def widths(self) -> list[int]:
        """The widths of the column of row numbers and of the streams that fit on the screen."""
        number = 0 if self.as_text else max(3, len(str(self.player.rows)))
        widest = TEXT_COLUMN if self.as_text else COLUMN
        streams = len(self.player.recording.names)
        widths = cells.fit([widest] * streams, self.size.width - number - 1)
        room = (self.size.width - number) // (min(widths) + 1)
        return [number, *widths[: max(1, room)]]

    def render_line(self, y: int) -> Strip:
        """Returns one line of the screen. Textual calls it."""
        widths = self.widths()
        streams = len(widths) - 1
        if y == 0:
            texts = self._header(streams)
        elif self.as_text:
            texts = self._text_line(y, streams)
        else:
            first = max(0, self.player.rows - self._height() - self.back)
            texts = self._row(first + y - 1, streams)
        segments = cells.line(texts, widths).render(self.app.console)
        return Strip(segments).adjust_cell_length(self.size.width).apply_style(self.rich_style)

    def on_resize(self) -> None:
        self.follow()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.scroll(3)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self.scroll(-3)

    async def on_click(self, event: events.Click) -> None:
        """Mutes the stream whose name was clicked."""
        ends = list(itertools.accumulate(width + 1 for width in self.widths()))
        stream = sum(event.x >= end for end in ends) - 1
        if event.y == 0 and 0 <= stream < len(ends) - 1:
            await self.app.run_action(f"mute({stream})")

    def _height(self) -> int:
        """The number of lines below the header."""
        return max(1, self.size.height - 1)

    def _count(self) -> int:
        """The number of lines on the screen and above it."""
        if self.as_text:
            return max(map(len, self._streams_as_text()), default=0)
        return self.player.rows

    def _header(self, streams: int) -> list[Text]:
        muted = self.player.muted
        texts = [Text("" if self.as_text else "row", style="bold")]
        for name in self.player.recording.names[:streams]:
            style = "dim" if name in muted else "bold"
            if name == self.target:
                style = "bold reverse"
            mark = TARGET * (name == self.target) + MUTED * (name in muted)
            texts.append(Text(f"{mark}{cells.visible(name)}", style=style))
        return texts

    def _row(self, row: int, streams: int) -> list[Text]:
        if row >= self.player.rows:
            return [Text() for _ in range(streams + 1)]
        recording, branch = self.player.recording, self.player.current
        line = zip(branch.tokens[row].tolist(), branch.present[row].tolist(), recording.kinds)
        texts = [cells.cell(recording.tokenizer, *cell) for cell in itertools.islice(line, streams)]
        return [Text(str(row), style="dim"), *texts]

    def _text_line(self, y: int, streams: int) -> list[Text]:
        """A line of the streams as text. The last line of each column is at the bottom."""
        from_end = self._height() - y + 1 + self.back
        texts = [Text()]  # the column of row numbers has no width
        for lines in self._streams_as_text()[:streams]:
            texts.append(lines[-from_end].copy() if from_end <= len(lines) else Text())
        # After a resize, there may be more columns than texts until the next update.
        return texts + [Text() for _ in range(streams + 1 - len(texts))]

    def _streams_as_text(self) -> list[list[Text]]:
        if self._text is None:
            self._text = [self._lines(stream, w) for stream, w in enumerate(self.widths()[1:])]
        return self._text

    def _lines(self, stream: int, width: int) -> list[Text]:
        """The text of a stream in lines of at most `width` characters."""
        recording, branch, rows = self.player.recording, self.player.current, self.player.rows
        recent = slice(max(0, rows - TEXT_ROWS), rows)
        tokens = branch.tokens[recent, stream][branch.present[recent, stream]]
        style = "cyan" if recording.kinds[stream] == "input" else ""
        lines: list[Text] = []
        for paragraph in recording.tokenizer.decode(tokens).split("\n"):
            text = Text(cells.visible(paragraph), style=style)
            lines += text.wrap(self.app.console, width)
        return lines


class ChatApp(App[None]):
    """Shows a player on a full screen."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #status { height: 1; background: $panel; }
    #line { height: 1; }
    #target { width: auto; }
    #typed { width: 1fr; }
    #keys { height: auto; color: $text-muted; }
    """
    # These bindings serve a screen without an input line. `Line` handles the keys itself.
    BINDINGS = [Binding(key, action) for key, action in ACTIONS.items()]

    def __init__(self, player: Player, out: str | os.PathLike = "chat.npz"):
        """Makes the screen.

        Args:
          player: the player to show.
          out: the file for saving a live session. A number is added if the file exists.
        """
        super().__init__()
        self.player, self.out = player, out
        self._live = player if isinstance(player, Live) else None
        kinds = player.recording.kinds if self._live else ()
        names = player.recording.names
        self._inputs = [name for name, kind in zip(names, kinds) if kind == "input"]
        self.columns = Columns(player, next(iter(self._inputs), ""))
        self._problem = ""  # the error that stopped the player
        self._saved = self._progress()
        self._warned: list[int] | None = None  # the events when ^Q last warned

    def compose(self) -> ComposeResult:
        """Yields the widgets from top to bottom. Textual calls it."""
        yield self.columns
        yield Static(id="status", markup=False)
        if self._inputs:
            with Horizontal(id="line"):
                yield Static(id="target", markup=False)
                yield Line(id="typed", compact=True)
        yield Static(self._help(), id="keys", markup=False)

    def on_mount(self) -> None:
        self.action_target(0)
        self.player.on_change = self.show
        self._save_at_hang_up()
        self.run_worker(self._play())

    def show(self) -> None:
        """Draws the player's current state."""
        self.columns.follow()
        # While the screen closes, there is no status line any more.
        for status in self.query("#status").results(Static):
            status.update(self._status(), layout=False)

    def action_send(self) -> None:
        if self._live and self._inputs:
            line = self.query_one(Line)
            target, text = self.columns.target, line.value
            if self._try(self._live.feed, target, text):
                line.clear()
                if words := self.player.recording.tokenizer.unknown_words(text):
                    shown = list_words(words)
                    self.notify(f"unknown to the model: {shown}", severity="warning", markup=False)

    def action_drop(self) -> None:
        if self._live:
            self._try(self._live.drop)

    def action_target(self, steps: int) -> None:
        if self._inputs:
            index = self._inputs.index(self.columns.target)
            self.columns.target = self._inputs[(index + steps) % len(self._inputs)]
            name = cells.visible(self.columns.target)
            self.query_one("#target", Static).update(f"{TARGET}{name} ")
        self.show()

    def action_pause(self) -> None:
        if not self._problem:
            self.player.pause(not self.player.paused)

    def action_step(self) -> None:
        self.player.step()

    def action_pace(self, steps: int) -> None:
        self.player.change_pace(steps)

    def action_mute(self, stream: int) -> None:
        if self._live and stream < len(self.player.recording.names):
            self._try(self._live.mute, self.player.recording.names[stream])

    def action_fork(self) -> None:
        if self._live:
            self._try(self._live.fork)

    def action_branch(self) -> None:
        count = len(self.player.recording.branches)
        self._try(self.player.switch, (self.player.branch + 1) % count)

    def action_text(self) -> None:
        self.columns.as_text, self.columns.back = not self.columns.as_text, 0
        self.show()

    def action_scroll(self, pages: int) -> None:
        self.columns.scroll(pages * max(1, self.columns.size.height - 2))

    def action_save(self) -> None:
        self._try(self._save)

    def action_leave(self) -> None:
        # Rows that come after the warning do not matter: the model makes them all the time.
        events = [len(branch.events) for branch in self.player.recording.branches]
        if self._live and self._warned != events and self._progress() != self._saved:
            self._warned = events
            self.notify("Not saved: ^S saves, another ^Q quits", severity="warning")
        else:
            self.exit()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Whether the player supports the action. Textual calls it."""
        needs_live = any(bound.live and action in bound.names for bound in KEYS)
        return self._live is not None or not needs_live

    def _save_at_hang_up(self) -> None:
        """Saves an unsaved session and quits if the terminal closes or the process is to end."""

        def leave() -> None:
            try:
                if self._live and self._progress() != self._saved:
                    self._save()
            finally:
                self.exit()

        for number in (signal.SIGHUP, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, leave)

    async def _play(self) -> None:
        try:
            await self.player.run()
        except Exception as error:  # keep the screen, so that the rows can be read and saved
            self._problem = f"stopped by {type(error).__name__}: {error}"
            self.player.pause()

    def _save(self) -> None:
        path = free_name(self.out)
        self.player.recording.save(path)
        self._saved, self._warned = self._progress(), None
        self.notify(f"saved as {path}")

    def _try(self, action: Callable[..., None], *arguments: Any) -> bool:
        """Calls `action` and shows its error, which must not end an unsaved session.

        Returns: whether there was none.
        """
        try:
            action(*arguments)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.notify(f"{kind}{error}", severity="error", markup=False)
            return False
        return True

    def _progress(self) -> list[tuple[int, int]]:
        """A value that differs from `_saved` if there is something to save.

        Rows in which no stream says anything are not worth saving: a model that waits makes them
        all the time.
        """
        silence = self.player.recording.tokenizer.silence_id
        return [
            (len(branch.events), int((branch.present & (branch.tokens != silence)).sum()))
            for branch in self.player.recording.branches
        ]

    def _help(self) -> Text:
        """The help line."""
        parts = []
        for bound in KEYS:
            if self._live or not bound.live:
                shown, does = _unbroken(bound.shown), _unbroken(f" {bound.does}")
                parts.append(Text.assemble((shown, "bold"), does))
        return Text("  ").join(parts)

    def _status(self) -> str:
        if self._problem:
            return f" {self._problem}"
        player = self.player
        parts = [f"row {player.rows - 1}" if player.rows else "no row yet", self._pace()]
        if player.paused:
            parts.append("paused")
        if len(player.recording.branches) > 1:
            parts.append(self._branch())
        if self.columns.back:
            parts.append(f"{self.columns.back} lines back")
        if player.ended:
            parts.append("the end")
        if self._live:
            waiting = self._live.waiting.items()
            parts += [f"{count} waiting for {name}" for name, count in waiting if count]
        streams = len(player.recording.names)
        hidden = streams - len(self.columns.widths()) + 1
        if hidden:
            parts.append(f"{hidden} of {streams} streams hidden")
        return " " + " \N{MIDDLE DOT} ".join(parts)

    def _pace(self) -> str:
        pace = f"{self.player.pace:g} {'rows/s' if self._live else 'x its pace'}"
        return f"{pace}, actually {self.player.rate:.2g} rows/s" if self.player.late else pace

    def _branch(self) -> str:
        branch, count = self.player.current, len(self.player.recording.branches)
        text = f"branch {self.player.branch + 1} of {count}"
        if branch.parent is None:
            return text
        return f"{text}, forked from {branch.parent + 1} at row {branch.forked}"


def _unbroken(text: str) -> str:
    """The text with its spaces made non-breaking."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")
