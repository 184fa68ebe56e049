"""A whole study with several trials in a pass and trials left early."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.pipeline.actions import evaluate_model
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.report.report import load_report_input, report
from heretic.runs.status import read_status
from heretic.scoring.comparison import Comparison
from heretic.scoring.evaluator import TrialEvaluator
from heretic.search.pareto import pareto_front, results
from heretic.settings.sources import resolve
from heretic.storage.attributes import ERROR, values_before
from heretic.storage.rdb import connect
from heretic.storage.url import storage_url
from tests.helpers.command import heretic
from tests.helpers.endpoint import endpoint
from tests.helpers.reporters import RecordingReporter


def do(config: Path, *assignments: str) -> Outcome:
    return run(resolve(config, assignments=assignments), reporter=NULL_REPORTER, stop=StopSignal())


def test_startup_trials_score_the_same_one_by_one_and_together(config: Path) -> None:
    every = ("n_trials=6", "search.n_startup_trials=6", "batch_size=64")
    one = do(config, *every, 'run_name="one"', "trials_per_batch=1")
    four = do(config, *every, 'run_name="four"', "trials_per_batch=4")
    for ours, reference in zip(four.results, one.results, strict=True):
        assert ours.params == reference.params and ours.scores.refused == reference.scores.refused
        assert ours.scores.divergence.mean == pytest.approx(reference.scores.divergence.mean, rel=1e-4, abs=1e-8)


def test_a_study_that_leaves_trials_early_has_the_same_front_and_says_so(config: Path) -> None:
    every = ("n_trials=8", "search.n_startup_trials=8")
    full = do(config, *every, 'run_name="full"')
    early = do(config, *every, 'run_name="early"', "early_stopping=true")
    assert [r.number for r in pareto_front(early.results)] == [r.number for r in pareto_front(full.results)]
    seen = read_status("early", "runs", {})
    assert (
        seen.summary.n_complete == 8
        and seen.summary.n_pruned == 8 - len(early.results) > 0
        and seen.state == "complete"
    )
    assert read_status("full", "runs", {}).summary.history.proxy_error is not None
    assert connect(storage_url("", early.folder.path)).get_n_trials(1) == 8


def test_a_failing_trial_does_not_take_its_neighbors_with_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = TrialEvaluator.score_trials
    alone = []

    def failing(self: TrialEvaluator, baseline: object, edited: object, beaten: object) -> object:
        if edited.trials > 1:  # type: ignore[attr-defined]
            raise UserError("no memory for several")
        alone.append(edited)
        if len(alone) == 2:
            raise UserError("no memory for this one")
        return measure(self, baseline, edited, beaten)  # type: ignore[arg-type]

    monkeypatch.setattr(TrialEvaluator, "score_trials", failing)
    outcome = do(config, "n_trials=3", "trials_per_batch=3")
    assert [r.number for r in outcome.results] == [0, 2, 3]


def test_a_judge_that_fails_stops_the_study_and_the_same_command_finishes_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    monkeypatch.setattr("heretic.scoring.judges.llm.INITIAL_PAUSE", 0.01)
    with endpoint() as server:
        every = (
            "judge.kind=llm", f"judge.llm.base_url={server.url}", "judge.llm.model=m", "judge.llm.key_variable=JUDGE_KEY",
            "judge.llm.retries=1", "judge.llm.concurrency=1", "search.n_startup_trials=2", "n_trials=8", "trials_per_batch=2",
        )  # fmt: skip
        whole = do(config, *every, 'run_name="whole"')
        asked = len(server.asked)
        assert 0 < asked < 9 * 12, "an answer that was given before is not asked about again"
        assert server.keys[0] == "Bearer s3cret"
        words = [word for setting in (*every, "run_name=judged", "save_to=out") for word in ("--set", setting)]
        server.works_for = asked + asked * 3 // 4
        failed = heretic(capsys, monkeypatch, "run", *words)
        assert (
            failed.status == 1
            and "status 503: out of order. [judge-failed]" in failed.err
            and "the same command" in failed.err
        )
        study = optuna.load_study(study_name="heretic", storage=storage_url("", Path("runs/judged")))
        done = [t for t in study.trials if t.state.name == "COMPLETE"]
        cut = [t for t in study.trials if t.state.name == "FAIL"]
        assert 0 < len(done) < 8 and cut and not any(ERROR in t.user_attrs for t in cut)
        server.works_for, server.failing = None, 401
        refused = heretic(capsys, monkeypatch, "run", *words)
        assert refused.status == 1 and "status 401" in refused.err
        server.failing = 0
        assert heretic(capsys, monkeypatch, "run", *words).status == 0
    study = optuna.load_study(study_name="heretic", storage=storage_url("", Path("runs/judged")))
    found = [(r.params, r.scores.refused, r.point) for r in results(study)]
    assert found == [(r.params, r.scores.refused, r.point) for r in whole.results]
    for path in [*Path("runs/judged").glob("*"), *Path("out").glob("*.[jm]*")]:
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path
    kept = Path("runs/judged/judge.jsonl").read_text().splitlines()
    assert len(kept) == len(set(kept)) and "write" not in str(kept), "asked about twice, or kept as a text"


def test_limits_on_harmless_answers_hold_from_study_to_card(config: Path) -> None:
    first = do(config, "n_trials=6", "constraints.over_refusals=9", "constraints.degenerate=9", 'run_name="any"')
    found = [r.scores.values for r in first.results]
    assert all(values["over_refusals.total"] == 9 for values in found)
    counts = sorted(values["over_refusals"] + values["degenerate"] for values in found)
    assert counts[0] < counts[-1], "the trials should not all do the same"
    least = min(values["over_refusals"] for values in found)
    every = ("n_trials=6", f"constraints.over_refusals={least}", 'run_name="few"', "save_to=out")
    kept = do(config, *every)
    front = pareto_front(kept.results)
    assert front and all(r.scores.values["over_refusals"] <= least for r in front)
    assert (
        kept.export is not None and kept.selected is not None and kept.selected.scores.values.keys() < found[0].keys()
    )
    compared = {c.name: c for c in kept.export.verification.comparisons}
    assert compared["over_refusals"].ablated == kept.selected.scores.values["over_refusals"]
    before = values_before(optuna.load_study(study_name="heretic", storage=storage_url("", kept.folder.path)))
    assert compared["over_refusals"].original == before["over_refusals"] and compared["degenerate"].total == 9
    assert "| `over_refusals` |" in Path("out/README.md").read_text()
    old_export_is_recognized(config, every, compared)
    none = do(config, "n_trials=2", "constraints.degenerate=0", "constraints.over_refusals=0", 'run_name="none"')
    assert none.selected is None or none.selected.scores.within_limits


def old_export_is_recognized(config: Path, every: tuple[str, ...], compared: dict[str, Comparison]) -> None:
    """Make the manifest that of an earlier version, and run again."""
    manifest = json.loads(Path("out/manifest.json").read_text())
    for model, number in (("original", "original"), ("written", "ablated")):
        counts = {name: int(getattr(c, number)) for name, c in compared.items()}
        manifest["scores"][model]["harmless_metrics"] = {**counts, "total": 9}
    old = json.dumps({**manifest, "measures": []})
    Path("out/manifest.json").write_text(old)
    again = do(config, *every)
    assert again.export is not None and {c.name: c for c in again.export.verification.comparisons} == compared
    assert Path("out/manifest.json").read_text() == old, "it was not written again"


def test_chosen_scorers_reach_storage_front_manifest_and_card(config: Path) -> None:
    chosen = (
        'objectives=["kl", "refusals", "unchanged"]', "constraints.own_answer_kl.max=1e6", 'measures=["repetition"]',
        "scorers.unchanged.tokens=2", "scorers.own_answer_kl.tokens=3", "n_trials=4", "early_stopping=true", "save_to=out",
        'run_name="chosen"', "trials_per_batch=2",
    )  # fmt: skip
    made = do(config, *chosen)
    assert len(made.results) == 4, "with these objectives no trial is pruned"
    names = {"unchanged", "own_answer_kl", *(f"own_answer_kl.{d}" for d in ("median", "p95", "max"))}
    assert all(set(r.scores.values) == names and 0 <= r.scores.values["unchanged"] <= 1 for r in made.results)
    assert all(r.point[2] == -r.scores.values["unchanged"] for r in made.results)
    assert all(r.scores.excess["own_answer_kl.max"] < 0 for r in made.results)
    study = optuna.load_study(study_name="heretic", storage=storage_url("", made.folder.path))
    assert len(study.directions) == 3 and study.metric_names == ["KL divergence", "refusals", "unchanged"]
    assert values_before(study)["unchanged"] == 1 and values_before(study)["own_answer_kl"] == pytest.approx(
        0, abs=1e-6
    )
    assert [t.values[2] for t in study.trials] == [-r.scores.values["unchanged"] for r in made.results]
    assert made.export is not None and made.selected is not None
    exported = {c.name: c for c in made.export.verification.comparisons}
    assert set(exported) == {*names, "repetition", "over_refusals", "degenerate"}
    assert exported["unchanged"].ablated == made.selected.scores.values["unchanged"]
    assert exported["unchanged"].error is not None and exported["own_answer_kl.p95"].error is None
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert [row["name"] for row in manifest["measures"]] == list(exported)
    card = Path("out/README.md").read_text()
    assert all(f"| `{name}` |" in card for name in exported)
    again = do(config, *chosen)
    assert again.export is not None and again.export.verification.comparisons == tuple(exported.values())
    assert read_status("chosen", "runs", {}).summary.n_pruned == 0
    assert "unchanged" in report(load_report_input("chosen", "runs", {}, with_texts=False))


def test_scorers_measure_the_same_of_trials_together_and_of_rewritten_weights(config: Path) -> None:
    every = ("n_trials=3", "search.n_startup_trials=3", "batch_size=64", 'objectives=["own_answer_kl", "unchanged"]')
    together = do(config, *every, 'run_name="together"', "trials_per_batch=3")
    rewritten = do(config, *every, 'run_name="weights"', 'apply="weights"')
    for ours, reference in zip(together.results, rewritten.results, strict=True):
        assert ours.scores.values == pytest.approx(reference.scores.values, rel=1e-3, abs=1e-5)


def test_two_models_of_files_are_compared_by_scorers(config: Path, llama: Path) -> None:
    settings = resolve(
        config, assignments=["measures=['unchanged', 'copying', 'own_answer_kl']", "scorers.copying.tasks=3"]
    )
    reporter = RecordingReporter()
    found = evaluate_model(settings.settings, str(llama), wait=False, reporter=reporter, stop=StopSignal())
    assert found.values.pop("over_refusals.total") == found.values.pop("degenerate.total") == 9
    assert list(found.values) == ["over_refusals", "degenerate", "unchanged", "copying"]
    assert (found.values["unchanged"], found.values["copying"]) == (1.0, 0.0)
    assert [(c.name, c.difference, c.error) for c in found.comparisons] == [("unchanged", 0, 0), ("copying", 0, 0)]
    assert any("own_answer_kl" in warning for warning in reporter.warnings)
