"""A whole study with several trials in a pass and trials left early."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.progress import SILENT
from heretic.run import Outcome, run
from heretic.scoring.ladder import Ladder
from heretic.search.front import front
from heretic.search.storage import connect, storage_url
from heretic.settings.layers import resolve
from heretic.status import look_at
from heretic.stop import Stop


def do(config: Path, *assignments: str) -> Outcome:
    return run(resolve(config, assignments=assignments), watcher=SILENT, stop=Stop())


def test_startup_trials_score_the_same_one_by_one_and_together(config: Path) -> None:
    every = ("n_trials=6", "search.n_startup_trials=6", "batch_size=64")
    one = do(config, *every, 'run_name="one"', "trials_per_batch=1")
    four = do(config, *every, 'run_name="four"', "trials_per_batch=4")
    for ours, reference in zip(four.found, one.found, strict=True):
        assert ours.params == reference.params and ours.scores.declined == reference.scores.declined
        assert ours.scores.divergence.mean == pytest.approx(reference.scores.divergence.mean, rel=1e-4, abs=1e-8)


def test_a_study_that_leaves_trials_early_has_the_same_front_and_says_so(config: Path) -> None:
    every = ("n_trials=8", "search.n_startup_trials=8")
    full = do(config, *every, 'run_name="full"')
    early = do(config, *every, 'run_name="early"', "early_stopping=true")
    assert [r.number for r in front(early.found)] == [r.number for r in front(full.found)]
    seen = look_at("early", "runs", {})
    assert seen.standing.done == 8 and seen.standing.stopped == 8 - len(early.found) > 0 and seen.state == "complete"
    assert look_at("full", "runs", {}).standing.progress.surrogate_error is not None
    assert connect(storage_url("", early.folder.path)).get_n_trials(1) == 8


def test_a_failing_trial_does_not_take_its_neighbours_with_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Ladder.score_trials
    alone = []

    def failing(self: Ladder, baseline: object, edited: object, beaten: object) -> object:
        if edited.trials > 1:  # type: ignore[attr-defined]
            raise UserError("no memory for several")
        alone.append(edited)
        if len(alone) == 2:
            raise UserError("no memory for this one")
        return measure(self, baseline, edited, beaten)  # type: ignore[arg-type]

    monkeypatch.setattr(Ladder, "score_trials", failing)
    outcome = do(config, "n_trials=3", "trials_per_batch=3")
    assert [r.number for r in outcome.found] == [0, 2, 3]
