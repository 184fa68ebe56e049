"""`heretic` in a real pseudo-terminal, with the screen that a person would see."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import time
from collections import Counter

import pexpect
import pyte
from pexpect.fdpexpect import fdspawn

from tests.helpers.fork_server import fork_on_terminal

ALTERNATE = (b"\x1b[?1049h", b"\x1b[?1049l")  # begins and ends the full screen


class Terminal:
    """A running command and its screen."""

    def __init__(self, *arguments: str, rows: int = 40, columns: int = 100) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._answered: Counter[str] = Counter()  # how often a question had been asked when it was last answered
        master, slave = os.openpty()
        _resize(master, rows, columns)
        self._process = fork_on_terminal(arguments, {**environment, "TERM": "xterm-256color"}, slave)
        os.close(slave)
        self._keyboard = fdspawn(master)

    @property
    def text(self) -> str:
        """What is on the screen now."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    @property
    def said(self) -> str:
        """Everything that was printed, without what steers the terminal."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))

    @property
    def full_screen(self) -> bool:
        """Whether the terminal shows its alternate screen."""
        begun, ended = (self.raw.count(code) for code in ALTERNATE)
        return begun > ended

    def resize(self, rows: int, columns: int) -> None:
        """As when a person drags the window's corner."""
        _resize(self._keyboard.child_fd, rows, columns)
        self.screen.resize(rows, columns)

    def until(self, wanted: str, seconds: float = 60) -> None:
        """Wait until the screen shows this."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"{wanted!r} did not come:\n{self.text}"
            assert self._take(), f"it ended without {wanted!r}:\n{self.text}"

    def press_ctrl_c(self) -> None:
        """Send what the keyboard sends; the terminal makes a signal of it."""
        self._keyboard.send(b"\x03")

    def answer(self, question: str, *lines: str) -> None:
        """Type each line once the question is the last thing on the screen, asked anew after the line before."""
        for line in lines:
            end = time.monotonic() + 40
            while not self._last_line().startswith(question) or self.said.count(question) == self._answered[question]:
                assert time.monotonic() < end and self._take(), f"{question!r} was not asked:\n{self.text}"
            self._answered[question] = self.said.count(question)
            self._keyboard.sendline(line)

    def end(self, seconds: float = 60) -> int:
        """Wait for the end; the exit status."""
        end = time.monotonic() + seconds
        while self._take():
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
        status = self._process.wait(seconds)
        self._keyboard.close()
        return status

    def _last_line(self) -> str:
        return next((line for line in reversed(self.text.splitlines()) if line), "")

    def _take(self, seconds: float = 0.1) -> bool:
        try:
            data = self._keyboard.read_nonblocking(1 << 16, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True


def _resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
