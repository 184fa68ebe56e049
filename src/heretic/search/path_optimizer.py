"""Strengths and a direction by gradient descent: the least change for the fewest refusals, from gentle to strict.

Minimised is the KL divergence on harmless prompts + a weight x the mean -log(1 - p) of the words with which the original
declines, as in refusal-direction optimization (Wollschläger et al. 2025, arXiv 2502.17420, section 3) but over strengths and a
mixture of the layers' mean differences instead of a free vector. Each weight starts from the solution of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions, orthonormal
from heretic.interrupt import StopSignal
from heretic.progress import ProgressReporter
from heretic.scoring.gradient_loss import LossTerms, Objective
from heretic.search.gradient_path import PathPoint
from heretic.settings import GradientSettings

MIDDLE = (0.6, 0.85)  # the layers whose directions the mixture begins with, as shares of the depth
MAX_STRENGTH = 2.5  # of a single writer; 1 removes the direction, 2 mirrors it
CONVERGED_REFUSALS = 0.005  # mean probability of refusing at which nothing is left to push down
MIN_STEPS_PER_WEIGHT = 2  # steps from nothing after which a weight that raised no strength is taken to raise none
STILL_REFUSED = 0.1  # share of the prompts, in whatever words, above which the walk goes on to stricter weights
EXTRA_FACTOR, MAX_EXTRA_WEIGHTS = 3.0, 4  # each that many times the one before, and at most so many
MINE_BELOW = 0.1  # mean probability of refusing in the words known so far; above, others would hardly be heard

MinedRefusals = tuple[
    int, list[int]
]  # a declined prompt by its place among the objective's, and the words with which it still is


@dataclass
class OptimizerState:
    """The descent so far: numbers that a step changes, the optimizer's own, and the points that are finished.

    `strengths` [components, layers]; `mixture` [layers] or `vector` [count x width] is the direction (neither: each layer's own).
    `first_layer`: below it nothing is edited any more. `heard`: other words than the original's that were made improbable too;
    `just_heard`: whether some of them are from the last point. `further`: how many weights beyond those of the settings.
    `places`: where the declined prompts by which `heard` counts stand in the prompt set (empty: not known).
    """

    strengths: Tensor
    mixture: Tensor | None = None
    vector: Tensor | None = None
    steps: int = 0
    first_layer: int = 0
    points: list[PathPoint] = field(default_factory=list)
    extra_refusals: list[MinedRefusals] = field(default_factory=list)
    has_new_refusals: bool = False
    extra_weights: int = 0
    prompt_indices: list[int] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initial(cls, components: int, directions: Directions, kind: str) -> OptimizerState:
        """Nothing edited; the direction an equal mixture of those of the middle layers, or what that comes to."""
        layers = directions.num_layers
        strengths, mixture = torch.zeros(components, layers), torch.zeros(layers)
        low, high = (round(share * (layers - 1)) for share in MIDDLE)
        mixture[low : high + 1] = 1
        if kind == "mixture":
            return cls(strengths, mixture)
        return cls(strengths, vector=orthonormal(directions.mixed_at(mixture))[0].flatten() if kind == "free" else None)

    def remap_extra_refusals(self, places: Sequence[int]) -> None:
        """Let `heard` count by these declined prompts, which may be others than in an earlier session: another judge, another
        batch size."""
        known = {place: row for row, place in enumerate(places)}
        before = self.prompt_indices or places
        moved = [(known.get(before[row]) if row < len(before) else None, words) for row, words in self.extra_refusals]
        self.extra_refusals = [(row, words) for row, words in moved if row is not None]
        self.prompt_indices = list(places)

    @property
    def converged(self) -> bool:
        """Whether hardly any refusing is left at the last point."""
        return bool(self.points) and self.points[-1].probability < CONVERGED_REFUSALS and not self.has_new_refusals

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is being optimized, by name."""
        all_of_them = {"strengths": self.strengths, "mixture": self.mixture, "vector": self.vector}
        return {name: t for name, t in all_of_them.items() if t is not None}


@dataclass
class PathOptimizer:
    """Walks from gentle to strict; `keep` receives the state after every step, and a state that was kept goes on as if
    it had not been interrupted.

    `listen` gives what is still declined under an ablation in words not known yet, and how many prompts are at all; `teach` gives
    the objective with such words among its refusals: an ablation can trade the original's words for others, which the objective
    would not see.
    """

    objective: Objective
    components: Sequence[str]
    settings: GradientSettings
    seed: int
    reporter: ProgressReporter
    stop: StopSignal
    save_state: Callable[[OptimizerState], None] = lambda _: None
    mine: Callable[[Ablation], tuple[Sequence[MinedRefusals], int]] | None = None
    add_targets: Callable[[Sequence[MinedRefusals]], Objective] | None = None

    def __post_init__(self) -> None:
        self._refusals = len(self.objective.harmful.sequences)
        both = (self.objective.harmless, self.objective.harmful)
        parts = [_split(len(taught.sequences), self.settings.validation_fraction) for taught in both]
        self.train, self.validation = [train for train, _ in parts], [held for _, held in parts]

    def run(self, state: OptimizerState) -> list[PathPoint]:
        """All points. Raises Interrupted after a stop, RuntimeError where a kernel of the model has no backward."""
        steps = self.settings.steps
        self._add_refusals(state)
        with self.reporter.stage("Strengths by gradient", len(self.settings.weights) * steps) as stage:
            stage.advance(state.steps)
            while state.steps < self._last_step(state) and not state.converged:
                self.stop.check()
                done, weight = state.steps, self._weight(state.steps // steps)
                reading = self.step(state, weight)
                if self._too_gentle(state):
                    state.steps += -state.steps % steps
                    self.reporter.info(f"Weight {weight:g} is too gentle to change anything; on to the next.")
                elif state.steps % steps == 0:
                    self._finish_point(state, weight)
                    self._prepare_next_weight(state)
                self.save_state(state)
                loss = reading.kl + weight * reading.refusing
                note = f"loss {loss:.3f}, KL {reading.kl:.3f}, probability of refusing {reading.probability:.2f}"
                stage.advance(state.steps - done, note=note)
        return state.points

    def _prepare_next_weight(self, state: OptimizerState) -> None:
        """After a point: learn from it for the next one, which is one more where the last has left too much."""
        at_end = state.steps == self._last_step(state)
        if at_end and state.extra_weights == MAX_EXTRA_WEIGHTS:
            return
        if self._mine_refusals(state) > STILL_REFUSED and at_end:
            state.extra_weights += 1
            self.reporter.info("More than a tenth of the prompts are still declined; on to a stricter weight.")

    def _last_step(self, state: OptimizerState) -> int:
        return (len(self.settings.weights) + state.extra_weights) * self.settings.steps

    def _weight(self, number: int) -> float:
        """The settings' weights, and beyond them stricter ones."""
        weights = self.settings.weights
        beyond = number - len(weights) + 1
        return weights[number] if beyond <= 0 else weights[-1] * EXTRA_FACTOR**beyond

    def _too_gentle(self, state: OptimizerState) -> bool:
        """Whether the rest of a weight's steps can be spared: refusing is not worth any strength's penalty. Never of the last."""
        steps = self.settings.steps
        at_last = state.steps > (len(self.settings.weights) - 1) * steps
        told = steps > MIN_STEPS_PER_WEIGHT and state.steps % steps == MIN_STEPS_PER_WEIGHT
        return told and not at_last and not state.strengths.any()

    def step(self, state: OptimizerState, weight: float) -> LossTerms:
        """One step of Adam on one minibatch, then back into the allowed range."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in state.tensors.items()}
        harmless, harmful = (self._minibatch(rows, state.steps) for rows in self.train)
        # Of the words that were heard some take part in every step, in the place of up to half of the others.
        mined = self._minibatch(self._refusals_in(self.train[1], state), state.steps, most=len(harmful) // 2)
        batch = [harmless, [*mined, *harmful][: len(harmful)]]
        ablation = self._ablation(leaves)
        reading = self.objective.evaluate(
            ablation, state.first_layer, *batch, weight=weight, wanted=list(leaves.values())
        )
        gradients = dict(zip(leaves, reading.gradients, strict=True))
        # As a penalty in the loss: a strength stays above 0 only where it is worth more than this.
        gradients["strengths"] = gradients["strengths"] + self.settings.sparsity
        if "vector" in leaves:
            gradients["vector"] = gradients["vector"] + self._off_span_penalty(leaves["vector"])
        for name, tensor in state.tensors.items():
            # A destroyed model has no slope; the momentum of the steps before leads on.
            self._adam(state, name, tensor, gradients[name].nan_to_num(0.0, 0.0, 0.0))
        state.strengths.clamp_(0, MAX_STRENGTH)
        state.strengths[:, : state.first_layer] = 0
        state.steps += 1
        return reading

    def validate(self, state: OptimizerState) -> LossTerms:
        """The state on the prompts that no step sees."""
        harmful = [*self.validation[1], *self._refusals_in(self.validation[1], state)]
        return self.objective.evaluate(self._ablation(state.tensors), state.first_layer, self.validation[0], harmful)

    def _mine_refusals(self, state: OptimizerState) -> float:
        """Learn the words with which prompts are still declined at the last point; the share of the prompts that are."""
        if self.mine is None or state.points[-1].probability > MINE_BELOW:
            return 1.0 if self.mine else 0.0
        mined, refused = self.mine(state.points[-1].ablation)
        new = [h for h in mined if h not in state.extra_refusals]
        state.extra_refusals += new
        state.has_new_refusals = bool(new)
        self._add_refusals(state)
        return refused / self._refusals

    def _add_refusals(self, state: OptimizerState) -> None:
        if state.extra_refusals and self.add_targets is not None:
            self.objective = self.add_targets(state.extra_refusals)

    def _refusals_in(self, part: Sequence[int], state: OptimizerState) -> list[int]:
        """The objective's rows of what was heard from prompts of this part."""
        rows = set(part)
        return [self._refusals + i for i, (row, _) in enumerate(state.extra_refusals) if row in rows]

    def _ablation(self, tensors: Mapping[str, Tensor]) -> Ablation:
        strengths = dict(zip(self.components, tensors["strengths"], strict=True))
        return Ablation(strengths, tensors.get("mixture"), vector=tensors.get("vector"))

    def _off_span_penalty(self, vector: Tensor) -> Tensor:
        """Slope of the penalty on the share of each vector, squared, that is outside the span of the layers' directions."""
        span = torch.linalg.qr(self.objective.operator_factory.directions.all_directions.flatten(0, 1).T).Q
        unit = torch.nn.functional.normalize(vector.unflatten(0, (-1, len(span))), dim=1)
        outside = (unit - (unit @ span) @ span.T).square().sum()
        return self.settings.off_span_penalty * torch.autograd.grad(outside, vector)[0]

    def _minibatch(self, rows: Sequence[int], step: int, most: int | None = None) -> list[int]:
        """The rows in an order that changes with every round through them, as many as a step takes, or at most so many."""
        size = min(self.settings.batch if most is None else most, len(rows))
        if not size:
            return []
        rounds, place = divmod(step, max(1, len(rows) // size))
        order = np.random.default_rng((self.seed, rounds)).permutation(len(rows))
        return [rows[i] for i in order[place * size : (place + 1) * size]]

    def _adam(self, state: OptimizerState, name: str, tensor: Tensor, gradient: Tensor) -> None:
        """torch.optim.Adam on one tensor, its moments where they can be kept."""
        # A vector of norm 1 is to move as far as a strength, not each of its components.
        width = self.objective.operator_factory.directions.vectors.shape[-1]
        rate = self.settings.learning_rate / (width**0.5 if name == "vector" else 1)
        optimizer = torch.optim.Adam([tensor], lr=rate)
        moments = [f"{name}.{which}" for which in ("step", "exp_avg", "exp_avg_sq")]
        if all(m in state.moments for m in moments):
            optimizer.state[tensor] = {m.rpartition(".")[2]: state.moments[m] for m in moments}
        tensor.grad = gradient
        optimizer.step()
        tensor.grad = None
        state.moments.update({m: optimizer.state[tensor][m.rpartition(".")[2]] for m in moments})

    def _finish_point(self, state: OptimizerState, weight: float) -> None:
        used = state.strengths.sum(dim=0).nonzero()
        state.first_layer = int(used[0]) if len(used) else state.first_layer
        reading = self.validate(state)
        strengths = {c: tuple(row) for c, row in zip(self.components, state.strengths.tolist(), strict=True)}
        mixture, vector = (None if t is None else tuple(t.tolist()) for t in (state.mixture, state.vector))
        state.points.append(PathPoint(weight, strengths, mixture, reading.kl, reading.probability, vector))
        self.reporter.info(
            f"Weight {weight:g}: KL {reading.kl:.4f}, probability of refusing {reading.probability:.3f} on prompts held back; "
            f"edited from layer {state.first_layer}."
        )


def _split(count: int, held_back: float) -> tuple[list[int], list[int]]:
    """Rows for the steps, and rows held back."""
    held = max(1, round(count * held_back))
    return list(range(count - held)), list(range(count - held, count))
