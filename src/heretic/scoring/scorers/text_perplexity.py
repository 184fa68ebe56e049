"""Perplexity of a model on neutral text: how well it still predicts ordinary prose."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from heretic.errors import UserError
from heretic.files import expand_user, read_text
from heretic.scoring.scorers.context import ScorerContext
from heretic.scoring.scorers.own_perplexity import perplexity
from heretic.scoring.scorers.scorer import Measurement, Scorer


@dataclass(frozen=True)
class TextPerplexity(Scorer):
    """Lets the model read paragraphs without a chat template."""

    file: str = ""  # UTF-8 text, paragraphs separated by empty lines; empty: the text that ships with heretic

    name = "text_perplexity"
    meaning = "perplexity of neutral text (`file`, or paragraphs that ship with heretic) under the model"

    def check(self) -> None:
        """Read the file once. Raises UserError."""
        self.paragraphs()

    def paragraphs(self) -> list[str]:
        """Return the paragraphs, each on one line. Raises UserError."""
        where = f"scorers.{self.name}.file"
        if self.file:
            text = read_text(expand_user(self.file), "The text file", where=where)
        else:
            text = (resources.files("heretic") / "data" / "neutral.txt").read_text(encoding="utf-8")
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
        if not paragraphs:
            raise UserError("The text file is empty.", code="no-prompts", where=where, fix="add a paragraph")
        return paragraphs

    def baseline(self, original: ScorerContext) -> list[list[int]]:
        """Return the token ids of the paragraphs, cut to the context, with the tokenizer's first token if it has one."""
        chat, context = original.parts.chat, original.parts.language_model.context
        first = chat.tokenizer.bos_token_id
        start = [] if first is None else [int(first)]
        return [[*start, *chat.tokens(text)][:context] for text in self.paragraphs()]

    def score(self, model: ScorerContext, baseline: Any) -> Measurement:
        """Compute the perplexity of every token but the first of each paragraph."""
        texts = [tokens for tokens in baseline if len(tokens) > 1]
        return perplexity(model, [tokens[:1] for tokens in texts], [tokens[1:] for tokens in texts])
