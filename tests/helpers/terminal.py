"""`heretic` in a real pseudo-terminal, with the screen that a person would see."""

from __future__ import annotations

import os
import re
import sys
import time

import pexpect
import pyte

ALTERNATE = (b"\x1b[?1049h", b"\x1b[?1049l")  # begins and ends the full screen


class Terminal:
    """A running command and its screen."""

    def __init__(self, *arguments: str, rows: int = 40, columns: int = 100) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "heretic", *arguments],
            dimensions=(rows, columns),
            env={**environment, "TERM": "xterm-256color"},  # type: ignore[arg-type]
        )

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
        self.process.setwinsize(rows, columns)
        self.screen.resize(rows, columns)

    def until(self, wanted: str, seconds: float = 60) -> None:
        """Wait until the screen shows this."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"{wanted!r} did not come:\n{self.text}"
            assert self._take(), f"it ended without {wanted!r}:\n{self.text}"

    def answer(self, question: str, *lines: str) -> None:
        """Wait for the question, which has to be the last thing on the screen, and type."""
        end = time.monotonic() + 40
        while not self._last_line().startswith(question):
            assert time.monotonic() < end and self._take(), f"{question!r} was not asked:\n{self.text}"
        for line in lines:
            self.process.sendline(line)
            self._take(0.3)

    def end(self, seconds: float = 60) -> int:
        """Wait for the end; the exit status."""
        end = time.monotonic() + seconds
        while self._take():
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
        self.process.close()
        return int(self.process.exitstatus if self.process.exitstatus is not None else -self.process.signalstatus)

    def _last_line(self) -> str:
        return next((line for line in reversed(self.text.splitlines()) if line), "")

    def _take(self, seconds: float = 0.1) -> bool:
        try:
            data = self.process.read_nonblocking(1 << 16, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True
