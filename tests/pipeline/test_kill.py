"""Real processes that are killed, interrupted and started twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import optuna
import pytest

from heretic.errors import BusyError, Interrupted
from heretic.pipeline.session_note import FILE
from tests.helpers.command import start


def wait_for(condition: object, process: object, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        assert process.poll() is None, process.stdout.read()  # type: ignore[attr-defined]
        time.sleep(0.02)


def trials(state: str = "COMPLETE") -> int:
    files = list(Path("runs").glob("mine/study.db"))
    if not files:
        return 0
    try:
        with sqlite3.connect(f"file:{files[0]}?mode=ro", uri=True) as database:
            return int(database.execute("select count(*) from trials where state = ?", (state,)).fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # not created yet, or locked this instant


@pytest.fixture
def slow(config: Path) -> list[str]:
    """A run that takes long enough to be hit in the middle."""
    return [
        "run",
        "--run-name",
        "mine",
        "--trials",
        "12",
        "--set",
        "max_response_length=100",
        "--set",
        'refusal_markers=["zzz"]',
    ]


def test_kill_9_loses_the_running_trial_only_and_the_lock_is_free(slow: list[str]) -> None:
    process = start(*slow)
    wait_for(lambda: trials() >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = trials()
    assert done >= 3
    note = Path("runs/mine") / FILE
    assert json.loads(note.read_text())["stage"] == "Trials"
    again = start(*slow)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert f"{done} of 12 trials are done" in output
    assert "'Trials'" in output and "batch_size = 4" in " ".join(output.split()), "the last session's end is said"
    assert not note.exists()
    study = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    states = [t.state.name for t in study.trials]
    assert states.count("COMPLETE") == 12 and states.count("FAIL") <= 1 and len(states) <= 13


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_one_signal_ends_the_run_cleanly(slow: list[str], number: int) -> None:
    process = start(*slow)
    wait_for(lambda: trials() >= 1, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == Interrupted.exit_status, output
    assert "Stopped." in output and "Traceback" not in output
    assert trials("RUNNING") == 0, "the trial under way was not marked"
    assert not (Path("runs/mine") / FILE).exists()


def test_a_second_process_is_turned_away_and_a_queued_one_follows(slow: list[str]) -> None:
    long = [*slow, "--trials", "500"]  # it must not end while the second one starts
    first = start(*long)
    wait_for(lambda: trials() >= 1, first)
    second = start(*long)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == BusyError.exit_status
    assert str(first.pid) in output and "--wait" in output
    third = start(*slow, "--wait", "--trials", "2")
    time.sleep(1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 0, output
