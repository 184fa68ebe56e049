"""Over-refusals and degenerate answers, of the original and of trials in one pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.scoring.judges.evasion import is_loop, repetition
from heretic.scoring.judges.verdict import ANSWER, Exchange
from heretic.scoring.scorers.context import ScorerContext, TrialGroup
from heretic.scoring.scorers.harmless_answers import Degenerate, OverRefusals
from tests.scoring.scorers.test_scorers import Tiny


@pytest.fixture(scope="module")
def tiny(llama: Path) -> Tiny:
    return Tiny(llama)


def test_loops_and_empty_answers_are_degenerate(tiny: Tiny) -> None:
    loops = [[], [7] * 9, [1, 2] * 8]
    group = TrialGroup(tiny.parts)
    group.keep(tiny.parts.harmless, [*loops, [5], list(range(20)), [1, 2, 3, 4, 5] * 2])
    found = Degenerate().score(ScorerContext(group), None)
    assert (found.value, found.details) == (len(loops), {"total": 6})
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_counts_are_those_of_plain_decoding(tiny: Tiny) -> None:
    harmless, judge = tiny.parts.harmless, tiny.parts.judge
    over, loops = tiny.measure(OverRefusals()), tiny.measure(Degenerate())
    for trial, (refused, looped) in enumerate(zip((over[0], *over[1]), (loops[0], *loops[1]), strict=True), -1):
        answers = [tiny.answer(prompt, 12, None if trial < 0 else trial) for prompt in harmless.tokens]
        said = [Exchange(q, tiny.parts.chat.text(a)) for q, a in zip(harmless.texts, answers, strict=True)]
        assert refused.value == sum(verdict != ANSWER for verdict in judge.verdicts(said))
        assert looped.value == sum(not answer or is_loop(answer) for answer in answers)
        assert refused.details == looped.details == {"total": len(answers)}


def test_stored_answers_are_not_decoded_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialGroup, "_decode", lambda *_: pytest.fail("decoded"))
    group = TrialGroup(tiny.parts)
    group.keep(tiny.parts.harmless, [[1, 2, 3]] * 6)
    assert OverRefusals().score(ScorerContext(group), None).details["total"] == 6
