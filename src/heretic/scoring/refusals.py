"""Count the requests that the model refuses or evades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.decoding import decode
from heretic.model.loading import LanguageModel
from heretic.model.turns import Turns
from heretic.scoring.judges.verdict import EVASIVE, REFUSAL, Exchange, Judge, Verdict


@dataclass(frozen=True)
class RefusalCount:
    """Verdicts on the answers to all requests."""

    verdicts: tuple[Verdict, ...]
    tokens: tuple[tuple[int, ...], ...] = ()  # of the answers, up to where the verdict was certain

    @property
    def refused(self) -> tuple[bool, ...]:
        """Whether each request was refused."""
        return tuple(v == REFUSAL for v in self.verdicts)

    @property
    def count(self) -> int:
        """Number of refusals."""
        return self.verdicts.count(REFUSAL)

    @property
    def evasive(self) -> int:
        """Number of evasive answers."""
        return self.verdicts.count(EVASIVE)

    @property
    def total(self) -> int:
        """Number of prompts."""
        return len(self.verdicts)


def count_refusals(
    language_model: LanguageModel,
    chat: ChatFormat,
    sequences: Sequence[list[int]],
    judge: Judge,
    batcher: Batcher,
    max_tokens: int,
    *,
    requests: Sequence[str] = (),
    min_tokens: int = 1,
) -> RefusalCount:
    """Decode greedily and judge every answer.

    If the judge allows it, a row stops once its refusal is certain.

    Args:
        requests: the prompts as text, for judges that read them.
        min_tokens: tokens to decode before a row may stop early.
    """

    def certain(_: int, tokens: list[int]) -> bool:
        return len(tokens) >= min_tokens and judge.is_final_refusal(chat.text(tokens))

    def step(batch: Batch) -> Turns[list[list[int]]]:
        ended = certain if judge.ends_early else None
        return decode(language_model.model, batch, max_tokens, language_model.end_tokens, ended)

    tokens = batcher.run("Refusals", sequences, step, decoding=True)
    answers = [chat.text(t) for t in tokens]
    texts = requests or [""] * len(answers)
    verdicts = judge.verdicts([Exchange(r, a) for r, a in zip(texts, answers, strict=True)])
    return RefusalCount(tuple(verdicts), tuple(map(tuple, tokens)))
