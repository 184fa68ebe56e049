"""Live display: progress bars during preparation, a full screen while a study runs.

The full screen is the terminal's alternate screen, redrawn as a whole, so that resizing leaves no remains.
At its end the warnings are printed once more on the ordinary screen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

from heretic.cli.ui.console import LineReporter, escape_terminal, restored_while_stopped
from heretic.cli.ui.study_view import aligned, pareto_plot, rows
from heretic.hardware.memory_usage import MemoryUsage, memory_usage
from heretic.interrupt import StopSignal
from heretic.progress import Stage

if TYPE_CHECKING:
    from heretic.search.summary import StudySummary

log = logging.getLogger(__name__)

REFRESH_RATE = 4  # times a second
MEMORY_POLL_SECONDS = 3
LAST_LINES = 3  # messages and warnings shown on the full screen
MAX_PLOT_LINES = 16
MIN_PLOT_LINES = 5


class Dashboard(LineReporter):
    """Progress bars of the open stages; a full screen from the first `study_updated` to the end of the outermost stage."""

    def __init__(
        self,
        console: Console,
        title: str,
        stop: StopSignal,
        read_memory: Callable[[], Sequence[MemoryUsage]] = memory_usage,
    ) -> None:
        super().__init__(console)
        self.title, self.stop, self.read_memory = title, stop, read_memory
        self.bars = _bars(console)
        self.summary: StudySummary | None = None
        self.live: Live | None = None
        self.open: list[TaskID] = []
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.n_printed_warnings = 0  # warnings on the ordinary screen
        self.memory: Sequence[MemoryUsage] = ()
        self.memory_read_at = 0.0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See ProgressReporter."""
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

        outermost = len(self.open) == 1
        try:
            with restored_while_stopped(self._hide, self._show) if outermost else nullcontext():
                yield Bar()
        finally:
            self.open.remove(task)
            bars.remove_task(task)
            if not self.open:
                self._close_full_screen()
                bars.stop()
            log.info("%s: %.1f s", name, time.monotonic() - began)

    def info(self, text: str) -> None:
        """See ProgressReporter; the full screen shows the last lines."""
        if self.live is None:
            super().info(text)
            return
        log.info(text)
        self.messages.append(text)

    def warning(self, text: str) -> None:
        """See ProgressReporter."""
        self.warnings.append(text)
        if self.live is None:
            super().warning(text)
            self.n_printed_warnings = len(self.warnings)
            return
        log.warning(text)

    def study_updated(self, summary: StudySummary) -> None:
        """See StudyReporter."""
        self.summary = summary
        if self.live is None and self.open:
            self.bars.stop()
            self.messages.clear()
            live = Live(
                console=self.console,
                get_renderable=self.render,
                screen=True,
                refresh_per_second=REFRESH_RATE,
                transient=True,
            )
            live.start()
            self.live = live

    def render(self) -> RenderableType:
        """Render the full screen for the terminal's current size; a small terminal omits the least important parts."""
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
            note = "Stopping after the current batch. Ctrl-C again stops at once. All finished work is kept."
            add(Text(note, style="bold yellow"), -(-len(note) // width))
        facts = aligned([*(rows(self.summary) if self.summary else []), *self._memory()])
        add(facts, facts.plain.count("\n") + 1)
        lines = self._last_lines()
        lines_height = len(lines.plain.splitlines())
        if self.summary:
            plot = pareto_plot(
                self.summary, self.console, min(width, 100), min(MAX_PLOT_LINES, height - used - lines_height)
            )
            plot_height = len(plot.plain.splitlines())
            if plot_height >= MIN_PLOT_LINES:
                add(plot, plot_height)
        add(lines, lines_height)
        return Group(*parts)

    def _hide(self) -> None:
        (self.live or self.bars).stop()

    def _show(self) -> None:
        (self.live or self.bars).start()

    def _close_full_screen(self) -> None:
        """Return to the ordinary screen and print the warnings that it lacks."""
        if self.live is None:
            return
        self.live.stop()
        self.live = None
        for text in self.warnings[self.n_printed_warnings :]:
            self.console.print(f"[yellow]Warning:[/yellow] {escape_terminal(text)}", highlight=False, soft_wrap=True)
        self.n_printed_warnings = len(self.warnings)

    def _memory(self) -> list[tuple[str, str]]:
        """Return a row for every device, with values at most MEMORY_POLL_SECONDS old."""
        now = time.monotonic()
        if not self.memory or now - self.memory_read_at > MEMORY_POLL_SECONDS:
            self.memory, self.memory_read_at = self.read_memory(), now
        return [(usage.device, str(usage)) for usage in self.memory]

    def _last_lines(self) -> Text:
        """Return the last warnings and messages, a line each."""
        text = Text(no_wrap=True, overflow="ellipsis")
        lines = [(f"Warning: {warning}", "yellow") for warning in self.warnings[-LAST_LINES:]]
        lines += [(message, "dim") for message in self.messages[-LAST_LINES:]]
        for i, (line, style) in enumerate(lines):
            text.append("\n" * (i > 0))
            text.append_text(Text.from_markup(escape_terminal(line.replace("\n", " ")), style=style))
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
