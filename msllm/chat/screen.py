"""The screen of `msllm chat`: it draws what a player (msllm/chat/player.py) shows, and hands keys on to it. Needs Textual."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import rich.text
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
from msllm.view import cells

COLUMN, TEXT_COLUMN = 24, 60  # characters of a stream's column at most, as cells and as text
TEXT_ROWS = 1000  # rows whose text is shown
TARGET, MUTED = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", "\N{MULTIPLICATION X}"


class Key(NamedTuple):
    """Keys that belong together.

    actions: {key as Textual names it: action}. shown, does: as the screen says it. live: not for recordings.
    """

    actions: dict[str, str]
    shown: str
    does: str
    live: bool = False

    @property
    def names(self) -> set[str]:
        """Actions without their arguments."""
        return {action.partition("(")[0] for action in self.actions.values()}


KEYS = (
    Key({"enter": "send"}, "Enter", "send", live=True),
    Key({"tab": "target(1)", "shift+tab": "target(-1)"}, "Tab", "next input", live=True),
    Key({"ctrl+p": "pause"}, "^P", "pause, go on"),
    Key({"ctrl+n": "single"}, "^N", "one row"),
    Key({"up": "pace(1)", "down": "pace(-1)"}, "↑↓", "pace"),
    Key({f"f{n + 1}": f"mute({n})" for n in range(12)}, "F1-F12", "mute stream", live=True),
    Key({"ctrl+f": "fork"}, "^F", "fork", live=True),
    Key({"ctrl+o": "branch"}, "^O", "other fork"),
    Key({"ctrl+t": "text"}, "^T", "text, cells"),
    Key({"pageup": "scroll(1)", "pagedown": "scroll(-1)"}, "PgUp PgDn", "scroll"),
    Key({"ctrl+s": "save"}, "^S", "save", live=True),
    Key({"ctrl+q": "leave"}, "^Q", "leave"),
)
ACTIONS = {key: action for bound in KEYS for key, action in bound.actions.items()}


class Line(Input):
    """Where one types. It takes all keys in their order: Enter and Tab act on what was typed before them."""

    async def on_key(self, event: events.Key) -> None:
        if action := ACTIONS.get(event.key):
            event.stop(), event.prevent_default()
            await self.app.run_action(action)


class Columns(Widget):
    """A column for each stream: a line for each row, or the text that it says. The newest is at the bottom.

    Attributes:
      target: the stream that typed text goes to; empty: none.
      as_text: whether the columns hold text.
      back: lines that the newest one lies below the bottom.
    """

    DEFAULT_CSS = "Columns { height: 1fr; }"

    def __init__(self, player: Player, target: str):
        super().__init__()
        self.player, self.target, self.as_text, self.back = player, target, False, 0
        self._count = self._branch = (
            0  # lines there were and the branch that was shown when it was last drawn
        )
        self._text: list[list[rich.text.Text]] | None = (
            None  # lines of each stream; None: not made yet
        )

    def follow(self) -> None:
        """Draws what the player shows now. Who has scrolled back stays where he is."""
        branch, before = self.player.branch, self._count if self.back else 0
        self._text = None
        if self.back:
            self._count = self._lines()
            self.back = self.back + max(self._count - before, 0) if branch == self._branch else 0
        self._branch = branch
        self.refresh()

    def scroll(self, lines: int) -> None:
        """So many lines up, or down."""
        self._count = self._lines()
        self.back = max(0, min(self.back + lines, self._count - self._height()))
        self.refresh()

    def widths(self) -> list[int]:
        """Of the row numbers, and of the streams that find a place."""
        number = 0 if self.as_text else max(3, len(str(self.player.rows)))
        names = self.player.recording.names
        widths = cells.fit(
            [TEXT_COLUMN if self.as_text else COLUMN] * len(names), self.size.width - number - 1
        )
        places = (self.size.width - number) // (min(widths) + 1)
        return [number, *widths[: max(1, places)]]

    def render_line(self, y: int) -> Strip:
        widths = self.widths()
        if y == 0:
            texts = self._header(len(widths) - 1)
        elif self.as_text:
            # Each column ends at the bottom, whatever its length.
            above = self._height() - y + 1 + self.back
            lines = [
                text[-above] if above <= len(text) else rich.text.Text() for text in self._texts()
            ]
            texts = [rich.text.Text(), *(line.copy() for line in lines[: len(widths) - 1])]
            texts += [rich.text.Text() for _ in range(len(widths) - len(texts))]
        else:
            first = max(0, self.player.rows - self._height() - self.back)
            texts = self._row(first + y - 1, len(widths) - 1)
        line = cells.line(texts, widths)
        return Strip(line.render(self.app.console)).adjust_cell_length(
            self.size.width, self.rich_style
        )

    def on_resize(self) -> None:
        self.follow()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self.scroll(3)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self.scroll(-3)

    def on_click(self, event: events.Click) -> None:
        ends = list(itertools.accumulate(width + 1 for width in self.widths()))
        stream = sum(event.x >= end for end in ends) - 1
        if event.y == 0 and 0 <= stream < len(ends) - 1 and isinstance(self.player, Live):
            self.app.action_mute(stream)

    def _height(self) -> int:
        return max(1, self.size.height - 1)

    def _lines(self) -> int:
        return max(map(len, self._texts()), default=0) if self.as_text else self.player.rows

    def _texts(self) -> list[list[rich.text.Text]]:
        if (
            self._text is None
        ):  # at most once for each time that the screen is drawn, however fast rows come
            self._text = [
                self._lines_of(stream, width) for stream, width in enumerate(self.widths()[1:])
            ]
        return self._text

    def _header(self, streams: int) -> list[rich.text.Text]:
        texts, muted = (
            [rich.text.Text("" if self.as_text else "row", style="bold")],
            self.player.muted,
        )
        for name in self.player.recording.names[:streams]:
            style = "bold reverse" if name == self.target else "dim" if name in muted else "bold"
            mark = TARGET * (name == self.target) + MUTED * (name in muted)
            texts.append(rich.text.Text(f"{mark}{cells.visible(name)}", style=style))
        return texts

    def _row(self, row: int, streams: int) -> list[rich.text.Text]:
        if row >= self.player.rows:
            return [rich.text.Text() for _ in range(streams + 1)]
        recording, shown = self.player.recording, self.player.shown
        line = zip(shown.tokens[row].tolist(), shown.present[row].tolist(), recording.kinds)
        texts = [cells.cell(recording.tokenizer, *cell) for cell in itertools.islice(line, streams)]
        return [rich.text.Text(str(row), style="dim"), *texts]

    def _lines_of(self, stream: int, width: int) -> list[rich.text.Text]:
        """What a stream says, in lines of at most `width` characters."""
        recording, shown, rows = self.player.recording, self.player.shown, self.player.rows
        here = slice(max(0, rows - TEXT_ROWS), rows)
        said = recording.tokenizer.decode(shown.tokens[here, stream][shown.present[here, stream]])
        style = "cyan" if recording.kinds[stream] == "input" else ""
        lines = []
        for paragraph in said.split("\n"):
            lines += rich.text.Text(cells.visible(paragraph), style=style).wrap(
                self.app.console, width
            )
        return lines


class ChatApp(App[None]):
    """A player on a full screen."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #status { height: 1; background: $panel; }
    #line { height: 1; }
    #target { width: auto; }
    #typed { width: 1fr; }
    #keys { height: auto; color: $text-muted; }
    """
    BINDINGS = [
        Binding(key, action) for key, action in ACTIONS.items()
    ]  # where there is no line to type in

    def __init__(self, player: Player, out: str = "chat.npz"):
        """`out`: where a live session is saved, or the first free name after it."""
        super().__init__()
        self.player, self.out, self._live = player, out, isinstance(player, Live)
        kinds = player.recording.kinds if self._live else ()
        self._inputs = [
            name for name, kind in zip(player.recording.names, kinds) if kind == "input"
        ]
        self.columns = Columns(player, next(iter(self._inputs), ""))
        self._problem, self._saved = "", self._done()

    def compose(self) -> ComposeResult:
        yield self.columns
        yield Static(id="status", markup=False)
        if self._inputs:
            with Horizontal(id="line"):
                yield Static(id="target", markup=False)
                yield Line(id="typed", compact=True)
        shown = [bound for bound in KEYS if self._live or not bound.live]

        def whole(text):
            return text.replace(" ", "\N{NO-BREAK SPACE}")  # no line break within

        parts = [((whole(bound.shown), "bold"), whole(f" {bound.does}")) for bound in shown]
        keys = rich.text.Text("  ").join(rich.text.Text.assemble(*part) for part in parts)
        yield Static(keys, id="keys", markup=False)

    def on_mount(self) -> None:
        self.action_target(0)
        self.player.changed = self.show
        self.run_worker(self._play())

    def show(self) -> None:
        """Draws what the player shows now."""
        self.columns.follow()
        self.query_one("#status", Static).update(self._status(), layout=False)

    def action_send(self) -> None:
        if self._inputs:
            line = self.query_one(Line)
            self._try(lambda: self.player.feed(self.columns.target, line.value))
            line.clear()

    def action_target(self, steps: int) -> None:
        if self._inputs:
            at = self._inputs.index(self.columns.target)
            self.columns.target = self._inputs[(at + steps) % len(self._inputs)]
            self.query_one("#target", Static).update(
                f"{TARGET}{cells.visible(self.columns.target)} "
            )
        self.show()

    def action_pause(self) -> None:
        if not self._problem:
            self.player.pause(not self.player.paused)

    def action_single(self) -> None:
        self.player.single()

    def action_pace(self, steps: int) -> None:
        self.player.faster(steps)

    def action_mute(self, stream: int) -> None:
        if stream < len(self.player.recording.names):
            self._try(lambda: self.player.mute(self.player.recording.names[stream]))

    def action_fork(self) -> None:
        self._try(self.player.fork)

    def action_branch(self) -> None:
        count = len(self.player.recording.branches)
        self._try(lambda: self.player.switch((self.player.branch + 1) % count))

    def action_text(self) -> None:
        self.columns.as_text, self.columns.back = not self.columns.as_text, 0
        self.show()

    def action_scroll(self, pages: int) -> None:
        self.columns.scroll(pages * max(1, self.columns.size.height - 2))

    def action_save(self) -> None:
        def save():
            path = free_name(self.out)
            self.player.recording.save(path)
            self._saved = self._done()
            self.notify(f"saved as {path}")

        self._try(save)

    def action_leave(self) -> None:
        if self._live and self._done() != self._saved:
            self._saved = self._done()
            self.notify("Not saved: ^S saves, ^Q once more leaves", severity="warning")
        else:
            self.exit()

    def check_action(self, action: str, parameters: tuple) -> bool:
        return self._live or not any(bound.live and action in bound.names for bound in KEYS)

    async def _play(self) -> None:
        try:
            await self.player.run()
        except Exception as error:  # what there is can still be read and saved
            self._problem = f"stopped by {type(error).__name__}: {error}"
            self.player.pause()

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except UserError as error:
            self.notify(str(error), severity="error")

    def _done(self) -> list[int]:
        """What changes with everything that is worth saving."""
        return [len(branch.events) + branch.rows for branch in self.player.recording.branches]

    def _status(self) -> str:
        player, shown, branches = self.player, self.player.shown, self.player.recording.branches
        parts = [f"row {player.rows - 1}" if player.rows else "no row yet"]
        parts.append(f"{player.pace:g} rows/s" if self._live else f"{player.pace:g} x its pace")
        if player.late:
            parts[-1] += f", comes at {player.rate:.2g} rows/s"
        if player.paused:
            parts.append("paused")
        if len(branches) > 1:
            origin = (
                f", forked from {shown.parent + 1} at row {shown.forked}"
                if shown.parent is not None
                else ""
            )
            parts.append(f"branch {player.branch + 1} of {len(branches)}{origin}")
        if self.columns.back:
            parts.append(f"{self.columns.back} lines back")
        if player.ended:
            parts.append("the end")
        if self._live:
            parts += [
                f"{count} waiting for {name}" for name, count in player.waiting.items() if count
            ]
        hidden = len(player.recording.names) - len(self.columns.widths()) + 1
        if hidden:
            parts.append(f"{hidden} streams find no place")
        return " " + (self._problem or " \N{MIDDLE DOT} ".join(parts))
