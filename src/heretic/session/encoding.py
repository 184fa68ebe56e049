"""Encoding of the prompt sets, and the common beginning of the answers."""

from __future__ import annotations

from dataclasses import replace

from heretic.errors import plain_line
from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat, answer_tokens, check_different, check_length
from heretic.model.end_of_turn import end_of_turn
from heretic.model.loading import LanguageModel
from heretic.model.response_prefix import (
    PREFIX_PROMPTS,
    AnswerStart,
    close_thinking,
    detect_start,
    warn_of_open_thinking,
)
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets
from heretic.settings import Settings


def encode(prompts: PromptSets, chat: ChatFormat, context: int, settings: Settings) -> dict[str, list[list[int]]]:
    """Encode all prompt sets, by role. Raises UserError if a prompt with its answer exceeds the context."""
    encoded = {}
    for prompt_set in prompts.all:
        encoded[prompt_set.role] = chat.encode(prompt_set.prompts, prompt_set.role)
        check_different(prompt_set.role, encoded[prompt_set.role])
        check_length(prompt_set.role, encoded[prompt_set.role], context, answer_tokens(prompt_set.role, settings))
    return encoded


def end_answers(model: LanguageModel, start: AnswerStart | None, reporter: ProgressReporter) -> LanguageModel:
    """Return the model with the token that the chat template puts after answers, or that of an earlier session (`start`)."""
    if start is not None:
        return replace(model, end_of_turn=start.end_of_turn)
    token = end_of_turn(model.tokenizer)
    if token is not None and token not in model.end_tokens:
        name = plain_line(str(model.tokenizer.convert_ids_to_tokens(token)))
        reporter.info(f"Answers also end at {name}, as in the chat template. The model's eos_token_id lacks it.")
    return replace(model, end_of_turn=token)


def start_answers(
    chat: ChatFormat,
    encoded: dict[str, list[list[int]]],
    start: AnswerStart | None,
    prompts: PromptSets,
    language_model: LanguageModel,
    settings: Settings,
    batcher: Batcher,
) -> tuple[ChatFormat, dict[str, list[list[int]]]]:
    """Return the chat format with the answers' common beginning, and the prompts encoded with it.

    Args:
        start: the beginning from an earlier session or another worker. None: use the response_prefix of the settings; if that is
            "auto", close a thinking block of the template and detect the prefix that the model's answers share.
    """
    reporter, context = batcher.reporter, language_model.context
    detected = start is None and settings.response_prefix == "auto"
    if start is not None:
        if start.variables:
            reporter.info(f"Rendering the chat template with {start.spelled_variables}.")
    else:
        start = start_without_model(chat, prompts, settings, reporter)
    if detected:
        start = detect_start(language_model, chat, start, sample_of(prompts), batcher)
    if start.prefix:
        reporter.info(f"Every answer starts with {start.prefix!r}.")
    started = chat.with_variables(start.variables).answering(start.prefix)
    return (chat, encoded) if started == chat else (started, encode(prompts, started, context, settings))


def sample_of(prompts: PromptSets) -> list[str]:
    """Return the prompts whose answers show how every answer starts."""
    harmful, harmless = (s.prompts[:PREFIX_PROMPTS] for s in (prompts.harmful_train, prompts.harmless_train))
    return [*harmful, *harmless]


def start_without_model(
    chat: ChatFormat, prompts: PromptSets, settings: Settings, reporter: ProgressReporter
) -> AnswerStart:
    """Return the response_prefix of the settings; if that is "auto", what closes a thinking block of the template."""
    shown = [prompt for prompt_set in prompts.all for prompt in prompt_set.prompts[:PREFIX_PROMPTS]]
    if settings.response_prefix == "auto":
        return close_thinking(chat, shown, reporter)
    start = AnswerStart(settings.response_prefix)
    warn_of_open_thinking(chat.answering(start.prefix), shown, reporter)
    return start
