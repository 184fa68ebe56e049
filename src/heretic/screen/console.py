"""How the work is shown: live progress on a terminal, plain lines elsewhere; everything also goes to the run's log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from heretic.errors import plain_line
from heretic.progress import Stage, Watcher
from heretic.stop import Stop

if TYPE_CHECKING:
    from heretic.search.standing import Standing

log = logging.getLogger(__name__)

AT_ONCE = 0.5  # seconds in which what was done before is told
SECONDS_BETWEEN_LINES = 15


def printable(text: str) -> str:
    """Text that cannot steer the terminal: control characters are shown, not sent; markup is taken literally."""
    return escape("\n".join(map(plain_line, text.split("\n"))))


def on_terminal(console: Console) -> bool:
    """Whether somebody sees this as a screen: FORCE_COLOR alone makes no terminal of a file."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def asked_here() -> bool:
    """Whether somebody can type an answer; a process may have no standard input at all."""
    return sys.stdin is not None and sys.stdin.isatty()


def make_watcher(console: Console, *, plain: bool = False, title: str = "", stop: Stop | None = None) -> Watcher:
    """The watcher that suits the console; `title` says what is worked on, `stop` whether a stop is awaited."""
    if plain or not on_terminal(console):
        return Plain(console)
    from heretic.screen.dashboard import Dashboard

    return Dashboard(console, title, stop or Stop())


class Lines:
    """What all ways have in common: facts and warnings are lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """See Watcher."""
        log.info(text)
        self.console.print(printable(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """See Watcher."""
        log.warning(text)
        self.console.print(f"[yellow]Warning:[/yellow] {printable(text)}", highlight=False, soft_wrap=True)

    def stands(self, standing: Standing) -> None:
        """See Watcher; the lines of the trials say it already."""


class Plain(Lines):
    """A line when an outermost stage ends, and now and then while a long one runs."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.open = 0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See Watcher."""
        outermost = self.open == 0
        self.open += 1
        lines, began = self, time.monotonic()

        class Counter:
            done = 0
            before = 0  # of an earlier session: told at once, and says nothing of the pace
            last = began

            def advance(self, steps: int = 1, note: str = "") -> None:
                now = time.monotonic()
                if not self.done and now - began < AT_ONCE:
                    self.before = steps
                self.done += steps
                if outermost and total and self.done < total and now - self.last > SECONDS_BETWEEN_LINES:
                    self.last = now
                    left = (now - began) / max(1, self.done - self.before) * (total - self.done)
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
