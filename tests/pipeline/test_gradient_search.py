"""A whole run that begins with the gradient search: its points are the first trials, and an interruption changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from safetensors import safe_open

from heretic.ablation.ablation import Ablation
from heretic.errors import Interrupted, OutOfMemory, UserError
from heretic.interrupt import StopSignal
from heretic.pipeline import gradient_search
from heretic.pipeline.actions import export_from_run, open_run
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import DENSE_PATH_STATE, PATH_STATE, RunFolder
from heretic.runs.status import read_status
from heretic.scoring import gradient_loss
from heretic.scoring.gradient_loss import LossTerms
from heretic.scoring.judges.verdict import ANSWER, Exchange, Verdict, WholeAnswerJudge
from heretic.search import path_optimizer
from heretic.search.gradient_path import GradientPath
from heretic.search.path_optimizer import OptimizerState
from heretic.session.session import Session
from heretic.settings import TrainedSettings
from heretic.settings.sources import resolve
from heretic.storage.attributes import GRADIENT_PATH
from heretic.storage.rdb import connect
from heretic.storage.url import storage_url
from tests.helpers.errors import raises
from tests.helpers.reporters import RecordingReporter

GRADIENT_SEARCH = (
    'search.start="gradient"', "search.gradient.weights=[0.5, 2.0]", "search.gradient.steps=3", "search.gradient.batch=4",
    "search.gradient.refusal_tokens=1", 'refusal_markers=["e"]', 'run_name="run"',
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models "refuse" with the letter e, whatever is taken out: without this the search would go on and begin again."""
    monkeypatch.setattr(path_optimizer, "MAX_EXTRA_WEIGHTS", 0)
    monkeypatch.setattr(gradient_search, "MANY_UNANSWERED", 1.0)


def do(config: Path, *assignments: str, reporter: object = None) -> Outcome:
    resolved = resolve(config, assignments=[*GRADIENT_SEARCH, *assignments])
    return run(resolved, reporter=reporter or RecordingReporter(), stop=StopSignal())  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["free", "per_layer"])
def test_a_run_starts_with_the_gradient_search_and_searches_around_its_path(config: Path, direction: str) -> None:
    listener = RecordingReporter()
    outcome = do(config, 'save_to="written"', f'search.gradient.direction="{direction}"', reporter=listener)
    assert sum("refusal probability" in line for line in listener.lines) == 2
    assert [r.params["path.point"] for r in outcome.results][:2] == [1.0, 0.0]
    assert len(outcome.results) == 4 and outcome.export is not None
    manifest = json.loads(Path("written/manifest.json").read_text())
    assert {len(s) for s in manifest["ablation"]["strengths"].values()} == {4}
    assert len(manifest["ablation"]["vector"] or ()) == (32 if direction == "free" else 0)
    assert all(("path.shift" in r.params) == (direction == "per_layer") for r in outcome.results)
    told = {"free": "from the gradient search (in the manifest)", "per_layer": "each layer's own"}
    assert told[direction] in Path("written/README.md").read_text()
    with open_run("run", "runs", [], wait=False, reporter=NULL_REPORTER, stop=StopSignal()) as run_context:
        later = export_from_run(run_context, 1, Path("gentle"))
    assert later.export.verification.scores.refused == outcome.results[1].scores.refused
    with safe_open(outcome.folder.path / "gradient_path.safetensors", "pt") as file:
        assert file.get_tensor("strengths").shape == (2, 4)


def test_edits_of_readers_are_searched_exported_verified_and_made_again(config: Path) -> None:
    from tests.pipeline.test_reproduce import again

    settings = ("ablation.readers=true", "search.gradient.sparsity=0.0", 'save_to="out"')
    full = do(config, *settings).export
    assert full is not None and full.verification.divergence < 1e-5 and full.verification.tensors_checked > 0
    strengths = json.loads(Path("out/manifest.json").read_text())["ablation"]["strengths"]
    assert list(strengths) == ["attention", "mlp", "attention_inputs", "mlp_inputs"]
    assert all(any(profile) for profile in strengths.values())
    assert again(Path("out")).verdict == "identical"
    lora = do(config, *settings, 'save_to="adapter"', 'export_format="lora"', "lora_rank=4").export
    assert lora is not None and lora.verification.divergence < 1e-2
    targets = json.loads(Path("adapter/adapter_config.json").read_text())["target_modules"]
    assert any(name.endswith("q_proj") for name in targets) and any(name.endswith("o_proj") for name in targets)


def test_a_gradient_search_stopped_in_the_middle_is_resumed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = do(config, 'run_name="whole"')
    keep = RunFolder.save_path_state

    def cut(folder: RunFolder, state: OptimizerState, name: str = PATH_STATE) -> None:
        keep(folder, state, name)
        if state.steps == 4:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "save_path_state", cut)
        do(config)
    study = connect(storage_url("", Path("runs/run")))
    assert study.get_n_trials(1) == 0 and GRADIENT_PATH not in study.get_study_user_attrs(1)
    assert read_status("run", "runs", {}).gradient_path == "step 4 of 6"
    calls = []
    read = gradient_loss.Objective.evaluate
    monkeypatch.setattr(
        gradient_loss.Objective, "evaluate", lambda self, *a, **k: calls.append(1) or read(self, *a, **k)
    )
    again = do(config)
    assert len(calls) == 2 + 1, "the two steps that were left, and the second point on prompts held back"
    assert [(r.params, r.scores.refused) for r in again.results] == [
        (r.params, r.scores.refused) for r in whole.results
    ]
    assert read_status("run", "runs", {}).gradient_path.startswith("2 points, edited layers ")
    calls.clear()
    assert len(do(config, "n_trials=5").results) == 5 and not calls, "the path is stored with the study"


def test_a_search_that_was_overtaken_keeps_the_studys_path(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stood still, for instance in a suspended machine, has lost its claim to another one."""
    url, search = storage_url("", Path("runs/run")), gradient_search._search

    def overtaken(session: Session, folder: RunFolder) -> GradientPath:
        found = search(session, folder)
        replace(found, points=found.points[1:]).save(optuna.load_study(study_name="heretic", storage=url))
        return found

    monkeypatch.setattr(gradient_search, "_search", overtaken)
    do(config)
    stored = GradientPath.load(optuna.load_study(study_name="heretic", storage=url))
    assert stored is not None and len(stored.points) == 1, "its trials are around this path"


@pytest.mark.parametrize("better", [True, False])
def test_a_path_that_leaves_prompts_unanswered_is_searched_again_with_dense_edits(
    config: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    monkeypatch.setattr(gradient_search, "MANY_UNANSWERED", 0.25)
    counts = [20, 20, 3 if better else 20]  # under the first path's last point, in both sessions, and the second's

    def counted(problem: gradient_search.GradientProblem, _: Ablation) -> int:
        return counts.pop(0)

    monkeypatch.setattr(gradient_search.GradientProblem, "unanswered", counted)
    monkeypatch.setattr(gradient_search.GradientProblem, "usually_unanswered", 1.0)
    keep = RunFolder.save_path_state

    def cut(folder: RunFolder, state: OptimizerState, name: str = PATH_STATE) -> None:
        keep(folder, state, name)
        if name == DENSE_PATH_STATE and state.steps == 4:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "save_path_state", cut)
        do(config)
    assert read_status("run", "runs", {}).gradient_path == "second search, step 4 of 6"
    outcome = do(config)
    path = GradientPath.load(optuna.load_study(study_name="heretic", storage=storage_url("", Path("runs/run"))))
    assert path is not None and (path.points[0].vector is None) == path.second == better
    assert len(outcome.results) == 4


def test_a_weak_model_that_answers_nothing_usually_is_not_searched_again(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_search, "MANY_UNANSWERED", 0.25)
    asked: list[str] = []

    def none_answered(problem: gradient_search.GradientProblem, role: str, prompts: Sequence[list[int]]) -> int:
        asked.append(role)
        return len(prompts)

    monkeypatch.setattr(gradient_search.GradientProblem, "_unanswered", none_answered)
    do(config)
    assert asked == ["harmful_train", "harmless_train"] and not Path("runs/run/dense_path.safetensors").exists()


@pytest.mark.parametrize("error", [OutOfMemory("GPU 0 is full."), RuntimeError("no backward")])
def test_a_second_search_that_fails_leaves_the_first_path(
    config: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(gradient_search, "MANY_UNANSWERED", 0.25)
    monkeypatch.setattr(gradient_search.GradientProblem, "usually_unanswered", 0.0)
    evaluate = path_optimizer.PathOptimizer.step

    def step(optimizer: path_optimizer.PathOptimizer, state: OptimizerState) -> LossTerms:
        if optimizer.settings.sparsity == 0:
            raise error
        return evaluate(optimizer, state)

    monkeypatch.setattr(path_optimizer.PathOptimizer, "step", step)
    outcome = do(config)
    assert outcome.results[0].params["path.point"] == 1.0


def test_an_incomplete_encoder_does_not_stop_the_search(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_search, "MANY_UNANSWERED", 0.25)
    encoder = Path("encoder")
    encoder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (encoder / name).write_text("{}")
    found = {"kind": "trained", "trained": TrainedSettings(encoder=str(encoder))}
    monkeypatch.setattr(
        gradient_search,
        "with_evaluation_judge",
        lambda settings, _: settings.model_copy(update={"judge": settings.judge.model_copy(update=found)}),
    )
    listener = RecordingReporter()
    assert do(config, reporter=listener).results[0].params["path.point"] == 1.0
    assert any("Cannot load the encoder" in line for line in listener.lines)


def test_answers_under_a_point_are_read_by_the_judge_of_evaluate(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_search, "MANY_UNANSWERED", 0.25)
    read: list[int] = []

    class Never(WholeAnswerJudge):
        name = "never"

        def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
            read.append(len(exchanges))
            return [ANSWER] * len(exchanges)

    monkeypatch.setattr(
        gradient_search, "with_evaluation_judge", lambda settings, _: settings.model_copy(update={"seed": 9})
    )
    monkeypatch.setattr(gradient_search, "make_judge", lambda _: Never())
    listener = RecordingReporter()
    do(config, reporter=listener)
    assert sum(read) >= gradient_search.MIN_REFUSALS and not Path("runs/run/dense_path.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("derivative for aten::special is not implemented\nand more"),
            "aten::special is not implemented)",
        ),
        (NotImplementedError(), "(NotImplementedError)"),
    ],
)
def test_a_model_that_cannot_run_backwards_is_searched_with_kernels(
    config: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    listener = RecordingReporter()
    outcome = do(config, reporter=listener)
    assert any("does not support gradients" in s and said in s for s in listener.lines)
    assert len(outcome.results) == 4 and "direction_scope" in outcome.results[0].params


def test_a_model_that_hardly_refuses_is_searched_with_kernels(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = RecordingReporter()
    monkeypatch.setattr(gradient_search, "MIN_REFUSALS", 1000)
    outcome = do(config, reporter=listener)
    assert any("refuses fewer than" in s for s in listener.lines)
    assert len(outcome.results) == 4


def test_an_interrupted_gradient_search_is_not_given_up(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a judge that refuses: the same command resumes the gradient search."""
    whole = do(config, 'run_name="whole"')
    keep = RunFolder.save_path_state

    def full(folder: RunFolder, state: OptimizerState, name: str = PATH_STATE) -> None:
        if state.steps == 4:
            raise UserError("No space left on device.", code="disk")
        keep(folder, state, name)

    with monkeypatch.context() as patch, raises("disk"):
        patch.setattr(RunFolder, "save_path_state", full)
        do(config)
    again = do(config)
    assert [(r.params, r.scores.refused) for r in again.results] == [
        (r.params, r.scores.refused) for r in whole.results
    ]


def test_where_memory_is_short_blocks_are_computed_twice_and_then_it_is_kernels(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.autograd.grad
    fails = {"where": "kept"}
    twice = []

    def short(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("out of memory")

    def checkpointed(blocks: object) -> object:
        twice.append(len(list(blocks)))  # type: ignore[call-overload]
        monkeypatch.setattr(torch.autograd, "grad", real if twice[-1] and fails["where"] == "kept" else short)
        return original(blocks)

    original = gradient_loss._recomputed_activations
    monkeypatch.setattr(gradient_loss, "_recomputed_activations", checkpointed)
    assert [r.params["path.point"] for r in do(config).results][:2] == [1.0, 0.0] and max(twice) == 4
    fails["where"] = "everywhere"
    listener = RecordingReporter()
    outcome = do(config, 'run_name="other"', reporter=listener)
    assert any("kernels: Out of memory with a single prompt" in line for line in listener.lines)
    assert len(outcome.results) == 4 and "direction_scope" in outcome.results[0].params
