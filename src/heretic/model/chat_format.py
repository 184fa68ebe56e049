"""Turn prompts into token ids: chat template, system prompt, and response prefix."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from heretic.errors import UserError, first_line, plain_line
from heretic.model.template import contains, render_messages
from heretic.settings import Settings

# Of the answers to training prompts in the gradient search:
SEARCH_TOKENS = 16  # in which the original must refuse
CHECK_TOKENS = 48  # under the last point: as much as the trained judge reads


@dataclass(frozen=True)
class ChatFormat:
    """The chat format of one model: turns prompts into token ids."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str = ""
    response_prefix: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template, for example enable_thinking
    date: str = ""  # what the chat template prints as today, as YYYY-MM-DD; empty: the real date
    given_variables: Mapping[str, Any] = field(default_factory=dict)  # those of the settings
    rows: int = 0  # of the model's embedding; 0: unknown, not checked

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, settings: Settings, *, date: str = "", rows: int = 0) -> ChatFormat:
        """Return the format that the settings ask for, without a response prefix."""
        given = settings.template_variables
        return cls(tokenizer, settings.system_prompt, variables=given, date=date, given_variables=given, rows=rows)

    def render(self, prompt: str) -> str:
        """Render a conversation of one prompt as text, up to the start of the answer."""
        return self.conversation([{"role": "user", "content": prompt}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render messages (`role`, `content`) as text, up to the start of the answer. Raises UserError."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        text = render_messages(self.tokenizer, [*system, *messages], self.variables, self.date)
        # Templates may change its blanks or letters, so another one is tried.
        if not contains(text, system) and text == render_messages(
            self.tokenizer,
            [{**system[0], "content": f"Note: {self.system_prompt}"}, *messages],
            self.variables,
            self.date,
        ):
            raise UserError(
                "The chat template leaves out the system message, so no model would see it.",
                code="system-prompt-left-out",
                where="system_prompt",
                fix='system_prompt = "", or set chat_template to one with system messages',
            )
        return text + self.response_prefix

    def encode(self, prompts: Sequence[str], role: str = "") -> list[list[int]]:
        """Encode every prompt of the set `role`; the template adds the special tokens. Raises UserError."""
        where = f"prompts.{role}" if role else ""
        return [self.tokens(self.render(p), f"{where}, prompt {n}" if where else "") for n, p in enumerate(prompts, 1)]

    def tokens(self, text: str, where: str = "") -> list[int]:
        """Encode a rendered conversation. Raises UserError if the tokenizer fails or the embedding lacks a token."""
        try:
            ids = [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        except Exception as error:  # its library raises plain Exceptions, custom code anything
            raise UserError(
                f"The tokenizer failed: {first_line(error)[:300]}",
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
                fix="use the model's own tokenizer, or remove the token from the prompt, system_prompt and template",
            )
        return ids

    def answering(self, prefix: str, variables: Mapping[str, Any] | None = None) -> ChatFormat:
        """Return this format with another response prefix and, unless None, other template variables."""
        return replace(self, response_prefix=prefix, variables=self.variables if variables is None else variables)

    def with_variables(self, variables: Mapping[str, Any]) -> ChatFormat:
        """Return this format with these template variables beside its own."""
        return replace(self, variables={**self.variables, **variables})

    def text(self, tokens: list[int]) -> str:
        """Decode the tokens of an answer."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def common_prefix(answers: Sequence[str], structural: Collection[str] = ()) -> str:
    """Return what all answers begin with: the whole words, or the line breaks and tokens without content, if longer.

    After such a beginning all models give nearly the same first token, before and after any edit.

    Args:
        answers: The beginnings of answers, with special tokens.
        structural: The texts of tokens that stand for no words, such as `<|channel|>`.

    Returns:
        The common beginning. One of fewer than eight characters is chance, unless it begins with a line break or such a token.
    """
    shared = common_text(answers)
    words = shared.rstrip() if shared in answers else shared[: shared.rfind(" ") + 1].rstrip()
    mark = re.compile("|".join([r"\n+", *map(re.escape, sorted(structural, key=len, reverse=True))]))
    lines = shared[: max((found.end() for found in mark.finditer(shared)), default=0)]
    return max(words if len(words) >= 8 else "", lines if len(lines) >= 8 or mark.match(lines) else "", key=len)


def common_text(texts: Sequence[str]) -> str:
    """Return the characters that all texts begin with."""
    return os.path.commonprefix(list(texts))  # noqa: RUF071  (character by character is what is wanted)


def check_different(role: str, sequences: Sequence[list[int]]) -> None:
    """Raise UserError if prompts have no tokens, or all have the same: the template omits them, or a set repeats one."""
    if not all(sequences):
        raise UserError(
            "A prompt was encoded to no tokens.",
            code="prompt-without-tokens",
            where=f"prompts.{role}",
            fix='check the tokenizer, and the chat template: chat_template = "template.jinja"',
        )
    if len(sequences) > 1 and all(tokens == sequences[0] for tokens in sequences):
        raise UserError(
            f"All {len(sequences)} prompts of {role} give the model the same text.",
            code="prompts-alike",
            where=f"prompts.{role}",
            fix="check that the chat template contains the prompt, and that the set does not repeat one prompt",
        )


def answer_tokens(role: str, settings: Settings) -> int:
    """Return the maximum number of answer tokens evaluated after a prompt of this set."""
    decoded = settings.max_response_length
    return {"harmful_eval": decoded, "harmless_eval": max(decoded, settings.kl_tokens)}.get(role, 1)


def decoded_tokens(role: str, settings: Settings) -> int:
    """Return the largest number of answer tokens that any pass runs after a prompt of this set, in the gradient search too."""
    decoded = settings.max_response_length
    if role.endswith("_eval") or settings.search.start != "gradient":
        return answer_tokens(role, settings)
    tried = max(SEARCH_TOKENS, min(decoded, CHECK_TOKENS))
    return tried if role == "harmful_train" else max(tried, settings.search.gradient.kl_tokens)


def check_length(
    role: str, sequences: Sequence[list[int]], context: int, new_tokens: int, setting: str = "max_response_length"
) -> None:
    """Raise UserError if a prompt and its answer, limited by a setting or option, do not fit into the model's context."""
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))
    if len(sequences[longest]) + new_tokens > context:
        raise UserError(
            f"Prompt {longest + 1} of {role} has {len(sequences[longest])} tokens. With {new_tokens} for the answer it exceeds "
            f"the model's context of {context} tokens.",
            code="prompt-too-long",
            where=f"prompts.{role}" if setting == "max_response_length" else role,
            fix=f"shorten or remove the prompt, or lower {setting}",
        )
