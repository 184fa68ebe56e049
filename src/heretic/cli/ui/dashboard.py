"""The live screen: bars while things are made ready, and one calm full screen while a study runs.

The full screen is the terminal's alternate one, drawn anew as a whole, so that a change of its size leaves nothing behind and
what was there before comes back at the end. Warnings are then printed once more, where they can be scrolled to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.text import Text

from heretic.cli.ui.console import LineReporter, escape_terminal
from heretic.cli.ui.study_view import aligned, pareto_plot, rows
from heretic.hardware.memory_usage import MemoryUsage, memory_usage
from heretic.interrupt import StopSignal
from heretic.progress import Stage

if TYPE_CHECKING:
    from heretic.search.summary import StudySummary

log = logging.getLogger(__name__)

REFRESH_RATE = 4  # times a second
MEMORY_POLL_SECONDS = 3  # at memory
LAST_LINES = 3
TALLEST_PLOT = 16
FEWEST_LINES = 5  # of a plot that is worth drawing


class Dashboard(LineReporter):
    """Bars for the stages under way; from the first `stands` to the end of the outermost stage the full screen."""

    def __init__(
        self, console: Console, title: str, stop: StopSignal, look: Callable[[], Sequence[MemoryUsage]] = memory_usage
    ) -> None:
        super().__init__(console)
        self.title, self.stop, self.read_memory = title, stop, look
        self.bars = _bars(console)
        self.summary: StudySummary | None = None
        self.live: Live | None = None
        self.open: list[TaskID] = []
        self.said: list[str] = []
        self.warned: list[str] = []
        self.shown_warnings = 0  # how many of them are on the ordinary screen already
        self.use: Sequence[MemoryUsage] = ()
        self.looked = 0.0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See Watcher."""
        began = time.monotonic()
        if not self.open:
            self.bars = _bars(self.console)
            self.bars.start()
        bars, task = self.bars, self.bars.add_task(escape_terminal(name), total=total)
        self.open.append(task)

        class Bar:
            def advance(self, steps: int = 1, note: str = "") -> None:
                bars.advance(task, steps)
                if note:
                    bars.update(task, description=f"{escape_terminal(name)} ({escape_terminal(note)})")

        try:
            yield Bar()
        finally:
            self.open.remove(task)
            bars.remove_task(task)
            if not self.open:
                self._leave()
                bars.stop()
            log.info("%s: %.1f s", name, time.monotonic() - began)

    def info(self, text: str) -> None:
        """See Watcher; while the full screen is on, the last lines stand there."""
        if self.live is None:
            super().info(text)
            return
        log.info(text)
        self.said.append(text)

    def warning(self, text: str) -> None:
        """See Watcher."""
        self.warned.append(text)
        if self.live is None:
            super().warning(text)
            self.shown_warnings = len(self.warned)
            return
        log.warning(text)

    def study_updated(self, summary: StudySummary) -> None:
        """See Watcher."""
        self.summary = summary
        if self.live is None and self.open:
            self.bars.stop()
            self.said.clear()
            live = Live(
                console=self.console,
                get_renderable=self.picture,
                screen=True,
                refresh_per_second=REFRESH_RATE,
                transient=True,
            )
            live.start()
            self.live = live

    def picture(self) -> RenderableType:
        """The full screen as it is now, for the terminal's present size; what matters least is left out where it is small."""
        width, height = self.console.size
        parts: list[RenderableType] = [Rule(Text(f"heretic · {self.title}" if self.title else "heretic"), style="dim")]
        used = 1

        def add(part: RenderableType, lines: int) -> None:
            nonlocal used
            if lines and used + lines <= height:
                parts.append(part)
                used += lines

        add(self.bars.get_renderable(), min(len(self.open), 2))
        if self.stop.requested:
            note = "Stopping after the batch under way; Ctrl-C again stops at once. Nothing that is finished is lost."
            add(Text(note, style="bold yellow"), -(-len(note) // width))
        facts = aligned([*(rows(self.summary) if self.summary else []), *self._memory()])
        add(facts, facts.plain.count("\n") + 1)
        lines = self._last_lines()
        lines_height = len(lines.plain.splitlines())
        if self.summary:
            plot = pareto_plot(
                self.summary, self.console, min(width, 100), min(TALLEST_PLOT, height - used - lines_height)
            )
            tall = len(plot.plain.splitlines())
            if tall >= FEWEST_LINES:
                add(plot, tall)
        add(lines, lines_height)
        return Group(*parts)

    def _leave(self) -> None:
        """Back to the ordinary screen, with the warnings that were not seen there."""
        if self.live is None:
            return
        self.live.stop()
        self.live = None
        for text in self.warned[self.shown_warnings :]:
            self.console.print(f"[yellow]Warning:[/yellow] {escape_terminal(text)}", highlight=False, soft_wrap=True)
        self.shown_warnings = len(self.warned)

    def _memory(self) -> list[tuple[str, str]]:
        """A row for every device."""
        now = time.monotonic()
        if not self.use or now - self.looked > MEMORY_POLL_SECONDS:
            self.use, self.looked = self.read_memory(), now
        return [(use.device, str(use)) for use in self.use]

    def _last_lines(self) -> Text:
        """The last warnings and facts, a line each."""
        text = Text(no_wrap=True, overflow="ellipsis")
        shown = [("Warning: " + one, "yellow") for one in self.warned[-LAST_LINES:]]
        shown += [(one, "dim") for one in self.said[-LAST_LINES:]]
        for i, (one, style) in enumerate(shown):
            text.append("\n" * (i > 0))
            text.append_text(Text.from_markup(escape_terminal(one.replace("\n", " ")), style=style))
        return text


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
