"""How directions are found, and what is done with them."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from heretic.settings.field import SettingsModel, setting

DirectionMethod = Literal["mean_difference", "geometric_median", "self_organizing_map"]
GIVE_ONE = {"mean_difference", "geometric_median"}
Geometry = Literal["plain", "row_normalized", "norm_preserving"]


class DirectionSettings(SettingsModel):
    """How the refusal direction of every layer is found."""

    method: DirectionMethod = setting(
        "mean_difference",
        "`mean_difference`: mean residual of harmful minus harmless prompts. `geometric_median`: of their geometric medians, which "
        "single prompts cannot pull away. `self_organizing_map`: neurons of a map of the harmful prompts, minus the harmless mean; "
        "it can give several. All but the first keep every prompt's residuals in RAM, prompts x layers x width x 4 bytes.",
        when=(
            "to study directions; on two small models none of the others beat the default by more than seeds differ "
            '(benchmarks/RESULTS.md, "Other settings").'
        ),
    )
    count: int = setting(
        1,
        "Directions of a layer, all removed with the same strength; more than one needs `self_organizing_map`. What "
        " the geometries keep of a writer in RAM grows with it (layers x directions x width x 4 bytes; "
        "`plain` keeps nothing).",
        when="with `self_organizing_map`; more directions change the model more, so look at the KL.",
        ge=1,
        le=8,
    )
    iterative_rounds: int = setting(
        0,
        "How many times more directions are sought in what is left after those found so far are removed everywhere, each layer's "
        "its own; every round adds `count` of them and costs one more pass over both sets.",
        when="1, where refusals stay at any strength; the one alternative that gained a little when measured (one seed).",
        ge=0,
        le=4,
    )
    project_harmless: bool = setting(
        True,
        "Make every direction orthogonal to the mean residual of the harmless prompts, so that removing it "
        "leaves what ordinary requests have in common alone.",
        when="false to have the plain difference of means, as in the paper.",
    )
    winsorize: float = setting(
        1.0,
        "Clip the components of every residual vector to this quantile of their magnitudes before averaging; "
        "0.995 tames models with a few huge components, 1.0 clips nothing.",
        when=(
            "to 0.995 for a model that is known to have a few huge components (`heretic geometry` does not show them)."
        ),
        gt=0.5,
        le=1.0,
    )

    @property
    def keeps_each(self) -> bool:
        """Whether the residuals of every prompt are kept in RAM."""
        return self.method != "mean_difference"

    @property
    def per_layer(self) -> int:
        """Directions that a layer comes to, all rounds together."""
        return self.count * (1 + self.iterative_rounds)

    @field_validator("count")
    @classmethod
    def _gives_so_many(cls, count: int, found: ValidationInfo) -> int:
        if count > 1 and (method := found.data.get("method")) in GIVE_ONE:
            raise ValueError(f"`{method}` gives one direction a layer")
        return count


class AblationSettings(SettingsModel):
    """What is done to the weights that write to the residual stream."""

    geometry: Geometry = setting(
        "norm_preserving",
        "`plain`: W' = (I - s v vT) W. `row_normalized`: the same on rows scaled to norm 1, scaled back afterwards. "
        "`norm_preserving`: then every row is given its old norm again.",
        when=(
            "`plain` or `row_normalized` for an adapter that is exact at rank 1, or to compare; `plain` needs no "
            "reading of the weights at the start."
        ),
    )
    norm_aware: bool = setting(
        True,
        "Where a block's outputs pass an RMS norm before they are added to the stream (Gemma 2 and 3, OLMo 2), take out "
        "what the norm turns into the direction, instead of the direction itself. Other models are not affected.",
        when="false to repeat what other tools do to these models.",
    )
