"""Where the chat template ends an answer."""

from __future__ import annotations

import pytest

from heretic.model.end_of_turn import end_of_turn
from tests.tiny import tiny_tokenizer

ASKED = "{% if add_generation_prompt %}<|assistant|> {% endif %}"
TURNS = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}END{% endfor %}" + ASKED


@pytest.mark.parametrize(
    ("end", "token"),
    [
        (" <|end|>", "<|end|>"),
        ("\n<|end|>\n", "<|end|>"),
        ("", "<|assistant|>"),  # as in GLM-4: the next role ends the turn
        (" <|end|>{# <|channel|>analysis #}", None),  # as in gpt-oss: it also ends a thought
        (" and so on <|end|>", None),
        (" unheardof <|end|>", None),
        (" [THINK]", None),
        ("{{ raise_exception('no answers') }}", None),
    ],
)
def test_the_special_token_after_an_answer(end: str, token: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|assistant|>", "<|user|>", "<|end|>", "[THINK]"]})
    tokenizer.chat_template = TURNS.replace("END", end)
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == token
