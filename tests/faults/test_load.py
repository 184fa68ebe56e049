"""Many at once, and studies of ten thousand trials."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import optuna
from plotly.offline import get_plotlyjs

from heretic.report.report import ReportInput
from heretic.report.reporter import write_report
from heretic.runs.folder import RunFolder
from heretic.runs.status import read_status
from heretic.scoring.scores import Divergence, Scores
from heretic.search.pruning import StudyHistory
from heretic.search.sampler import sampler
from heretic.settings import SearchSettings, Settings
from heretic.storage.attributes import KL_PER_PROMPT
from heretic.storage.rdb import open_study
from heretic.storage.url import storage_url
from tests.faults.conftest import FULL, Amount, Tally, only_full
from tests.pipeline.test_run import do

MANY = 10_000


def fill(study: optuna.Study, count: int, more: dict[str, object] | None = None) -> None:
    """Add so many trials with made-up scores; `more` is stored with each of them."""
    floats = {f"x{i}": optuna.distributions.FloatDistribution(0, 1) for i in range(9)}
    chance = random.Random(0)
    trials = []
    for _ in range(count):
        params = {name: chance.random() for name in floats}
        kl, refusals = params["x0"] + 0.1 * params["x1"], round(50 * (1 - params["x0"]) * params["x2"])
        scores = Scores(Divergence(kl, kl, kl, kl), refusals, 50, {"trial": 1.0})
        trials.append(
            optuna.trial.create_trial(
                params=params,
                distributions=floats,
                values=[kl, refusals],
                user_attrs={"heretic:scores": scores.as_dict(), **(more or {})},
            )
        )
    study.add_trials(trials)


def test_a_study_of_ten_thousand_trials_stays_responsive(tally: Tally, tmp_path: Path) -> None:
    url = storage_url("", tmp_path) if FULL else "sqlite://"
    study = open_study(url, "heretic", {"a": 1}) if FULL else optuna.create_study(directions=["minimize", "minimize"])
    fill(study, MANY)  # two minutes in a file
    began = time.perf_counter()
    if FULL:
        study = open_study(url, "heretic", {"a": 1})
    assert len(study.get_trials(deepcopy=False)) == MANY
    opened = time.perf_counter() - began
    seconds = []
    for number in range(5):
        study.sampler = sampler(Settings(search=SearchSettings(n_startup_trials=10)), MANY + number)
        began = time.perf_counter()
        trial = study.ask()
        for i in range(9):
            trial.suggest_float(f"x{i}", 0, 1)
        seconds.append(time.perf_counter() - began)
        study.tell(trial, [0.5, 5])
    began = time.perf_counter()
    assert StudyHistory.of(study).proxy_error is None
    read = time.perf_counter() - began
    asked = statistics.median(seconds)
    assert opened < 15 and asked < 1 and read < 2, "far slower than it should be, even on a busy machine"
    tally(
        f"a study of {MANY} trials: opened in {opened:.1f} s, a trial drawn in {asked * 1000:.0f} ms, read in {read:.1f} s",
        5,
        "nothing",
    )


def test_a_report_of_ten_thousand_trials(tally: Tally, tmp_path: Path) -> None:
    url = storage_url("", tmp_path) if FULL else "sqlite://"
    study = open_study(url, "heretic", {"a": 1}) if FULL else optuna.create_study(directions=["minimize", "minimize"])
    fill(study, MANY, {KL_PER_PROMPT: [i / 1000 for i in range(200)]})
    source = ReportInput(study, Settings(n_trials=MANY), RunFolder(tmp_path), "")
    began = time.perf_counter()
    write_report(source, tmp_path / "report.html")
    seconds = time.perf_counter() - began
    size = (tmp_path / "report.html").stat().st_size
    library = len(get_plotlyjs().encode())
    assert seconds < 10 and size - library < 4e6, f"{seconds:.1f} s, {size / 1e6:.1f} MB"
    tally(
        f"the report of a study of {MANY} trials: {seconds:.1f} s, {size / 1e6:.1f} MB, of which {library / 1e6:.1f} MB are "
        "the library that draws",
        1,
        "nothing",
    )


WORKER = """
import sys
from pathlib import Path
from heretic.progress import NULL_REPORTER
from heretic.scoring.scores import Divergence
from heretic.scoring.scores import Scores
from heretic.storage.rdb import open_study
from heretic.search.study import run_study
from heretic.runs.status import read_status
from heretic.settings import SearchSettings, Settings
from heretic.interrupt import StopSignal
class Fake:
    def trials_per_batch(self, before): return 1
    def initial_params(self): return []
    def sample(self, trial): trial.suggest_float("x", 0, 1)
    def measure(self, trials, beaten):
        x = trials[0].params["x"]
        return [Scores(Divergence(x, x, x, x), round(10 * (1 - x)), 10, {})]
study = open_study(sys.argv[1], "heretic", {"a": 1})
settings = Settings(n_trials=int(sys.argv[2]), search=SearchSettings(n_startup_trials=100000))
run_study(study, settings, Fake(), reporter=NULL_REPORTER, stop=StopSignal())
"""


@only_full
def test_processes_on_one_study(amount: Amount, tally: Tally, tmp_path: Path) -> None:
    processes, wanted = amount(2, 8), amount(20, 400)
    url = storage_url("", tmp_path)
    open_study(url, "heretic", {"a": 1})
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, url, str(wanted)], stderr=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    study = optuna.load_study(study_name="heretic", storage=url)
    states = [t.state.name for t in study.trials]
    assert wanted <= states.count("COMPLETE") < wanted + processes
    assert sorted(t.number for t in study.trials) == list(range(len(study.trials)))
    tally(f"{processes} processes on one SQLite study of {wanted} trials", 1, "nothing")


def test_status_over_and_over(amount: Amount, tally: Tally, tmp_path: Path, config: Path) -> None:
    do(config)
    name = next(Path("runs").iterdir()).name
    times = amount(20, 500)
    began = time.perf_counter()
    for _ in range(times):
        read_status(name, "runs", {})
    rate = times / (time.perf_counter() - began)
    tally(f"status read, {rate:.0f} times a second", times, "nothing")
