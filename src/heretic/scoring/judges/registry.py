"""Who judges, by name: the table of judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER, ProgressReporter
from heretic.scoring.judges.classifier import ClassifierJudge, labels_of
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.llm import LlmJudge
from heretic.scoring.judges.markers import MarkerJudge
from heretic.scoring.judges.verdict import Judge
from heretic.settings import Settings

CACHE = "judge.jsonl"  # in a run's folder


@dataclass(frozen=True)
class JudgeContext:
    """What a judge may use besides the settings: a run's folder for what it keeps, who is told, and what stops it."""

    folder: Path | None = None
    reporter: ProgressReporter = NULL_REPORTER
    stop: StopSignal | None = None


def _markers(settings: Settings, _: JudgeContext) -> MarkerJudge:
    return MarkerJudge(settings.refusal_markers, settings.judge.topic_words, _evasion(settings))


def _classifier(settings: Settings, _: JudgeContext) -> Judge:
    return ClassifierJudge(settings.judge.classifier, _evasion(settings))


def _llm(settings: Settings, around: JudgeContext) -> Judge:
    cache = around.folder / CACHE if around.folder else None
    return LlmJudge(settings.judge.llm, _evasion(settings), cache, around.reporter, around.stop or StopSignal())


def _try_classifier(settings: Settings) -> str:
    labels_of(settings.judge.classifier)
    return ""


def _try_llm(settings: Settings) -> str:
    return LlmJudge(settings.judge.llm, _evasion(settings), None, NULL_REPORTER, StopSignal()).try_once()


@dataclass(frozen=True)
class JudgeSpec:
    """How a judge is made, and how it is tried at little cost before a run: as `try_judge`."""

    make: Callable[[Settings, JudgeContext], Judge]
    try_out: Callable[[Settings], str] = lambda _: ""


JUDGES: dict[str, JudgeSpec] = {
    "markers": JudgeSpec(_markers),
    "classifier": JudgeSpec(_classifier, _try_classifier),
    "llm": JudgeSpec(_llm, _try_llm),
}


def make_judge(settings: Settings, around: JudgeContext | None = None) -> Judge:
    """The judge that the settings name. Raises UserError where it cannot be had."""
    return JUDGES[settings.judge.kind].make(settings, around or JudgeContext())


def try_judge(settings: Settings) -> str:
    """What is doubtful about the judge that the settings name: an endpoint that does not answer now may do so later. Raises
    UserError where it cannot work. No weights are loaded; an endpoint is asked about one harmless answer."""
    return JUDGES[settings.judge.kind].try_out(settings)


def _evasion(settings: Settings) -> Evasion:
    return Evasion(settings.judge.evasive_markers)
