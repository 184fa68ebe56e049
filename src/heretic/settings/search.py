"""What the study searches, and how."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator

from heretic.settings.field import Range, SettingsModel, setting


def _rising(weights: list[float]) -> list[float]:
    if weights[0] <= 0 or any(a >= b for a, b in itertools.pairwise(weights)):
        raise ValueError("the weights must be positive and rise")
    return weights


class KernelSpace(SettingsModel):
    """The space of one component's kernel: strengths over the layers."""

    max_weight: Range = setting(
        [0.8, 1.5],
        "Range of the largest strength; what is drawn below 0 counts as exactly 0: this component is left alone.",
        when=(
            "upper bound up, where the front's trials lie at it. 1 removes a direction; beyond, what is left of "
            "it points the other way, as long as before at 2."
        ),
    )
    max_weight_position: Range = setting(
        [0.6, 1.0],
        "Range of the layer with the largest strength, as a share of the depth.",
        when="where the report shows that the best trials crowd one end.",
    )
    min_weight: Range = setting(
        [0.0, 1.0], "Range of the smallest strength inside the kernel, as a share of the largest.", when=("seldom.")
    )
    min_weight_distance: Range = setting(
        [0.05, 0.6],
        "Range of the distance at which the smallest strength is reached, as a share of the depth; 0 strength beyond.",
        when="down for edits in few layers, up for edits everywhere.",
    )


class GradientSettings(SettingsModel):
    """The walk: strengths and a direction by gradient, on the prompt sets that give the direction."""

    direction: Literal["mixture", "per_layer", "free"] = setting(
        "free",
        "One direction for all layers that is optimized too: `free`: any, at the price of `leaving` for what is outside the span "
        "of the layers' own; `mixture`: a mixture of the layers' own. Or `per_layer`: each layer's own as it is.",
        when=(
            "`mixture` or `per_layer` to stay within what the prompts' means say; on one model both came out "
            "behind `free`."
        ),
    )
    off_span_penalty: float = setting(
        0.1,
        "Penalty on the share, squared, of a `free` direction that is outside the span of the layers'.",
        when="up, to keep the direction interpretable as a refusal direction; 0 lets it go anywhere.",
        ge=0,
    )
    weights: Annotated[list[float], AfterValidator(_rising)] = setting(
        [0.06, 0.12, 0.25, 0.5, 1.5],
        "Weights of refusing against change, from gentle to strict: each gives one point, and the next one starts from it.",
        when=(
            "more or larger ones for stricter points, smaller ones for gentler points; each costs `steps` steps "
            "and a measurement. The walk ends early where hardly any refusing is left (probability below 0.005), and goes "
            "on to stricter ones by itself where more than a tenth of the prompts are still declined after the last."
        ),
        min_length=1,
    )
    steps: int = setting(
        6,
        "Steps at each weight.",
        when=(
            "up, where the walk's points are still far from the front that the study finds; the walk's time grows "
            "with it."
        ),
        ge=1,
    )
    batch: int = setting(
        16,
        "Prompts of each kind in a step.",
        when=(
            "down for cheaper and noisier steps; not for memory: a step that does not fit into one pass is run in "
            "several."
        ),
        ge=1,
    )
    prompts: int = setting(
        64,
        "Prompts of each kind that are used, the first of `harmful_train` and of `harmless_train`.",
        when="up for a behavior with many faces; the prompts' answers are kept, a step costs the same.",
        ge=4,
    )
    validation_fraction: float = setting(
        0.25,
        "Share of them that no step sees and every point is measured on.",
        when=(
            "seldom. This share decides when the walk listens and when it ends; the trials are measured on the "
            "evaluation prompts."
        ),
        gt=0,
        lt=1,
    )
    learning_rate: float = setting(
        0.15,
        "How far a step moves a strength, about.",
        when="down, where the loss jumps; up with few `steps`.",
        gt=0,
    )
    sparsity: float = setting(
        0.003,
        "Penalty on the sum of the strengths; it keeps writers that are not worth it at exactly 0.",
        when="up for fewer edited writers and cheaper trials, 0 to let all take part.",
        ge=0,
    )
    mine_refusals: bool = setting(
        True,
        "Where the original's words of refusing have become improbable at a point, answer the prompts again, and make the words "
        "with which some are still declined improbable too.",
        when="false for a shorter walk; refusals in other words than the original's then stay for the trials to find.",
    )
    kl_tokens: int = setting(
        1,
        "Tokens of the harmless answers whose change counts.",
        when=(
            "with the setting `kl_tokens` of the trials, to minimize what they measure; every token makes the "
            "pass longer."
        ),
        ge=1,
    )
    refusal_tokens: int = setting(
        4,
        "Tokens of a refusal that are made improbable.",
        when='up, where refusals begin with words that answers begin with too ("As a chef, I").',
        ge=1,
    )


class SearchSettings(SettingsModel):
    """What the study searches, and how."""

    start: Literal["gradient", "kernels"] = setting(
        "gradient",
        "`gradient`: first a walk by gradient from gentle to strict ablations; its points are the first trials, and the "
        "search goes on around them. `kernels`: four numbers a component, from nothing. Where gradients are impossible it is "
        "`kernels`, and heretic says so.",
        when="`kernels` to search as other tools do, or where memory is too short for gradients.",
    )
    n_startup_trials: int = setting(
        30,
        "Until so many trials are finished, others are drawn at random; then TPE models the results.",
        when=(
            "down to 10 for studies of 30 to 50 trials: the walk's points count among them, and with as many as "
            "`n_trials` TPE is never asked."
        ),
        ge=0,
    )
    kl_floor: float = setting(
        0.02,
        "A smaller KL divergence than this counts as this one while searching, so that trials are not spent on ablations "
        "that change nothing. The front and the choice use the measured values.",
        when=(
            "down, where differences between very small changes matter to you; at 0 trials are spent on ablations "
            "that do nothing."
        ),
        ge=0,
    )
    direction_scope: list[Literal["global", "per_layer"]] = setting(
        ["global", "per_layer"],
        "`global`: one layer's direction (or a mix of two neighbors) is removed everywhere; `per_layer`: each layer's own.",
        when="to only one of the two, if earlier studies of the model show which wins. Only for trials by kernels.",
        min_length=1,
    )
    direction_index: Range = setting(
        [0.4, 0.9],
        "Range of the layer that gives the global direction, as a share of the depth.",
        when="where the report shows that the best trials crowd one end. Only for trials by kernels.",
    )
    gradient: GradientSettings = setting(GradientSettings(), "The walk by gradient.")
    attention: KernelSpace = setting(
        KernelSpace(),
        "The kernel over attention output projections: for trials by kernels (`start` = `kernels`, or no walk).",
    )
    mlp: KernelSpace = setting(
        KernelSpace(max_weight=[-0.25, 1.5]), "The kernel over MLP down projections: as for attention."
    )
