"""The report of a run, from its storage and its folder; nothing is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import optuna

from heretic.ablation.ablation import Ablation
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.errors import UserError
from heretic.files import split_lines
from heretic.prompts import load
from heretic.report import figures
from heretic.report.geometry_figures import geometry_figures, projections
from heretic.report.importance import FEWEST_TRIALS, importances
from heretic.report.page import Page
from heretic.runs.folder import GEOMETRY, RunFolder, find_run, load_settings
from heretic.runs.metadata import RunMetadata
from heretic.runs.status import load_study
from heretic.scoring.judges.verdict import JUDGE_DESCRIPTIONS
from heretic.search.gradient_path import GradientPath
from heretic.search.hypervolume import hypervolume_history
from heretic.search.integrity import check_attributes, damaged_trials, warning
from heretic.search.pareto import Result, pareto_front, table_columns
from heretic.search.space import SearchSpace, describe
from heretic.search.study import MAX_STORED_PROMPTS
from heretic.search.summary import StudySummary
from heretic.settings import Settings
from heretic.storage.attributes import kl_per_prompt
from heretic.storage.rdb import translate_storage_errors
from heretic.storage.url import masked, storage_url, study_name

REFERENCE_KL = 1.0  # nats; a trial above adds nothing to the hypervolume
MOST_CHANGED = 5  # prompts that are named
OF_EVERY_TRIAL = ("Trials", "KL divergence", "Surrogate", "Refusals")  # stages that trials time themselves


@dataclass(frozen=True)
class ReportInput:
    """What a report is made from. `settings_text` is what the run's folder keeps; `texts` are the prompts by role, where they
    shall be shown."""

    study: optuna.Study
    settings: Settings
    folder: RunFolder
    settings_text: str
    texts: Mapping[str, Sequence[str]] | None = None

    @classmethod
    def of(
        cls,
        study: optuna.Study,
        settings: Settings,
        folder: RunFolder,
        texts: Mapping[str, Sequence[str]] | None = None,
    ) -> ReportInput:
        """With the settings as the folder keeps them."""
        file = folder.path / "config.toml"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return cls(study, settings, folder, "\n".join(map(masked, split_lines(text))), texts)


def load_report_input(name: str, runs_dir: str, environment: Mapping[str, str], *, with_texts: bool) -> ReportInput:
    """Of a run, from its folder and its storage; works while another process is at it. Raises UserError."""
    folder = find_run(name, runs_dir)
    settings = load_settings(folder, environment)
    if not settings.storage and not (folder.path / "study.db").is_file():
        raise UserError(
            "The run has no study yet.",
            code="no-study",
            where=str(folder.path),
            fix="wait until its first trial begins",
        )
    url = storage_url(settings.storage, folder.path)
    with translate_storage_errors(url):
        study = load_study(url, study_name(settings.storage, folder.path))
    roles = ("harmful_eval", "harmless_eval") if with_texts else ()
    texts = {role: load(role, getattr(settings.prompts, role)).prompts for role in roles}
    return ReportInput.of(study, settings, folder, texts)


def geometry_page(geometry: ResidualGeometry, model: str) -> str:
    """How residuals lie, as a page of its own."""
    page = Page(f"Residuals of {model}")
    add_geometry(page, geometry)
    return page.html()


def report(source: ReportInput) -> str:
    """The report as HTML."""
    study, settings, folder = source.study, source.settings, source.folder
    with translate_storage_errors(storage_url(settings.storage, folder.path)):
        check_attributes(study)
        damage = damaged_trials(study)
        summary, about, geometry = (
            StudySummary.of(study, settings, damage),
            RunMetadata.load(study),
            folder.load_geometry(),
        )
    page = Page(f"{folder.name}: {settings.model}")
    _overview(page, summary, settings)
    if damage:
        page.text(warning(damage))
    _front(page, summary)
    _trials(page, study, settings, summary, about)
    _requests(page, summary, about)
    _importance(page, study, damage)
    if geometry is not None:
        add_geometry(page, geometry)
    elif (folder.path / GEOMETRY).exists():
        page.section("Residuals")
        page.text(f"What is stored of them is damaged. It is measured anew with: heretic geometry {folder.name}")
    _time(page, summary, folder)
    _made_with(page, source, about)
    return page.html()


def _overview(page: Page, summary: StudySummary, settings: Settings) -> None:
    page.section("Overview")
    counts = [f"{summary.n_complete} of {summary.n_trials}"]
    counts += [f"{n} {what}" for n, what in ((summary.n_pruned, "left early"), (summary.n_failed, "failed")) if n]
    pairs = [("trials", ", ".join(counts))]
    if summary.original_refusals is not None and summary.results:
        pairs.append(
            ("original", f"declines {summary.original_refusals} of {summary.results[0].scores.total} requests")
        )
    if summary.best is not None:
        best, reason = summary.best
        pairs += [
            ("chosen", f"trial {best.number}: {reason}"),
            ("declines", f"{best.scores.refusals} of {best.scores.total} requests"),
            *([("neither declines nor answers", str(best.scores.evasive))] if best.scores.evasive else []),
            ("KL divergence", str(best.scores.divergence)),
            *_conduct(best),
        ]
    if summary.history.surrogate_error is not None:
        pairs.append(("estimates", f"off by {summary.history.surrogate_error:.1f} refusals on average"))
    page.facts([*pairs, ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))])
    tokens = "first token" if settings.kl_tokens == 1 else f"first {settings.kl_tokens} tokens"
    page.text(
        f"Answers are judged by {JUDGE_DESCRIPTIONS[settings.judge.kind]}; the KL divergence is that of the probabilities of the {tokens} of "
        "the original's answers to harmless requests, original against ablated."
    )


def _conduct(result: Result) -> list[tuple[str, str]]:
    """What happened to the answers to harmless requests, where it was measured."""
    found = result.scores.harmless_metrics
    if found is None:
        return []
    return [
        ("declines of the harmless", f"{found.over_refusals} of {found.total} requests"),
        ("degenerate answers", f"{found.degenerate} of {found.total}, to harmless requests"),
    ]


def _front(page: Page, summary: StudySummary) -> None:
    page.section(
        "Front",
        "Fewer refusals and less change are both better, so the best trials are at the lower left. Expected refusals are those "
        "that were counted, and how much the other answers lean to the original's refusals.",
    )
    if not summary.results:
        page.text("No trial is finished yet.")
        return
    best = pareto_front(summary.results)
    chosen = summary.best[0].number if summary.best else None
    page.figure("front", [figures.of_front(summary.history, chosen, summary.original_refusals)], height=460)
    destroyed = sum(r.point[0] == float("inf") for r in summary.results)
    page.text(
        f"Filled: measured in full. Hollow: left early, since a finished trial had beaten it; its refusals are an estimate. "
        f"{len(summary.results)} trials are measured in full, {summary.n_pruned} were left early."
        + (f" {destroyed} destroyed the model (infinite KL) and cannot be drawn." if destroyed else "")
    )
    beyond = sum(not r.scores.within_limits for r in summary.results)
    if beyond:
        page.text(f"Trials that go beyond a limit of [constraints], and so cannot be on the front: {beyond}.")
    total, shown = summary.results[0].scores.total, table_columns(best)
    rows = [[*cells, describe(r.params)] for r, *cells in zip(best, *shown.values(), strict=True)]
    marked = next((i for i, r in enumerate(best) if r.number == chosen), None)
    page.table([*shown, "from"], rows, marked)
    page.section(
        "Progress",
        f"The share of the rectangle up to {total} refusals and a KL of {REFERENCE_KL:g} that the front beats (hypervolume), "
        "after every trial measured in full. When it stays flat, more trials hardly help.",
    )
    grown = hypervolume_history([r.point for r in summary.results], (REFERENCE_KL, float(total)))
    page.figure("progress", [figures.of_progress([r.number for r in summary.results], grown)], height=300)


def _trials(
    page: Page, study: optuna.Study, settings: Settings, summary: StudySummary, about: RunMetadata | None
) -> None:
    """Strengths and divergences of each trial on the front."""
    best = pareto_front(summary.results)
    if not best:
        return
    page.section(
        "A trial",
        "Strength 1 removes the direction whole, 0 leaves the layer alone. A click on the front chooses, too.",
    )
    space = SearchSpace(settings.search, about.layers, about.components, GradientPath.load(study)) if about else None
    trials = {t.number: t for t in study.get_trials(deepcopy=False)}
    strengths: list[figures.Figure | None] = []
    changes: list[figures.Figure | None] = []
    chosen = summary.best[0].number if summary.best else best[0].number
    labels = [f"trial {r.number}: {r.scores.refusals} refusals, KL {r.point[0]:.4f}" for r in best]
    selected = next(i for i, r in enumerate(best) if r.number == chosen)
    page.select("trial", "Trial of the front", labels, selected, [r.number for r in best])
    for index, r in enumerate(best):
        d = r.scores.divergence
        marks = {"mean": d.mean, "median": d.median, "95 % below": d.p95, "largest": d.max}
        edit = _edit(space, r) if space else None
        profiles = {c: [float(s) for s in profile] for c, profile in edit.strengths.items()} if edit else None
        strengths.append(figures.of_strengths(profiles) if profiles else None)
        stored = kl_per_prompt(study, trials[r.number])
        changes.append(figures.of_divergences(stored, marks) if stored else None)
        facts = [("refusals", f"{r.scores.refusals} of {r.scores.total}"), ("KL divergence", str(d))]
        if stored:
            order = sorted(range(len(stored)), key=lambda i: -stored[i])[:MOST_CHANGED]
            named = ", ".join(f"{i + 1} ({stored[i]:.3g})" for i in order)
            facts.append(("changed most", f"harmless prompts {named}"))
            if len(stored) == MAX_STORED_PROMPTS:
                facts.append(("drawn", f"the first {MAX_STORED_PROMPTS} prompts"))
        page.block("trial", index, facts)
    page.figure("strengths", strengths, "trial", height=320)
    page.figure("divergences", changes, "trial", height=320)


def _edit(space: SearchSpace, result: Result) -> Ablation | None:
    """A trial's ablation; None where its stored parameters are damaged, so that only its strengths are not drawn."""
    try:
        return space.from_params(result.params)
    except UserError:
        return None


def _requests(page: Page, summary: StudySummary, about: RunMetadata | None) -> None:
    best = [r for r in pareto_front(summary.results) if r.scores.refused]
    if not best:
        return
    page.section(
        "Requests",
        "Which requests are still declined, by their number in the set; the texts are not in this file unless they were "
        "asked for. Orange: declined, as by the original. Red: declined, although the original answers. Blue: neither declined nor "
        "answered.",
    )
    before = about.refused if about else ""
    rows = [(f"trial {r.number}", r.scores.refused) for r in best]
    shown = [("original", before), *rows] if before else rows
    page.figure(
        "requests", [figures.of_requests(shown, before)], height=110 + len(shown) * min(26, max(8, 1200 // len(shown)))
    )
    if before:
        counted = [[name, *_kinds(bits, before)] for name, bits in rows]
        headings = ["", "still declined", "no longer", "newly declined", "neither", "numbers still declined"]
        page.table(headings, counted)


def _kinds(bits: str, before: str) -> list[object]:
    pairs = list(zip(before, bits, strict=False))
    still = [i + 1 for i, pair in enumerate(pairs) if pair == ("1", "1")]
    named = ", ".join(map(str, still[:20])) + (" …" if len(still) > 20 else "")
    return [len(still), pairs.count(("1", "0")), pairs.count(("0", "1")), bits.count("2"), named]


def _importance(page: Page, study: optuna.Study, without: Collection[int]) -> None:
    page.section(
        "Parameters",
        "How much each parameter of the search decided, as shares of the whole (Optuna's PED-ANOVA, on the values that the "
        "search was told).",
    )
    found = importances(study, without)
    if not found:
        page.text(f"Nothing can be said with fewer than {FEWEST_TRIALS} trials, or where all came out alike.")
        return
    height = 120 + 46 * len(next(iter(found.values())))
    page.figure("importance", [figures.of_importances(found)], height=height)


def add_geometry(page: Page, geometry: ResidualGeometry) -> None:
    """The section about residuals, as `heretic geometry` shows it, too."""
    drawn = geometry_figures(geometry)
    count = int(geometry.harmful.sum()), int((1 - geometry.harmful).sum())
    page.section(
        "Residuals",
        "What the stream holds at the last token of the prompts that gave the directions, after every block. The silhouette "
        "says how clearly harmful and harmless prompts form two clusters (1: entirely, 0: not at all); the separation, how far "
        "their means lie apart along the direction, in standard deviations. Clusters, separation and components are of "
        f"{count[0]} harmful and {count[1]} harmless prompts.",
    )
    page.figure("separation", [drawn["separation"]], height=340)
    shown = projections(geometry)
    clearest = int(geometry.silhouette.argmax())
    page.slider("layer", "Layer", [label for label, _ in shown], clearest)
    page.figure("projection", [figure for _, figure in shown], "layer", height=460)
    page.text("The two components that vary most, by layer; the slider begins at the layer with the clearest clusters.")
    page.figure("norms", [drawn["norms"]], height=320)
    page.text("Cosines between the directions of the layers: where they are close to 1, the layers share a direction.")
    page.figure("cosines", [drawn["cosines"]], height=460)


def _time(page: Page, summary: StudySummary, folder: RunFolder) -> None:
    seconds = stages(folder.path / "run.log")
    for r in summary.results:
        for phase in ("prepare", "divergence", "refusals"):
            name = f"trials: {phase}"
            seconds[name] = seconds.get(name, 0.0) + r.scores.seconds.get(phase, 0.0)
    seconds = {name: s for name, s in seconds.items() if s >= 0.05}
    if seconds:
        page.section("Time", "Seconds by phase, over all sessions; those of trials are of the ones measured in full.")
        page.figure("time", [figures.of_phases(seconds)], height=100 + 28 * len(seconds))


def stages(log: Path) -> dict[str, float]:
    """Seconds of the stages that a run's log tells of, summed over sessions, but for those that trials time themselves."""
    found: dict[str, float] = {}
    if log.is_file():
        for line in split_lines(log.read_text(encoding="utf-8", errors="replace")):
            match = re.fullmatch(r"[\d-]+ [\d:,]+ INFO (.+): (\d+\.\d) s", line)
            if match and match[1] not in OF_EVERY_TRIAL:
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def _made_with(page: Page, source: ReportInput, about: RunMetadata | None) -> None:
    page.section("Settings and environment")
    if about:
        page.facts(about.environment.items())
    page.details("Settings", source.settings_text)
    for role, texts in (source.texts or {}).items():
        numbered = "\n".join(f"{i} {text}" for i, text in enumerate(texts, start=1))
        page.details(f"Texts of {role}", numbered)
