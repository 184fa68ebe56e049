"""Who judges, by name: the table of judges, and the markers that may take the place of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heretic.progress import SILENT, Watcher
from heretic.scoring.classifier import ClassifierJudge
from heretic.scoring.evasion import Evasion
from heretic.scoring.llm import JudgeUnavailable, LlmJudge
from heretic.scoring.markers import MarkerJudge
from heretic.scoring.verdict import Judge, Said, Verdict
from heretic.settings import Settings
from heretic.stop import Stop

CACHE = "judge.jsonl"  # in a run's folder


@dataclass(frozen=True)
class Surroundings:
    """What a judge may use besides the settings: a run's folder for what it keeps, who is told, and what stops it."""

    folder: Path | None = None
    watcher: Watcher = SILENT
    stop: Stop | None = None


@dataclass
class OrMarkers:
    """A judge until it fails for good; from then on the markers, so that a study can go on.

    Whoever counts with it looks at `name` before and after: verdicts of the two are never put together in one count.
    """

    first: Judge
    markers: MarkerJudge
    watcher: Watcher
    given_up: bool = False

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
            return self.markers.verdicts(said)


def _markers(settings: Settings, _: Surroundings) -> MarkerJudge:
    return MarkerJudge(settings.refusal_markers, settings.judge.topic_words, _evasion(settings))


def _classifier(settings: Settings, _: Surroundings) -> Judge:
    return ClassifierJudge(settings.judge.classifier, _evasion(settings))


def _llm(settings: Settings, around: Surroundings) -> Judge:
    llm = settings.judge.llm
    cache = around.folder / CACHE if around.folder else None
    first = LlmJudge(llm, _evasion(settings), cache, around.watcher, around.stop or Stop())
    return OrMarkers(first, _markers(settings, around), around.watcher) if llm.on_failure == "markers" else first


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
