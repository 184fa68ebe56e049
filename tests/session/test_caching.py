"""How many trials share a pass, and what is kept of the original's passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.judges.markers import MarkerJudge
from heretic.session import caching
from heretic.session.caching import enable_caching, tune_trials_per_batch
from tests.tiny import HARMFUL, HARMLESS


def evaluator(llama: Path, size: int) -> TrialEvaluator:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    chat = ChatFormat(model.tokenizer)
    judge = MarkerJudge(["sorry"])
    return TrialEvaluator(model, chat, chat.encode(HARMFUL[:10]), chat.encode(HARMLESS[:10]), judge, Batcher(size), 5)


@pytest.mark.parametrize(
    ("rates", "size", "expected"),
    [
        ({10: 100, 20: 110}, 512, 1),  # bound by arithmetic
        ({10: 100, 20: 190, 40: 300, 80: 310}, 512, 4),
        ({10: 100, 20: 190, 40: 300, 80: 600}, 40, 4),  # no more rows than a batch has
        ({10: 100, 20: 200, 40: 400, 80: 800, 160: 1600, 320: 3200}, 512, 16),
        ({10: 100, 20: 190, 40: 0}, 512, 2),
    ],
)
def test_as_many_trials_as_pay(
    rates: dict[int, float], size: int, expected: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_evaluator: object, rows: int) -> float:
        return rates[rows]

    monkeypatch.setattr(caching, "_rows_per_second", measured)
    assert tune_trials_per_batch(evaluator(llama, size)) == expected


def test_the_rate_is_really_measured(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluator(llama, 64)
    assert caching._rows_per_second(made, 10) > 10
    decode, tried = caching.decode, []

    def short(model: object, batch: Batch, *limits: Any) -> Any:
        tried.append(len(batch.rows))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return decode(model, batch, *limits)

    monkeypatch.setattr(caching, "decode", short)
    assert caching._rows_per_second(made, 10) == 0 and tried[:2] == [10, 5] and made.batcher.size == 64


def test_nothing_is_kept_that_does_not_fit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluator(llama, 64)
    texts = [[5, 6]] * 10
    assert enable_caching(made, texts).harmful_entries is not None
    monkeypatch.setattr(caching, "memory", lambda: (10**9, 1000))
    saving = enable_caching(made, texts)
    assert saving.harmful_entries is None and saving.harmless_entries is None and saving.drafts == texts
