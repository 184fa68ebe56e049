"""Processes beside each other: those that wait for one device, and those that look while another is at work."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.runs.status import read_status
from heretic.search.pareto import results
from heretic.settings.sources import resolve
from tests.faults.conftest import Amount, Tally, only_full
from tests.helpers.command import start

Span = tuple[float, float]


def trials(name: str) -> list[FrozenTrial]:
    """The trials of a run here."""
    study = optuna.load_study(study_name="heretic", storage=f"sqlite:///runs/{name}/study.db")
    return study.get_trials(deepcopy=False)


def span(of: list[FrozenTrial]) -> Span:
    """When the first of these trials began and the last one ended."""
    began = [t.datetime_start.timestamp() for t in of if t.datetime_start]
    ended = [t.datetime_complete.timestamp() for t in of if t.datetime_complete]
    return min(began), max(ended)


def wait_for_each_other(*names: str) -> None:
    """A process for each name, all at the same time; each adds two trials."""
    processes = [start("run", "--run-name", name, "--trials", "+2", "--wait") for name in names]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


def one_after_the_other(spans: list[Span]) -> bool:
    """Whether each ended before the next one began."""
    return all(before[1] <= after[0] for before, after in itertools.pairwise(sorted(spans)))


def test_three_that_wait_for_one_run_all_finish_one_after_the_other(config: Path, tally: Tally) -> None:
    wait_for_each_other("mine", "mine", "mine")
    by_process = defaultdict(list)
    for trial in trials("mine"):
        assert trial.state.name == "COMPLETE"
        by_process[trial.user_attrs["heretic:worker"]["pid"]].append(trial)
    assert [len(of) for of in by_process.values()] == [2, 2, 2]
    assert one_after_the_other([span(of) for of in by_process.values()])
    tally("three processes that wait for one run (--wait)", 1, "nothing: all finished in turn")


@only_full
def test_three_runs_that_wait_for_one_device(config: Path, tally: Tally) -> None:
    names = ("one", "two", "three")
    wait_for_each_other(*names)
    assert [len(trials(name)) for name in names] == [2, 2, 2]
    assert one_after_the_other([span(trials(name)) for name in names])
    tally("three runs that wait for one device (--wait)", 1, "nothing: all finished in turn")


LOOK = """
import sys
from heretic.cli.main import main
sys.argv = ["heretic", "status", "mine", "--json"]
while True:
    try:
        main()
    except SystemExit as finished:
        print("status", finished.code, flush=True)
"""


def test_status_in_a_tight_loop_beside_a_running_study(config: Path, amount: Amount, tally: Tally) -> None:
    number = amount(8, 40)
    alone = run(resolve(config, {"run_name": "alone", "n_trials": number}), reporter=NULL_REPORTER, stop=StopSignal())
    with Path("looked").open("w") as out:
        looker = subprocess.Popen([sys.executable, "-c", LOOK], stdout=out, stderr=subprocess.STDOUT)
    looks = 0
    try:
        while "status" not in Path("looked").read_text():  # from before there is a run
            time.sleep(0.02)
        process = start("run", "--run-name", "mine", "--trials", str(number))
        while not Path("runs/mine/study.db").exists():
            time.sleep(0.02)
        # Through the lock, the storage, the log; the other process may be slow where the machine is busy.
        while process.poll() is None or looks < amount(40, 500) or "status 0" not in Path("looked").read_text():
            try:
                read_status("mine", "runs", {})
            except UserError as early:
                assert not looks, early  # it is about to begin
                continue
            looks += 1
        output, _ = process.communicate()
    finally:
        looker.terminate()
        looker.wait()
    said = Path("looked").read_text()
    assert process.returncode == 0, output
    statuses = [line for line in said.splitlines() if line.startswith("status ")]
    assert "status 0" in statuses and set(statuses) <= {"status 0", "status 1"}, said[-500:]
    assert "Traceback" not in said and "damaged" not in said
    found = results(optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db"))
    assert [(r.params, r.point) for r in found] == [(r.params, r.point) for r in alone.results], (
        "looking changed the study"
    )
    tally(
        "status read beside a running study, in a tight loop, by two processes",
        looks + statuses.count("status 0"),
        "nothing",
    )
