"""Processes that take turns on the machine, each with a clock that counts only its own time."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from heretic_llm import Line, clock_of

LIBC = ctypes.CDLL(None)


class Job:
    """A command in a process group of its own that can be paused, with a clock that stands still meanwhile.

    `reply` gets its lines and may return what to type. Up to a line that begins with `whole_until` it is not to be paused.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        reply: Callable[[str], str | None] = lambda _: None,
        whole_until: str = "",
    ) -> None:
        self.command, self.folder, self.environment, self.reply = list(command), folder, dict(environment), reply
        self.whole_until = whole_until
        self.lines: list[Line] = []
        self.peak_gb = 0.0
        self.turns: list[tuple[float, float, float]] = []  # begin and end by the wall clock, own clock at the begin
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lock = threading.Lock()
        self._elapsed = 0.0
        self._since: float | None = None

    def clock(self) -> float:
        """Seconds that it has been running."""
        with self._lock:
            return self._elapsed + (time.monotonic() - self._since if self._since is not None else 0.0)

    def resume(self) -> None:
        """Start it, or go on with it."""
        with self._lock:
            self.turns.append((time.time(), float("inf"), self._elapsed))
            self._since = time.monotonic()
        if self._process is None:
            self._process = self._start()
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        else:
            os.killpg(self._process.pid, signal.SIGCONT)

    def may_pause(self) -> bool:
        """Whether a pause would do no harm."""
        return not self.whole_until or clock_of(self.lines, self.whole_until) is not None

    def pause(self) -> None:
        """Stop the whole group and the clock."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        self._halt()

    def ended(self) -> bool:
        """Whether it has come to its end; notes its peak memory in passing. Raises SystemExit if it failed."""
        assert self._process is not None and self._reader is not None
        self._note_peak()
        if self._process.poll() is None:
            return False
        self._halt()
        self._reader.join(10)
        if self._process.returncode:
            tail = "".join(f"  {line.text}\n" for line in self.lines[-10:])
            errors = (self.folder / "stderr.txt").read_text(errors="replace")[-3000:]
            sys.exit(f"{shlex.join(self.command)}\nended with status {self._process.returncode}:\n{tail}{errors}")
        return True

    def cpu_seconds(self) -> float:
        """CPU seconds that its process has used, user and system."""
        assert self._process is not None
        with suppress(OSError):
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def signal(self, number: int) -> None:
        """Send its whole group a signal."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Make sure that nothing of it is left, stopped or running."""
        if self._process is None or self._process.poll() is not None:
            return
        for number, patience in ((signal.SIGCONT, 0), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                return

    def clock_at(self, moment: float) -> float | None:
        """Its clock at a moment of the wall clock; None if it was not running then."""
        return next((c + moment - begin for begin, end, c in self.turns if begin <= moment <= end), None)

    def _start(self) -> subprocess.Popen[str]:
        with open(self.folder / "stderr.txt", "w") as errors:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                preexec_fn=lambda: LIBC.prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: also if we are killed outright
            )

    def _halt(self) -> None:
        with self._lock:
            if self._since is not None:
                self._elapsed += time.monotonic() - self._since
                self._since = None
                begin, _, clock = self.turns[-1]
                self.turns[-1] = (begin, time.time(), clock)

    def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with open(self.folder / "output.txt", "w", encoding="utf-8", buffering=1) as log:
            for text in process.stdout:
                self._note_peak()
                self.lines.append(Line(self.clock(), self.peak_gb, text.rstrip("\n")))
                log.write(f"{self.clock():8.1f} {text}")
                if answer := self.reply(text):
                    with suppress(BrokenPipeError):
                        process.stdin.write(answer)
                        process.stdin.flush()

    def _note_peak(self) -> None:
        assert self._process is not None
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
            self.peak_gb = max(self.peak_gb, round(int(kilobytes) * 1024 / 1e9, 2))


def take_turns(jobs: Sequence[Job], seconds: float) -> None:
    """Run the jobs to their ends, only one of them at any time."""
    waiting = list(jobs)
    try:
        while waiting:
            job = waiting.pop(0)
            job.resume()
            until = time.monotonic() + seconds
            while not (ended := job.ended()):
                if waiting and time.monotonic() >= until and job.may_pause():
                    break
                time.sleep(0.1)
            if not ended:
                job.pause()
                waiting.append(job)
    finally:
        for job in jobs:
            job.kill()
