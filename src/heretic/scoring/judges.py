"""Who judges, by name: the table of judges, and the markers that may take the place of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from heretic.progress import SILENT, Watcher
from heretic.scoring.agreement import labelled_answers
from heretic.scoring.classifier import ClassifierJudge, labels_of
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
    # Once the markers have taken its place they keep it, whatever the settings say since: a front holds trials of one judge.
    if llm.on_failure != "markers" and not (around.fallback and around.fallback.happened()):
        return first
    judge = OrMarkers(first, _markers(settings, around), around.watcher, around.fallback)
    judge.follow()
    return judge


def _try_classifier(settings: Settings) -> None:
    labels_of(settings.judge.classifier)


def _try_llm(settings: Settings) -> None:
    LlmJudge(settings.judge.llm, _evasion(settings), None, SILENT, Stop()).try_once(labelled_answers()[0].said)


@dataclass(frozen=True)
class Kind:
    """How a judge is made, and how it is tried at little cost before a run: as `try_judge`."""

    make: Callable[[Settings, Surroundings], Judge]
    try_out: Callable[[Settings], None] = lambda _: None


JUDGES: dict[str, Kind] = {
    "markers": Kind(_markers),
    "classifier": Kind(_classifier, _try_classifier),
    "llm": Kind(_llm, _try_llm),
}


def make_judge(settings: Settings, around: Surroundings | None = None) -> Judge:
    """The judge that the settings name. Raises UserError where it cannot be had."""
    return JUDGES[settings.judge.kind].make(settings, around or Surroundings())


def try_judge(settings: Settings) -> str:
    """What is doubtful about the judge that the settings name: an endpoint that does not answer now may do so later. Raises
    UserError where it cannot work. No weights are loaded; an endpoint is asked about one harmless answer."""
    try:
        JUDGES[settings.judge.kind].try_out(settings)
    except JudgeUnavailable as error:
        return f"{error.what} ({error.fix})"
    return ""


def _evasion(settings: Settings) -> Evasion:
    return Evasion(settings.judge.evasive_markers)
