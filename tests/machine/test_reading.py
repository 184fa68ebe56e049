"""How quickly files are read."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heretic.machine import reading
from heretic.machine.reading import ASSUMED, NUMBERS, Reading, placing_seconds, reading_of


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 8 and 24 MiB, just written, so in the page cache."""
    found = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, size in zip(found, (8, 24), strict=True):
        file.write_bytes(os.urandom(size << 20))
    return found


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a millisecond whenever it is asked: what else the machine does changes nothing."""
    ticks = itertools.count()
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000))


def test_a_sample_gives_the_time_of_the_whole(files: list[Path], ticking: None) -> None:
    found, ten_times = reading_of(files, 32 << 20), reading_of(files, 320 << 20)
    assert found.measured and 0 < found.seconds < 5 and found.nbytes == 32 << 20
    assert ten_times.seconds == pytest.approx(10 * found.seconds)
    assert "measured on a sample" in found.how and "GB/s" in found.how


@pytest.mark.skipif(reading.KEPT_IN_RAM is None, reason="only Linux tells")
def test_what_is_in_the_page_cache_is_told_apart(files: list[Path]) -> None:
    found = reading_of(files, 32 << 20)
    if found.cached == 0:
        pytest.skip("this file system does not tell")
    assert found.cached == pytest.approx(1, abs=0.2) and "page cache" in found.how


def test_a_file_system_that_does_not_tell_is_timed_as_a_whole(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "KEPT_IN_RAM", None)
    found = reading_of(files, 32 << 20)
    assert found.measured and found.cached is None and "page cache" not in found.how


def test_what_cannot_be_read_is_assumed_and_said_so(tmp_path: Path) -> None:
    for given in (reading_of([tmp_path / "missing"], 3 * 10**9), Reading.assumed(3 * 10**9)):
        assert not given.measured and given.seconds == 3e9 / ASSUMED and given.how == "assuming 2 GB/s"
    (tmp_path / "empty").touch()
    assert not reading_of([tmp_path / "empty"], 10).measured


def test_the_way_into_memory_is_timed_on_a_sample(ticking: None) -> None:
    once = placing_seconds(NUMBERS, torch.bfloat16, torch.float32)
    hundred_times = placing_seconds(100 * NUMBERS, torch.bfloat16, torch.float32)
    assert once == pytest.approx(0.001) and hundred_times == pytest.approx(100 * once)
    assert placing_seconds(0, torch.float32, torch.float32) == 0
