"""Processes that are killed, stopped and left alone by their terminal, at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest

from heretic.files import read_tensors, sha256
from heretic.storage import rdb
from tests.faults.conftest import Amount, Tally, only_full
from tests.helpers.command import start

RUN = ("run", "--run-name", "mine", "--save-to", "out", "--set", 'search.start="gradient"', "--set",
       "search.gradient.weights=[0.1,0.5]", "--set", "search.gradient.steps=2", "--trials", "4")  # fmt: skip


Reference = tuple[float, dict[str, object]]


@pytest.fixture
def config(config: Path) -> Path:
    """Known by its whole path, since the tests here change folders."""
    return config.resolve()


@pytest.fixture
def reference(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """Seconds of a run that nobody disturbs, and what it comes to."""
    with monkeypatch.context() as there:
        there.chdir(config_in(tmp_path / "reference", config))
        began = time.monotonic()
        output, _ = (process := start(*RUN)).communicate(timeout=120)
        assert process.returncode == 0, output
        return time.monotonic() - began, outcome()


def outcome() -> dict[str, object]:
    """What a finished run must come to, whatever happened on the way."""
    study = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert not [t for t in study.trials if t.state.name in ("RUNNING", "WAITING")]
    return {
        "trials": sorted((tuple(t.values), tuple(sorted(t.params.items()))) for t in complete),
        **{
            name: read_tensors(Path(f"runs/mine/{name}.safetensors"))[1]["sha256"]
            for name in ("directions", "baseline")
        },
        "weights": {f.name: sha256(f) for f in Path("out").glob("*.safetensors")},
    }


def whole_or_not_there() -> None:
    """An export that can be seen is finished: it has its manifest, and the manifest is whole."""
    if Path("out").exists():
        json.loads(Path("out/manifest.json").read_text())


def test_kill_9_at_random_moments(
    reference: Reference, amount: Amount, tally: Tally, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, wanted = reference
    times = amount(1, 50)
    chance = random.Random(8)
    for i in range(times):
        monkeypatch.chdir(config_in(tmp_path / f"killed-{i}", config))
        process = start(*RUN)
        time.sleep(chance.uniform(0.1, 1.05) * seconds)
        process.kill()
        process.communicate()
        whole_or_not_there()
        output, _ = (again := start(*RUN)).communicate(timeout=120)
        assert again.returncode == 0, output
        assert outcome() == wanted, f"kill {i}"
    tally("kill -9 at a random moment of a run, then the same command", times, "the trial under way")


@only_full
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_orderly_signals_at_random_moments(
    reference: Reference,
    amount: Amount,
    tally: Tally,
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    seconds, wanted = reference
    times = amount(1, 10)
    chance = random.Random(name)
    for i in range(times):
        monkeypatch.chdir(config_in(tmp_path / f"{name}-{i}", config))
        process = start(*RUN)
        time.sleep(chance.uniform(0.4, 1.0) * seconds)
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output, output
        whole_or_not_there()
        output, _ = (again := start(*RUN)).communicate(timeout=120)
        assert again.returncode == 0, output
        assert outcome() == wanted
    tally(f"{name} at a random moment, then the same command", times, "the trial under way")


@only_full
def test_the_terminal_goes_away(
    reference: Reference, tally: Tally, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = pytest.importorskip("pty")
    seconds, wanted = reference
    monkeypatch.chdir(config_in(tmp_path / "terminal", config))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "heretic", *RUN], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    time.sleep(0.8 * seconds)
    os.close(ours)  # writes fail from now on
    os.killpg(process.pid, signal.SIGHUP)  # as the kernel does to the session of a terminal that is gone
    process.wait(timeout=60)
    output, _ = (again := start(*RUN)).communicate(timeout=120)
    assert again.returncode == 0, output
    assert outcome() == wanted
    tally("terminal closed during a run, then the same command", 1, "the trial under way")


@only_full
def test_a_suspended_machine_goes_on(
    reference: Reference, tally: Tally, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, wanted = reference
    monkeypatch.chdir(config_in(tmp_path / "suspended", config))
    process = start(*RUN)
    for _ in range(3):
        time.sleep(0.3 * seconds)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert outcome() == wanted
    tally("process suspended and woken", 3, "nothing")


def test_the_clock_jumps(tally: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept, or a clock that is set: the time at which this machine is said to have started moves along."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    before = rdb.worker()
    assert rdb.is_alive(before)
    jumps = (-86400, -3600, -5, 5, 3600, 86400)
    for seconds in jumps:
        proc = tmp_path / f"proc{seconds}"
        proc.mkdir()
        for name in ("self", str(os.getpid()), "uptime", "meminfo"):
            (proc / name).symlink_to(f"/proc/{name}")
        lines = Path("/proc/stat").read_text().splitlines()
        moved = [f"btime {int(x.split()[1]) + seconds}" if x.startswith("btime") else x for x in lines]
        (proc / "stat").write_text("\n".join(moved) + "\n")
        with monkeypatch.context() as patched:
            patched.setattr(psutil, "PROCFS_PATH", str(proc))
            assert rdb.is_alive(before), f"a worker is taken for dead after a jump of {seconds} s"
            assert rdb.is_alive(rdb.worker())
    tally("clock set while a worker runs: by 5 s, an hour, a day, forwards and back", len(jumps), "nothing")


def config_in(folder: Path, config: Path) -> Path:
    """A folder with these settings."""
    folder.mkdir()
    (folder / "config.toml").write_text(config.read_text())
    return folder
