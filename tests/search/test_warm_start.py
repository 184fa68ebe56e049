"""A study that begins with the fronts of earlier runs."""

from __future__ import annotations

from pathlib import Path

from heretic.progress import Silent, Watcher
from heretic.run import Outcome, run
from heretic.search.front import front
from heretic.settings.layers import resolve
from heretic.stop import Stop

KERNELS = ("search.start=kernels", "search.n_startup_trials=10")


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    warn = say


def do(config: Path, watcher: Watcher, *assignments: str) -> Outcome:
    return run(resolve(config, assignments=[*KERNELS, *assignments]), watcher=watcher, stop=Stop())


def test_the_front_of_an_earlier_run_is_measured_first_and_the_same_on_resumption(config: Path) -> None:
    first = do(config, Said(), "run_name=a")
    best = front(first.found)
    said = Said()
    warm = do(config, said, "run_name=b", "search.warm_start=true", "seed=7", "n_trials=2")
    assert [r.params for r in warm.found[:2]] == [r.params for r in best][:2]
    assert any("earlier runs: a" in line for line in said.lines)
    do(config, Said(), "run_name=c", "seed=9")  # another one to begin with, but what was decided stays
    again = do(config, Said(), "run_name=b", "search.warm_start=true", "seed=7", "n_trials=5")
    assert [r.params for r in again.found[:2]] == [r.params for r in warm.found[:2]]
    measured = [r.params for r in again.found]
    assert all(r.params in measured for r in best)
    cold = do(config, Said(), "run_name=d", "seed=7", "n_trials=2")
    assert cold.found[0].params != best[0].params


def test_broken_runs_are_passed_over(config: Path) -> None:
    do(config, Said(), "run_name=a", "n_trials=2")
    broken = Path("runs/broken")
    broken.mkdir()
    (broken / "study.db").write_text("no database")
    (broken / "directions.safetensors").write_bytes(Path("runs/a/directions.safetensors").read_bytes())
    shapeless = Path("runs/shapeless")
    shapeless.mkdir()
    (shapeless / "study.db").write_text("")
    said = Said()
    warm = do(config, said, "run_name=b", "search.warm_start=true", "n_trials=3")
    assert len(warm.found) == 3
    assert sum("run broken" in line for line in said.lines) == 1


def test_a_walk_has_its_own_beginning(config: Path) -> None:
    do(config, Said(), "run_name=a", "n_trials=2")
    said = Said()
    wanted = ["run_name=b", "search.warm_start=true", "search.start=gradient", "search.gradient.steps=1", "n_trials=1"]
    run(resolve(config, assignments=wanted), watcher=said, stop=Stop())
    assert not any("earlier runs" in line for line in said.lines)
