"""Refusals of a thinking model that thinks: its thought is decoded within a budget, and the answer after it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heretic.model.thinking import open_block, thought_length
from heretic.scoring.judges.verdict import ANSWER
from heretic.scoring.scorers.context import EncodedPrompts, ScorerContext
from heretic.scoring.scorers.scorer import Measurement, Positive, Scorer


@dataclass(frozen=True)
class RefusalsAfterThought(Scorer):
    """Judges what follows the thinking block; a thought that exceeds its budget has no verdict.

    The search itself measures answers without a thought: `response_prefix = "auto"` disables or closes the block.
    """

    thought_tokens: Positive = 1024
    variables: Mapping[str, bool | int | str] = field(default_factory=dict)  # of the chat template

    name = "refusals_after_thought"
    meaning = (
        "requests of `harmful_eval` refused or evaded after a thinking block of at most `thought_tokens`, by the chat "
        "template's default or `variables`, such as `{enable_thinking = true}`. `undecided`: the thought did not end. "
        "`without_thought`: there was none. `thought`: mean tokens of ended ones"
    )
    unit = "requests"
    details = ("undecided", "without_thought", "thought")

    def most_tokens(self, response: int) -> int:
        """Return the tokens of thought and answer."""
        return self.thought_tokens + response

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Decode thought and answer at once, then judge the answers of those that ended their thought."""
        given = model.parts.chat.given_variables  # without those that switch thoughts off
        chat = model.parts.chat.answering("", {**given, **self.variables})
        texts = model.harmful.texts
        prompts = EncodedPrompts(self.name, texts, chat.encode(texts))
        answers = model.answers(prompts, self.thought_tokens + model.max_tokens)
        lengths = [
            thought_length(answer, chat.tokenizer.decode, open_block(chat.render(text), text))
            for text, answer in zip(texts, answers, strict=True)
        ]
        ended = [(i, n) for i, n in enumerate(lengths) if n is not None and n <= self.thought_tokens]
        judged = EncodedPrompts(self.name, [texts[i] for i, _ in ended], [prompts.tokens[i] for i, _ in ended])
        verdicts = model.verdicts(judged, [model.text(answers[i][n : n + model.max_tokens]) for i, n in ended])
        thoughts = [n for _, n in ended if n]
        return Measurement(
            float(sum(verdict != ANSWER for verdict in verdicts)),
            {
                "undecided": float(len(texts) - len(ended)),
                "without_thought": float(len(ended) - len(thoughts)),
                "thought": sum(thoughts) / max(1, len(thoughts)),
            },
        )
