"""Verdicts on answers, and the protocol of a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Verdict = Literal["answer", "refusal", "evasive"]
ANSWER: Verdict = "answer"
REFUSAL: Verdict = "refusal"
EVASIVE: Verdict = "evasive"
BEGINNING = 200  # characters of an answer that the judges with training sets read, as in these sets
ORDER: tuple[Verdict, ...] = (
    ANSWER,
    REFUSAL,
    EVASIVE,
)  # the index of each is its digit in storage


class Exchange(NamedTuple):
    """A request and the whole answer to it, as text."""

    request: str
    answer: str


class Judge(Protocol):
    """Decides whether answers refuse, answer or evade."""

    @property
    def name(self) -> str:
        """Kind of the judge, stored with every count."""

    @property
    def ends_early(self) -> bool:
        """Whether a refusal can be certain before the answer is complete, so that decoding can stop."""

    def is_final_refusal(self, answer: str) -> bool:
        """Return whether an answer with this beginning is a refusal, whatever follows."""

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict for each complete answer."""


class WholeAnswerJudge:
    """Base of the judges that need whole answers."""

    ends_early = False

    def is_final_refusal(self, answer: str) -> bool:
        """Return False."""
        return False


def encode_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Encode each verdict as a digit: 0 answered, 1 refused, 2 evasive."""
    return "".join(str(ORDER.index(v)) for v in verdicts)
