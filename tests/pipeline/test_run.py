"""The main job from end to end on a tiny random model: study, resume, choice, export, proof."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
import torch

from heretic.errors import Interrupted, StudyMismatch, UserError
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.pipeline.actions import evaluate_model
from heretic.pipeline.run import Outcome, logging_to, run
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import REPORT, RunFolder
from heretic.runs.status import read_status
from heretic.scoring.judges.registry import JUDGES
from heretic.settings import JudgeSettings
from heretic.settings.sources import resolve
from tests.helpers.errors import raises


def do(config: Path, *assignments: str, **options: Any) -> Outcome:
    return run(resolve(config, assignments=assignments), **options, reporter=NULL_REPORTER, stop=StopSignal())


def points(outcome: Outcome) -> list[tuple[float, int]]:
    return [r.point for r in outcome.results]


def test_a_run_studies_chooses_exports_and_proves(config: Path, llama: Path) -> None:
    outcome = do(config, "save_to=out")
    assert len(outcome.results) == 4
    assert outcome.selected is not None and outcome.export is not None
    assert {p.name for p in outcome.folder.path.iterdir()} >= {
        "study.db", "config.toml", "directions.safetensors", "baseline.safetensors", "run.log",
    }  # fmt: skip
    proof = outcome.export.verification
    assert proof.divergence < 1e-6
    assert proof.scores.refusals == outcome.selected.scores.refusals
    assert proof.scores.divergence.mean == pytest.approx(outcome.selected.scores.divergence.mean, rel=1e-3)
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["scores"]["written"]["refusals"] == proof.scores.refusals
    assert "safety training" in Path("out/README.md").read_text()
    before, after = open_checkpoint(str(llama)), open_checkpoint("out")
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert changed and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    assert not list(Path().glob(".out.partial*"))


@pytest.mark.parametrize(
    "error, level, lines",
    [
        (Interrupted(), "INFO", 1),
        (KeyboardInterrupt(), "INFO", 1),
        (UserError("What.\nMore.", code="some-code", where="place", fix="do"), "ERROR", 1),
        (ZeroDivisionError("defect"), "ERROR", 0),
    ],
)
def test_only_defects_leave_a_traceback_in_the_log(
    tmp_path: Path, error: BaseException, level: str, lines: int
) -> None:
    with pytest.raises(type(error)), logging_to(RunFolder(tmp_path)):
        raise error
    log = (tmp_path / "run.log").read_text()
    assert f" {level} " in log and ("Traceback" in log) == (not lines)
    assert not lines or len(log.splitlines()) == lines
    assert not isinstance(error, UserError) or "[some-code]" in log


@pytest.mark.parametrize("geometry", ["plain", "norm_preserving"])
def test_several_directions_of_a_layer_are_searched_exported_and_proven(config: Path, geometry: str) -> None:
    wanted = ("directions.method=self_organizing_map", "directions.count=2", "directions.iterative_rounds=1")
    outcome = do(config, *wanted, f"ablation.geometry={geometry}", "n_trials=2", "save_to=out")
    stored = RunFolder(outcome.folder.path, outcome.folder.fingerprint).load_directions(NULL_REPORTER)
    assert stored is not None and stored.count == 4
    assert outcome.export is not None and outcome.export.verification.divergence < 1e-6
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["settings"]["directions"]["count"] == 2
    assert do(config, f"ablation.geometry={geometry}").folder.name != outcome.folder.name, "another fingerprint"


def test_a_finished_run_does_nothing_again_and_grows_when_asked(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = do(config, "save_to=out")
    with monkeypatch.context() as patch:
        patch.setattr(
            "heretic.pipeline.run_context.open_session", lambda *a: pytest.fail("the model was loaded for nothing")
        )
        again = do(config, "save_to=out")
    assert points(again) == points(first) and again.export is not None
    with monkeypatch.context() as patch:
        patch.setattr(
            "heretic.session.session.find_directions", lambda *a: pytest.fail("directions were computed again")
        )
        patch.setattr(
            "heretic.session.session.measure_baseline", lambda *a: pytest.fail("the baseline was measured again")
        )
        grown = do(config, "n_trials=6")
    assert points(grown)[:4] == points(first) and len(grown.results) == 6


def test_a_converged_run_does_not_run_again_until_more_trials_are_asked_for(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny random model changes too much for the reference point: every trial counts as one within it.
    monkeypatch.setattr("heretic.search.convergence.REFERENCE_KL", 1e3)
    wanted = ("n_trials=9", "search.patience=1", "search.min_gain=0.999", "run_name=mine")
    first = do(config, *wanted)
    ran = len(first.results)
    assert first.summary.end is not None and first.summary.end[0] == "converged" and 3 <= ran < 9
    assert first.as_dict()["ended"] == "converged" and first.as_dict()["convergence"]["n_complete"] == ran
    status = read_status("mine", "runs", {})
    assert status.state == "complete"
    assert {key: status.as_dict()[key] for key in ("ended", "convergence", "seconds_left")} == {
        "ended": "converged", "convergence": first.as_dict()["convergence"], "seconds_left": None,
    }  # fmt: skip
    assert "converged after trial" in (first.folder.path / REPORT).read_text()
    with monkeypatch.context() as patch:
        patch.setattr("heretic.pipeline.run_context.open_session", lambda *a: pytest.fail("the model was loaded"))
        assert points(do(config, *wanted)) == points(first)
    more = do(config, *wanted, extra_trials=2)
    assert len(more.results) == ran + 2 and more.as_dict()["ended"] == "n_trials"


def test_an_interrupted_study_ends_like_an_uninterrupted_one(config: Path) -> None:
    whole = do(config, "n_trials=5", 'run_name="whole"')
    do(config, "n_trials=3", 'run_name="parts"')
    parts = do(config, "n_trials=5", 'run_name="parts"')
    assert [r.params for r in parts.results] == [r.params for r in whole.results]
    assert points(parts) == points(whole)


def test_all_ways_of_applying_give_the_same_scores(config: Path) -> None:
    ways = ["apply=operators", "apply=weights", "apply=weights,cache_weights=false"]
    outcomes = [do(config, *way.split(","), f'run_name="{i}"') for i, way in enumerate(ways)]
    for outcome in outcomes[1:]:
        for ours, reference in zip(outcome.results, outcomes[0].results, strict=True):
            assert ours.params == reference.params
            assert ours.scores.refusals == reference.scores.refusals
            assert ours.scores.divergence.mean == pytest.approx(reference.scores.divergence.mean, rel=1e-3, abs=1e-6)


def test_abandoned_trials_are_failed_and_do_not_count(config: Path) -> None:
    outcome = do(config, "n_trials=2")
    study = optuna.load_study(study_name="heretic", storage=f"sqlite:///{outcome.folder.path / 'study.db'}")
    study.ask()  # a process asks for a trial and dies before it can sign it
    after = do(config, "n_trials=3")
    assert len(after.results) == 3
    states = [t.state.name for t in study.get_trials()]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_another_prompt_file_or_setting_makes_another_run(config: Path) -> None:
    first = do(config, "n_trials=2")
    second = do(config, "n_trials=2", "ablation.geometry=plain")
    third = do(config, "n_trials=2", 'prompts.harmful_train.split="train[:8]"')
    assert len({o.folder.path for o in (first, second, third)}) == 3
    assert do(config, "n_trials=2", "batch_size=3").folder == first.folder


def test_a_study_of_other_settings_under_the_same_name_is_refused(config: Path) -> None:
    do(config, "n_trials=2", "run_name=mine")
    with raises("study-mismatch", StudyMismatch) as refused:
        do(config, "n_trials=2", "run_name=mine", "ablation.geometry=plain", "max_response_length=7")
    assert 'ablation.geometry: was "norm_preserving", now "plain"' in str(refused.value)
    assert "max_response_length: was 6, now 7" in str(refused.value)
    fresh = do(config, "n_trials=2", "run_name=mine", "ablation.geometry=plain", fresh=True)
    assert len(fresh.results) == 2
    assert len(list(Path("runs").glob("mine.*"))) == 1, "the old run was not kept"


def test_damaged_files_of_a_run_are_recomputed(config: Path) -> None:
    first = do(config, "n_trials=2")
    file = first.folder.path / "directions.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    again = do(config, "n_trials=4")
    assert points(again)[:2] == points(first)
    assert (first.folder.path / "directions.damaged").exists()
    assert points(again) == points(do(config, "n_trials=4", "run_name=other"))


def test_the_destination_of_another_is_left_alone(config: Path) -> None:
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    with raises("preflight-failed") as refused:
        do(config, "save_to=out")
    assert refused.value.where == "preflight: export" and "out" in refused.value.what
    assert Path("out/precious.txt").read_text() == "mine"
    shutil.rmtree("out")
    do(config, "n_trials=2", "save_to=out")
    with raises("destination-not-ours"):
        do(config, "n_trials=2", "save_to=out", "seed=1")


def test_study_db_is_a_plain_optuna_study(config: Path) -> None:
    outcome = do(config, "n_trials=2")
    with sqlite3.connect(outcome.folder.path / "study.db") as database:
        assert database.execute("select count(*) from trials").fetchone() == (2,)


def test_kl_over_several_tokens_is_the_same_in_study_proof_and_evaluation(config: Path, llama: Path) -> None:
    outcome = do(config, "save_to=out", "kl_tokens=5")
    assert outcome.selected is not None and outcome.export is not None
    study, written = outcome.selected.scores.divergence, outcome.export.verification.scores.divergence
    assert written.mean == pytest.approx(study.mean, rel=1e-3) and written.max == pytest.approx(study.max, rel=1e-3)
    assert "first 5 tokens of the original's answer" in Path("out/README.md").read_text()
    assert json.loads(Path("out/manifest.json").read_text())["settings"]["kl_tokens"] == 5
    settings = resolve(config, {"model": "out"}, ["kl_tokens=5"]).settings
    again = evaluate_model(settings, str(llama), wait=False, reporter=NULL_REPORTER, stop=StopSignal())
    assert again.divergence is not None and again.divergence.mean == pytest.approx(written.mean, rel=1e-4)
    first = do(config)
    assert first.folder.path != outcome.folder.path and first.results[0].params == outcome.results[0].params
    assert first.results[0].scores.divergence.mean != outcome.results[0].scores.divergence.mean


def test_log_probabilities_that_do_not_fit_are_not_begun(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.session.session.memory", lambda: (10**9, 20_000))
    with raises("insufficient-ram") as refused:
        do(config, "kl_tokens=6")
    assert str(refused.value.fix).startswith(("kl_tokens = 1", "kl_tokens = 2"))


def test_a_study_judged_by_words_is_exported_and_reported(config: Path) -> None:
    outcome = do(config, 'judge.kind="words"', 'save_to="out"')
    assert JUDGES["words"].words in " ".join(Path("out/README.md").read_text().split())
    assert JUDGES["words"].words in (outcome.folder.path / REPORT).read_text()


def test_every_judge_of_the_settings_is_in_the_table() -> None:
    assert set(JUDGES) == set(get_args(JudgeSettings.model_fields["kind"].annotation))
