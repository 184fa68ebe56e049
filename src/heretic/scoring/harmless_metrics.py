"""Side effects of an ablation on harmless prompts: over-refusals and degenerate answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heretic.model.batching import UNEDITED, Batcher, EditSpec
from heretic.model.chat_format import ChatFormat
from heretic.model.decoding import greedy
from heretic.model.loading import LanguageModel
from heretic.scoring.judges.evasion import is_loop
from heretic.scoring.judges.verdict import ANSWER, Exchange, Judge
from heretic.scoring.scores import HarmlessMetrics


@dataclass(frozen=True)
class HarmlessProbe:
    """Harmless prompts to answer, as token ids and as text."""

    prompts: Sequence[list[int]]
    requests: Sequence[str]
    in_trials: bool = False  # whether objectives or constraints need these numbers of every fully measured trial


def measure_harmless_metrics(
    language_model: LanguageModel,
    chat: ChatFormat,
    probe: HarmlessProbe,
    judge: Judge,
    batcher: Batcher,
    max_tokens: int,
    edited: EditSpec = UNEDITED,
    trials: Sequence[int] = (0,),
) -> list[HarmlessMetrics]:
    """Decode whole answers for the given trials of a pass, and return one result per trial."""
    count, step = len(probe.prompts), greedy(language_model, max_tokens)
    order = batcher.longest_first(probe.prompts, edited)
    items = [i for i in order if i // count in trials]
    tokens = batcher.run_items("Harmless answers", probe.prompts, step, edited=edited, items=items, decoding=True)
    metrics = []
    for trial in trials:
        answers = [tokens[trial * count + i] for i in range(count)]
        exchanges = [Exchange(r, chat.text(a)) for r, a in zip(probe.requests, answers, strict=True)]
        unanswered = sum(v != ANSWER for v in judge.verdicts(exchanges))
        metrics.append(HarmlessMetrics(unanswered, sum(map(degenerate, answers)), count))
    return metrics


def degenerate(tokens: Sequence[int]) -> bool:
    """Whether an answer is empty or a loop."""
    return not tokens or is_loop(tokens)
