"""That a study's judge has failed for good: told to the storage by the worker that saw it, and seen there by all."""

from __future__ import annotations

from dataclasses import dataclass

import optuna

from heretic.search.attributes import FALLEN, judge_failed
from heretic.search.front import results
from heretic.search.storage import worker


@dataclass(frozen=True)
class StudyFallback:
    """The fact, kept with a study. `kind` is the judge of the settings."""

    study: optuna.Study
    kind: str

    def happened(self) -> bool:
        """Whether a worker has said so, or a trial was judged by another one."""
        return judge_failed(self.study) or any(r.scores.judge != self.kind for r in results(self.study))

    def happen(self, why: str) -> None:
        """Say so."""
        who = worker()
        self.study.set_user_attr(FALLEN, f"on {who['host']}, process {who['pid']}: {why}")
