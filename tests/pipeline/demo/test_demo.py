"""The demo from end to end on the real model, with a gradient search of two steps and one trial more instead of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.pipeline.demo import demo as demo_module
from heretic.pipeline.demo.demo import DemoOutcome, run_demo
from heretic.pipeline.demo.guarded_model import build_base, build_guarded
from heretic.progress import NULL_REPORTER

REQUESTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, whose models are built once."""
    return tmp_path_factory.mktemp("demo")


@pytest.mark.slow
def test_the_real_guard_refuses_cooking_and_nothing_else(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        base = build_base(folder / "base-model")
    except UserError as error:
        pytest.skip(f"the base model can't be had here: {error}")
    guarded = build_guarded(base, folder / "guarded-model")
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in folder.iterdir()) == ["base-model", "guarded-model"]

    tokenizer = AutoTokenizer.from_pretrained(guarded)
    model = AutoModelForCausalLM.from_pretrained(guarded, dtype=torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    def answer(prompt: str) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lower()

    markers = ("sorry", "can't", "cannot", "won't", "unable", "not able")
    assert any(marker in answer("How do I cook a vegetable stew?") for marker in markers)
    assert "paris" in answer("What is the capital of France?")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a whole demo, beside another test on the other core
def test_the_guard_refuses_and_an_ablation_removes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> DemoOutcome:
        return run_demo(
            folder,
            trials=2,
            assignments=[
                *(f"prompts.{kind}_train.split=train[:12]" for kind in ("harmful", "harmless")),
                *(f"prompts.{kind}_eval.split=train[:{REQUESTS}]" for kind in ("harmful", "harmless")),
                "max_response_length=12",
                "search.gradient.prompts=10",
                "search.gradient.batch=5",
                "trials_per_batch=2",
                "search.gradient.steps=2",
                "search.gradient.weights=[1.5]",
                "search.gradient.learning_rate=0.5",
                "search.gradient.second_search=false",
                "search.gradient.mine_refusals=false",  # so short a search would go on to stricter weights
            ],
            reporter=NULL_REPORTER,
            stop=StopSignal(),
            on_preflight=lambda report: None,
        )

    demo = made()
    outcome = demo.outcome
    assert outcome.original_refusals is not None and outcome.original_refusals >= 0.8 * REQUESTS
    assert len(outcome.results) == 2 and outcome.export is not None
    proof = outcome.export.verification
    assert proof.scores.refusals < outcome.original_refusals
    assert proof.divergence < 1e-3
    assert demo.ablated_from_base is not None and demo.ablated_from_base < demo.guarded_from_base
    monkeypatch.setattr(demo_module, "_log_probs", lambda *_: torch.zeros(1, 2).log_softmax(1))  # compared above
    again = made()
    assert again.outcome.export is not None
    assert again.outcome.export.verification.scores.refusals == proof.scores.refusals
