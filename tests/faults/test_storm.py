"""Workers on one study in PostgreSQL that are killed and cut off, and a server that restarts."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

from heretic.files import sha256
from heretic.search.pareto import pareto_front, results
from heretic.search.scheduler import n_complete
from heretic.storage.rdb import connect
from tests.faults.conftest import FULL, Amount, Tally, only_full
from tests.helpers.fork_server import ForkedProcess, fork_heretic
from tests.helpers.postgres import PASSWORD, Server

WORKERS = 4
QUICK = ("workers.heartbeat=1", "workers.grace_period=3", "max_response_length=100", 'refusal_markers=["zzz"]')


def begin(config: Path, postgres: Server, name: str, trials: int, place: Path, *more: str) -> ForkedProcess:
    """A worker as on another machine: with a folder of its own for runs."""
    place.mkdir(exist_ok=True)
    assignments = [f'runs_dir="{place}"', f"run_name={name}", f"n_trials={trials}", *QUICK, *more]
    words = ["run", "-c", str(config), *[w for a in assignments for w in ("-s", a)]]
    environment = {**os.environ, "HERETIC_STORAGE": postgres.url, "XDG_RUNTIME_DIR": str(place)}
    return fork_heretic(words, environment, place / "said")


@functools.cache
def storage(url: str) -> optuna.storages.RDBStorage:
    """Opened once: a new one for every look would use up the server's connections."""
    return connect(url)


def study(postgres: Server, name: str) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage(postgres.url))
    except KeyError:
        return None


def rows(postgres: Server, name: str) -> list[tuple[int, float, float]]:
    """Number, KL and refusals of the complete trials, by SQL alone."""
    found = postgres.ask(
        "select t.number, v0.value, v1.value from trials t join studies s using (study_id) "
        "join trial_values v0 on v0.trial_id = t.trial_id and v0.objective = 0 "
        "join trial_values v1 on v1.trial_id = t.trial_id and v1.objective = 1 "
        f"where s.study_name = '{name}' and t.state = 'COMPLETE' order by 1"
    )
    return [(int(a), float(b), float(c)) for a, b, c in found]  # type: ignore[call-overload]


def check(postgres: Server, name: str, trials: int) -> None:
    """Exactly so many trials, none twice, nothing left under way, and the front is the rows' own."""
    found = study(postgres, name)
    assert found is not None
    all_trials = found.get_trials()
    complete = [t for t in all_trials if t.state == TrialState.COMPLETE]
    assert len(complete) == trials == len(rows(postgres, name))
    assert not [t for t in all_trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    params = [tuple(sorted(t.params.items())) for t in complete]
    assert len(set(params)) == trials, "a trial was counted twice"
    measured = results(found)
    points = [(r.scores.divergence.mean, r.scores.expected) for r in measured]
    best = {p for p in points if not any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in points)}
    assert {r.point for r in pareto_front(measured)} == best
    assert [round(told, 9) for _, _, told in rows(postgres, name)] == [round(r.point[1], 9) for r in measured]


def test_a_storm(postgres: Server, config: Path, amount: Amount, tally: Tally, tmp_path: Path) -> None:
    times = amount(1, 10)
    for i in range(times):
        (folder := tmp_path / f"storm{i}").mkdir()
        storm(postgres, config, folder, random.Random(i), 60 if FULL else 18)
    tally(
        "four workers: two killed, connections cut, PostgreSQL restarted", times, "nothing: their trials were repeated"
    )


def storm(postgres: Server, config: Path, folder: Path, chance: random.Random, trials: int) -> None:
    shared = f'artifacts="{folder / "shared"}"'
    places = [folder / f"machine-{i}" for i in range(WORKERS)]
    begun = [begin(config, postgres, folder.name, trials, place, shared) for place in places]
    try:
        weather(postgres, begun, places, folder.name, chance, trials)
    finally:
        for process in begun:
            process.kill()  # those that are left where the test fails
    check(postgres, folder.name, trials)
    files = [f for f in folder.rglob("*") if f.suffix in (".log", ".toml") or f.name == "said"]
    said = "".join(f.read_text() for f in files)
    assert PASSWORD not in said and "Traceback" not in said
    assert "Downloaded " in said, "nothing was fetched"
    made = [sha256(f) for f in folder.rglob("directions.safetensors")]
    assert len(made) > 1 and len(set(made)) == 1


def weather(
    postgres: Server,
    begun: list[ForkedProcess],
    places: list[Path],
    name: str,
    chance: random.Random,
    trials: int,
) -> None:
    """What happens to the workers, until those that were not killed have ended."""

    def reach(number: int) -> None:
        end = time.monotonic() + 240
        while (now := study(postgres, name)) is None or n_complete(now) < number:
            assert time.monotonic() < end, "too slow"
            assert any(p.poll() is None for p in begun), (places[0] / "said").read_text()
            time.sleep(0.1)

    reach(2)
    begun[0].send_signal(signal.SIGKILL)
    time.sleep(chance.uniform(0, 1))
    ours = "from pg_stat_activity where application_name = 'heretic' limit 2"
    assert postgres.ask(f"select pg_terminate_backend(pid) {ours}")
    reach(chance.randint(5, 8))
    begun[1].send_signal(signal.SIGKILL)
    time.sleep(chance.uniform(0, 1))
    postgres.control("restart", "-m", chance.choice(["fast", "immediate"]))
    for process, place in list(zip(begun, places, strict=True))[2:]:
        assert process.wait(timeout=240) == 0, (place / "said").read_text()


@only_full
def test_four_workers_ask_for_the_last_trials_at_once(postgres: Server, config: Path, tmp_path: Path) -> None:
    trials = 5
    places = [tmp_path / f"last-{i}" for i in range(WORKERS)]
    begun = [begin(config, postgres, "last", trials, place) for place in places]
    for process, place in zip(begun, places, strict=True):
        assert process.wait(timeout=240) == 0, (place / "said").read_text()
    check(postgres, "last", trials)
    found = study(postgres, "last")
    assert found is not None and len(found.trials) == trials, "more were asked for than wanted"
