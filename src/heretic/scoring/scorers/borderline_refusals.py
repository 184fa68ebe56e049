"""Over-refusals on prompts that sound dangerous and are harmless, such as those of XSTest and OR-Bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from heretic.errors import UserError
from heretic.prompts.sets import load
from heretic.scoring.judges.verdict import ANSWER
from heretic.scoring.scorers.context import EncodedPrompts, ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Scorer
from heretic.settings import PromptSource


@dataclass(frozen=True)
class BorderlineRefusals(Scorer):
    """Counts refusals of a prompt set of the user's choice.

    Borderline sets: XSTest (Röttger et al. 2024), arXiv 2308.01263; OR-Bench (Cui et al. 2024), arXiv 2405.20947.
    """

    source: str = ""  # as in [prompts.harmless_eval]; required
    split: str = "train"
    column: str = "text"
    subset: str = ""

    name = "borderline_refusals"
    meaning = (
        "prompts of `source` refused or evaded. `newly_refused`: by the ablated model only. `no_longer_refused`: by "
        "the original only"
    )
    unit = "prompts"
    has_own_prompts = True
    details: ClassVar[tuple[str, ...]] = ("newly_refused", "no_longer_refused", "total")

    def check(self) -> None:
        """Load the prompts once. Raises UserError."""
        self.prompts()

    def prompts(self) -> tuple[str, ...]:
        """Load the prompts. Raises UserError."""
        key = f"scorers.{self.name}"
        if not self.source:
            raise UserError(
                f"The scorer '{self.name}' has no prompts.",
                code="no-prompts",
                where=f"{key}.source",
                fix=f'set a file or a data set: [scorers.{self.name}] source = "prompts.txt"',
            )
        source = PromptSource(source=self.source, split=self.split, column=self.column, subset=self.subset)
        return load(self.name, source, key).prompts

    def baseline(self, original: ScorerContext) -> tuple[EncodedPrompts, list[bool]]:
        """Return the prompts, and which of them the original does not answer."""
        prompts = original.encode(self.name, self.prompts())
        return prompts, self._unanswered(original, prompts)

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Count refusals and evasions, and compare them with the original's."""
        prompts, before = baseline
        now = self._unanswered(model, prompts)
        pairs = list(zip(before, now, strict=True))
        details = {"newly_refused": pairs.count((False, True)), "no_longer_refused": pairs.count((True, False))}
        return Measurement.count_of(now, details)

    @staticmethod
    def _unanswered(model: ScorerContext, prompts: EncodedPrompts) -> list[bool]:
        return [verdict != ANSWER for verdict in model.verdicts(prompts, model.texts(prompts))]
