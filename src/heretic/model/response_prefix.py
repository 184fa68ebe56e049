"""What all answers of a model begin with: a thinking block is closed, and what else they share is found by asking it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heretic.errors import UserError
from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import ChatFormat, common_prefix
from heretic.model.decoding import decode
from heretic.model.loading import LanguageModel
from heretic.model.template import template_of
from heretic.model.thinking import MARKERS, open_block, switches_in
from heretic.progress import ProgressReporter

# How many prompts of each kind, and how many tokens, show what all answers begin with.
PREFIX_PROMPTS = 8
PREFIX_TOKENS = 16


@dataclass(frozen=True)
class AnswerStart:
    """What every answer is made to begin with, and the variables that the chat template is given."""

    prefix: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spelled_variables(self) -> str:
        """The variables in one line, as `enable_thinking = false`."""
        return ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.variables.items())


def find_prefix(language_model: LanguageModel, encoded: Mapping[str, list[list[int]]], batcher: Batcher) -> str:
    """What the model's answers to harmful and harmless prompts alike begin with; empty if nothing, or if one answer is no more."""
    asked = [*encoded["harmful_train"][:PREFIX_PROMPTS], *encoded["harmless_train"][:PREFIX_PROMPTS]]

    def step(batch: Batch) -> list[tuple[str, bool]]:
        tokens = decode(language_model.model, batch, PREFIX_TOKENS, language_model.end_tokens)
        # Special tokens are kept: thinking blocks and channels are made of them.
        return [(str(language_model.tokenizer.decode(t)), len(t) < PREFIX_TOKENS) for t in tokens]

    answers = batcher.run("Looking for a common beginning of answers", asked, step)
    prefix = common_prefix([text for text, _ in answers])
    return "" if any(ended and text.rstrip() == prefix for text, ended in answers) else prefix


def close_thinking(chat: ChatFormat, prompts: Sequence[str], reporter: ProgressReporter) -> AnswerStart:
    """How answers have to begin so that none lies in a thinking block that the chat template has opened.

    The template's own switch is used where it has one, else the closing marker is appended. What is done is told.
    """
    opened = open_blocks(chat, prompts)
    if not opened:
        return AnswerStart()
    marker = opened.most_common(1)[0][0]
    what = f"The chat template opens a thinking block ({marker}), and answers are to be judged, not thoughts:"
    for variables in switches_in(template_of(chat.tokenizer)):
        try:
            remaining = open_blocks(chat.answering("", variables), prompts)
        except UserError:  # the template does not take that value
            continue
        if not remaining:
            start = AnswerStart("", variables)
            reporter.info(f"{what} {start.spelled_variables} switches it off.")
            return start
    closing = AnswerStart(MARKERS[marker])
    if opened[marker] == len(prompts) and not open_blocks(chat.answering(closing.prefix), prompts):
        reporter.info(f"{what} it is closed at once.")
        return closing
    reporter.warning(
        f"The chat template opens a thinking block ({marker}) after {opened.total()} of {len(prompts)} prompts only, so it stays "
        "open: thoughts are judged as answers. Set chat_template to one that does not open it."
    )
    return AnswerStart()


def warn_of_open_thinking(chat: ChatFormat, prompts: Sequence[str], reporter: ProgressReporter) -> None:
    """Tell that answers begin inside a thinking block, with the response_prefix that the user has set."""
    if opened := open_blocks(chat, prompts):
        marker = opened.most_common(1)[0][0]
        reporter.warning(
            f"Answers begin inside a thinking block ({marker}), so thoughts are judged as answers. "
            f'Set response_prefix = "auto", or let it begin with {MARKERS[marker].strip()!r}.'
        )


def open_blocks(chat: ChatFormat, prompts: Sequence[str]) -> Counter[str]:
    """How many prompts end inside a thinking block, by its marker."""
    found = (open_block(chat.render(prompt), prompt) for prompt in prompts)
    return Counter(marker for marker in found if marker)
