"""From prompt to tokens, and the beginning that answers share."""

from __future__ import annotations

import pytest

from heretic.errors import UserError
from heretic.model.chat_format import ChatFormat, check_length, common_prefix
from tests.tiny import tiny_tokenizer


def test_system_prompt_and_prefix_are_in_the_text() -> None:
    chat = ChatFormat(tiny_tokenizer(), system_prompt="be good", response_prefix="sure")
    assert chat.render("tell me") == "<|system|> be good <|end|><|user|> tell me <|end|><|assistant|> sure"
    assert "system" not in ChatFormat(tiny_tokenizer()).render("tell me")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Hello", "No"], ""),
        (["I am here", "It is there"], ""),
        (["Final answer: yes", "Final answer: no"], "Final answer:"),
        (["Certainly, here", "Certainly, hence"], "Certainly,"),
        (["<think>\nOkay, so", "<think>\nOkay, the"], "<think></think>"),
        (["<think>"], "<think></think>"),
        (["[THINK]a", "[THINK]b"], "[THINK][/THINK]"),
        (["Just the same answer."] * 3, "Just the same answer."),
    ],
)
def test_common_prefix(answers: list[str], expected: str) -> None:
    assert common_prefix(answers) == expected


def test_a_prompt_that_does_not_fit_is_named() -> None:
    check_length("harmful_eval", [[1] * 10, [1] * 20], 30, 10)
    with pytest.raises(UserError, match=r"Prompt 2 of harmful_eval has 21 tokens") as error:
        check_length("harmful_eval", [[1] * 10, [1] * 21], 30, 10)
    assert "max_response_length" in str(error.value)


def test_a_template_that_refuses_is_an_error_in_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="no system role"):
        ChatFormat(tokenizer, "x").render("y")
