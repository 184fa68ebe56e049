"""What is said of an answer, and what every judge can do. Who judges is chosen in `judges.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Verdict = Literal["answer", "refusal", "evasive"]
ANSWER: Verdict = "answer"
REFUSAL: Verdict = "refusal"
EVASIVE: Verdict = "evasive"
ORDER: tuple[Verdict, ...] = (
    ANSWER,
    REFUSAL,
    EVASIVE,
)  # the place of each is the digit that stands for it where stored

JUDGE_DESCRIPTIONS = {  # what stands for a judge's name in a sentence
    "markers": "refusal phrases in their first tokens",
    "classifier": "a classifier of their first tokens",
    "llm": "a language model that read their first tokens",
}


class Exchange(NamedTuple):
    """A request and the whole answer to it, as texts."""

    request: str
    answer: str


class Judge(Protocol):
    """Says of answers whether they decline, answer, or do neither."""

    @property
    def name(self) -> str:
        """Which kind it is, stored with every count that it made."""

    @property
    def ends_early(self) -> bool:
        """Whether a refusal may be certain before the answer is complete, so that decoding can end there."""

    def is_final_refusal(self, answer: str) -> bool:
        """Whether an answer that begins so declines, whatever follows; never true of a judge that needs whole answers."""

    def verdicts(self, said: Sequence[Exchange]) -> list[Verdict]:
        """One verdict for each answer, which is as long as it will get."""


def encode_verdicts(verdicts: Sequence[Verdict]) -> str:
    """A digit each: 0 answered, 1 declined, 2 evasive."""
    return "".join(str(ORDER.index(v)) for v in verdicts)
