"""How a prompt becomes token ids: chat template, system prompt, and a beginning that every answer shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from heretic.errors import UserError, first_line

# How a thinking block begins, and what to put there so that it is closed at once and the answer follows.
CLOSED_THINKING = {
    "<think>": "<think></think>",
    "<thought>": "<thought></thought>",
    "<thinking>": "<thinking></thinking>",
    "[THINK]": "[THINK][/THINK]",
    "<seed:think>": "<seed:think></seed:think>",
    "<|channel|>analysis<|message|>": (
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ),
}


@dataclass(frozen=True)
class ChatFormat:
    """Turns prompts into token ids for one model."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str = ""
    response_prefix: str = ""

    def render(self, prompt: str) -> str:
        """A conversation of one prompt as text, up to where the answer goes on."""
        return self.conversation([{"role": "user", "content": prompt}])

    def conversation(self, said: Sequence[dict[str, str]]) -> str:
        """A conversation (`role` user or assistant, `content`) as text, up to where the answer goes on."""
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages += said
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program; it raises what its author thought of
            raise UserError(
                f"The model's chat template refuses the conversation: {first_line(error)[:200]}",
                fix='leave system_prompt empty, or set chat_template = "template.jinja"',
            ) from None
        return str(text) + self.response_prefix

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of every prompt; the template has already put the special tokens in."""
        return [self.tokenizer(self.render(p), add_special_tokens=False)["input_ids"] for p in prompts]

    def with_prefix(self, prefix: str) -> ChatFormat:
        """The same format, answers beginning with `prefix`."""
        return replace(self, response_prefix=prefix)

    def text(self, tokens: list[int]) -> str:
        """The text of an answer's tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def common_prefix(answers: Sequence[str]) -> str:
    """What all answers begin with; a thinking block that they open is closed at once.

    Cut at the last space, since half a word says nothing of what follows; a beginning shorter than a few letters is chance.
    """
    shared = os.path.commonprefix(list(answers))  # noqa: RUF071  (character by character is what is wanted)
    for opening, closed in CLOSED_THINKING.items():
        if shared.lstrip().startswith(opening):
            return closed
    cut = shared.rstrip() if shared in answers else shared[: shared.rfind(" ") + 1].rstrip()
    return cut if len(cut) >= 8 else ""


def check_different(role: str, sequences: Sequence[list[int]]) -> None:
    """Raise UserError if several prompts all come to the same tokens, or to none: the template leaves them out, or a set repeats
    one prompt."""
    if not all(sequences):
        raise UserError("The model's chat template gives no text at all.", fix='set chat_template = "template.jinja"')
    if len(sequences) > 1 and all(tokens == sequences[0] for tokens in sequences):
        raise UserError(
            f"The {len(sequences)} prompts of {role} come to one and the same text for the model.",
            where=f"prompts.{role}",
            fix="check that the chat template puts the prompt in, and that the set does not repeat one prompt",
        )


def check_length(role: str, sequences: Sequence[list[int]], context: int, new_tokens: int) -> None:
    """Raise UserError if a prompt and its answer do not fit into the model's context."""
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))
    if len(sequences[longest]) + new_tokens > context:
        raise UserError(
            f"Prompt {longest + 1} of {role} has {len(sequences[longest])} tokens; with {new_tokens} for the answer that is more "
            f"than the {context} that the model can hold.",
            where=f"prompts.{role}",
            fix="shorten or remove the prompt, or lower max_response_length",
        )
