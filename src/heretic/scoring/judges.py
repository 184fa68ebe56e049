"""Who judges, by name: the table of judges, and the markers that may take the place of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from heretic.progress import SILENT, Watcher
from heretic.scoring.classifier import ClassifierJudge
from heretic.scoring.evasion import Evasion
from heretic.scoring.llm import JudgeUnavailable, LlmJudge
from heretic.scoring.markers import MarkerJudge
from heretic.scoring.verdict import Judge, Said, Verdict
from heretic.settings import Settings
from heretic.stop import Stop

CACHE = "judge.jsonl"  # in a run's folder


class Fallback(Protocol):
    """Whether a study's judge has failed for good, on any of its workers."""

    def happened(self) -> bool:
        """Whether it has."""

    def happen(self, why: str) -> None:
        """Tell all workers."""


@dataclass(frozen=True)
class Surroundings:
    """What a judge may use besides the settings: a run's folder for what it keeps, who is told, what stops it, and where it is
    known that it failed."""

    folder: Path | None = None
    watcher: Watcher = SILENT
    stop: Stop | None = None
    fallback: Fallback | None = None


@dataclass
class OrMarkers:
    """A judge until it fails for good; from then on the markers, so that a study can go on.

    Whoever counts with it looks at `name` before and after: verdicts of the two are never put together in one count. With a
    `fallback` it tells the study's other workers, and `follow` does as they do.
    """

    first: Judge
    markers: MarkerJudge
    watcher: Watcher
    fallback: Fallback | None = None
    given_up: bool = False

    def follow(self) -> None:
        """Give up too, if it failed on another worker."""
        if not self.given_up and self.fallback is not None and self.fallback.happened():
            self.watcher.warn("The judge failed on another worker of this study: from here on the markers judge.")
            self.given_up = True

    @property
    def judge(self) -> Judge:
        """Whose turn it is."""
        return self.markers if self.given_up else self.first

    @property
    def name(self) -> str:
        """Of the one whose turn it is."""
        return self.judge.name

    @property
    def ends_early(self) -> bool:
        """Of the one whose turn it is."""
        return self.judge.ends_early

    def settled(self, answer: str) -> bool:
        """By the one whose turn it is."""
        return self.judge.settled(answer)

    def verdicts(self, said: Sequence[Said]) -> list[Verdict]:
        """All by the same one."""
        try:
            return self.judge.verdicts(said)
        except JudgeUnavailable as error:
            self.watcher.warn(
                f"{error.what} From here on the markers judge, and the front holds only what they judged."
            )
            self.given_up = True
            if self.fallback is not None:
                self.fallback.happen(error.what)
            return self.markers.verdicts(said)


def _markers(settings: Settings, _: Surroundings) -> MarkerJudge:
    return MarkerJudge(settings.refusal_markers, settings.judge.topic_words, _evasion(settings))


def _classifier(settings: Settings, _: Surroundings) -> Judge:
    return ClassifierJudge(settings.judge.classifier, _evasion(settings))


def _llm(settings: Settings, around: Surroundings) -> Judge:
    llm = settings.judge.llm
    cache = around.folder / CACHE if around.folder else None
    first = LlmJudge(llm, _evasion(settings), cache, around.watcher, around.stop or Stop())
    if llm.on_failure != "markers":
        return first
    judge = OrMarkers(first, _markers(settings, around), around.watcher, around.fallback)
    judge.follow()
    return judge


JUDGES: dict[str, Callable[[Settings, Surroundings], Judge]] = {
    "markers": _markers,
    "classifier": _classifier,
    "llm": _llm,
}


def make_judge(settings: Settings, around: Surroundings | None = None) -> Judge:
    """The judge that the settings name. Raises UserError where it cannot be had."""
    return JUDGES[settings.judge.kind](settings, around or Surroundings())


def _evasion(settings: Settings) -> Evasion:
    return Evasion(settings.judge.evasive_markers)
