"""Micro-batches in turn over pretend GPUs: the results of one batch at a time, and no wait between launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model import batching
from heretic.model.batching import Batch, Batcher, EditSpec
from heretic.model.capture import mean_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import decode
from heretic.model.input_capture import writer_inputs
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import Turns
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs
from tests.helpers.pretend_gpus import PretendGpus
from tests.helpers.spread import spread
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("cuda")

SEQUENCES = [[5 + j for j in range(12)] + [5 + (i * 7 + j) % 80 for j in range(4 + i % 3)] for i in range(8)]
TOKENS = 13  # of an answer: the first by the prompt's pass, twelve until the host reads


class Measuring:
    """All passes of a study over one loaded model, and how often the host had waited when each forward pass began."""

    def __init__(self, gpus: PretendGpus, model: LanguageModel) -> None:
        self.gpus, self.model = gpus, model
        self.waited: list[int] = []
        model.structure.blocks[0].register_forward_pre_hook(lambda *_: self.waited.append(self.waits))
        directions = Directions(torch.nn.functional.normalize(torch.randn(4, model.structure.width), dim=-1))
        self.factory = OperatorFactory.prepare(directions, model.structure.writers, "norm_preserving")
        self.operators = self.factory.operators(Ablation({"mlp": (0.5,) * 4}))
        self.texts = TeacherForcedTexts.of(SEQUENCES, [[7, 8]] * 8)
        self.original = all_log_probs(model, self.texts, Batcher(8, model.device), "original")

    @property
    def waits(self) -> int:
        return sum(self.gpus.syncs["-"].values())

    def residuals(self, batcher: Batcher) -> list[torch.Tensor]:
        return [mean_residuals(self.model, "r", SEQUENCES, batcher).mean]

    def inputs(self, batcher: Batcher) -> list[torch.Tensor]:
        writers, whole = self.model.structure.writers, replace(batcher, prefix_caching=False)
        return list(writer_inputs(self.model, writers, "i", SEQUENCES, [[1, 2]] * 8, whole).values())

    def baseline(self, batcher: Batcher) -> list[torch.Tensor]:
        return [all_log_probs(self.model, self.texts, batcher, "b")]

    def divergence(self, batcher: Batcher) -> list[torch.Tensor]:
        with apply_operators(self.model.structure.writers, self.operators, {}):
            found = measure_divergence(self.model, self.texts, self.original, batcher, EditSpec(2))
        return [torch.tensor(each.per_prompt) for each in found]

    def answers(self, batcher: Batcher) -> list[torch.Tensor]:
        def step(batch: Batch) -> Turns[list[list[int]]]:
            return decode(self.model.model, batch, TOKENS, set())

        with apply_operators(self.model.structure.writers, self.operators, {}):
            found = batcher.run_items("a", SEQUENCES, step, edited=EditSpec(2), decoding=True)
        return [torch.tensor([found[i] for i in range(16)])]

    def gradients(self, batcher: Batcher) -> list[torch.Tensor]:
        structure = self.model.structure
        objective = Objective(
            self.model, self.factory, batcher, self.texts, self.texts, self.original.split(self.texts.counts)
        )
        strengths, vector = torch.full((2, 4), 0.5, requires_grad=True), torch.ones(structure.width, requires_grad=True)
        ablation = Ablation(dict(zip(structure.components, strengths, strict=True)), vector=vector)
        found = objective.evaluate(ablation, 0, range(8), range(8), wanted=[strengths, vector])
        return [torch.tensor([found.kl, found.probability]), *found.gradients]


@pytest.mark.parametrize(
    ("family", "count", "shared"),
    [
        ("llama", 4, False),
        ("llama", 4, True),
        ("llama", 1, True),
        ("gemma3", 4, False),
        ("mixtral", 4, False),
        ("gpt2", 2, False),
    ],
)
def test_results_are_those_of_one_batch_and_nothing_waits_between_launches(
    family: str, count: int, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "FEWEST_TOKENS", 1)
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family)))
    with PretendGpus(count) as gpus:
        model = load(checkpoint, ["float32"], {"device_map": spread(family, count)})
        assert model.groups == count
        measuring = Measuring(gpus, model)

        def measured(work: Callable[[Batcher], list[Any]], groups: int) -> tuple[list[Any], list[int], int]:
            gpus.reset()
            measuring.waited.clear()
            found = work(Batcher(16, model.device, groups=groups, prefix_caching=shared))
            return found, list(measuring.waited), measuring.waits

        kinds = ("residuals", "inputs", "baseline", "divergence", "answers", "gradients")
        for work in (getattr(measuring, kind) for kind in kinds):
            expected, _, alone = measured(work, 1)
            found, waited, waits = measured(work, count)
            for one, other in zip(expected, found, strict=True):
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), work.__name__
            launched = waited[:count]  # forward passes before the first read, with that of the shared prefix
            assert len(launched) == count and launched == launched[:1] * count, work.__name__
            if work.__name__ == "answers":
                assert waits == 2 * count, "for the first token, and for twelve"
            if work.__name__ == "gradients":
                assert waits == alone == 2
            if work.__name__ in ("residuals", "inputs", "baseline"):
                assert {target - source for _, source, target, _ in gpus.peer_bytes} <= {1}, "only to the next GPU"
