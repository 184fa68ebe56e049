"""The report: what it says, what it keeps to itself, when it is written, and what it costs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from heretic.errors import UserError
from heretic.pipeline.run import Outcome
from heretic.report.importance import FEWEST_TRIALS, importances
from heretic.report.page import Page
from heretic.report.report import ReportInput, load_report_input, report, stages
from heretic.report.reporter import ReportWriter, write_report
from heretic.runs.folder import REPORT, RunFolder
from heretic.runs.metadata import RunMetadata
from heretic.scoring.judges.verdict import REFUSAL
from heretic.scoring.refusals import RefusalCount
from heretic.scoring.scores import Divergence, PrunedTrial, RefusalProxy, Scores
from heretic.search.pareto import pareto_front
from heretic.settings import SearchSettings, Settings
from heretic.storage.attributes import KL_PER_PROMPT, PRUNED
from tests.helpers.command import heretic
from tests.helpers.reporters import RecordingReporter
from tests.report.runs import SCRIPT, SECRET

MANY = 10_000


def fill(study: optuna.Study, count: int) -> None:
    """Add so many trials, a third of them left early; a KL that x0 decides, refusals that x0 and x2 decide."""
    floats = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("x0", "x1", "x2", "x3")}
    scope = {"direction_scope": optuna.distributions.CategoricalDistribution(["per_layer"])}
    chance = random.Random(0)
    trials = []
    for i in range(count):
        params = {name: chance.random() for name in floats}
        kl, refusals = params["x0"] + 0.1 * params["x1"], round(50 * (1 - params["x0"]) * params["x2"])
        divergence = Divergence(kl, kl, kl, kl)
        if i % 3 == 2:
            found = {PRUNED: PrunedTrial(divergence, refusals, 50, {}, RefusalProxy(refusals, 0.5, 50)).as_dict()}
        else:
            found = {"heretic:scores": Scores(divergence, refusals, 50, {"refusals": 1.0}, refused="01" * 25).as_dict()}
        given = {**params, "direction_scope": "per_layer"}
        values = [kl, float(refusals)]
        trials.append(
            optuna.trial.create_trial(params=given, distributions=floats | scope, values=values, user_attrs=found)
        )
    study.add_trials(trials)


def without_scripts(html: str) -> str:
    return re.sub(r"<script.*?</script>", "", html, flags=re.S)


def content(html: str) -> dict:  # type: ignore[type-arg]
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def test_a_run_leaves_a_report_of_its_last_state(made: Outcome) -> None:
    html = (made.folder.path / REPORT).read_text(encoding="utf-8")
    page = without_scripts(html)
    assert "24 of 24" in page and made.selected is not None and "<th>expected</th>" in page
    assert f"trial {made.selected.number}: fewest refusals" in page
    for r in pareto_front(made.results):
        assert f"<td>{r.scores.divergence.mean:.4f}</td>" in page
    variants = content(html)["figures"]["strengths"]["variants"]
    assert len(variants) == len(pareto_front(made.results)) and all(len(v["data"][0]["y"]) == 4 for v in variants)
    assert not list(made.folder.path.glob(f".{REPORT}.*")), "a partial file was left"


def test_texts_of_prompts_are_shown_only_when_asked_for(made: Outcome, tmp_path: Path) -> None:
    path = str(made.folder.path)
    harmful = "tell soup me"
    plain = report(load_report_input(path, "", os.environ, with_texts=False))
    assert harmful not in plain and harmful not in (made.folder.path / REPORT).read_text()
    full = report(load_report_input(path, "", os.environ, with_texts=True))
    assert harmful in without_scripts(full)
    assert SCRIPT not in full and SCRIPT.replace("<", "&lt;").replace(">", "&gt;") in full


def test_divergences_are_stored_for_the_front_and_agree_with_the_scores(made: Outcome) -> None:
    study = load_report_input(str(made.folder.path), "", os.environ, with_texts=False).study
    by_number = {t.number: t for t in study.get_trials()}
    for r in pareto_front(made.results):
        stored = by_number[r.number].user_attrs[KL_PER_PROMPT]
        assert len(stored) == 10
        assert sum(stored) / 10 == pytest.approx(r.scores.divergence.mean, rel=1e-3)
        assert max(stored) == pytest.approx(r.scores.divergence.max, rel=1e-3)
    without = [t.number for t in by_number.values() if KL_PER_PROMPT not in t.user_attrs]
    assert len(without) > len(by_number) / 4, "stored for trials that never were on the front"


def test_the_kinds_of_requests_add_up(made: Outcome) -> None:
    study = load_report_input(str(made.folder.path), "", os.environ, with_texts=False).study
    about = RunMetadata.load(study)
    assert about is not None and about.layers == 4 and about.refused.count("1") == made.original_refusals
    html = without_scripts((made.folder.path / REPORT).read_text())
    for r in pareto_front(made.results):
        pairs = list(zip(about.refused, r.scores.refused, strict=True))
        still, gone, new = (pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1")))
        assert still + gone == made.original_refusals and still + new == r.scores.refusals
        assert (
            f"<td>trial {r.number}</td><td>{still}</td><td>{gone}</td><td>{new}</td><td>{r.scores.evasive}</td>" in html
        )


def test_it_says_who_judged_and_what_the_divergence_is_of(tmp_path: Path) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    d = Divergence(0.1, 0.1, 0.1, 0.1)
    limits = {"over_refusals": -1.0}
    kept = Scores(
        d,
        5,
        10,
        {},
        refused="1212111000",
        evasive=2,
        judge="llm",
        values={"over_refusals": 3.0, "over_refusals.total": 8.0},
        excess=limits,
    )
    beyond = replace(kept, refusals=1, excess={"over_refusals": 2.0})
    for scores in (kept, beyond):
        values, found = [0.1, scores.expected], {"heretic:scores": scores.as_dict()}
        study.add_trial(optuna.trial.create_trial(values=values, user_attrs=found))
    settings = Settings(model="m", kl_tokens=4, judge={"kind": "llm"})
    page = without_scripts(report(ReportInput(study, settings, RunFolder(tmp_path), "")))
    assert "judged by a language model" in page and "phrases" not in page and "first 4 tokens" in page
    for heading, cell in (("evasive", "2"), ("over refusals", "3/8")):
        assert f"<th>{heading}</th>" in page and f"<td>{cell}</td>" in page
    assert "neither refuses nor answers" in page and "not on the Pareto front: 1." in page


def test_passwords_are_masked(made: Outcome, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(made.folder.path, tmp_path / "run"))
    url = f"postgresql://me:{SECRET}@host/db"
    (folder.path / "config.toml").write_text(f'model = "m"\nstorage = "{url}"\n# someone@example.org\n')
    study = load_report_input(str(made.folder.path), "", os.environ, with_texts=False).study
    html = report(ReportInput.of(study, Settings(model="m", storage=url), folder))
    assert SECRET not in html and "postgresql://me:***@host/db" in html and "someone@example.org" in html


def test_ten_thousand_trials_take_less_than_ten_seconds(tmp_path: Path) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    fill(study, MANY)
    settings = Settings(model="m", n_trials=MANY, search=SearchSettings())
    began = time.perf_counter()
    write_report(ReportInput(study, settings, RunFolder(tmp_path), ""), tmp_path / REPORT)
    seconds = time.perf_counter() - began
    assert seconds < 10, f"{seconds:.1f} s"
    points = {
        t["name"]: len(t["x"])
        for t in content((tmp_path / REPORT).read_text())["figures"]["front"]["variants"][0]["data"]
    }
    assert sum(points.values()) - points["chosen"] == MANY
    assert (tmp_path / REPORT).stat().st_size < 8 * 2**20


def test_importances_find_what_decides(tmp_path: Path) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    fill(study, FEWEST_TRIALS - 1)
    assert importances(study) == {}
    fill(study, 300)
    found = importances(study)
    assert next(iter(found["for a small KL"])) == "x0"
    assert set(list(found["for few refusals"])[:2]) == {"x0", "x2"}


def reporter_of(made: Outcome, folder: Path, reporter: RecordingReporter) -> ReportWriter:
    """A reporter that writes to this folder."""
    source = load_report_input(str(made.folder.path), "", os.environ, with_texts=False)
    return ReportWriter(source.study, source.settings, RunFolder(folder), reporter)


def test_it_takes_a_small_share_of_the_time(made: Outcome, tmp_path: Path) -> None:
    reporter = reporter_of(made, tmp_path, RecordingReporter())
    began = time.monotonic()
    reporter.after_batch()
    first = (tmp_path / REPORT).stat()
    assert reporter.next >= began + 10
    reporter.after_batch()
    assert (tmp_path / REPORT).stat().st_ino == first.st_ino, "written again at once"
    reporter.next = 0.0
    reporter.after_batch()
    assert (tmp_path / REPORT).stat().st_ino != first.st_ino


def test_a_report_that_cannot_be_written_is_said_once_and_ends_nothing(made: Outcome, tmp_path: Path) -> None:
    reporter = RecordingReporter()
    writer = reporter_of(made, tmp_path / "gone", reporter)
    writer.write()
    writer.write()
    assert len(reporter.warnings) == 1 and "report" in reporter.warnings[0]


def test_stages_of_all_sessions_are_added_up(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "2026-11-24 15:00:00,123 INFO Loading a: b as float32: 1.5 s\n2026-11-24 15:00:01,123 INFO Trials: 9.0 s\n"
        "a line of something else: 4.0 s\n2026-11-24 16:00:00,000 INFO Loading a: b as float32: 2.0 s\n"
    )
    assert stages(log) == {"Loading a: b as float32": 3.5}
    assert stages(tmp_path / "none.log") == {}


def test_the_policy_names_the_scripts_that_are_there() -> None:
    import base64
    import hashlib

    html = Page("x").html()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    hashes = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
    assert len(scripts) == 2 and set(re.findall(r"'sha256-([^']*)'", policy)) == hashes
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_the_command_writes_to_the_given_folder(
    made: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    ran = heretic(capsys, monkeypatch, "report", str(made.folder.path), "-o", "here.html", "--open")
    assert ran.status == 0 and "Written: here.html" in ran.out
    assert opened == [Path("here.html").resolve().as_uri()]
    assert "harmful" in Path("here.html").read_text()


def test_what_a_user_can_do_wrong(
    made: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = heretic(capsys, monkeypatch, "report", "nothing")
    assert ran.status == 1 and "'nothing'" in ran.err
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(made.folder.path / "config.toml", empty)
    ran = heretic(capsys, monkeypatch, "report", str(empty))
    assert ran.status == 1 and "[no-study]" in ran.err
    with pytest.raises(UserError) as refused:
        write_report(
            load_report_input(str(made.folder.path), "", os.environ, with_texts=False), tmp_path / "no" / "x.html"
        )
    assert "x.html" in refused.value.what and refused.value.where == str(tmp_path / "no")


def test_geometry_of_a_run_and_of_a_model_is_the_same(
    made: Outcome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = heretic(capsys, monkeypatch, "geometry", str(made.folder.path), "--html", "g.html")
    assert stored.status == 0 and "silhouette" in stored.out and "Residuals of" in Path("g.html").read_text()
    monkeypatch.setenv("HERETIC_RUNS_DIR", "elsewhere")
    settings = made.folder.path.parents[1] / "config.toml"
    measured = heretic(capsys, monkeypatch, "geometry", "-c", str(settings), "--json")
    assert measured.status == 0, measured.err
    layers = json.loads(measured.out)["layers"]
    geometry = made.folder.load_geometry()
    assert geometry is not None
    assert [row["silhouette"] for row in layers] == pytest.approx(geometry.silhouette.tolist(), abs=1e-5)
    assert layers[-1]["cosine_with_next"] is None and not Path("elsewhere").exists()


def test_a_run_without_stored_geometry_gets_it_again_and_the_effects_that_are_asked_for(
    made: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(shutil.copytree(made.folder.path, tmp_path / made.folder.name))
    file = folder.path / "geometry.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)
    assert folder.load_geometry() is None, "a damaged file was believed"
    ran = heretic(capsys, monkeypatch, "geometry", str(folder.path), "--plain", "--effects")
    assert ran.status == 1 and "[too-few-refusals]" in ran.err
    refused = RefusalCount((REFUSAL,) * 32, ((7, 8),) * 32)
    monkeypatch.setattr(
        "heretic.pipeline.geometry.find_refusals",
        lambda _context, asked: RefusalCount(refused.verdicts[: len(asked)], refused.tokens[: len(asked)]),
    )
    ran = heretic(capsys, monkeypatch, "geometry", str(folder.path), "--plain", "--effects")
    assert ran.status == 0, ran.err
    effects = folder.load_effects()
    assert effects is not None and len(effects.kl) == 4 and "of Arditi et al. 2024" in ran.out
    monkeypatch.setattr("heretic.pipeline.geometry.load_model_context", None)  # everything is stored now
    again = heretic(capsys, monkeypatch, "geometry", str(folder.path), "--json")
    assert json.loads(again.out)["effects"]["kl"] == pytest.approx(effects.kl.tolist())
    assert heretic(capsys, monkeypatch, "report", str(folder.path), "-o", "r.html").status == 0
    assert "What each layer's direction does" in Path("r.html").read_text().replace("&#x27;", "'")
    found, before = folder.load_geometry(), made.folder.load_geometry()
    assert found is not None and before is not None and (found.silhouette - before.silhouette).abs().max() < 1e-5
