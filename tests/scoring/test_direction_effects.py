"""What a layer's direction does: removal and addition against the same changes by hand, and the choice of a layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heretic.ablation.directions import Directions
from heretic.model.batching import Batcher
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.scoring.direction_effects import DirectionEffects, direction_effects
from heretic.scoring.teacher_forcing import TeacherForcedTexts

REFUSED, HARMLESS = [[5, 9, 17], [7, 8, 11, 60]], [[5, 21], [9, 33, 12]]
OPENING = [14, 15]


@torch.no_grad()
def test_removing_and_adding_are_what_they_are_by_hand(llama: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    torch.manual_seed(1)
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    texts = TeacherForcedTexts.of(REFUSED, [OPENING, OPENING])
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = direction_effects(model, Batcher(2), directions, lengths, texts, HARMLESS)

    def log_probs(prompt: list[int]) -> torch.Tensor:
        return model.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)

    def probability(prompts: list[list[int]]) -> float:
        each = []
        for prompt in prompts:
            rows = log_probs([*prompt, OPENING[0]])
            each.append(float((rows[-2, OPENING[0]] + rows[-1, OPENING[1]]).exp()))
        return sum(each) / len(each)

    assert found.original.tolist() == pytest.approx([probability(REFUSED), probability(HARMLESS)], rel=1e-4)
    before = [log_probs(prompt)[-1] for prompt in HARMLESS]
    for layer in (0, 2):
        v = directions.vectors[layer]
        block = model.structure.blocks[layer]
        handle = block.register_forward_hook(lambda _m, _i, o, added=lengths[layer] * v: o + added)
        assert float(found.sufficiency[layer]) == pytest.approx(probability(HARMLESS), rel=1e-4)
        handle.remove()
        handles = [
            writer.module.register_forward_hook(lambda _m, _i, o, v=v: o - (o @ v)[..., None] * v)
            for writer in model.structure.writers
        ]
        assert float(found.necessity[layer]) == pytest.approx(probability(REFUSED), rel=1e-4)
        kls = [(b.exp() * (b - log_probs(prompt)[-1])).sum() for b, prompt in zip(before, HARMLESS, strict=True)]
        assert float(found.kl[layer]) == pytest.approx(float(sum(kls)) / 2, rel=1e-3)
        for handle in handles:
            handle.remove()


def test_the_best_layer_leaves_least_refusal_within_the_limits() -> None:
    effects = DirectionEffects(
        necessity=torch.tensor([0.5, 0.2, 0.1, 0.3, 0.0]),
        sufficiency=torch.tensor([0.4, 0.4, 0.4, 0.01, 0.9]),
        kl=torch.tensor([0.01, 0.05, 0.2, 0.01, 0.01]),
        original=torch.tensor([0.9, 0.1]),
    )
    assert effects.best == 1, "not 2, of a large KL, nor 4, in the last fifth"
    assert effects.as_dict()["best"] == 1
    assert replace(effects, sufficiency=torch.zeros(5)).best is None
