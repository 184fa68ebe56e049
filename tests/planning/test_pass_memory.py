"""The plan against the peaks of pretend GPUs, by phase and GPU: never under, and at most 15 % over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model import batching
from heretic.model.batching import Batch, Batcher
from heretic.model.capture import mean_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import DecodingState, StopCriteria, continue_decoding, verify_draft
from heretic.model.loading import load
from heretic.model.turns import Turns, take_turns
from heretic.planning.memory_plan import make_plan
from heretic.planning.model_dims import ModelDims
from heretic.planning.pass_memory import PassMemory, Rows, rows_with_gradients
from heretic.planning.workload import GradientSearchWorkload, Workload
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs
from tests.helpers.pretend_gpus import PretendGpus
from tests.helpers.shapes import gpus
from tests.helpers.spread import spread
from tests.tiny import FAMILIES, MIXED, save_tiny

ROWS, OWN, DRAFT, NEW = 24, 20, 8, 3  # rows; tokens of a prompt after the shared ones, of a draft, of an answer
WIDE = dict(
    hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=4096
)
MORE = {"gemma3": {"sliding_window": 512}, "mixtral": {"intermediate_size": 384, "moe_intermediate_size": 384}}
SMALL = 16_384  # bytes of token ids and single numbers, which the plan leaves to its reserve
PROBE = 100_000  # bytes by which the plan of the probe after loading may be over


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("family", "count", "shared", "dtype", "readers"),
    [
        ("llama", 4, 48, torch.bfloat16, False),
        ("gemma3", 1, 48, torch.bfloat16, False),
        ("mixtral", 1, 0, torch.bfloat16, False),
        ("llama", 1, 0, torch.float32, False),
        ("llama", 1, 48, torch.bfloat16, True),
    ],
)
def test_every_phase_takes_what_is_planned(
    family: str,
    count: int,
    shared: int,
    dtype: torch.dtype,
    readers: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "FEWEST_TOKENS", 4)
    table = MIXED if family in MIXED else FAMILIES
    name, sizes = table[family]
    with mock.patch.dict(table, {family: (name, {**sizes, **WIDE, **MORE.get(family, {})})}):
        checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family, dtype=dtype)))
    sequences = [[5 + j for j in range(shared)] + [60 + i + j for j in range(OWN - i % 3)] for i in range(ROWS)]
    texts = [[7] * DRAFT for _ in sequences]
    placed = spread(family, count)
    work = Workload(
        shared + OWN, NEW, shared_tokens=shared, requests=ROWS, harmless=ROWS, training=ROWS, trials=1,
        gradient_search=GradientSearchWorkload(batch=ROWS // 2, prompts=ROWS, kl_tokens=1, refusal_tokens=4),
        readers=readers,
    )  # fmt: skip
    found = make_plan(
        checkpoint, work, device_map=placed, max_memory={}, dtypes=["auto"], batch_size=ROWS, devices=gpus(count, 24)
    )
    with PretendGpus(count) as cards:
        model = load(checkpoint, [found.dtype], {"device_map": placed}, readers=readers)
        measured = {"loading": list(cards.peak)}
        experts = [p.numel() * p.element_size() for p in model.model.parameters() if p.ndim == 3]
        structure = model.structure
        batcher = Batcher(ROWS, model.device, groups=count, prefix_caching=bool(shared))
        directions = Directions(torch.nn.functional.normalize(torch.randn(4, structure.width), dim=-1))
        texts_of = TeacherForcedTexts.of
        harmless, harmful = texts_of(sequences, [[0]] * ROWS), texts_of(sequences, [text[:4] for text in texts])
        original = all_log_probs(model, harmless, batcher, "original")

        def peak(phase: str, work: Callable[[], object]) -> None:
            cards.reset()
            work()
            measured[phase] = [max(pair) for pair in zip(measured.get(phase, cards.peak), cards.peak, strict=True)]

        def trial() -> None:
            states: list[DecodingState] = []

            def step(batch: Batch) -> Turns[list[None]]:
                tried = [texts[i] for i in batch.rows]
                states.append((yield from verify_draft(model.model, batch, tried, StopCriteria(NEW, set()))))
                return [None] * len(batch.rows)

            cards.reset()
            with_drafts = [[*s, *t] for s, t in zip(sequences, texts, strict=True)]
            batcher.run("drafts", with_drafts, step, decoding=True)
            measured["prefill"] = [max(pair) for pair in zip(measured["prefill"], cards.peak, strict=True)]
            assert len(states) == count, "micro-batches"
            going_on = [(None, continue_decoding(model.model, state, StopCriteria(NEW, set()))) for state in states]
            peak("decoding", lambda: list(take_turns(going_on, count)))

        factory = OperatorFactory.prepare(directions, structure.writers, "norm_preserving")
        peak("weight_stats", lambda: OperatorFactory.prepare(directions, structure.writers, "norm_preserving"))
        peak(
            "residuals",
            lambda: mean_residuals(model, "r", sequences, batcher),
        )
        operators = factory.operators(Ablation(dict.fromkeys(structure.components, (1.0,) * 4)))
        with apply_operators(structure.writers, operators):
            peak("prefill", lambda: measure_divergence(model, harmless, original, batcher))
            trial()
        half = dataclasses.replace(batcher, size=ROWS // 2)
        objective = Objective(model, factory, half, harmless, harmful, original.split(harmless.counts))
        strengths = torch.full((len(structure.components), 4), 0.5, requires_grad=True)
        vector = torch.ones(structure.width, requires_grad=True)
        ablation = Ablation(dict(zip(structure.components, strengths, strict=True)), vector=vector)
        rows, wanted = range(ROWS // 2), [strengths, vector]
        peak("gradients", lambda: objective.evaluate(ablation, 0, rows, rows, wanted=wanted))
        if dtype == torch.float32:
            again = dataclasses.replace(objective, recompute_activations=True)
            peak("checkpointing", lambda: again.evaluate(ablation, 0, rows, rows, wanted=wanted))
            dims = ModelDims.of(checkpoint.text_config, model.model)
    wrong = {}
    for phase, peaks in measured.items():
        for device, most in zip(found.loads, peaks, strict=True):
            if phase == "checkpointing":
                taken_rows = Rows(ROWS // 2, shared + OWN + 3)
                head = PassMemory(dims, 4).head(taken_rows, 2 * ROWS, 32, 12)
                planned = PassMemory(dims, 4, embedding=True).gradients(taken_rows, checkpointing=True, head=head)
            else:
                planned = getattr(device, phase) + (phase in ("prefill", "decoding")) * device.operators
            taken = most - device.weights
            most_planned = (1.5 if readers else 1.15) * taken + PROBE * (phase == "loading")
            # Threads decide whether the largest weight of a mixture is merged last, on top of all others.
            if phase == "loading" and family in MIXED:
                most_planned = taken = max(taken, *experts)
            if not taken - SMALL <= planned <= most_planned:
                wrong[phase, device.device.name] = (planned, taken)
    assert not wrong


def test_rows_with_gradients_fill_the_budget() -> None:
    dims = ModelDims.of(
        LlamaConfig(), SimpleNamespace(dtype=torch.bfloat16, named_modules=lambda: [], named_parameters=lambda: [])
    )  # type: ignore[arg-type]
    row = PassMemory(dims, dims.blocks).gradients(Rows(1, 100), checkpointing=False)
    assert rows_with_gradients(dims, 9 * row, 100, 100, on_cpu=False) == (9, False)
    assert rows_with_gradients(dims, 9 * row, 100, 100, on_cpu=True) == (5, False), "512 tokens"
    fewer, twice = rows_with_gradients(dims, 3 * row, 100, 100, on_cpu=False)
    assert twice and fewer > 9
    assert rows_with_gradients(dims, 1, 100, 100, on_cpu=False) == (1, True)
