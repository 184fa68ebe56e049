"""KL over the first tokens of the original's own answer: what every saving gives is what plain passes give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heretic.ablation.apply import apply_operators
from heretic.model.batching import EditSpec
from heretic.scoring.scores import Scores
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs, answer_prefixes
from heretic.session.caching import enable_caching
from tests.scoring.test_refusal_count import ABLATIONS, model_context, refusal_texts
from tests.tiny import WINDOWED, save_tiny

TOKENS = 4


@torch.inference_mode()
def plainly(model: object, prompts: list[list[int]], texts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities by whole passes over one prompt after the other, without anything of ours."""
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = torch.tensor([[*prompt, *text[:-1]]])
        logits = model(input_ids=tokens).logits[0, -len(text) :]  # type: ignore[operator]
        found.append(torch.log_softmax(logits.double(), -1))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_kl_of_trials_that_share_passes_is_that_of_plain_passes(family: str, tmp_path: Path) -> None:
    evaluator, operator_factory, _ = model_context(
        save_tiny(tmp_path / "m", family), share=family not in WINDOWED, size=7
    )
    model = evaluator.language_model
    texts = answer_prefixes(model, evaluator.harmless, evaluator.batcher, TOKENS)
    assert {len(t) for t in texts} <= set(range(1, TOKENS + 1)) and max(map(len, texts)) == TOKENS
    evaluator = replace(evaluator, reference_tokens=texts)
    baseline = all_log_probs(model, evaluator.harmless_texts, evaluator.batcher, "Baseline")
    original = plainly(model.model, list(evaluator.harmless), texts)
    assert torch.allclose(baseline.double(), torch.cat(original), atol=1e-4)
    expected = []
    for ablation in ABLATIONS[:3]:
        with apply_operators(operator_factory.writers, operator_factory.operators(ablation)):
            now = plainly(model.model, list(evaluator.harmless), texts)
        per_prompt = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(original, now, strict=True)]
        expected.append(float(torch.stack(per_prompt).mean()))
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    assert (saving.harmless_entries is None) is (family in WINDOWED)
    operators = [operator_factory.operators(a) for a in ABLATIONS[:3]]
    for _ in range(2):  # the second time from what the first has kept
        with apply_operators(operator_factory.writers, *operators):
            found = saving.score_trials(baseline, EditSpec(3, 1))
        for one, kl in zip(found, expected, strict=True):
            assert isinstance(one, Scores) and one.divergence.mean == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert len({round(kl, 6) for kl in expected}) == 3


def test_the_texts_are_the_original_s_own_greedy_answers(llama: Path) -> None:
    evaluator, _, _ = model_context(llama, share=True)
    whole = answer_prefixes(evaluator.language_model, evaluator.harmless, evaluator.batcher, 9)
    taught = TeacherForcedTexts.of(evaluator.harmless, whole)
    best = all_log_probs(evaluator.language_model, taught, evaluator.batcher, "b").argmax(-1).split(taught.counts)
    for text, most_probable in zip(whole, best, strict=True):
        assert text[:-1] == most_probable[:-1].tolist() and text[-1] == 0


def test_a_baseline_of_other_texts_is_no_baseline(llama: Path) -> None:
    evaluator, _, baseline = model_context(llama, share=True)
    with pytest.raises(ValueError):
        replace(evaluator, reference_tokens=[[5, 0]] * 10).score(baseline)
