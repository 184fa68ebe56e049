"""Does a layer's direction carry refusal? What removing and adding it does to refusals and to other answers, without decoding.

The criteria by which Arditi et al. 2024 (arXiv 2406.11717, section 2.3 and appendix C) select a direction, with the probability of
known refusals in place of their refusal tokens, and the writers' outputs in place of the whole residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.batching import Batcher
from heretic.model.loading import LanguageModel
from heretic.model.patching import forward_hooks
from heretic.model.writer import first_tensor, with_first
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.teacher_forcing import TeacherForcedTexts, log_probs_at

PROMPTS = 16  # of each kind
# Appendix C: a direction with a larger KL, or in the last fifth of the layers, is not selected.
MOST_KL, DEPTH = 0.1, 0.8


@dataclass(frozen=True)
class DirectionEffects:
    """Effects by layer; refusal probabilities are those of the first tokens of the original's refusals."""

    necessity: Tensor  # [layers], refusal probability of refused prompts with the direction removed from every writer
    sufficiency: Tensor  # [layers], refusal probability of harmless prompts with the direction added after the layer
    kl: Tensor  # [layers], KL in nats at the first token on harmless prompts with the direction removed
    original: Tensor  # [2], refusal probability of refused and of harmless prompts without any change

    @property
    def best(self) -> int | None:
        """The layer whose direction carries refusal best by the criteria of Arditi et al.; None if no layer meets them."""
        layers = len(self.kl)
        allowed = (self.kl <= MOST_KL) & (self.sufficiency > self.original[1]) & (self.necessity < self.original[0])
        allowed &= torch.arange(layers) < DEPTH * layers
        left = torch.where(allowed, self.necessity, torch.inf)
        return int(left.argmin()) if bool(allowed.any()) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the data that --json prints."""
        names = ("necessity", "sufficiency", "kl")
        return {"best": self.best, "original": self.original.tolist(), **{n: getattr(self, n).tolist() for n in names}}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def direction_effects(
    language_model: LanguageModel,
    batcher: Batcher,
    directions: Directions,
    lengths: Tensor,
    refused: TeacherForcedTexts,
    harmless: Sequence[list[int]],
    *,
    norm_aware: bool = True,
) -> DirectionEffects:
    """Measure every layer's first direction, in three passes a layer.

    Args:
        language_model: The loaded model.
        batcher: Runs the batches.
        directions: The directions of every layer.
        lengths: Difference between the harmful and the harmless mean of every layer, its norm [layers]: so much is added.
        refused: Refused prompts with the first tokens of the refusals.
        harmless: Harmless prompts, as token ids.
        norm_aware: As the setting `ablation.norm_aware`.
    """
    structure = language_model.structure
    layers = structure.num_layers
    one = Directions(directions.vectors)
    factory = OperatorFactory.prepare(one, structure.writers, "plain", norm_aware=norm_aware)
    first_tokens = TeacherForcedTexts.of(harmless, [[0]] * len(harmless))
    original = log_probs_at(language_model, first_tokens, batcher)
    removing = Objective(language_model, factory, batcher, first_tokens, refused, original)
    opening, _ = Counter(tuple(text) for text in refused.texts).most_common(1)[0]
    adding = replace(removing, harmful=TeacherForcedTexts.of(harmless, [list(opening)] * len(harmless)))
    rows = [range(len(harmless)), range(len(refused.texts))]

    def induced() -> float:
        return adding.evaluate(Ablation({}), layers, [], rows[0]).probability

    before = removing.evaluate(Ablation({}), layers, [], rows[1]).probability, induced()
    necessity, sufficiency, kl = [], [], []
    with batcher.reporter.stage("Effects of the directions", layers) as stage:
        for layer in range(layers):
            mixture = tuple(float(i == layer) for i in range(layers))
            found = removing.evaluate(
                Ablation(dict.fromkeys(structure.writing_components, (1.0,) * layers), mixture), 0, *rows
            )
            with forward_hooks([(structure.blocks[layer], _adding(lengths[layer] * one.vectors[layer]))]):
                sufficiency.append(induced())
            necessity.append(found.probability)
            kl.append(found.kl)
            stage.advance()
    return DirectionEffects(*(torch.tensor(numbers) for numbers in (necessity, sufficiency, kl, before)))


def _adding(vector: Tensor) -> Callable[..., Any]:
    """Return a hook that adds a vector to a block's output at all tokens."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        stream = first_tensor(output)
        return with_first(output, stream + vector.to(stream))

    return hook
