"""Plain progress lines, and checks of what the console supports; all messages also go to the run's log."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from heretic.errors import plain_line
from heretic.progress import Stage

if TYPE_CHECKING:
    from heretic.search.summary import StudySummary

log = logging.getLogger(__name__)

RESUME_SECONDS = 0.5  # an advance within these seconds counts the steps of earlier sessions
SECONDS_BETWEEN_LINES = 15
# Prefixes of environment variables that notebook kernels set.
NOTEBOOKS = {
    "JPY_PARENT_PID": "a notebook",
    "JPY_SESSION_NAME": "a notebook",
    "COLAB_": "a notebook on Colab",
    "KAGGLE_KERNEL_": "a notebook on Kaggle",
    "KAGGLE_URL_BASE": "a notebook on Kaggle",
    "KAGGLE_CONTAINER_NAME": "a notebook on Kaggle",
}


class PipeConsole(Console):
    """A console whose reader may end before it: `head`, `tee` at a logout, a terminal. Long work goes on, other commands end."""

    long_work = False

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            gone = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.file.fileno()).st_mode)
            if not gone:  # the terminal
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Print nothing more. Raises BrokenPipeError except during long work."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
        if not self.long_work:
            raise BrokenPipeError
        log.warning("The reader of the output has ended; the work goes on.")


@contextmanager
def restored_while_stopped(hide: Callable[[], None], show: Callable[[], None]) -> Iterator[None]:
    """Give the terminal back while Ctrl-Z stops this process: call `hide` before it, `show` once it continues."""
    stopped = getattr(signal, "SIGTSTP", None)  # Windows has none
    in_main = threading.current_thread() is threading.main_thread()
    if stopped is None or not in_main or signal.getsignal(stopped) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, _: object) -> None:
        hide()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # returns once the process continues
        signal.signal(number, stop)
        show()

    signal.signal(stopped, stop)
    try:
        yield
    finally:
        signal.signal(stopped, signal.SIG_DFL)


def escape_terminal(text: str) -> str:
    """Escape control characters and rich markup."""
    return escape("\n".join(map(plain_line, text.split("\n"))))


def on_terminal(console: Console) -> bool:
    """Whether the console is a screen; a file is none, also with FORCE_COLOR."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def is_interactive() -> bool:
    """Whether a user can type an answer."""
    return not non_interactive_reason()


def non_interactive_reason() -> str:
    """Return why no user can type an answer, in a few words; empty if one can.

    A pseudo-terminal is not enough: notebooks and CI give one to commands without input.
    """
    try:
        if sys.stdin is None or not sys.stdin.isatty():
            return "standard input is not a terminal"
    except ValueError:
        return "standard input is closed"
    if where := notebook():
        return f"this is {where}"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return "this is a CI job (CI is set)"
    # Jupyter kernels set TERM=xterm-color, which no current terminal uses.
    if (terminal := os.environ.get("TERM", "")) in ("dumb", "unknown", "xterm-color"):
        return f"the terminal is {terminal}"
    return "the command runs in the background" if _in_background() else ""


def notebook() -> str:
    """Return the kind of notebook that runs this process, by its environment variables; empty if none does."""
    variables = [name for name, value in os.environ.items() if value]
    return next((kind for prefix, kind in NOTEBOOKS.items() if any(v.startswith(prefix) for v in variables)), "")


def _in_background() -> bool:
    """Whether another process group is in the foreground: reading from the terminal would then stop this process."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp()
    except (AttributeError, OSError, ValueError):  # unsupported by the system, or not this session's terminal
        return False


class LineReporter:
    """Base of the reporters: print messages and warnings as lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def info(self, text: str) -> None:
        """See ProgressReporter."""
        log.info(text)
        self.console.print(escape_terminal(text), highlight=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """See ProgressReporter."""
        log.warning(text)
        self.console.print(f"[yellow]Warning:[/yellow] {escape_terminal(text)}", highlight=False, soft_wrap=True)

    def study_updated(self, summary: StudySummary) -> None:
        """See StudyReporter; prints nothing, since each trial prints a line."""


class PlainReporter(LineReporter):
    """Print a line when an outermost stage ends, and every few seconds during a long one."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.open = 0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See ProgressReporter."""
        outermost = self.open == 0
        self.open += 1
        reporter, began = self, time.monotonic()

        class Counter:
            done = 0
            before = 0  # steps of earlier sessions, which do not count for the speed
            last = began

            def advance(self, steps: int = 1, note: str = "") -> None:
                now = time.monotonic()
                if not self.done and now - began < RESUME_SECONDS:
                    self.before = steps
                self.done += steps
                if outermost and total and self.done < total and now - self.last > SECONDS_BETWEEN_LINES:
                    self.last = now
                    left = (now - began) / max(1, self.done - self.before) * (total - self.done)
                    reporter.console.print(
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
    """Format a duration: '8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
