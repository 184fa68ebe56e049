"""Table of judges by name."""

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
from heretic.scoring.judges.trained import TrainedJudge, check_encoder, local_encoder
from heretic.scoring.judges.verdict import Judge
from heretic.scoring.judges.words import WordJudge
from heretic.settings import DEFAULT_MARKERS, Settings
from heretic.settings.languages import ENGLISH, language

CACHE = "judge.jsonl"  # in a run's folder


@dataclass(frozen=True)
class JudgeContext:
    """Resources of a judge besides the settings: run folder for its cache, reporter and stop signal."""

    folder: Path | None = None
    reporter: ProgressReporter = NULL_REPORTER
    stop: StopSignal | None = None


def _markers(settings: Settings, _: JudgeContext) -> MarkerJudge:
    markers = [*settings.refusal_markers, *language(settings.language).refusal_markers]
    return MarkerJudge(markers, settings.judge.topic_words, _evasion(settings))


def _classifier(settings: Settings, _: JudgeContext) -> Judge:
    return ClassifierJudge(settings.judge.classifier, _evasion(settings))


def _trained(settings: Settings, _: JudgeContext) -> Judge:
    return TrainedJudge(settings.judge.trained, _evasion(settings))


def _words(settings: Settings, _: JudgeContext) -> Judge:
    return WordJudge(_evasion(settings))


def _llm(settings: Settings, context: JudgeContext) -> Judge:
    cache = context.folder / CACHE if context.folder else None
    return LlmJudge(settings.judge.llm, _evasion(settings), cache, context.reporter, context.stop or StopSignal())


def _try_classifier(settings: Settings) -> str:
    labels_of(settings.judge.classifier)
    return ""


def _try_trained(settings: Settings) -> str:
    check_encoder(settings.judge.trained)
    return ""


def _try_llm(settings: Settings) -> str:
    return LlmJudge(settings.judge.llm, _evasion(settings), None, NULL_REPORTER, StopSignal()).try_once()


@dataclass(frozen=True)
class JudgeSpec:
    """How to construct a judge, what it is, and how to check it cheaply before a run (see `try_judge`)."""

    make: Callable[[Settings, JudgeContext], Judge]
    words: str  # within the sentence "answers are judged by …"
    try_out: Callable[[Settings], str] = lambda _: ""


JUDGES: dict[str, JudgeSpec] = {
    "markers": JudgeSpec(_markers, "refusal phrases in their first tokens"),
    "words": JudgeSpec(_words, "the words and pairs of words in their first tokens"),
    "trained": JudgeSpec(_trained, "a classifier on a sentence encoder, which read their first tokens", _try_trained),
    "classifier": JudgeSpec(_classifier, "a classifier of their first tokens", _try_classifier),
    "llm": JudgeSpec(_llm, "a language model that read their first tokens", _try_llm),
}


def make_judge(settings: Settings, context: JudgeContext | None = None) -> Judge:
    """Construct the judge that the settings select. Raises UserError if that fails."""
    return JUDGES[settings.judge.kind].make(settings, context or JudgeContext())


def try_judge(settings: Settings) -> str:
    """Check the judge that the settings select, without loading weights; an endpoint judges one harmless answer.

    Returns:
        A warning if the endpoint does not answer properly, else "".

    Raises:
        UserError: if the judge cannot work.
    """
    return JUDGES[settings.judge.kind].try_out(settings)


def with_evaluation_judge(settings: Settings, otherwise: str = "markers") -> Settings:
    """Return settings with the judge of `heretic evaluate`: `trained` if its encoder is on this machine, else `otherwise`.

    The settings' own judge stays if the user chose another one than the English phrases.
    """
    judge = settings.judge
    usual = judge.kind == "markers" and settings.refusal_markers == DEFAULT_MARKERS and settings.language == ENGLISH
    if judge.evaluate == "kind" or not usual or settings.behavior:
        return settings
    folder = local_encoder(judge.trained.encoder)
    if folder is None:
        found = judge.model_copy(update={"kind": otherwise})
    else:
        trained = judge.trained.model_copy(update={"encoder": folder})
        found = judge.model_copy(update={"kind": "trained", "trained": trained})
    return settings.model_copy(update={"judge": found})


def _evasion(settings: Settings) -> Evasion:
    return Evasion([*settings.judge.evasive_markers, *language(settings.language).evasive_markers])
