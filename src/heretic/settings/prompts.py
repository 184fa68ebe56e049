"""Settings of the prompt sets."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from heretic.settings.field import SettingsModel, setting
from heretic.settings.languages import ENGLISH, LANGUAGES


def with_prompts_of_language(values: Any) -> Any:
    """Complete the prompt sets without a `source`, in the values of all settings, from the sets of the language."""
    if not isinstance(values, dict):
        return values
    code, prompts = values.get("language", ENGLISH), values.get("prompts", {})
    if not isinstance(code, str) or code == ENGLISH or code not in LANGUAGES or not isinstance(prompts, dict):
        return values
    completed = dict(prompts)
    for role in PromptSettings.model_fields:
        table = prompts.get(role, {})
        if isinstance(table, dict) and not table.get("source"):
            completed[role] = {"split": "train", **table, "source": f"bundled:{code}/{role}"}
    return {**values, "prompts": completed}


class PromptSource(SettingsModel):
    """The source of one prompt set."""

    source: str = setting(
        "",
        "A Hugging Face data set (`owner/name`), a local file (.txt with one prompt per line, .jsonl, .json, .csv, .tsv, "
        ".parquet), or `bundled:NAME` for a set that ships with heretic.",
        when=(
            "Change it for your own requests, another language or another behavior. All four sets should be similar in "
            "kind and length."
        ),
    )
    split: str = setting(
        "train",
        "Split of the data set, with an optional slice such as `train[:400]`. If you set `source`, the default is "
        "`train`.",
        when=(
            "More training prompts give a more accurate direction, at a one-time cost. More evaluation prompts give more "
            "accurate scores, at a cost in every trial."
        ),
    )
    column: str = setting(
        "text",
        "Column with the prompts (not for .txt files): texts, or conversations (lists of messages with `role` and "
        "`content`, or `from` and `value`), of which heretic takes the last user turn.",
        when="Set it if the data set uses another name; the error message lists the columns.",
    )
    subset: str = setting(
        "",
        "Configuration name of the data set.",
        when="Set it if the error message asks for one.",
    )
    prefix: str = setting(
        "",
        "Text before every prompt.",
        when=(
            "Set it for a task description or few-shot examples. heretic computes a common beginning once per pass if "
            "the model allows it."
        ),
    )
    suffix: str = setting(
        "",
        "Text after every prompt.",
        when="Set it for a question that follows each prompt.",
    )


class PromptSettings(SettingsModel):
    """The four prompt sets: two to compute the directions, two to measure trials."""

    harmful_train: PromptSource = setting(
        PromptSource(source="mlabonne/harmful_behaviors", split="train[:400]"),
        "Requests that the model refuses. Together with `harmless_train` they give the refusal direction.",
    )
    harmless_train: PromptSource = setting(
        PromptSource(source="mlabonne/harmless_alpaca", split="train[:400]"), "Requests that the model answers."
    )
    harmful_eval: PromptSource = setting(
        PromptSource(source="mlabonne/harmful_behaviors", split="test[:100]"),
        "Requests for counting refusals. They must not overlap with `harmful_train`.",
    )
    harmless_eval: PromptSource = setting(
        PromptSource(source="mlabonne/harmless_alpaca", split="test[:100]"),
        "Requests for measuring the KL divergence. They must not overlap with `harmless_train`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_from_default_source(cls, values: Any) -> Any:
        """Complete a set without a `source` from the default set of its role."""
        if not isinstance(values, dict):
            return values
        completed = dict(values)
        for role, table in values.items():
            if role in cls.model_fields and isinstance(table, dict) and not table.get("source"):
                completed[role] = {
                    **cls.model_fields[role].get_default(call_default_factory=True).model_dump(),
                    **{key: value for key, value in table.items() if value != ""},
                }
        return completed
