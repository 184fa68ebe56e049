"""Where the prompt sets come from."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from heretic.settings.field import SettingsModel, setting


class PromptSource(SettingsModel):
    """Where one prompt set comes from."""

    source: str = setting(
        "",
        "A Hugging Face data set (`owner/name`), a local file (.txt with one prompt a line, .jsonl, .json, .csv, .parquet), "
        "or `bundled:NAME` for a set that ships with heretic.",
        when=(
            "for your own requests, another language or another behavior; the four sets should be of one kind "
            "and length."
        ),
    )
    split: str = setting(
        "train",
        "Which part: a split of the data set, with an optional slice such as `train[:400]`. A set with a `source` of its own has "
        "all of `train`, unless it says otherwise.",
        when=(
            "to other or fewer prompts. More training prompts make the direction surer and cost time once; more "
            "evaluation prompts make the scores surer and every trial longer."
        ),
    )
    column: str = setting(
        "text",
        "The column that holds the prompt (not used for .txt files): texts; or conversations, of which the last user turn is taken "
        "(lists of messages with `role` and `content`, or with `from` and `value`).",
        when="where the data set calls it otherwise; the message names the columns that it has.",
    )
    subset: str = setting(
        "", "The data set's configuration name, if it has several.", when=("where the message asks for one.")
    )
    prefix: str = setting(
        "",
        "Text put before every prompt.",
        when=(
            "for a task text that stands before each, as with few-shot examples; what all prompts begin with is "
            "run once in a pass, where the model allows it."
        ),
    )
    suffix: str = setting("", "Text put after every prompt.", when=("for a question that follows each."))


class PromptSettings(SettingsModel):
    """The four prompt sets: two to find the direction, two that a trial is judged on."""

    harmful_train: PromptSource = setting(
        PromptSource(source="mlabonne/harmful_behaviors", split="train[:400]"),
        "Requests that the model declines; with `harmless_train` they give the refusal direction.",
    )
    harmless_train: PromptSource = setting(
        PromptSource(source="mlabonne/harmless_alpaca", split="train[:400]"), "Requests that the model answers."
    )
    harmful_eval: PromptSource = setting(
        PromptSource(source="mlabonne/harmful_behaviors", split="test[:100]"),
        "Requests on which refusals are counted; keep them apart from `harmful_train`.",
    )
    harmless_eval: PromptSource = setting(
        PromptSource(source="mlabonne/harmless_alpaca", split="test[:100]"),
        "Requests on which the change (KL divergence) is measured; keep them apart from `harmless_train`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _other_part_of_the_same(cls, given: Any) -> Any:
        """A set without a `source` of its own is the default one, with what is said of it."""
        if not isinstance(given, dict):
            return given
        laid = dict(given)
        for role, said in given.items():
            if role in cls.model_fields and isinstance(said, dict) and not said.get("source"):
                laid[role] = {
                    **cls.model_fields[role].get_default(call_default_factory=True).model_dump(),
                    **{k: v for k, v in said.items() if v != ""},
                }
        return laid
