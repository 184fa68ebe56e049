"""Settings of the search: sampler, gradient search and strength kernels."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator

from heretic.settings.field import Range, SettingsModel, setting


def _rising(weights: list[float]) -> list[float]:
    if weights[0] <= 0 or any(a >= b for a, b in itertools.pairwise(weights)):
        raise ValueError("the weights must be positive and increasing")
    return weights


class KernelSpace(SettingsModel):
    """The search space of one component's strength kernel over the layers."""

    max_weight: Range = setting(
        [0.8, 1.5],
        "Range of the highest strength. Samples below 0 count as 0. Strength 1 removes the direction; 2 reverses it.",
        when="Raise the upper bound if the best trials are close to it.",
    )
    max_weight_position: Range = setting(
        [0.6, 1.0],
        "Range of the layer with the highest strength, as a fraction of the depth.",
        when="Change it if the report shows the best trials at one end.",
    )
    min_weight: Range = setting(
        [0.0, 1.0],
        "Range of the lowest strength inside the kernel, as a fraction of the highest.",
        when="Rarely needs a change.",
    )
    min_weight_distance: Range = setting(
        [0.05, 0.6],
        "Range of the distance at which the kernel ends, as a fraction of the depth.",
        when="Lower it to edit few layers, raise it to edit many.",
    )


class GradientSettings(SettingsModel):
    """The gradient search over strengths and a direction, on the two training prompt sets."""

    direction: Literal["per_layer", "free"] = setting(
        "free",
        "`free`: optimize one direction for all layers. `per_layer`: use each layer's own, unchanged.",
        when="Use `per_layer` to stay with the measured directions; on one model it was worse than `free`.",
    )
    off_span_penalty: float = setting(
        0.1,
        "Penalty on the squared fraction of a `free` direction outside the span of the layers' directions.",
        when="Raise it to keep the direction interpretable; 0 removes the constraint.",
        ge=0,
    )
    weights: Annotated[list[float], AfterValidator(_rising)] = setting(
        [0.06, 0.12, 0.25, 0.5, 1.5],
        "Weights of the refusal loss against the KL loss, from gentle to strict. Each gives one point of the path "
        "and starts from the previous one.",
        when=(
            "Larger weights give stricter points, smaller ones gentler points. The path stops early below a refusal "
            "probability of 0.005, and continues with larger weights if the model still refuses more than a tenth of the "
            "prompts."
        ),
        min_length=1,
    )
    steps: int = setting(
        6,
        "Optimization steps per weight.",
        when="Raise it if the gradient search's points are far from the study's final Pareto front.",
        ge=1,
    )
    batch: int = setting(
        16,
        "Prompts of each kind per step.",
        when=(
            "Lower it for cheaper, noisier steps. It does not limit memory: heretic splits a step that does not fit into "
            "several passes."
        ),
        ge=1,
    )
    prompts: int = setting(
        64,
        "Prompts of each kind, from the start of `harmful_train` and `harmless_train`.",
        when="Raise it for a varied behavior; the cost of a step does not change.",
        ge=4,
    )
    validation_fraction: float = setting(
        0.25,
        "Fraction of these prompts held out from the steps, to measure each point and decide when to stop.",
        when="Rarely needs a change.",
        gt=0,
        lt=1,
    )
    learning_rate: float = setting(
        0.15,
        "Approximate change of a strength per step.",
        when="Lower it if the loss is unstable; raise it with few `steps`.",
        gt=0,
    )
    sparsity: float = setting(
        0.003,
        "L1 penalty on the strengths; it keeps unimportant writers at exactly 0.",
        when="Raise it to edit fewer writers, which makes trials cheaper; 0 allows all.",
        ge=0,
    )
    mine_refusals: bool = setting(
        True,
        "Once the reference refusals are improbable at a point, generate responses again and make the new refusals "
        "improbable too.",
        when=(
            "Set false for a shorter gradient search; the trials must then find edits against other refusal phrases."
        ),
    )
    second_search: bool = setting(
        True,
        "If the path leaves more than a quarter of the prompts unanswered, search again with each layer's own direction "
        "and no sparsity, and keep the second path if it leaves at most half as many.",
        when="Set false to keep `direction` and `sparsity` in any case; the check costs a trial's time.",
    )
    kl_tokens: int = setting(
        1,
        "Tokens of the harmless responses in the KL loss.",
        when="Set it to the top-level `kl_tokens` to minimize what trials measure. Every token makes a pass longer.",
        ge=1,
    )
    refusal_tokens: int = setting(
        4,
        "Tokens of a refusal in the refusal loss.",
        when='Raise it if refusals and answers begin with the same words ("As a chef, I").',
        ge=1,
    )


class SearchSettings(SettingsModel):
    """The search space and the sampler."""

    start: Literal["gradient", "kernels"] = setting(
        "gradient",
        "`gradient`: a gradient search from gentle to strict ablations gives the first trials, and TPE continues around "
        "them. `kernels`: TPE over four parameters per component, also if gradients are impossible.",
        when="Use `kernels` to search as other tools do, or if memory is too small for gradients.",
    )
    n_startup_trials: int = setting(
        10,
        "Trials before TPE starts; those not given by the gradient search are random.",
        when="Raise it to 30 for kernels with 100 trials and more. With `n_trials` or more, TPE never starts.",
        ge=0,
    )
    patience: int = setting(
        10,
        "The study ends once the last `patience` finished trials have raised the hypervolume of the Pareto front by at most "
        "`min_gain`. Trials before TPE starts do not count. 0: run all `n_trials`.",
        when="Set 0 to compare studies at equal numbers of trials; raise it if `--trials +50` still improves the front.",
        affects_results=False,
        ge=0,
    )
    min_gain: float = setting(
        0.01,
        "Largest gain within `patience` trials that counts as none, as a fraction of the hypervolume.",
        when="Lower it for the last small gains, at the cost of more trials.",
        affects_results=False,
        ge=0,
        lt=1,
    )
    kl_floor: float = setting(
        0.02,
        "The search treats a lower KL divergence as this value, so that it does not spend trials on edits without effect.",
        when="Lower it if differences between very small changes matter to you.",
        ge=0,
    )
    direction_scope: list[Literal["global", "per_layer"]] = setting(
        ["global", "per_layer"],
        "`global`: one layer's direction (or a mix of two neighbors) for all layers. `per_layer`: each layer's own. "
        "Only for kernel trials.",
        when="Keep one of them if earlier studies of the model show which is better.",
        min_length=1,
    )
    direction_index: Range = setting(
        [0.4, 0.9],
        "Range of the layer that gives the global direction, as a fraction of the depth. Only for kernel trials.",
        when="Change it if the report shows the best trials at one end.",
    )
    gradient: GradientSettings = setting(GradientSettings(), "The gradient search.")
    attention: KernelSpace = setting(
        KernelSpace(),
        "Strength kernel of the attention output projections, for kernel trials only.",
    )
    mlp: KernelSpace = setting(
        KernelSpace(max_weight=[-0.25, 1.5]),
        "Strength kernel of the MLP down projections, for kernel trials only.",
    )
