"""How directions are found, and what is done with them."""

from __future__ import annotations

from typing import Literal

from heretic.settings.field import Table, setting

Geometry = Literal["plain", "row_normalized", "norm_preserving"]


class Directions(Table):
    """How the refusal direction of every layer is found."""

    project_harmless: bool = setting(
        True,
        "Make every direction orthogonal to the mean residual of the harmless prompts, so that removing it "
        "leaves what ordinary requests have in common alone.",
    )
    winsorize: float = setting(
        1.0,
        "Clip the components of every residual vector to this quantile of their magnitudes before averaging; "
        "0.995 tames models with a few huge components, 1.0 clips nothing.",
        gt=0.5,
        le=1.0,
    )


class AblationSettings(Table):
    """What is done to the weights that write to the residual stream."""

    geometry: Geometry = setting(
        "norm_preserving",
        "`plain`: W' = (I - s v vT) W. `row_normalized`: the same on rows scaled to norm 1, scaled back afterwards. "
        "`norm_preserving`: then every row is given its old norm again.",
    )
    norm_aware: bool = setting(
        True,
        "Where a block's outputs pass an RMS norm before they are added to the stream (Gemma 2 and 3, OLMo 2), take out "
        "what the norm turns into the direction, instead of the direction itself. Other models are not affected.",
    )
