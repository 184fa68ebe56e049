"""Processes beside each other: those that wait for one device, and those that look while another is at work."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import optuna

from heretic.search.front import results
from heretic.status import look_at
from tests.command import start
from tests.faults.conftest import Amount, Tally

Span = tuple[float, float]


def study(name: str) -> optuna.Study:
    """The study of a run here."""
    return optuna.load_study(study_name="heretic", storage=f"sqlite:///runs/{name}/study.db")


def span(name: str) -> Span:
    """When a run's first trial began and its last one ended."""
    trials = study(name).get_trials(deepcopy=False)
    began = [t.datetime_start.timestamp() for t in trials if t.datetime_start]
    ended = [t.datetime_complete.timestamp() for t in trials if t.datetime_complete]
    return min(began), max(ended)


def test_three_that_wait_for_one_device_all_finish_one_after_the_other(config: Path, tally: Tally) -> None:
    names = ["one", "two", "three"]
    processes = [start("run", "--run-name", name, "--trials", "2", "--wait") for name in names]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert all(len(results(study(name))) == 2 for name in names)
    spans = sorted(map(span, names))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans
    tally("three runs that wait for one device (--wait)", 1, "nothing: all finished, one after the other")


def test_three_that_wait_for_one_run_share_its_trials(config: Path, tally: Tally) -> None:
    processes = [start("run", "--run-name", "mine", "--trials", "+2", "--wait") for _ in range(3)]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    trials = study("mine").get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 6, "two trials each"
    tally("three processes that wait for one run (--wait --trials +2)", 1, "nothing: two trials each")


LOOK = """
import sys
from heretic.cli import main
sys.argv = ["heretic", "status", "mine", "--json"]
while True:
    try:
        main()
    except SystemExit as finished:
        print("status", finished.code, flush=True)
"""


def test_status_in_a_tight_loop_beside_a_running_study(config: Path, amount: Amount, tally: Tally) -> None:
    trials = str(amount(12, 40))
    quiet, _ = (alone := start("run", "--run-name", "alone", "--trials", trials)).communicate(timeout=240)
    assert alone.returncode == 0, quiet
    process = start("run", "--run-name", "mine", "--trials", trials)
    while not Path("runs/mine/config.toml").exists():
        time.sleep(0.02)
    looks = 0
    with Path("looked").open("w") as out:
        looker = subprocess.Popen([sys.executable, "-c", LOOK], stdout=out, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None or looks < amount(100, 500):  # through the lock, the storage, the log
            look_at("mine", "runs", {})
            looks += 1
        output, _ = process.communicate()
    finally:
        looker.terminate()
        looker.wait()
    said = Path("looked").read_text()
    assert process.returncode == 0, output
    statuses = [line for line in said.splitlines() if line.startswith("status ")]
    assert statuses and set(statuses) == {"status 0"} and "Traceback" not in said, said[-500:]
    found, wanted = ([(r.params, r.point) for r in results(study(name))] for name in ("mine", "alone"))
    assert found == wanted, "the study is not the same as without anybody looking"
    json.loads(said[said.index("{") : said.index("\nstatus 0")])
    tally("status read beside a running study, in a tight loop, by two processes", looks + len(statuses), "nothing")
