"""Directions of a model: rounds, what is kept in memory, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import heretic.session.find_directions as finding
from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.batching import Batcher
from heretic.model.capture import last_token_residuals, mean_residuals
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import finish
from heretic.session.find_directions import find_directions
from heretic.settings import DirectionSettings as Wanted
from tests.helpers.errors import raises
from tests.tiny import HARMFUL, HARMLESS


@pytest.fixture
def model(llama: Path) -> LanguageModel:
    return load(open_checkpoint(str(llama)), ["float32"], {})


def found(model: LanguageModel, **wanted: object) -> Directions:
    chat = ChatFormat(model.tokenizer)
    return find_directions(model, chat.encode(HARMFUL[:16]), chat.encode(HARMLESS[:16]), Batcher(5), Wanted(**wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"method": "geometric_median"},
        {"method": "self_organizing_map", "count": 2, "iterative_rounds": 1},
        {"iterative_rounds": 2},
    ],
)
def test_as_many_as_asked_for_all_at_right_angles(model: LanguageModel, wanted: dict[str, object]) -> None:
    directions = found(model, **wanted)
    count = Wanted(**wanted).count * (1 + Wanted(**wanted).iterative_rounds)  # type: ignore[arg-type]
    assert directions.count == count and directions.all_directions.dtype == torch.float32
    eye = torch.eye(count).expand(4, count, count)
    assert torch.allclose(directions.all_directions @ directions.all_directions.mT, eye, atol=1e-5)


def test_the_first_round_is_what_a_single_round_finds_and_the_second_sees_an_ablated_model(
    model: LanguageModel,
) -> None:
    one, two = found(model, project_harmless=False), found(model, iterative_rounds=1, project_harmless=False)
    assert torch.allclose(one.vectors, two.vectors, atol=1e-6) and two.count == 2
    chat = ChatFormat(model.tokenizer)
    operator_factory = OperatorFactory.prepare(one, model.structure.writers, "plain")
    ablation = Ablation(dict.fromkeys(model.structure.components, (1.0,) * 4))
    with apply_operators(model.structure.writers, operator_factory.operators(ablation)):
        bad, good = (mean_residuals(model, "", chat.encode(p[:16]), Batcher(5)).mean for p in (HARMFUL, HARMLESS))
    left = bad - good
    left = left - (left * one.vectors).sum(-1, keepdim=True) * one.vectors
    assert torch.allclose(two.all_directions[:, 1].double(), torch.nn.functional.normalize(left, dim=-1), atol=1e-4)
    assert all(not module._forward_hooks for module in model.model.modules()), "the rounds left hooks behind"


def test_every_prompts_residuals_are_kept_in_the_order_of_the_prompts(model: LanguageModel) -> None:
    sequences = ChatFormat(model.tokenizer).encode(HARMFUL[:7])
    kept = mean_residuals(model, "", sequences, Batcher(3), keep_each=True)
    batch = Batcher(8).batch([4], sequences)
    assert torch.allclose(kept.require_per_prompt[4], finish(last_token_residuals(model, batch))[0], atol=1e-5)
    assert torch.allclose(kept.require_per_prompt.double().mean(dim=0), kept.mean, atol=1e-6)
    assert mean_residuals(model, "", sequences, Batcher(3)).per_prompt is None


def test_residuals_that_do_not_fit_are_refused_before_anything_is_run(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "memory", lambda: (2**14, 2**14))
    assert found(model).count == 1, "means need no room"
    with raises("insufficient-ram") as refused:
        found(model, method="geometric_median")
    assert refused.value.where == "directions.method" and "mean_difference" in str(refused.value.fix)


def test_residuals_that_are_not_finite_are_refused(model: LanguageModel) -> None:
    model.model.model.embed_tokens.weight.data.fill_(float("nan"))
    with raises("residuals-not-finite") as refused:
        found(model, method="self_organizing_map")
    assert refused.value.where == "dtypes"
