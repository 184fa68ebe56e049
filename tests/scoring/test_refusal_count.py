"""Trials that share passes, with everything saved that can be, get the verdicts that each gets alone and in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.model import batching
from heretic.model.batching import Batcher, EditSpec
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import DecodingState, StopCriteria, continue_decoding
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import Turns
from heretic.scoring import refusal_count
from heretic.scoring.divergence import first_token_log_probs
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.judges.markers import MarkerJudge
from heretic.scoring.judges.verdict import Exchange, Verdict, WholeAnswerJudge
from heretic.scoring.refusal_count import RefusalBounds
from heretic.scoring.refusal_proxy import FIRST_TOKENS, MAX_DRAFT_TOKENS
from heretic.scoring.scores import PrunedTrial, Scores
from heretic.scoring.teacher_forcing import TeacherForcedTexts, log_probs_at
from heretic.session.caching import enable_caching
from tests.tiny import FAMILIES, HARMFUL, HARMLESS, WINDOWED, save_tiny

ABLATIONS = [
    Ablation.from_kernels({c: StrengthKernel(strength, 3.0, 0.4, reach) for c in ("attention", "mlp")}, 4)
    for strength, reach in ((1.2, 1.0), (0.7, 2.0), (3.0, 1.5), (0.0, 1.0), (1.5, 4.0))
]


def model_context(folder: Path, *, share: bool, size: int = 64) -> tuple[TrialEvaluator, OperatorFactory, torch.Tensor]:
    model = load(open_checkpoint(str(folder)), ["float32"], {})
    chat = ChatFormat(model.tokenizer)
    batcher = Batcher(size, prefix_caching=share)
    evaluator = TrialEvaluator(
        model, chat, chat.encode(HARMFUL[:14]), chat.encode(HARMLESS[:10]), MarkerJudge(["sorry"]), batcher, 12
    )
    torch.manual_seed(3)
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    operator_factory = OperatorFactory.prepare(directions, model.structure.writers, "norm_preserving")
    whole = replace(evaluator, judge=MarkerJudge(["nothing"])).refusals()
    answers = [chat.text(list(tokens)) for tokens in whole.tokens]
    # The word that divides the answers best is the marker, so that some are refused.
    words = {word for answer in answers for word in answer.split()}
    marker = min(sorted(words), key=lambda w: abs(2 * sum(w in a for a in answers) - len(answers)), default="sorry")
    evaluator = replace(evaluator, judge=MarkerJudge([marker]))
    return evaluator, operator_factory, first_token_log_probs(model, evaluator.harmless, batcher)


def refusal_texts(evaluator: TrialEvaluator) -> list[list[int]]:
    counted = evaluator.refusals(min_tokens=3)
    assert counted.count or counted.evasive
    return [list(t[:MAX_DRAFT_TOKENS]) if d else [] for t, d in zip(counted.tokens, counted.refused, strict=True)]


def together(
    evaluator: TrialEvaluator,
    operator_factory: OperatorFactory,
    baseline: torch.Tensor,
    ablations: list[Ablation],
    **more: object,
) -> list[object]:
    operators = [operator_factory.operators(a) for a in ablations]
    first = min((w.layer for w in operator_factory.writers if any(w.name in o for o in operators)), default=4)
    with apply_operators(operator_factory.writers, *operators):
        return list(evaluator.score_trials(baseline, EditSpec(len(ablations), first), **more))  # type: ignore[arg-type]


def alone(evaluator: TrialEvaluator, operator_factory: OperatorFactory, baseline: torch.Tensor) -> list[Scores]:
    found = []
    for ablation in ABLATIONS:
        with apply_operators(operator_factory.writers, operator_factory.operators(ablation)):
            found.append(evaluator.score(baseline))
    return found


@pytest.mark.parametrize(
    ("family", "size"), [*((family, 128) for family in FAMILIES), ("llama", 3), ("gemma3", 3), ("gpt_neox", 3)]
)
def test_verdicts_and_kl_are_those_of_each_alone(family: str, size: int, tmp_path: Path) -> None:
    evaluator, operator_factory, baseline = model_context(
        save_tiny(tmp_path / "m", family), share=family not in WINDOWED
    )
    evaluator.batcher.prefix_caching, sharing = False, evaluator.batcher.prefix_caching
    expected = alone(evaluator, operator_factory, baseline)
    evaluator.batcher.prefix_caching, evaluator.batcher.size = sharing, size
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    windowed = family in WINDOWED
    assert (saving.harmful_entries is None) is windowed
    for _ in range(2):  # the second time passes begin with what the first has kept
        for some in (ABLATIONS[:3], ABLATIONS[3:], ABLATIONS[1:2]):
            for found, ablation in zip(together(saving, operator_factory, baseline, some), some, strict=True):
                reference = expected[ABLATIONS.index(ablation)]
                assert isinstance(found, Scores) and found.refused == reference.refused
                assert found.divergence.mean == pytest.approx(reference.divergence.mean, rel=1e-4, abs=1e-7)
    if not windowed:
        assert len({e.refused for e in expected}) > 1, "the ablations should not all do the same"
        assert saving.harmful_entries is not None and saving.harmful_entries.hidden, "nothing was kept"


@pytest.mark.parametrize("size", [1, 3])
def test_recurrent_states_are_never_resumed_after_a_batch_without_drafts(size: int, tmp_path: Path) -> None:
    evaluator, operator_factory, baseline = model_context(save_tiny(tmp_path / "m", "lfm2"), share=False, size=size)
    evaluator.batcher.equal_lengths = True
    with apply_operators(operator_factory.writers, operator_factory.operators(ABLATIONS[0])):
        expected = evaluator.score(baseline)
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    (found,) = together(saving, operator_factory, baseline, ABLATIONS[:1])
    assert isinstance(found, Scores) and found.refused == expected.refused


def test_what_answers_lean_to_is_the_joint_probability_of_the_originals_first_words(llama: Path) -> None:
    evaluator, operator_factory, baseline = model_context(llama, share=True)
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    ablation = ABLATIONS[0]
    (found,) = together(saving, operator_factory, baseline, [ablation])
    assert isinstance(found, Scores) and found.refusal_mass is not None
    by_hand = 0.0
    with apply_operators(operator_factory.writers, operator_factory.operators(ablation)):
        for prompt, text, refused in zip(evaluator.harmful, saving.drafts, found.refused, strict=True):
            if text and refused == "0":
                first = text[:FIRST_TOKENS]
                (log_probs,) = log_probs_at(
                    evaluator.language_model, TeacherForcedTexts.of([prompt], [first]), Batcher(1)
                )
                by_hand += float(log_probs.gather(1, torch.tensor(first)[:, None]).sum().exp())
        again = saving.score(baseline)
    assert by_hand > 0 and found.refusal_mass == pytest.approx(by_hand, rel=1e-3)
    assert again.refusal_mass == pytest.approx(by_hand, rel=1e-3) and again.expected == found.expected
    assert Scores.from_dict(found.as_dict()) == found
    assert evaluator.score(baseline).refusal_mass is None, "nothing was kept to try"


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=12), st.randoms())
def test_what_is_to_be_expected_at_least_only_grows(requests: list[tuple[float, bool]], order: Random) -> None:
    summary = RefusalBounds.unknown(len(requests))
    summary.prefix_prob = [p for p, _ in requests]
    seen = [summary.expected_at_least]
    places = list(range(len(requests)))
    order.shuffle(places)
    for place in places:
        summary.verdicts[place] = "refusal" if requests[place][1] else "answer"
        seen.append(summary.expected_at_least)
    assert seen == sorted(seen)


def test_rows_of_a_hybrid_model_are_tried_first_and_decoded_plainly(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Lfm2Config

    from heretic.model.architecture import find_residual_writers
    from tests.tiny import COMMON, tiny_tokenizer

    evaluator, _, _ = model_context(save_tiny(tmp_path / "m"), share=False)
    torch.manual_seed(1)
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    model = AutoModelForCausalLM.from_config(Lfm2Config(**COMMON, layer_types=kinds, conv_L_cache=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    hybrid = LanguageModel(
        model, tiny_tokenizer(), evaluator.language_model.checkpoint, find_residual_writers(model), "float32"
    )
    same_length = [r for r in evaluator.harmful if len(r) == len(evaluator.harmful[0])]  # convolutions see the padding
    evaluator = replace(evaluator, language_model=hybrid, harmful=same_length, batcher=Batcher(1))
    baseline = first_token_log_probs(hybrid, evaluator.harmless, evaluator.batcher)
    counted = evaluator.refusals()
    texts = [list(t[:MAX_DRAFT_TOKENS]) if d else [] for t, d in zip(counted.tokens, counted.refused, strict=True)]
    saving = enable_caching(evaluator, texts)
    (found,) = saving.score_trials(baseline)
    assert isinstance(found, Scores) and found.refused == "".join("01"[d] for d in counted.refused)
    assert found.refusal_proxy is not None and found.refusal_proxy.matching == counted.count


class Whole(WholeAnswerJudge):
    """A judge of whole answers: one that has an even number of letters refuses."""

    name = "whole"

    def verdicts(self, said: Sequence[Exchange]) -> list[Verdict]:
        return ["refusal" if len(one.answer) % 2 else "answer" for one in said]


@pytest.mark.parametrize("size", [4, 128])
def test_a_judge_of_whole_answers_gives_the_verdicts_of_each_alone(llama: Path, size: int) -> None:
    evaluator, operator_factory, baseline = model_context(llama, share=True)
    texts = refusal_texts(evaluator)
    evaluator = replace(evaluator, judge=Whole())
    expected = alone(evaluator, operator_factory, baseline)
    evaluator.batcher.size = size
    saving = enable_caching(evaluator, texts)
    for found, reference in zip(together(saving, operator_factory, baseline, ABLATIONS), expected, strict=True):
        assert isinstance(found, Scores) and (found.refused, found.judge) == (reference.refused, "whole")
    assert len({e.refused for e in expected}) > 1
    most = max(e.refusals for e in expected)
    left = together(saving, operator_factory, baseline, ABLATIONS, is_dominated=lambda _, at_least: at_least >= most)
    for found, reference in zip(left, expected, strict=True):
        assert isinstance(found, PrunedTrial) is (reference.refusals == most)
        assert not isinstance(found, PrunedTrial) or found.at_least == most


def test_a_trial_is_left_as_soon_as_it_is_beaten_and_its_neighbors_are_not(llama: Path) -> None:
    evaluator, operator_factory, baseline = model_context(llama, share=True)
    expected = alone(evaluator, operator_factory, baseline)
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    most = max(range(3), key=lambda i: expected[i].refusals)
    limit = expected[most].refusals
    kl = expected[most].divergence.mean
    assert limit > 0
    found = together(
        saving,
        operator_factory,
        baseline,
        ABLATIONS[:3],
        is_dominated=lambda k, at_least: abs(k - kl) < 1e-4 * kl and at_least >= limit,
    )
    for i, one in enumerate(found):
        if i == most:
            assert isinstance(one, PrunedTrial) and one.at_least == limit
        else:
            assert isinstance(one, Scores) and one.refused == expected[i].refused


def test_micro_batches_in_turn_give_the_scores_of_one_batch_and_continue_from_their_first_passes(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "FEWEST_TOKENS", 1)
    evaluator, operator_factory, baseline = model_context(llama, share=True)
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    begun: list[int] = []

    def continued(model: object, answers: DecodingState, limits: StopCriteria, _: object) -> Turns[None]:
        begun.append(len(answers.tokens))
        yield from continue_decoding(model, answers, limits)

    monkeypatch.setattr(refusal_count, "continue_decoding", continued)
    expected = together(saving, operator_factory, baseline, ABLATIONS[:2])
    assert begun == [28], "all rows of both trials"
    evaluator.batcher.groups = 3
    saving = enable_caching(evaluator, saving.drafts)
    for _ in range(2):  # the second time passes begin with what the first has kept
        begun.clear()
        found = together(saving, operator_factory, baseline, ABLATIONS[:2])
        assert begun == [10, 10, 8]
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, Scores) and isinstance(other, Scores) and one.refused == other.refused
            assert one.divergence.mean == pytest.approx(other.divergence.mean, rel=1e-4, abs=1e-7)
    assert saving.harmful_entries is not None and saving.harmful_entries.resume_layer([0], 9) > 0


def test_memory_that_runs_out_while_decoding_goes_on_halves_the_batch(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the first pass grows with every token, and is dropped where it grows too large."""
    evaluator, operator_factory, baseline = model_context(llama, share=True)
    saving = enable_caching(evaluator, refusal_texts(evaluator))
    (expected,) = together(saving, operator_factory, baseline, ABLATIONS[:1])
    sizes: list[int] = []

    def short(model: object, answers: DecodingState, limits: StopCriteria, _: object) -> Turns[None]:
        sizes.append(len(answers.tokens))
        if len(answers.tokens) > 4:
            raise torch.OutOfMemoryError("out of memory")
        yield from continue_decoding(model, answers, limits)

    monkeypatch.setattr(refusal_count, "continue_decoding", short)
    (found,) = together(saving, operator_factory, baseline, ABLATIONS[:1])
    assert isinstance(found, Scores) and isinstance(expected, Scores) and found.refused == expected.refused
    assert sizes[:2] == [14, 7] and max(sizes[2:]) <= 4 and evaluator.batcher.size <= 4
