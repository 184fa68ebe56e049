"""Variables of the chat template, by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

# Arguments of the renderer itself.
RESERVED_VARIABLES = {
    "self", "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "return_assistant_tokens_mask",
}  # fmt: skip


def _free_names(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if not name.isidentifier() or name in RESERVED_VARIABLES:
            raise ValueError(f"a chat template cannot have the variable `{name}`")
    return variables


TemplateVariables = Annotated[dict[str, bool | int | float | str], AfterValidator(_free_names)]
