"""What the study searches, and how."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator

from heretic.settings.field import Range, Table, setting


def _rising(weights: list[float]) -> list[float]:
    if weights[0] <= 0 or any(a >= b for a, b in itertools.pairwise(weights)):
        raise ValueError("the weights must be positive and rise")
    return weights


class KernelSpace(Table):
    """The space of one component's kernel: strengths over the layers."""

    max_weight: Range = setting(
        [0.8, 1.5],
        "Range of the largest strength; what is drawn below 0 counts as exactly 0: this component is left alone.",
    )
    max_weight_position: Range = setting(
        [0.6, 1.0], "Range of the layer with the largest strength, as a share of the depth."
    )
    min_weight: Range = setting(
        [0.0, 1.0], "Range of the smallest strength inside the kernel, as a share of the largest."
    )
    min_weight_distance: Range = setting(
        [0.05, 0.6],
        "Range of the distance at which the smallest strength is reached, as a share of the depth; 0 strength beyond.",
    )


class GradientSettings(Table):
    """The walk: strengths and a direction by gradient, on the prompt sets that give the direction."""

    direction: Literal["mixture", "per_layer", "free"] = setting(
        "free",
        "One direction for all layers that is optimised too: `free`: any, at the price of `leaving` for what is outside the span "
        "of the layers' own; `mixture`: a mixture of the layers' own. Or `per_layer`: each layer's own as it is.",
    )
    leaving: float = setting(
        0.1, "Penalty on the share, squared, of a `free` direction that is outside the span of the layers'.", ge=0
    )
    weights: Annotated[list[float], AfterValidator(_rising)] = setting(
        [0.06, 0.12, 0.25, 0.5, 1.5],
        "Weights of refusing against change, from gentle to strict: each gives one point, and the next one starts from it.",
        min_length=1,
    )
    steps: int = setting(6, "Steps at each weight.", ge=1)
    batch: int = setting(16, "Prompts of each kind in a step.", ge=1)
    prompts: int = setting(
        64, "Prompts of each kind that are used, the first of `harmful_train` and of `harmless_train`.", ge=4
    )
    held_back: float = setting(0.25, "Share of them that no step sees and every point is measured on.", gt=0, lt=1)
    learning_rate: float = setting(0.15, "How far a step moves a strength, about.", gt=0)
    sparsity: float = setting(
        0.003, "Penalty on the sum of the strengths; it keeps writers that are not worth it at exactly 0.", ge=0
    )
    listen: bool = setting(
        True,
        "Where the original's words of refusing have become improbable at a point, answer the prompts again, and make the words "
        "with which some are still declined improbable too.",
    )
    kl_tokens: int = setting(1, "Tokens of the harmless answers whose change counts.", ge=1)
    refusal_tokens: int = setting(4, "Tokens of a refusal that are made improbable.", ge=1)


class Search(Table):
    """What the study searches, and how."""

    start: Literal["gradient", "kernels", "both"] = setting(
        "gradient",
        "`gradient`: first a walk by gradient from gentle to strict ablations; its points are the first trials, and the "
        "search goes on around them. `kernels`: four numbers a component, from nothing. `both`: trials of either kind. Where "
        "gradients are impossible it is `kernels`, and that is said.",
    )
    n_startup_trials: int = setting(30, "Trials drawn at random before TPE starts to model the results.", ge=0)
    kl_floor: float = setting(
        0.02,
        "A smaller KL divergence than this counts as this one while searching, so that trials are not spent on ablations "
        "that change nothing. The front and the choice use the measured values.",
        ge=0,
    )
    direction_scope: list[Literal["global", "per_layer"]] = setting(
        ["global", "per_layer"],
        "`global`: one layer's direction (or a mix of two neighbours) is removed everywhere; `per_layer`: each layer's own.",
        min_length=1,
    )
    direction_index: Range = setting(
        [0.4, 0.9], "Range of the layer that gives the global direction, as a share of the depth."
    )
    direction_per_component: bool = setting(
        False,
        "Trials by kernels draw scope and layer of the direction for attention and for the MLPs, each for itself.",
    )
    widen_bounds: bool = setting(
        False,
        "Let the largest strength of a kernel go beyond its range where the front crowds it: after every 20 trials, if half of the "
        "front is in the uppermost tenth, the upper bound rises by half of the range, three times at most.",
    )
    warm_start: bool = setting(
        False,
        "Begin with the front of earlier runs in `runs_dir` that were searched by kernels on a model with as many layers of this "
        "width and the same components: at most ten of their trials are measured first. They are looked for once and kept with "
        "the study. Not with `start` = `gradient`, which has its own beginning.",
    )
    gradient: GradientSettings = setting(GradientSettings(), "The walk by gradient.")
    attention: KernelSpace = setting(KernelSpace(), "The kernel over attention output projections.")
    mlp: KernelSpace = setting(KernelSpace(max_weight=[-0.25, 1.5]), "The kernel over MLP down projections.")
