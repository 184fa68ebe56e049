"""From prompt to tokens, and the beginning that answers share."""

from __future__ import annotations

import pytest

from heretic.errors import UserError
from heretic.model.chat_format import ChatFormat, check_different, check_length, common_prefix, decoded_tokens
from heretic.settings import Settings
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
        (["Just the same answer."] * 3, "Just the same answer."),
        (["\nHello", "\nNo"], "\n"),
        (["\n\nHello", "\nNo"], "\n"),
        (["Hi\nHello", "Hi\nNo"], ""),
        (["<answer>\nHello", "<answer>\nNo"], "<answer>\n"),
        (["<|final|>Hello", "<|final|>No"], "<|final|>"),
        (["<|channel|>final<|final|>Hello", "<|channel|>final<|final|>No"], "<|channel|>final<|final|>"),
        (["<|channel|>a", "<|final|>b"], ""),
        (["Certainly:\n1. here", "Certainly:\n1. there"], "Certainly:\n1."),
        (["\n1. here", "\n1. there"], "\n"),
        (["\nI am", "\nI see"], "\n"),
    ],
)
def test_common_prefix(answers: list[str], expected: str) -> None:
    assert common_prefix(answers, ["<|channel|>", "<|final|>"]) == expected


def test_a_prompt_that_does_not_fit_is_named() -> None:
    check_length("harmful_eval", [[1] * 10, [1] * 20], 30, 10)
    with pytest.raises(UserError) as error:
        check_length("harmful_eval", [[1] * 10, [1] * 21], 30, 10)
    assert error.value.code == "prompt-too-long" and "21" in str(error.value)


def test_a_token_without_a_row_in_the_embedding_is_named() -> None:
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["newword"])
    chat = ChatFormat(tokenizer, rows=rows)
    assert chat.encode(["tell me"], "harmful_eval")
    with pytest.raises(UserError) as error:
        chat.encode(["tell me", "tell newword me"], "harmful_eval")
    assert error.value.code == "token-outside-embedding"
    assert "newword" in error.value.what and str(rows) in error.value.what
    assert error.value.where == "prompts.harmful_eval, prompt 2"


@pytest.mark.parametrize(
    "raised", [RuntimeError("no\x1b[2J"), OverflowError("int too big"), KeyError("x"), TypeError()]
)
def test_a_tokenizer_that_raises_is_an_error(raised: Exception) -> None:
    tokenizer = tiny_tokenizer()

    class Own(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *_: object, **__: object) -> dict[str, list[int]]:
            raise raised

    tokenizer.__class__ = Own
    with pytest.raises(UserError) as error:
        ChatFormat(tokenizer).encode(["tell me"], "harmful_eval")
    assert error.value.code == "tokenizer" and "\x1b" not in str(error.value)


def test_prompts_without_tokens_or_with_the_same_are_refused() -> None:
    for sequences, code in (([[1], []], "prompt-without-tokens"), ([[1, 2], [1, 2]], "prompts-alike")):
        with pytest.raises(UserError) as error:
            check_different("harmful_eval", sequences)
        assert error.value.code == code
    check_different("harmful_eval", [[1, 2], [1, 3]])


def test_a_template_that_refuses_a_system_prompt_says_what_to_leave_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError) as error:
        ChatFormat(tokenizer, "x").render("y")
    assert error.value.code == "chat-template" and "system_prompt" in (error.value.fix or "")


def test_a_system_prompt_that_the_template_leaves_out_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert ChatFormat(tokenizer).render("y") == "y"
    with pytest.raises(UserError) as error:
        ChatFormat(tokenizer, "be good").render("y")
    assert error.value.code == "system-prompt-left-out"


@pytest.mark.parametrize("change", ["lower", "e", "tojson", "indent", "replace('  ', ' ')"])
def test_a_system_prompt_that_the_template_changes_is_there(change: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.content | {change} }}}}{{% endfor %}}"
    assert ChatFormat(tokenizer, 'You are "Bob".\n\nDo not  lie.').render("y")


def test_what_the_gradient_search_decodes_after_training_prompts_counts() -> None:
    settings = Settings.model_validate({"max_response_length": 100, "search": {"gradient": {"kl_tokens": 60}}})
    expected = {"harmful_train": 48, "harmless_train": 60, "harmful_eval": 100, "harmless_eval": 100}
    assert {role: decoded_tokens(role, settings) for role in expected} == expected
    kernels = Settings.model_validate({"search": {"start": "kernels"}, "max_response_length": 100})
    assert decoded_tokens("harmful_train", kernels) == decoded_tokens("harmless_train", kernels) == 1
