"""How long the files of a checkpoint take to be loaded: from a sample of them, as they lie in the page cache and on the disk now,
and a sample of what the numbers cost on their way into memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLES, SAMPLE = 64, 4 << 20  # pieces of the files at equal distances, and bytes of each: 256 MiB in all
NUMBERS = 32 << 20  # that are put into memory to see how long it takes
MOST_SECONDS = 1.0  # that looking may take
ASSUMED = 2e9  # bytes a second, where nothing can be measured; as in benchmarks/scale.py
KEPT_IN_RAM = getattr(os, "RWF_NOWAIT", None)  # Linux: read only what needs no disk


@dataclass(frozen=True)
class Reading:
    """`seconds` for `nbytes`; `measured` is False where the speed is assumed. `cached` is the share that is in the page cache,
    None where the system does not tell. `placing`: the seconds that the numbers take besides, into RAM and into the format of the
    run; None where that is not known (on GPUs, of quantised numbers)."""

    nbytes: int
    seconds: float
    measured: bool
    cached: float | None = None
    placing: float | None = None

    @property
    def how(self) -> str:
        """Where the figure comes from, in words."""
        if not self.measured:
            return f"assuming {ASSUMED / 1e9:g} GB/s"
        speed = f"measured on a sample, {self.nbytes / 1e9 / self.seconds:.1f} GB/s"
        return speed if self.cached is None else f"{speed}, {self.cached:.0%} of it in the page cache"

    @classmethod
    def assumed(cls, nbytes: int) -> Reading:
        """Of files that are not here, or of a machine that is not this one."""
        return cls(nbytes, nbytes / ASSUMED, measured=False)


def reading_of(files: Sequence[Path], nbytes: int) -> Reading:
    """Of files that hold so many bytes in all. What the page cache holds and what it does not is timed apart, since the sample may
    be unlike the whole; the disk's share is brought into the cache by it. Never raises: what cannot be read is assumed."""
    fast, slow = [0, 0.0], [0, 0.0]
    try:
        sizes = [file.stat().st_size for file in files]
        whole, began = sum(sizes), time.perf_counter()
        pieces = min(SAMPLES, -(-whole // SAMPLE))
        for i in range(pieces):
            if time.perf_counter() - began > MOST_SECONDS:
                break
            place = i * max(0, whole - SAMPLE) // max(1, pieces - 1)
            for file, size in zip(files, sizes, strict=True):
                if place < size:
                    _read(file, place, min(SAMPLE, size - place), fast, slow)
                    break
                place -= size
    except OSError:
        return Reading.assumed(nbytes)
    looked = int(fast[0] + slow[0])
    if not looked:
        return Reading.assumed(nbytes)
    seconds = (fast[1] + slow[1]) * nbytes / looked
    return Reading(nbytes, seconds, measured=True, cached=fast[0] / looked if KEPT_IN_RAM is not None else None)


def placing_seconds(elements: int, stored: torch.dtype, wanted: torch.dtype) -> float:
    """How long so many numbers take from one format into another, in RAM that was not used before: that alone costs as much."""
    numbers = min(elements, NUMBERS)
    read = torch.zeros(numbers, dtype=stored)
    began = time.perf_counter()
    read.to(wanted, copy=True)
    return (time.perf_counter() - began) * elements / max(1, numbers)


def _read(file: Path, place: int, size: int, fast: list[float], slow: list[float]) -> None:
    """Read one piece; its bytes and seconds go to what was in the page cache, or to what was not."""
    buffer = bytearray(size)
    with file.open("rb", buffering=0) as opened:
        number = opened.fileno()
        done = 0
        if KEPT_IN_RAM is not None:
            began = time.perf_counter()
            try:
                done = os.preadv(number, [buffer], place, KEPT_IN_RAM)
            except OSError:  # nothing of it is there, or the file system cannot tell
                done = 0
            if done:
                fast[0] += done
                fast[1] += time.perf_counter() - began
        began = time.perf_counter()
        if done < size and (more := os.pread(number, size - done, place + done)):
            slow[0] += len(more)
            slow[1] += time.perf_counter() - began
