"""Find the response prefix: close a thinking block, and detect what all answers begin with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from heretic.errors import UserError
from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import ChatFormat, common_prefix, common_text
from heretic.model.decoding import decode
from heretic.model.loading import LanguageModel
from heretic.model.template import template_of
from heretic.model.thinking import MARKERS, begun_block, closed_immediately, open_block, switches_in
from heretic.model.turns import Turns
from heretic.progress import ProgressReporter

# Prompts of each kind, and tokens of each answer, to detect the common prefix.
PREFIX_PROMPTS = 8
PREFIX_TOKENS = 16
MOST_PARTS = 4  # of a prefix, each detected behind the one before


@dataclass(frozen=True)
class AnswerStart:
    """How every answer starts."""

    prefix: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    date: str = ""  # what the chat template prints as today; empty: the real date
    end_of_turn: int | None = None  # token that the chat template puts after an answer

    @property
    def spelled_variables(self) -> str:
        """The variables in one line, for example `enable_thinking = false`."""
        return ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.variables.items())


def detect_start(
    language_model: LanguageModel, chat: ChatFormat, start: AnswerStart, prompts: Sequence[str], batcher: Batcher
) -> AnswerStart:
    """Return `start` with what all answers to these prompts begin with.

    A thinking block that the model opens by itself is disabled by the template's own switch if there is one, else closed.
    """
    # 1. Sample with the template's own switch, if the model thinks and one helps
    chat = chat.with_variables(start.variables).answering(start.prefix)
    answers = sample_answers(language_model, chat.encode(prompts), batcher)
    for variables in _free_switches(chat) if _thoughts(answers) else ():
        switched = chat.with_variables(variables)
        try:
            if switched.render(prompts[0]) == chat.render(prompts[0]):
                continue
            without = sample_answers(language_model, switched.encode(prompts), batcher)
        except UserError:  # the template rejects that value
            continue
        if not _thoughts(without):
            chat, answers, start = switched, without, replace(start, variables={**start.variables, **variables})
            batcher.reporter.info(
                f"Answers begin with a thinking block, but judges need the answer: setting {start.spelled_variables}, "
                "which disables it."
            )
            break
    # 2. Add what answers begin with until they differ: after one beginning there can be another
    structural = _structural_tokens(chat)

    def part_of(answers: Sequence[tuple[str, bool]]) -> str:
        return _closed_block(answers, batcher.reporter) or prefix_of(answers, structural)

    found = part_of(answers)
    for _ in range(MOST_PARTS):
        longer = chat.answering(chat.response_prefix + found)
        if not found or not _follows(longer, chat, prompts[0]):
            break
        further = sample_answers(language_model, longer.encode(prompts), batcher)
        if (another := part_of(further)) == found:  # the model writes it in any case
            break
        chat, answers, found = longer, further, another
    if thoughts := _thoughts(answers):
        marker, count = thoughts.most_common(1)[0]
        batcher.reporter.warning(
            f"{count} of {len(answers)} answers begin with a thinking block ({marker}), so heretic judges thoughts as answers. "
            "Set response_prefix or template_variables so that the model does not think."
        )
    return replace(start, prefix=chat.response_prefix)


def _structural_tokens(chat: ChatFormat) -> list[str]:
    """Return the texts of special tokens that stand for no words and may begin an answer."""
    tokenizer = chat.tokenizer
    ends = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
    tokens = tokenizer.added_tokens_decoder.values()
    return [t.content for t in tokens if t.special and t.content.strip() and t.content not in ends]


def _follows(longer: ChatFormat, shorter: ChatFormat, prompt: str) -> bool:
    """Return whether a longer prefix leaves the tokens before it as they are, as they were when the model wrote it."""
    before, after = shorter.encode([prompt])[0], longer.encode([prompt])[0]
    return after[: len(before)] == before


def sample_answers(language_model: LanguageModel, sample: list[list[int]], batcher: Batcher) -> list[tuple[str, bool]]:
    """Return the beginnings of the answers to prompts (token ids), and whether they are whole answers."""

    def step(batch: Batch) -> Turns[list[tuple[str, bool]]]:
        tokens = yield from decode(language_model.model, batch, PREFIX_TOKENS, language_model.end_tokens)
        # With special tokens: thinking blocks and channels consist of them.
        return [(str(language_model.tokenizer.decode(t)), len(t) < PREFIX_TOKENS) for t in tokens]

    return batcher.run("Detecting the common response prefix", sample, step, decoding=True)


def _thoughts(answers: Sequence[tuple[str, bool]]) -> Counter[str]:
    """Count the answers that begin with a thinking block that does not end at once, by its marker."""
    return Counter(marker for text, _ in answers if (marker := begun_block(text)))


def _closed_block(answers: Sequence[tuple[str, bool]], reporter: ProgressReporter) -> str:
    """Return the closed thinking block for all answers if most of them begin with one; else empty."""
    thoughts = _thoughts(answers)
    if not thoughts or 2 * thoughts.total() <= len(answers):
        return ""
    marker, count = thoughts.most_common(1)[0]
    if count < len(answers):
        reporter.info(
            f"{count} of {len(answers)} answers begin with a thinking block ({marker}): closing one in all of them."
        )
    return closed_immediately(common_text([text for text, _ in answers if begun_block(text) == marker]))


def prefix_of(answers: Sequence[tuple[str, bool]], structural: Collection[str]) -> str:
    """Return the common prefix of answers; empty if there is none, or if it is a whole answer."""
    prefix = common_prefix([text for text, _ in answers], structural)
    return "" if any(ended and text.strip() == prefix.strip() for text, ended in answers) else prefix


def close_thinking(chat: ChatFormat, prompts: Sequence[str], reporter: ProgressReporter) -> AnswerStart:
    """Return the start of answers that avoids a thinking block opened by the chat template, and report it.

    It uses the template's own switch if there is one, else appends the closing marker.
    """
    opened = open_blocks(chat, prompts)
    if not opened:
        return AnswerStart()
    marker = opened.most_common(1)[0][0]
    what = f"The chat template opens a thinking block ({marker}), but judges need the answer:"
    for variables in _free_switches(chat):
        try:
            remaining = open_blocks(chat.with_variables(variables).answering(""), prompts)
        except UserError:  # the template rejects that value
            continue
        if not remaining:
            start = AnswerStart("", variables)
            reporter.info(f"{what} setting {start.spelled_variables}, which disables it.")
            return start
    closing = AnswerStart(MARKERS[marker])
    if opened[marker] == len(prompts) and not open_blocks(chat.answering(closing.prefix), prompts):
        reporter.info(f"{what} closing it.")
        return closing
    reporter.warning(
        f"The chat template opens a thinking block ({marker}) after only {opened.total()} of {len(prompts)} prompts, so heretic "
        "does not close it and judges thoughts as answers. Set chat_template to one that does not open it."
    )
    return AnswerStart()


def warn_of_open_thinking(chat: ChatFormat, prompts: Sequence[str], reporter: ProgressReporter) -> None:
    """Warn if answers begin inside a thinking block with the user's response_prefix."""
    if opened := open_blocks(chat, prompts):
        marker = opened.most_common(1)[0][0]
        reporter.warning(
            f"Answers begin inside a thinking block ({marker}), so heretic judges thoughts as answers. "
            f'Set response_prefix = "auto", or start it with {MARKERS[marker].strip()!r}.'
        )


def _free_switches(chat: ChatFormat) -> list[dict[str, Any]]:
    """Return the switches of the template that may disable thinking and that the settings leave open."""
    return [v for v in switches_in(template_of(chat.tokenizer)) if not v.keys() & chat.variables.keys()]


def open_blocks(chat: ChatFormat, prompts: Sequence[str]) -> Counter[str]:
    """Count the prompts that end inside a thinking block, by its marker."""
    markers = (open_block(chat.render(prompt), prompt) for prompt in prompts)
    return Counter(marker for marker in markers if marker)
