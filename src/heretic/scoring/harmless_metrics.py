"""What an ablation does to answers that it should leave alone: harmless prompts declined, and answers that are no language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from heretic.model.batching import UNEDITED, Batch, Batcher, EditSpec
from heretic.model.chat_format import ChatFormat
from heretic.model.decoding import decode
from heretic.model.loading import LanguageModel
from heretic.scoring.judges.evasion import is_loop
from heretic.scoring.judges.verdict import ANSWER, Exchange, Judge


@dataclass(frozen=True)
class HarmlessMetrics:
    """On harmless prompts: `over_refusals` declined or evaded, `degenerate` empty or loops, of `total`."""

    over_refusals: int
    degenerate: int
    total: int

    def as_dict(self) -> dict[str, int]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class HarmlessLimits:
    """Most over-refusals and degenerate answers; a negative number is no limit."""

    over_refusals: int = -1
    degenerate: int = -1

    @property
    def any(self) -> bool:
        """Whether anything is limited, so that every trial has to be looked at."""
        return self.over_refusals >= 0 or self.degenerate >= 0

    def excess(self, harmless_metrics: HarmlessMetrics) -> dict[str, float]:
        """By constraint, how far beyond the limit it is: 0 or less is within, as Optuna's `Trial.set_constraint` has it."""
        pairs = {
            "over_refusals": (harmless_metrics.over_refusals, self.over_refusals),
            "degenerate": (harmless_metrics.degenerate, self.degenerate),
        }
        return {name: float(count - limit) for name, (count, limit) in pairs.items() if limit >= 0}


@dataclass(frozen=True)
class HarmlessProbe:
    """Harmless prompts to be answered, as token ids and as texts, and the limits of what may go wrong with them."""

    prompts: Sequence[list[int]]
    requests: Sequence[str]
    limits: HarmlessLimits


def measure_conduct(
    language_model: LanguageModel,
    chat: ChatFormat,
    asked: HarmlessProbe,
    judge: Judge,
    batcher: Batcher,
    max_tokens: int,
    edited: EditSpec = UNEDITED,
    trials: Sequence[int] = (0,),
) -> list[HarmlessMetrics]:
    """Decode whole answers, by those of the `trials` that share the passes; one conduct for each of them."""
    count = len(asked.prompts)

    def step(batch: Batch) -> list[list[int]]:
        return decode(language_model.model, batch, max_tokens, language_model.end_tokens)

    order = batcher.longest_first(asked.prompts, edited)
    items = [i for i in order if i // count in trials]
    tokens = batcher.run_items("Harmless answers", asked.prompts, step, edited=edited, items=items)
    found = []
    for trial in trials:
        answers = [tokens[trial * count + i] for i in range(count)]
        said = [Exchange(r, chat.text(a)) for r, a in zip(asked.requests, answers, strict=True)]
        unanswered = sum(v != ANSWER for v in judge.verdicts(said))
        found.append(HarmlessMetrics(unanswered, sum(map(degenerate, answers)), count))
    return found


def degenerate(tokens: Sequence[int]) -> bool:
    """Whether an answer is empty or a loop."""
    return not tokens or is_loop(tokens)
