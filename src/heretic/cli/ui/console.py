"""How the work is shown: live progress on a terminal, plain lines elsewhere; everything also goes to the run's log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from heretic.errors import plain_line
from heretic.progress import Stage

if TYPE_CHECKING:
    from heretic.search.summary import StudySummary

log = logging.getLogger(__name__)

RESUME_SECONDS = 0.5  # seconds in which what was done before is told
SECONDS_BETWEEN_LINES = 15
# Variables, by how they begin, that the kernels of notebooks have, and what has them.
NOTEBOOKS = {
    "JPY_PARENT_PID": "a notebook",
    "JPY_SESSION_NAME": "a notebook",
    "COLAB_": "a notebook on Colab",
    "KAGGLE_KERNEL_": "a notebook on Kaggle",
    "KAGGLE_URL_BASE": "a notebook on Kaggle",
    "KAGGLE_CONTAINER_NAME": "a notebook on Kaggle",
}


def escape_terminal(text: str) -> str:
    """Text that cannot steer the terminal: control characters are shown, not sent; markup is taken literally."""
    return escape("\n".join(map(plain_line, text.split("\n"))))


def on_terminal(console: Console) -> bool:
    """Whether somebody sees this as a screen: FORCE_COLOR alone makes no terminal of a file."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def is_interactive() -> bool:
    """Whether somebody can type an answer."""
    return not non_interactive_reason()


def non_interactive_reason() -> str:
    """Why nobody can type an answer, in a few words; empty where somebody can.

    A pseudo-terminal alone says little: notebooks and CI give one to commands that nobody can type to.
    """
    try:
        if sys.stdin is None or not sys.stdin.isatty():
            return "standard input is no terminal"
    except ValueError:
        return "standard input is closed"
    if where := notebook():
        return f"this is {where}"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return "this is a CI job (CI is set)"
    # A kernel of Jupyter gives its commands the terminal xterm-color, which no terminal of today calls itself.
    if (terminal := os.environ.get("TERM", "")) in ("dumb", "unknown", "xterm-color"):
        return f"the terminal is {terminal}"
    return "the command runs in the background" if _in_background() else ""


def notebook() -> str:
    """The kind of notebook that this is a command of, told by its variables; empty if it is of none."""
    given = [name for name, value in os.environ.items() if value]
    return next((where for name, where in NOTEBOOKS.items() if any(g.startswith(name) for g in given)), "")


def _in_background() -> bool:
    """Whether the terminal listens to another group of processes: reading from it would stop this one."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp()
    except (AttributeError, OSError, ValueError):  # not on this system, or no terminal of this session
        return False


class LineReporter:
    """What all ways have in common: facts and warnings are lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def info(self, text: str) -> None:
        """See Watcher."""
        log.info(text)
        self.console.print(escape_terminal(text), highlight=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """See Watcher."""
        log.warning(text)
        self.console.print(f"[yellow]Warning:[/yellow] {escape_terminal(text)}", highlight=False, soft_wrap=True)

    def study_updated(self, summary: StudySummary) -> None:
        """See Watcher; the lines of the trials say it already."""


class PlainReporter(LineReporter):
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
                if not self.done and now - began < RESUME_SECONDS:
                    self.before = steps
                self.done += steps
                if outermost and total and self.done < total and now - self.last > SECONDS_BETWEEN_LINES:
                    self.last = now
                    left = (now - began) / max(1, self.done - self.before) * (total - self.done)
                    lines.console.print(
                        f"{escape_terminal(name)}: {self.done} of {total}{', ' if note else ''}{escape_terminal(note)}, "
                        f"about {format_duration(left)} left",
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
                self.console.print(f"{escape_terminal(name)}: {format_duration(seconds)}", highlight=False)


def format_duration(seconds: float) -> str:
    """A duration as people say it: '8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
