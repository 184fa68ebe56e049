"""Gradient search of strengths and direction: minimize KL on harmless prompts + weight * mean -log(1 - p) of the refusals.

p is the probability of a reference refusal, as in refusal-direction optimization (Wollschläger et al. 2025, arXiv 2502.17420,
section 3), but over strengths and one direction for all layers. Each weight starts from the previous solution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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

MIDDLE = (0.6, 0.85)  # the layers whose directions the search begins with, as shares of the depth
MAX_STRENGTH = 2.5  # of a single writer; 1 removes the direction, 2 mirrors it
CONVERGED_REFUSALS = 0.005  # mean refusal probability below which the search ends
STILL_REFUSED = 0.1  # share of refused prompts above which a larger weight is added
NOTHING_GAINED = 0.9  # share above which a point is no use to the trials
# Factor between extra weights, and their maximum number. A model with many wordings of a refusal changes to the next one at every
# weight: Gemma 3 with the demo's guard needed 7 (dev/LOG.md).
EXTRA_FACTOR, MAX_EXTRA_WEIGHTS = 1.5, 8
MINE_BELOW = 0.1  # mean probability of the known refusals below which new ones are mined

MinedRefusals = tuple[int, list[int]]  # (row of the prompt in the objective, tokens of its new refusal)


@dataclass
class OptimizerState:
    """Resumable state of the search; without `vector` each layer uses its own direction."""

    strengths: Tensor  # [components, layers]
    vector: Tensor | None = None  # [count * width]
    steps: int = 0
    first_layer: int = 0  # nothing below it is edited
    points: list[PathPoint] = field(default_factory=list)
    extra_refusals: list[MinedRefusals] = field(default_factory=list)
    has_new_refusals: bool = False  # mined at the last point, or it gained nothing
    extra_weights: int = 0  # beyond those of the settings
    prompt_indices: list[int] = field(default_factory=list)  # of the refused prompts; empty: not known
    moments: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initial(cls, components: int, directions: Directions, kind: str) -> OptimizerState:
        """Create the state without edits; a free direction starts as the equal mixture of the middle layers'."""
        layers = directions.num_layers
        strengths, middle = torch.zeros(components, layers), torch.zeros(layers)
        low, high = (round(share * (layers - 1)) for share in MIDDLE)
        middle[low : high + 1] = 1
        return cls(strengths, orthonormal(directions.mixed_at(middle))[0].flatten() if kind == "free" else None)

    def remap_extra_refusals(self, places: Sequence[int]) -> None:
        """Map the mined refusals to these refused prompts, which another judge or batch size may have changed."""
        known = {place: row for row, place in enumerate(places)}
        before = self.prompt_indices or places
        moved = [(known.get(before[row]) if row < len(before) else None, words) for row, words in self.extra_refusals]
        self.extra_refusals = [(row, words) for row, words in moved if row is not None]
        self.prompt_indices = list(places)

    @property
    def converged(self) -> bool:
        """Whether the last point has almost no refusal probability left and no new refusals."""
        return bool(self.points) and self.points[-1].probability < CONVERGED_REFUSALS and not self.has_new_refusals

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The optimized tensors by name."""
        return {"strengths": self.strengths} | ({} if self.vector is None else {"vector": self.vector})


@dataclass
class PathOptimizer:
    """Optimizes the points by increasing weight; `save_state` receives the resumable state after every step.

    `mine` returns refusals in new words under an ablation, and the number of refused prompts; `add_targets` returns the objective
    with them. Otherwise an ablation could trade the known refusals for others that the objective does not measure.
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
        """Return all points. Raises Interrupted after a stop, RuntimeError if an operation has no backward pass."""
        self._add_refusals(state)
        steps, planned = self.settings.steps, len(self.settings.weights) * self.settings.steps
        while state.steps < self._last_step(state) and not state.converged:
            begin = 0 if state.steps < planned else state.steps - state.steps % steps
            self._run_to(state, begin, begin + steps if begin else planned)
        return state.points

    def _run_to(self, state: OptimizerState, begin: int, end: int) -> None:
        """Take the steps of a stage: those of the settings' weights, or of one extra weight."""
        steps = self.settings.steps
        with self.reporter.stage("Strengths by gradient", end - begin) as stage:
            stage.advance(state.steps - begin)
            while state.steps < end and not state.converged:
                self.stop.check()
                done = state.steps
                reading = self.step(state)
                weight = self._weight((state.steps - 1) // steps)
                if state.steps % steps == 0:
                    self._finish_point(state, weight)
                    self._prepare_next_weight(state)
                self.save_state(state)
                loss = reading.kl + weight * reading.refusing
                note = f"loss {loss:.3f}, KL {reading.kl:.3f}, refusal probability {reading.probability:.2f}"
                stage.advance(state.steps - done, note=note)

    def _prepare_next_weight(self, state: OptimizerState) -> None:
        """Mine refusals after a point, and add a larger weight if the last one left too many."""
        at_end = state.steps == self._last_step(state)
        if at_end and state.extra_weights >= MAX_EXTRA_WEIGHTS:
            return
        share = self._mine_refusals(state)
        if at_end and (share is None or share > STILL_REFUSED):
            state.extra_weights += 1
            self.reporter.info("More than a tenth of the prompts are still refused. Continuing with a larger weight.")
        if share is not None and share > NOTHING_GAINED:
            # The first point stays as the gentle end of the path. Its refusals are in other words than those measured.
            last = state.points.pop()
            if not state.points:
                state.points.append(replace(last, probability=share))
            state.has_new_refusals = True

    def _last_step(self, state: OptimizerState) -> int:
        return (len(self.settings.weights) + state.extra_weights) * self.settings.steps

    def _weight(self, number: int) -> float:
        """Return a weight of the settings, or an extra, larger one."""
        weights = self.settings.weights
        beyond = number - len(weights) + 1
        return weights[number] if beyond <= 0 else weights[-1] * EXTRA_FACTOR**beyond

    def _first_step(self, state: OptimizerState) -> LossTerms:
        """Take the first step, from strengths of 0, at the smallest weight that raises a strength; skip the weights below it.

        The KL has its minimum there, so the gradient is the weight times that of the refusals: one pass tells what every weight
        does. A strength rises if its gradient exceeds the L1 penalty.
        """
        reading, gradients = self._gradients(state, 1.0)
        steepest = -float(gradients["strengths"].nan_to_num(0.0, 0.0, 0.0).min())
        gentle = [w for w in self.settings.weights[:-1] if w * steepest <= self.settings.sparsity]
        if gentle:
            state.steps = len(gentle) * self.settings.steps
            self.reporter.info(f"Weights up to {gentle[-1]:g} are too small to change anything. heretic skips them.")
        weight = self._weight(len(gentle))
        self._update(state, {name: weight * gradient for name, gradient in gradients.items()})
        return reading

    def step(self, state: OptimizerState) -> LossTerms:
        """Take one step of Adam on one minibatch, then back into the allowed range."""
        if state.steps == 0:
            return self._first_step(state)
        reading, gradients = self._gradients(state, self._weight(state.steps // self.settings.steps))
        self._update(state, gradients)
        return reading

    def _gradients(self, state: OptimizerState, weight: float) -> tuple[LossTerms, dict[str, Tensor]]:
        """Evaluate one minibatch; returns the loss, and its gradients by tensor without the penalties."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in state.tensors.items()}
        harmless, harmful = (self._minibatch(rows, state.steps) for rows in self.train)
        # Mined refusals take up to half of every minibatch.
        mined = self._minibatch(self._refusals_in(self.train[1], state), state.steps, most=len(harmful) // 2)
        batch = [harmless, [*mined, *harmful][: len(harmful)]]
        ablation = self._ablation(leaves)
        reading = self.objective.evaluate(
            ablation, state.first_layer, *batch, weight=weight, wanted=list(leaves.values())
        )
        return reading, dict(zip(leaves, reading.gradients, strict=True))

    def _update(self, state: OptimizerState, gradients: dict[str, Tensor]) -> None:
        # L1 penalty: a strength stays above 0 only if it reduces the loss by more.
        gradients["strengths"] = gradients["strengths"] + self.settings.sparsity
        # While all strengths are 0 the direction has no gradient. Of the penalty's rounding, Adam would make a whole step.
        if state.vector is not None and gradients["vector"].any():
            vector = state.vector.detach().clone().requires_grad_()
            gradients["vector"] = gradients["vector"] + self._off_span_penalty(vector)
        for name, tensor in state.tensors.items():
            # A destroyed model has NaN gradients; the momentum carries on.
            self._adam(state, name, tensor, gradients[name].nan_to_num(0.0, 0.0, 0.0))
        state.strengths.clamp_(0, MAX_STRENGTH)
        state.strengths[:, : state.first_layer] = 0
        state.steps += 1

    def validate(self, state: OptimizerState) -> LossTerms:
        """Evaluate the state on the validation prompts."""
        harmful = [*self.validation[1], *self._refusals_in(self.validation[1], state)]
        return self.objective.evaluate(self._ablation(state.tensors), state.first_layer, self.validation[0], harmful)

    def _mine_refusals(self, state: OptimizerState) -> float | None:
        """Mine new refusals at the last point; returns the share of refused prompts, None if many are refused in known words."""
        if self.mine is None:
            return 0.0
        if state.points[-1].probability > MINE_BELOW:
            return None
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
        """Return the objective's rows of refusals mined from these prompts."""
        rows = set(part)
        return [self._refusals + i for i, (row, _) in enumerate(state.extra_refusals) if row in rows]

    def _ablation(self, tensors: Mapping[str, Tensor]) -> Ablation:
        strengths = dict(zip(self.components, tensors["strengths"], strict=True))
        return Ablation(strengths, vector=tensors.get("vector"))

    def _off_span_penalty(self, vector: Tensor) -> Tensor:
        """Compute the gradient of the squared share of each vector outside the span of the layers' directions."""
        span = torch.linalg.qr(self.objective.operator_factory.directions.all_directions.flatten(0, 1).T).Q
        unit = torch.nn.functional.normalize(vector.unflatten(0, (-1, len(span))), dim=1)
        outside = (unit - (unit @ span) @ span.T).square().sum()
        return self.settings.off_span_penalty * torch.autograd.grad(outside, vector)[0]

    def _minibatch(self, rows: Sequence[int], step: int, most: int | None = None) -> list[int]:
        """Select the minibatch of a step, from rows shuffled in every epoch."""
        size = min(self.settings.batch if most is None else most, len(rows))
        if not size:
            return []
        rounds, place = divmod(step, max(1, len(rows) // size))
        order = np.random.default_rng((self.seed, rounds)).permutation(len(rows))
        return [rows[i] for i in order[place * size : (place + 1) * size]]

    def _adam(self, state: OptimizerState, name: str, tensor: Tensor, gradient: Tensor) -> None:
        """Run torch.optim.Adam on one tensor, with its moments in the resumable state."""
        # A unit vector moves as far as a strength; without the scaling each component would.
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
        vector = None if state.vector is None else tuple(state.vector.tolist())
        state.points.append(PathPoint(weight, strengths, reading.kl, reading.probability, vector))
        self.reporter.info(
            f"Weight {weight:g}: KL {reading.kl:.4f}, refusal probability {reading.probability:.3f} on validation prompts; "
            f"edited from layer {state.first_layer}."
        )


def _split(count: int, held_back: float) -> tuple[list[int], list[int]]:
    """Split rows into training and validation."""
    held = max(1, round(count * held_back))
    return list(range(count - held)), list(range(count - held, count))
