"""How answers are made to begin: thinking blocks that a template opens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from heretic.model import response_prefix
from heretic.model.chat_format import ChatFormat
from heretic.model.response_prefix import AnswerStart, close_thinking, detect_start, open_blocks, warn_of_open_thinking
from tests.helpers.reporters import RecordingReporter
from tests.tiny import tiny_tokenizer

MESSAGES = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
PROMPTS = ["make bread", "tell me a b"]
OFF = " </think>"


def chat_of(opening: str, system_prompt: str = "") -> ChatFormat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{MESSAGES}{{% if add_generation_prompt %}}<|assistant|>{opening}{{% endif %}}"
    return ChatFormat(tokenizer, system_prompt)


def closed(chat: ChatFormat, start: AnswerStart) -> bool:
    return not open_blocks(chat.answering(start.prefix, start.variables), PROMPTS)


@pytest.mark.parametrize(
    ("opening", "variables"),
    [
        ("<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}", {"enable_thinking": False}),
        ("{% if thinking is not defined or thinking %}<think>{% else %}</think>{% endif %}", {"thinking": False}),
        ("{% if reasoning_effort != 'none' %}[THINK]{% endif %}", {"reasoning_effort": "none"}),
        (
            "{% if thinking_budget != 0 %}<seed:think>{% else %}<seed:think></seed:think>{% endif %}",
            {"thinking_budget": 0},
        ),
    ],
)
def test_the_template_switches_its_own_thinking_off(opening: str, variables: dict[str, object]) -> None:
    chat, reporter = chat_of(opening), RecordingReporter()
    start = close_thinking(chat, PROMPTS, reporter)
    assert start == AnswerStart("", variables) and closed(chat, start)
    assert len(reporter.infos) == 1 and start.spelled_variables in reporter.infos[0] and not reporter.warnings


@pytest.mark.parametrize(
    ("opening", "prefix"),
    [
        ("<think>\n", "\n</think>\n\n"),
        ("[THINK]", "[/THINK]"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<seed:think> \n", "</seed:think>"),
        ("<think>{{ enable_thinking }}", "\n</think>\n\n"),  # names the switch and does not heed it
        ("{% if enable_thinking is false %}{{ raise_exception('no') }}{% endif %}<think>", "\n</think>\n\n"),
    ],
)
def test_without_a_switch_the_closing_marker_is_appended(opening: str, prefix: str) -> None:
    chat, reporter = chat_of(opening), RecordingReporter()
    start = close_thinking(chat, PROMPTS, reporter)
    assert start == AnswerStart(prefix) and closed(chat, start)
    assert len(reporter.infos) == 1 and not reporter.warnings


def test_a_closed_block_and_none_at_all_are_left_alone() -> None:
    for opening in ("", "<think>\n\n</think>\n\n", "<think></think>", "{% if enable_thinking %}<think>{% endif %}"):
        reporter = RecordingReporter()
        assert close_thinking(chat_of(opening), PROMPTS, reporter) == AnswerStart() and not reporter.infos


def test_thinking_that_a_system_prompt_opens_is_closed_with_that_prompt_only() -> None:
    opening = "{% if messages[0].role == 'system' %}<think>{% endif %}"
    assert close_thinking(chat_of(opening), PROMPTS, RecordingReporter()) == AnswerStart()
    assert close_thinking(chat_of(opening, "be good"), PROMPTS, RecordingReporter()).prefix == "\n</think>\n\n"


def test_a_block_after_some_prompts_only_is_reported() -> None:
    reporter = RecordingReporter()
    opening = "{% if 'bread' in messages[-1].content %}<think>{% endif %}"
    assert close_thinking(chat_of(opening), PROMPTS, reporter) == AnswerStart()
    assert len(reporter.warnings) == 1


def test_a_prefix_of_the_user_that_leaves_the_block_open_is_reported() -> None:
    chat = chat_of("<think>")
    for prefix, warnings in (("", 1), ("sure", 1), (OFF, 0)):
        reporter = RecordingReporter()
        warn_of_open_thinking(chat.answering(prefix), PROMPTS, reporter)
        assert len(reporter.warnings) == warnings


THOUGHTS = [("<think>\nOkay, so", False), ("<think>\nOkay, the", False)]


def test_a_switch_that_the_settings_set_is_not_changed() -> None:
    chat = chat_of("{% if enable_thinking %}<think>{% endif %}").with_variables({"enable_thinking": True})
    assert close_thinking(chat, PROMPTS, RecordingReporter()) == AnswerStart("\n</think>\n\n")


@pytest.mark.parametrize(
    ("opening", "start"),
    [
        # as Qwen3: the model opens the block, and the template can write an empty one
        (
            "{% if enable_thinking is false %} <think>\n\n</think>\n\n{% endif %}",
            AnswerStart("", {"enable_thinking": False}),
        ),
        ("", AnswerStart("<think>\n\n</think>\n\n")),
        ("{{ thinking }}", AnswerStart("<think>\n\n</think>\n\n")),  # names a switch that does not help
        ("{% if think is false %} only some{% endif %}", AnswerStart("<think>\n\n</think>\n\n")),
        ("{% if think is false %}{{ raise_exception('no') }}{% endif %}", AnswerStart("<think>\n\n</think>\n\n")),
    ],
)
def test_thinking_that_the_model_opens_is_switched_off_or_closed(
    opening: str, start: AnswerStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, reporter = chat_of(opening), RecordingReporter()

    def sample_answers(_: Any, rendered: list[str], __: Any) -> list[tuple[str, bool]]:
        if "only some" in rendered[0] and "</think>" not in rendered[0]:
            return [("Sure", False), *THOUGHTS]
        return [("Sure", False), ("No", False)] if "</think>" in rendered[0] else THOUGHTS

    monkeypatch.setattr(ChatFormat, "encode", lambda chat, prompts: [chat.render(prompt) for prompt in prompts])
    monkeypatch.setattr(response_prefix, "sample_answers", sample_answers)
    batcher: Any = SimpleNamespace(reporter=reporter)
    model: Any = None
    assert detect_start(model, chat, AnswerStart(), PROMPTS, batcher) == start
    assert len(reporter.infos) == bool(start.variables)


def detected(monkeypatch: pytest.MonkeyPatch, *rounds: list[str]) -> tuple[str, RecordingReporter]:
    """The prefix of a model that answers with each of these in turn, whatever it is asked."""
    answers, reporter = iter(rounds), RecordingReporter()
    monkeypatch.setattr(response_prefix, "sample_answers", lambda *_: [(text, False) for text in next(answers)])
    batcher, model = SimpleNamespace(reporter=reporter), None
    return detect_start(model, chat_of(""), AnswerStart(), PROMPTS, batcher).prefix, reporter  # type: ignore[arg-type]


def test_after_one_beginning_there_can_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, reporter = detected(monkeypatch, ["<think>\nOh", "<think>\nMy"], ["\nSure", "\nNo"], ["Sure", "No"])
    assert prefix == "<think>\n\n</think>\n\n\n" and not reporter.warnings


def test_a_block_that_most_answers_open_is_closed_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, reporter = detected(monkeypatch, ["<think>\nOh", "<think>\nMy", "Sure"], ["Sure", "No", "Sure"])
    assert prefix == "<think>\n\n</think>\n\n" and not reporter.warnings and len(reporter.infos) == 1
    prefix, reporter = detected(monkeypatch, ["<think>\nOh", "Yes", "Sure"])
    assert prefix == "" and len(reporter.warnings) == 1, "thoughts are judged as answers"
    endless = [["<think>\nOh", "<think>\nMy"]] * 9
    prefix, reporter = detected(monkeypatch, *endless)
    assert prefix == "" and len(reporter.warnings) == 1, "a closed block does not help this model"
    assert detected(monkeypatch, *[["\nOh", "\nMy"]] * 9)[0] == "", "nor does a line break"


def test_blocks_of_words_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["Here are my reasoning steps:\nOh", "Here are my reasoning steps:\nMy"]
    prefix, _ = detected(monkeypatch, answers, ["Sure", "No"])
    assert prefix == "Here are my reasoning steps:\n[BEGIN FINAL RESPONSE]\n"
    prefix, _ = detected(monkeypatch, ["<|think|>Oh", "<|think|>My"], ["Sure", "No"])
    assert prefix == "<|think|><|end|><|begin|>assistant<|content|>"
