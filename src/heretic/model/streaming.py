"""Stream an answer as it is generated, with the model's own generation settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from heretic.model.loading import LanguageModel


class _CallbackStreamer(TextStreamer):
    """A streamer that passes whole words to a callback, and calls another one at every token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], check: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.check = on_text, check
        self.parts: list[str] = []

    def put(self, value: Any) -> None:
        """Receive the next token."""
        self.check()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive the next piece of text."""
        if text:
            self.parts.append(text)
            self.on_text(text)


def stream_answer(
    language_model: LanguageModel,
    tokens: Sequence[int],
    max_tokens: int,
    on_text: Callable[[str], None],
    check: Callable[[], None],
) -> str:
    """Continue a conversation of token ids with the model as it is.

    `on_text` gets every piece of the answer. `check` is called at every token and ends the answer by raising.
    """
    ids = torch.tensor([list(tokens)], device=language_model.device)
    streamer = _CallbackStreamer(language_model.tokenizer, on_text, check)
    ends = sorted(language_model.end_tokens)
    model: Any = language_model.model
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        streamer=streamer,
        eos_token_id=ends or None,
        pad_token_id=language_model.pad,
    )
    return "".join(streamer.parts).strip()
