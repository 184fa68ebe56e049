"""The prompt sets as token ids, with answers that begin as they have to."""

from __future__ import annotations

from dataclasses import replace

from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat, check_different, check_length
from heretic.model.loading import LanguageModel
from heretic.model.response_prefix import (
    PREFIX_PROMPTS,
    AnswerStart,
    close_thinking,
    find_prefix,
    warn_of_open_thinking,
)
from heretic.prompts import PromptSets
from heretic.settings import Settings


def encode(prompts: PromptSets, chat: ChatFormat, context: int, settings: Settings) -> dict[str, list[list[int]]]:
    """Token ids of all sets by their role. Raises UserError for a prompt that does not fit, with the answers decoded from it."""
    encoded = {}
    decoded = {"harmful_eval": settings.max_response_length, "harmless_eval": most_new_tokens(settings)}
    for prompt_set in prompts.all:
        encoded[prompt_set.role] = chat.encode(prompt_set.prompts, prompt_set.role)
        check_different(prompt_set.role, encoded[prompt_set.role])
        new = decoded.get(prompt_set.role, 1)
        check_length(prompt_set.role, encoded[prompt_set.role], context, new)
    return encoded


def start_answers(
    chat: ChatFormat,
    encoded: dict[str, list[list[int]]],
    start: AnswerStart | None,
    prompts: PromptSets,
    language_model: LanguageModel,
    settings: Settings,
    batcher: Batcher,
) -> tuple[ChatFormat, dict[str, list[list[int]]]]:
    """The chat format whose answers begin as they have to, and the prompts encoded by it.

    `start` is how they begin in an earlier session of the run or on another worker. Without it, and without a response_prefix
    in the settings, a thinking block that the template opens is closed, and the model is asked what its answers have in common.
    """
    reporter, context = batcher.reporter, language_model.context
    shown = [prompt for prompt_set in prompts.all for prompt in prompt_set.prompts[:PREFIX_PROMPTS]]
    if start is not None:
        if start.variables:
            reporter.info(f"The chat template is given {start.spelled_variables}.")
    elif settings.response_prefix != "auto":
        start = AnswerStart(settings.response_prefix)
        warn_of_open_thinking(chat.answering(start.prefix), shown, reporter)
    else:
        start = close_thinking(chat, shown, reporter)
        closed = chat.answering(start.prefix, start.variables)
        asked = encode(prompts, closed, context, settings) if start != AnswerStart() else encoded
        start = replace(start, prefix=start.prefix + find_prefix(language_model, asked, batcher))
    if start.prefix:
        reporter.info(f"Answers are made to begin with {start.prefix!r}.")
    if start == AnswerStart():
        return chat, encoded
    chat = chat.answering(start.prefix, start.variables)
    return chat, encode(prompts, chat, context, settings)


def most_new_tokens(settings: Settings) -> int:
    """Most tokens that are looked at behind a harmless prompt."""
    return max(settings.max_response_length, settings.kl_tokens)
