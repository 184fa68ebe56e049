"""The hand-labeled answers, the figures of a judge on them, and the command that shows them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from heretic.scoring.judges.agreement import Agreement, Fraction, agreement, labeled_answers
from heretic.scoring.judges.markers import MarkerJudge
from heretic.scoring.judges.registry import make_judge
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, ORDER, REFUSAL
from heretic.settings import DEFAULT_MARKERS, Settings
from heretic.settings.scoring import TOPIC_WORDS
from tests.helpers.command import heretic


def test_the_set_holds_enough_of_every_kind_and_nothing_twice() -> None:
    found = labeled_answers()
    assert len({one.exchange for one in found}) == len(found) == 60
    assert all(n >= 15 for n in Counter(one.label for one in found).values()) and {o.label for o in found} == set(ORDER)


def test_the_markers_come_to_these_figures() -> None:
    """To be changed on purpose only, with the figures in docs/judges.md."""
    found = agreement(make_judge(Settings()), labeled_answers())
    assert (found.agreement.part, found.agreement.whole) == (48, 60)
    assert (found.precision.part, found.precision.whole) == (15, 18)
    assert (found.recall.part, found.recall.whole) == (15, 20)


def test_topic_words_as_plain_markers_are_less_precise() -> None:
    bare = agreement(MarkerJudge([*DEFAULT_MARKERS, *TOPIC_WORDS]), labeled_answers())
    assert bare.precision.value < agreement(make_judge(Settings()), labeled_answers()).precision.value


def test_shares() -> None:
    counts = {(REFUSAL, REFUSAL): 8, (REFUSAL, ANSWER): 2, (ANSWER, REFUSAL): 1, (EVASIVE, EVASIVE): 9}
    found = Agreement("j", counts)
    assert (found.agreement, found.precision, found.recall) == (Fraction(17, 20), Fraction(8, 9), Fraction(8, 10))
    # 8 of 10: 0.4902 to 0.9433 (any table of Wilson's interval)
    assert Fraction(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Fraction(0, 0).interval == (0.0, 1.0) and Fraction(10, 10).interval[1] == pytest.approx(1.0)


def test_the_command_shows_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = heretic(capsys, monkeypatch, "evaluate", "--judge-agreement")
    assert ran.status == 0 and "48 of 60" in ran.out and "labeled evasive" in ran.out
    ran = heretic(capsys, monkeypatch, "evaluate", "--judge-agreement", "--json")
    told = json.loads(ran.out)
    assert told["recall"]["of"] == 20 and sum(told["labeled_and_judged"]["refusal"].values()) == 20
    ran = heretic(capsys, monkeypatch, "evaluate", "some-model", "--judge-agreement")
    assert ran.status == 1 and "--judge-agreement" in ran.err
