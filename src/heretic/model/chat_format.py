"""How a prompt becomes token ids: chat template, system prompt, and a beginning that every answer shares."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from heretic.errors import UserError, first_line, plain_line
from heretic.model.template import render
from heretic.model.thinking import closed_immediately


@dataclass(frozen=True)
class ChatFormat:
    """Turns prompts into token ids for one model."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str = ""
    response_prefix: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template, such as enable_thinking
    rows: int = 0  # of the model's embedding; 0: not known, so not checked

    def render(self, prompt: str) -> str:
        """A conversation of one prompt as text, up to where the answer goes on."""
        return self.conversation([{"role": "user", "content": prompt}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation (`role` user or assistant, `content`) as text, up to where the answer goes on. Raises UserError."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return render(self.tokenizer, [*system, *messages], self.variables) + self.response_prefix

    def encode(self, prompts: Sequence[str], role: str = "") -> list[list[int]]:
        """Token ids of every prompt of the set `role`; the template has put the special tokens in. Raises UserError."""
        where = f"prompts.{role}" if role else ""
        return [self.tokens(self.render(p), f"{where}, prompt {n}" if where else "") for n, p in enumerate(prompts, 1)]

    def tokens(self, text: str, where: str = "") -> list[int]:
        """Token ids of a rendered conversation. Raises UserError where the tokenizer fails or the model has no row for a token."""
        try:
            ids = [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        except Exception as error:  # its library raises plain Exceptions, its own code what it likes
            raise UserError(
                f"The tokenizer fails: {plain_line(first_line(error))[:300]}",
                code="tokenizer",
                where=where or None,
                fix="check the prompt, or download the tokenizer's files again",
            ) from None
        outside = [i for i in ids if not 0 <= i < self.rows] if self.rows else []
        if outside:
            name = plain_line(str(self.tokenizer.convert_ids_to_tokens(outside[0])))[:100]
            raise UserError(
                f"Token {name!r} has the id {outside[0]}, but the model's embedding has {self.rows} rows.",
                code="token-outside-embedding",
                where=where or None,
                fix="take the tokenizer that belongs to the model, or remove that token from prompt, system_prompt and template",
            )
        return ids

    def answering(self, prefix: str, variables: Mapping[str, Any] | None = None) -> ChatFormat:
        """The same format, answers beginning with `prefix`, the template given `variables` (None: as before)."""
        return replace(self, response_prefix=prefix, variables=self.variables if variables is None else variables)

    def text(self, tokens: list[int]) -> str:
        """The text of an answer's tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def common_prefix(answers: Sequence[str]) -> str:
    """What all answers begin with; a thinking block that they open is closed at once.

    Cut at the last space, since half a word says nothing of what follows; a beginning shorter than a few letters is chance.
    """
    shared = os.path.commonprefix(list(answers))  # noqa: RUF071  (character by character is what is wanted)
    if closed := closed_immediately(shared):
        return closed
    cut = shared.rstrip() if shared in answers else shared[: shared.rfind(" ") + 1].rstrip()
    return cut if len(cut) >= 8 else ""


def check_different(role: str, sequences: Sequence[list[int]]) -> None:
    """Raise UserError if several prompts all come to the same tokens, or to none: the template leaves them out, or a set repeats
    one prompt."""
    if not all(sequences):
        raise UserError(
            "A prompt comes to no tokens at all.",
            code="prompt-without-tokens",
            where=f"prompts.{role}",
            fix='check the tokenizer, and the chat template: chat_template = "template.jinja"',
        )
    if len(sequences) > 1 and all(tokens == sequences[0] for tokens in sequences):
        raise UserError(
            f"The {len(sequences)} prompts of {role} come to one and the same text for the model.",
            code="prompts-alike",
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
            code="prompt-too-long",
            where=f"prompts.{role}",
            fix="shorten or remove the prompt, or lower max_response_length",
        )
