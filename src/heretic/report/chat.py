"""What the live page needs of a chat: the questions it asks, and whoever answers them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heretic.errors import UserError

MOST_TOKENS = 8192  # of one answer


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str


class Question(BaseModel):
    """What the page asks: every model continues its own conversation, whose last message is the new prompt."""

    model_config = ConfigDict(extra="forbid")

    trial: int | None = None  # None: the selected one
    tokens: int = Field(default=512, ge=1, le=MOST_TOKENS)  # of each answer, at most
    original: list[Message] = Field(min_length=1)
    ablated: list[Message] = Field(min_length=1)

    @classmethod
    def read(cls, text: bytes) -> Question:
        """Return the question of a request's body. Raises UserError."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"The question cannot be read: {first['msg']}.",
                code="invalid-question",
                where=place or None,
                fix="reload the page",
            ) from None


class ChatModel(Protocol):
    """A model of a run that answers, and its original."""

    def state(self) -> dict[str, Any]:
        """Return `phase` (off, loading, ready, answering or unloading), the latest `note` of the loading,
        and `problem`.
        """

    def load(self) -> None:
        """Begin to load the model. Raises UserError if it is loaded."""

    def unload(self) -> None:
        """Release the model, or end its loading."""

    def answer(self, question: Question) -> Generator[dict[str, str] | None]:
        """Yield pieces (`model`, `text`), whole answers (`model`, `answer`) and errors; None while there is nothing new.

        Closing the iterator, even if nothing was read, ends the answer. Raises UserError if the model is not loaded or
        answers already.
        """

    def stop(self) -> None:
        """End the answer that is under way."""

    def close(self) -> None:
        """Release the model and wait until it is released."""
