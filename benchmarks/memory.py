"""The memory of another process while it runs: what is its own and what is only mapped from files, as the kernel counts it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One look at a process, gigabytes (1e9 bytes)."""

    seconds: float  # since the first look
    resident: float  # everything in memory
    anonymous: float  # its own; the rest is pages of files, which the kernel may drop


class Sampler:
    """Looks at /proc/PID/smaps_rollup twice a second until the process is gone. Linux only; elsewhere no samples."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/smaps_rollup")
        self._began = time.monotonic()
        self.samples: list[Sample] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def profile(self) -> dict[str, float]:
        """The largest figures and when they were seen; empty where nothing was."""
        self._thread.join(2)
        if not self.samples:
            return {}
        resident = max(self.samples, key=lambda s: s.resident)
        anonymous = max(self.samples, key=lambda s: s.anonymous)
        return {
            "resident_peak_gb": round(resident.resident, 2),
            "resident_peak_at_s": round(resident.seconds),
            "anonymous_then_gb": round(resident.anonymous, 2),
            "anonymous_peak_gb": round(anonymous.anonymous, 2),
            "anonymous_peak_at_s": round(anonymous.seconds),
        }

    def curve(self, every: float = 5.0) -> list[tuple[int, float, float]]:
        """The largest resident and anonymous memory of each stretch of `every` seconds."""
        stretches: dict[int, list[Sample]] = {}
        for sample in self.samples:
            stretches.setdefault(int(sample.seconds // every), []).append(sample)
        return [
            (
                round(number * every),
                round(max(s.resident for s in seen), 2),
                round(max(s.anonymous for s in seen), 2),
            )
            for number, seen in sorted(stretches.items())
        ]

    def _watch(self) -> None:
        while True:
            try:
                self.samples.append(Sample(time.monotonic() - self._began, *looked_at(self._file)))
            except (OSError, KeyError):  # it is gone, or going
                return
            time.sleep(0.5)


def watched(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, Sampler]:
    """Run a command in a folder; its seconds and what it took of memory. Ends this program where it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment)
    memory = Sampler(process.pid)
    if process.wait():
        sys.exit(process.returncode)
    return time.monotonic() - began, memory


def looked_at(file: Path) -> tuple[float, float]:
    """Resident and own memory as a smaps_rollup file says it, GB. Raises OSError, and KeyError of a process that is ending."""
    fields = {line.split(":")[0]: line.split()[1] for line in file.read_text().splitlines()[1:]}
    return int(fields["Rss"]) * 1024 / 1e9, int(fields["Anonymous"]) * 1024 / 1e9
