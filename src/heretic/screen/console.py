"""How the work is shown: live progress on a terminal, plain lines elsewhere; everything also goes to the run's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from heretic.progress import Stage, Watcher

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15


def printable(text: str) -> str:
    """Text that cannot steer the terminal: control characters are shown, not sent; markup is taken literally."""
    return escape("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text))


def make_watcher(console: Console) -> Watcher:
    """The watcher that suits the console."""
    return Live(console) if console.is_terminal else Plain(console)


class _Lines:
    """What both ways have in common: facts and warnings are lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        log.info(text)
        self.console.print(printable(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        log.warning(text)
        self.console.print(f"[yellow]Warning:[/yellow] {printable(text)}", highlight=False, soft_wrap=True)


class Live(_Lines):
    """Bars with the time left, one for each stage under way."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.open = 0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        began = time.monotonic()
        if not self.open:
            self.progress.start()
        self.open += 1
        task = self.progress.add_task(printable(name), total=total)
        progress = self.progress

        class Bar:
            def advance(self, steps: int = 1, note: str = "") -> None:
                progress.advance(task, steps)
                if note:
                    progress.update(task, description=f"{printable(name)} ({printable(note)})")

        try:
            yield Bar()
        finally:
            self.progress.remove_task(task)
            self.open -= 1
            if not self.open:
                self.progress.stop()
            log.info("%s: %.1f s", name, time.monotonic() - began)


class Plain(_Lines):
    """A line when an outermost stage ends, and now and then while a long one runs."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.open = 0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        outermost = self.open == 0
        self.open += 1
        lines, began = self, time.monotonic()

        class Counter:
            done = 0
            last = began

            def advance(self, steps: int = 1, note: str = "") -> None:
                self.done += steps
                now = time.monotonic()
                if outermost and total and self.done < total and now - self.last > SECONDS_BETWEEN_LINES:
                    self.last = now
                    left = (now - began) / max(1, self.done) * (total - self.done)
                    lines.console.print(
                        f"{printable(name)}: {self.done} of {total}{', ' if note else ''}{printable(note)}, "
                        f"about {spell(left)} left",
                        highlight=False,
                    )

        counter = Counter()
        try:
            yield counter
        finally:
            self.open -= 1
            seconds = time.monotonic() - began
            log.info("%s: %.1f s", name, seconds)
            if outermost and seconds > 2:
                self.console.print(f"{printable(name)}: {spell(seconds)}", highlight=False)


def spell(seconds: float) -> str:
    """A duration as people say it: '8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
