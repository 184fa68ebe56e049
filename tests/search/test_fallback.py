"""A judge that fails on one worker has failed for all."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from heretic.scoring.judges import OrMarkers, Surroundings, make_judge
from heretic.scoring.llm import JudgeUnavailable
from heretic.scoring.markers import MarkerJudge
from heretic.scoring.verdict import Said, Verdict
from heretic.search.attributes import FALLEN
from heretic.search.fallback import StudyFallback
from heretic.search.front import front, of_standing_judge, results
from heretic.search.seal import sealed
from heretic.settings.layers import resolve
from tests.search.test_study import scores

SAID = [Said("a request", "no soup"), Said("another", "here it is")]


class Endpoint:
    """A judge behind a line that is cut when told to."""

    name, ends_early = "llm", False

    def __init__(self) -> None:
        self.cut = False

    def settled(self, answer: str) -> bool:
        return False

    def verdicts(self, said: list[Said]) -> list[Verdict]:
        if self.cut:
            raise JudgeUnavailable("The endpoint failed.")
        return ["answer"] * len(said)


class Told:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="s", storage=url, directions=["minimize", "minimize"])
    return url


def worker(url: str) -> tuple[OrMarkers, Endpoint, Told]:
    """A worker's judge, on a connection of its own."""
    study, first, told = optuna.load_study(study_name="s", storage=url), Endpoint(), Told()
    return OrMarkers(first, MarkerJudge(["soup"]), told, StudyFallback(study, "llm")), first, told  # type: ignore[arg-type]


def test_what_one_worker_saw_all_do(url: str) -> None:
    (one, line, _), (other, _, told) = worker(url), worker(url)
    other.follow()
    assert one.name == other.name == "llm" and other.verdicts(SAID) == ["answer", "answer"]
    line.cut = True
    assert one.verdicts(SAID) == ["refusal", "answer"] and one.name == "markers"
    assert other.name == "llm", "within a count nothing changes"
    other.follow()
    assert other.name == "markers" and other.verdicts(SAID) == ["refusal", "answer"]
    other.follow()
    assert len(told.warnings) == 1 and "another worker" in told.warnings[0]
    late, _, _ = worker(url)
    late.follow()
    assert late.given_up
    kept = optuna.load_study(study_name="s", storage=url).user_attrs[FALLEN]
    assert "The endpoint failed." in kept and "process" in kept


def test_the_markers_keep_its_place_whatever_the_settings_say_since(url: str) -> None:
    fallback = StudyFallback(optuna.load_study(study_name="s", storage=url), "llm")
    llm = {"judge.llm.base_url": "http://127.0.0.1:9/v1", "judge.llm.model": "m", "judge.kind": "llm"}
    settings = resolve(options=llm).settings
    around = Surroundings(fallback=fallback)
    assert make_judge(settings, around).name == "llm"
    fallback.happen("The endpoint failed.")
    assert make_judge(settings, around).name == "markers"


def test_the_front_is_of_the_markers_whatever_came_last(url: str) -> None:
    """A worker had a trial under way when the judge failed on the other."""
    study = optuna.load_study(study_name="s", storage=url)
    for judge, kl, refusals in (("llm", 0.1, 1), ("markers", 0.2, 5), ("llm", 0.05, 0)):
        trial = study.ask()
        found = scores(kl, refusals).as_dict() | {"judge": judge}
        trial.set_user_attr("scores", sealed(found, trial.params))
        study.tell(trial, [kl, refusals])
    found = results(study)
    assert [r.number for r in front(found)] == [1] and of_standing_judge([]) == []
    assert [r.number for r in of_standing_judge(found[:1])] == [0], "as long as it has not failed, its own"
    assert StudyFallback(study, "llm").happened(), "told by its trials too"
