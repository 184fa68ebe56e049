"""The table of scorers, names and options of the settings, and a user's own files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from heretic.errors import UserError
from heretic.scoring.objectives import Limits
from heretic.scoring.scorers.measuring import checked
from heretic.scoring.scorers.registry import check_scorers, choose_scorers, user_scorers
from heretic.scoring.scorers.scorer import Measurement, Scorer
from heretic.scoring.scores import Divergence, Scores
from heretic.settings import Settings
from tests.helpers.errors import raises

OWN = """
from heretic.scoring.scorers.scorer import Scorer

class {name}(Scorer):
    name = "{name}"
    meaning = "a number"

    def score(self, model, baseline):
        return 1.0
"""


def chosen(**settings: Any) -> Any:
    return choose_scorers(Settings.model_validate(settings))


def test_the_search_measures_what_its_objectives_and_constraints_name() -> None:
    assert chosen().of_trials == () and chosen().exported == ("over_refusals", "degenerate")
    found = chosen(objectives=["kl.p95", "unchanged"], constraints={"own_answer_kl.max": 3, "degenerate": 2})
    assert found.of_trials == ("unchanged", "own_answer_kl", "degenerate")
    assert found.by_models(found.exported) == [["unchanged", "degenerate", "over_refusals"], ["own_answer_kl"]]
    assert [o.better for o in found.objectives] == ["lower", "higher"]
    assert chosen(measures=["copying"]).of_trials == ()
    assert chosen(measures=["copying", "degenerate"]).exported == ("over_refusals", "degenerate", "copying")


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"objectives": ["kl", "refusal"]}, "unknown-scorer"),
        ({"constraints": {"kl.p90": 1.0}}, "unknown-scorer"),
        ({"measures": ["nothing_like_it"]}, "unknown-scorer"),
        ({"measures": ["kl"]}, "unknown-scorer"),
        ({"scorers": {"copying": {"task": 3}}, "measures": ["copying"]}, "scorer-option"),
        ({"scorers": {"copying": {"tasks": 0}}, "measures": ["copying"]}, "scorer-option"),
        ({"scorers": {"repetition": {"tasks": 3}}, "measures": ["repetition"]}, "scorer-option"),
        ({"scorers": {"copy": {}}}, "unknown-scorer"),
        ({"scorer_files": ["none.py"]}, "missing-file"),
    ],
)
def test_wrong_names_options_and_files_are_refused(settings: dict[str, Any], code: str) -> None:
    with raises(code):
        chosen(**settings)


@pytest.mark.parametrize("settings", [
    {"measures": ["borderline_refusals"]},
    {"measures": ["text_perplexity"], "scorers": {"text_perplexity": {"file": "none.txt"}}},
])  # fmt: skip
def test_files_that_a_scorer_needs_are_looked_for_before_the_run(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        check_scorers(Settings.model_validate(settings))
    assert error.value.code in ("no-prompts", "missing-file")


def test_options_reach_the_scorer() -> None:
    made = chosen(
        measures=["copying", "own_answer_kl"], scorers={"copying": {"tasks": 5}, "own_answer_kl": {"tokens": 3}}
    )
    assert made.scorers["copying"].tasks == 5 and made.scorers["own_answer_kl"].tokens == 3


def test_a_file_runs_only_if_the_settings_name_it_and_only_once(tmp_path: Path) -> None:
    file, mark = tmp_path / "mine.py", tmp_path / "ran"
    file.write_text(OWN.format(name="mine") + f"open({str(mark)!r}, 'a').write('x')\n", encoding="utf-8")
    chosen()
    assert not mark.exists()
    for _ in range(2):
        assert chosen(scorer_files=[str(file)], objectives=["kl", "mine"]).of_trials == ("mine",)
    assert mark.read_text() == "x"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("import nothing_of_this_name", "scorer-import"),
        ("def broken(:", "scorer-import"),
        ("raise SystemExit", "scorer-import"),
        ("number = 3", "scorer-class"),
        ("class Mine:\n    name = 'mine'\n", "scorer-class"),
        (OWN.format(name="kl"), "scorer-class"),
        (OWN.format(name="mine").replace('"mine"', '"My own"'), "scorer-class"),
        (OWN.format(name="mine").replace("def score", "def scores"), "scorer-class"),
        (OWN.format(name="mine").replace("meaning", 'better = "more"; meaning'), "scorer-class"),
    ],
)
def test_files_without_a_complete_scorer_are_refused(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with raises(code):
        user_scorers([str(tmp_path / "mine.py")])


class WithDetails(Scorer):
    name = "with_details"
    details = ("low",)


class Plain(Scorer):
    name = "plain"


@pytest.mark.parametrize(
    ("scorer", "returned"),
    [
        (Plain(), math.nan),
        (Plain(), [1.0]),
        (Plain(), None),
        (Plain(), Measurement(1.0, {"more": 2.0})),
        (WithDetails(), 1.0),
        (WithDetails(), Measurement(1.0, {"low": math.nan})),
    ],
)
def test_results_that_are_not_numbers_or_not_those_declared_are_refused(scorer: Scorer, returned: object) -> None:
    with raises("scorer-result"):
        checked(scorer, returned)


def test_a_destroyed_model_may_have_infinite_numbers() -> None:
    assert checked(Plain(), math.inf).value == math.inf
    assert checked(Plain(), 3).value == 3.0
    found = chosen(objectives=["unchanged", "answer_kl"]).worst_values()
    assert found["unchanged"] == -math.inf and found["answer_kl"] == found["answer_kl.p95"] == math.inf


def test_limits_are_the_worst_values_in_the_direction_of_each_scorer() -> None:
    scores = Scores(
        Divergence(0.5, 0.4, 0.9, 1.0),
        3,
        10,
        {},
        values={"unchanged": 0.25, "over_refusals": 4},
    )
    limits = Limits({
        "kl.p95": (1.0, "lower"), "over_refusals": (3, "lower"), "unchanged": (0.5, "higher"), "copying": (1, "higher")
    })  # fmt: skip
    assert limits.excess(scores) == pytest.approx({"kl.p95": -0.1, "over_refusals": 1, "unchanged": 0.25})
    destroyed = Scores(scores.divergence, 3, 10, {}, values={"unchanged": -math.inf})
    assert math.isfinite(limits.excess(destroyed)["unchanged"])
    assert Scores.from_dict(destroyed.as_dict()) == destroyed


HALF_DONE = """
from dataclasses import dataclass
from heretic.scoring.scorers.scorer import Scorer

@dataclass(frozen=True)
class Base(Scorer):
    tokens: int{default}
    name = "base"

    def check(self):
        if self.tokens == 3:
            raise ValueError("three")

class Mine(Base):
    name = "mine"

    def score(self, model, baseline):
        return 1.0
"""


@pytest.mark.parametrize(
    ("default", "options", "code"),
    [(" = 5", {}, ""), (" = 5", {"tokens": 3}, "scorer-failed"), ("", {}, "scorer-failed")],
)
def test_faults_of_a_user_s_scorer_are_errors_with_a_code(
    tmp_path: Path, default: str, options: dict[str, int], code: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HALF_DONE.format(default=default))
    settings = Settings.model_validate(
        {"scorer_files": [str(file)], "measures": ["mine"], "scorers": {"mine": options}}
    )
    if not code:
        check_scorers(settings)
        return
    with raises(code):
        check_scorers(settings)


def test_numbers_of_other_libraries_become_python_s() -> None:
    import numpy as np
    import torch

    class Mine(Scorer):
        name = "mine"

    for value in (np.float32(0.5), torch.tensor(0.5), 0.5):
        found = checked(Mine(), Measurement(value, {}, (value,)))
        assert type(found.value) is float and type(found.items[0]) is float and found.value == 0.5
    for wrong in (None, "much", [1.0, 2.0], Measurement(None)):  # type: ignore[arg-type]
        with raises("scorer-result"):
            checked(Mine(), wrong)


def test_an_infinite_value_gives_a_finite_excess() -> None:
    limits = Limits({"mine": (1.0, "higher")})
    scores = Scores(Divergence(0, 0, 0, 0), 0, 1, {}, values={"mine": math.inf})
    assert all(map(math.isfinite, limits.excess(scores).values()))
