"""Settings of the directions and the ablation."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from heretic.settings.field import SettingsModel, setting

DirectionMethod = Literal["mean_difference", "geometric_median", "self_organizing_map"]
SINGLE_DIRECTION_METHODS = {"mean_difference", "geometric_median"}
Geometry = Literal["plain", "row_normalized", "norm_preserving", "conditional"]


class DirectionSettings(SettingsModel):
    """How heretic computes the refusal directions."""

    method: DirectionMethod = setting(
        "mean_difference",
        "`mean_difference`: mean residual of the harmful prompts minus that of the harmless ones. `geometric_median`: the "
        "same with geometric medians. `self_organizing_map`: neurons of a map of the harmful prompts minus the harmless "
        "mean; gives several directions. The last two keep all residuals in RAM (prompts x layers x width x 4 bytes).",
        when=(
            "Change it to study directions. On two small models no other method beat the default by more than seeds "
            'differ (benchmarks/RESULTS.md, "Other settings").'
        ),
    )
    count: int = setting(
        1,
        "Directions per layer, all with the same strength. More than one needs `self_organizing_map`.",
        when=(
            "Raise it with `self_organizing_map`. More directions change the model more: watch the KL. `row_normalized` and "
            "`norm_preserving` take more RAM for them (layers x directions x width x 4 bytes)."
        ),
        ge=1,
        le=8,
    )
    iterative_rounds: int = setting(
        0,
        "Further rounds that search for directions in what is left after removing the earlier ones. Each adds `count` "
        "directions and one pass over both training sets.",
        when="Set 1 if refusals remain at any strength; it gained a little in one measurement (one seed).",
        ge=0,
        le=4,
    )
    project_harmless: bool = setting(
        True,
        "Make every direction orthogonal to the mean residual of the harmless prompts.",
        when="Set false for the plain difference of means, as in the paper.",
    )
    winsorize: float = setting(
        1.0,
        "Clip the components of each residual to this quantile of their magnitudes; 1.0: no clipping.",
        when="Set 0.995 for a model with a few huge residual components.",
        gt=0.5,
        le=1.0,
    )

    @property
    def keeps_each(self) -> bool:
        """Whether the method keeps the residuals of every prompt in RAM."""
        return self.method != "mean_difference"

    @property
    def per_layer(self) -> int:
        """Number of directions per layer, over all rounds."""
        return self.count * (1 + self.iterative_rounds)

    @field_validator("count")
    @classmethod
    def _check_method_supports_count(cls, count: int, info: ValidationInfo) -> int:
        if count > 1 and (method := info.data.get("method")) in SINGLE_DIRECTION_METHODS:
            raise ValueError(f"`{method}` gives one direction per layer")
        return count


class AblationSettings(SettingsModel):
    """How heretic edits the weights that write to the residual stream."""

    geometry: Geometry = setting(
        "norm_preserving",
        "`plain`: W' = (I - s v vT) W. `row_normalized`: the same on rows scaled to norm 1, then scaled back. "
        "`norm_preserving`: the same, and every row gets its original norm. `conditional`: W' = W - s v aT, an edit that "
        "acts on inputs of harmful prompts and hardly on others (docs/how.md).",
        when=(
            "Use `plain`, `row_normalized` or `conditional` for a LoRA adapter that is exact at rank 1. `conditional` needs "
            "training prompts beyond those of `search.gradient.prompts`, the more and the more varied the better, and RAM."
        ),
    )
    norm_aware: bool = setting(
        True,
        "If an RMS norm follows a block's output (Gemma 2 and 3, OLMo 2), remove the vector that the norm maps to the "
        "direction.",
        when="Set false to reproduce tools that ignore this norm.",
    )
    readers: bool = setting(
        False,
        "Edit also what reads the stream through an RMS norm (query, key, value, gate and up projections; not of experts), "
        "with strengths of its own: the direction is taken out of its input (docs/how.md).",
        when=(
            "Try it if the KL is too high at few refusals. Trials take a little longer, an export changes more tensors. It needs "
            '`apply = "operators"`.'
        ),
    )
