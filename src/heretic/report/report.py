"""The report of a run, from its storage and its folder, without loading a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from shlex import quote

import optuna

from heretic.ablation.ablation import Ablation
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.errors import UserError
from heretic.files import split_lines
from heretic.progress import NULL_REPORTER
from heretic.prompts.sets import load
from heretic.report import figures
from heretic.report.geometry_figures import effects_figure, geometry_figures, projections
from heretic.report.importance import FEWEST_TRIALS, importances
from heretic.report.page import Page
from heretic.runs.folder import GEOMETRY, RunFolder, find_run, load_run_settings
from heretic.runs.metadata import RunMetadata
from heretic.runs.status import load_study
from heretic.runs.stored_prompts import stored_prompts
from heretic.scoring.comparison import values_text
from heretic.scoring.direction_effects import DirectionEffects
from heretic.scoring.judges.registry import JUDGES
from heretic.scoring.objectives import DEFAULT_OBJECTIVES
from heretic.search.convergence import REFERENCE_KL, growth
from heretic.search.gradient_path import GradientPath
from heretic.search.integrity import check_attributes, damaged_trials, warning
from heretic.search.pareto import Result, pareto_front, table_columns
from heretic.search.space import SearchSpace, describe
from heretic.search.study import MAX_STORED_PROMPTS
from heretic.search.summary import StudySummary
from heretic.settings import Settings
from heretic.storage.attributes import kl_per_prompt
from heretic.storage.rdb import translate_storage_errors
from heretic.storage.url import masked, storage_url, study_name

MOST_CHANGED = 5  # prompts listed
OF_EVERY_TRIAL = ("Trials", "KL divergence", "Refusal proxy", "Refusals")  # stages that trials time themselves


@dataclass(frozen=True)
class ReportInput:
    """Input of a report."""

    study: optuna.Study
    settings: Settings
    folder: RunFolder
    settings_text: str  # config.toml of the run's folder
    texts: Mapping[str, Sequence[str]] | None = None  # prompts by role, if they are to be shown

    @classmethod
    def of(
        cls,
        study: optuna.Study,
        settings: Settings,
        folder: RunFolder,
        texts: Mapping[str, Sequence[str]] | None = None,
    ) -> ReportInput:
        """Create the input with the settings in the run's folder."""
        file = folder.path / "config.toml"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return cls(study, settings, folder, "\n".join(map(masked, split_lines(text))), texts)


def load_report_input(name: str, runs_dir: str, environment: Mapping[str, str], *, with_texts: bool) -> ReportInput:
    """Load the input of a run's report; works while another process runs the study. Raises UserError."""
    folder = find_run(name, runs_dir)
    resolved = load_run_settings(folder, environment)
    settings = resolved.settings
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
    texts: dict[str, Sequence[str]] = {}
    if with_texts:
        stored = stored_prompts(folder.path, resolved, NULL_REPORTER)
        for role in ("harmful_eval", "harmless_eval"):
            prompts = getattr(stored, role) if stored else load(role, getattr(settings.prompts, role))
            texts[role] = prompts.prompts
    return ReportInput.of(study, settings, folder, texts)


def geometry_page(geometry: ResidualGeometry, model: str, effects: DirectionEffects | None = None) -> str:
    """Return a page on residual geometry alone."""
    page = Page(f"Residuals of {model}")
    add_geometry(page, geometry, effects)
    return page.html()


def report(source: ReportInput) -> str:
    """Return the report as HTML."""
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
        add_geometry(page, geometry, folder.load_effects())
    elif (folder.path / GEOMETRY).exists():
        page.section("Residuals")
        page.text(f"The stored geometry is damaged. Recompute it: heretic geometry {quote(folder.name)}")
    _time(page, summary, folder)
    _made_with(page, source, about)
    return page.html()


def _overview(page: Page, summary: StudySummary, settings: Settings) -> None:
    page.section("Overview")
    counts = [f"{summary.n_complete} of {summary.n_trials}"]
    counts += [
        f"{n} {what}" for n, what in ((summary.n_pruned, "pruned (dominated)"), (summary.n_failed, "failed")) if n
    ]
    pairs = [("trials", ", ".join(counts))]
    if summary.end is not None:
        pairs.append(("ended", summary.end[1]))
    if summary.original_refusals is not None and summary.results:
        pairs.append(("original", f"refuses {summary.original_refusals} of {summary.results[0].scores.total} requests"))
    if summary.best is not None:
        best, reason, _ = summary.best
        pairs += [
            ("chosen", f"trial {best.number}: {reason}"),
            ("refuses", f"{best.scores.refusals} of {best.scores.total} requests"),
            *([("neither refuses nor answers", str(best.scores.evasive))] if best.scores.evasive else []),
            ("KL divergence", str(best.scores.divergence)),
            *_scorer_facts(best, summary.original_values),
        ]
    if summary.history.proxy_error is not None:
        pairs.append(("estimates", f"mean error {summary.history.proxy_error:.1f} refusals"))
    page.facts([*pairs, ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))])
    tokens = "first token" if settings.kl_tokens == 1 else f"first {settings.kl_tokens} tokens"
    page.text(
        f"Answers are judged by {JUDGES[settings.judge.kind].words}. The KL divergence compares the original's and the "
        f"ablated model's probabilities for the {tokens} of the original's answers to harmless requests."
    )


def _scorer_facts(result: Result, original: Mapping[str, float]) -> list[tuple[str, str]]:
    """Numbers of other scorers that the search uses."""
    before = values_text(original)
    return [
        (name, f"{text} (original: {before[name]})" if name in before else text)
        for name, text in values_text(result.scores.values).items()
    ]


_FRONT = (
    "Fewer refusals and a lower KL are better, so the best trials are at the lower left. Expected refusals are the counted "
    "ones plus the probability of the original's refusals in the other answers."
)


def _front_of_others(summary: StudySummary) -> str:
    """A sentence on objectives that the settings chose."""
    named = [f"{o.name} ({o.better} is better)" for o in summary.results[0].objectives]
    return f"The search optimizes {', '.join(named)}. The figure shows the first two."


def _front(page: Page, summary: StudySummary) -> None:
    page.section(
        "Pareto front",
        _FRONT
        if not summary.results or summary.results[0].objectives == DEFAULT_OBJECTIVES
        else _front_of_others(summary),
    )
    if not summary.results:
        page.text("No trial has finished yet.")
        return
    best = pareto_front(summary.results)
    chosen = summary.best.result.number if summary.best else None
    page.figure("front", [figures.of_front(summary.history, chosen, summary.original_refusals)], height=460)
    destroyed = sum(r.scores.divergence.mean == float("inf") for r in summary.results)
    page.text(
        f"Filled: fully measured ({len(summary.results)} trials). Hollow: pruned, since a finished trial dominates it "
        f"({summary.n_pruned} trials); its refusals are an estimate."
        + (f" {destroyed} trials destroyed the model (infinite KL) and are not drawn." if destroyed else "")
    )
    beyond = sum(not r.scores.within_limits for r in summary.results)
    if beyond:
        page.text(f"Trials that violate [constraints] and so are not on the Pareto front: {beyond}.")
    shown, top = table_columns(best), summary.original_refusals or summary.results[0].scores.total
    rows = [[*cells, describe(r.params)] for r, *cells in zip(best, *shown.values(), strict=True)]
    marked = next((i for i, r in enumerate(best) if r.number == chosen), None)
    page.table([*shown, "from"], rows, marked)
    if best[:1] and best[0].objectives != DEFAULT_OBJECTIVES:
        return  # the hypervolume below is that of KL and refusals
    page.section(
        "Progress",
        f"Hypervolume of the Pareto front after each finished trial (reference point: {top} refusals, KL "
        f"{REFERENCE_KL:g}). When it stays flat, more trials hardly help.",
    )
    page.figure("progress", [figures.of_progress(*growth(summary.history, summary.original_refusals))], height=300)


def _trials(
    page: Page, study: optuna.Study, settings: Settings, summary: StudySummary, about: RunMetadata | None
) -> None:
    """Strengths and divergences of each trial on the Pareto front."""
    best = pareto_front(summary.results)
    if not best:
        return
    page.section(
        "A trial",
        "Strength 1 removes the direction entirely, 0 leaves the layer unchanged. "
        "Clicking a point of the Pareto front selects its trial.",
    )
    space = SearchSpace(settings.search, about.layers, about.components, GradientPath.load(study)) if about else None
    trials = {t.number: t for t in study.get_trials(deepcopy=False)}
    strengths: list[figures.Figure | None] = []
    changes: list[figures.Figure | None] = []
    chosen = summary.best.result.number if summary.best else best[0].number
    labels = [f"trial {r.number}: {r.scores.refusals} refusals, KL {r.scores.divergence.mean:.4f}" for r in best]
    selected = next(i for i, r in enumerate(best) if r.number == chosen)
    page.select("trial", "Trial of the Pareto front", labels, selected, [r.number for r in best])
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
    """A trial's ablation; None if its stored parameters are damaged, so that the rest is still drawn."""
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
        "Requests that are still refused, by their number in the set. Orange: refused, as by the original. Red: refused, but the "
        "original answers. Blue: neither refused nor answered.",
    )
    before = about.refused if about else ""
    rows = [(f"trial {r.number}", r.scores.refused) for r in best]
    shown = [("original", before), *rows] if before else rows
    page.figure(
        "requests", [figures.of_requests(shown, before)], height=110 + len(shown) * min(26, max(8, 1200 // len(shown)))
    )
    if before:
        counted = [[name, *_verdict_counts(bits, before)] for name, bits in rows]
        headings = ["", "still refused", "no longer", "newly refused", "neither", "numbers still refused"]
        page.table(headings, counted)


def _verdict_counts(bits: str, before: str) -> list[object]:
    pairs = list(zip(before, bits, strict=False))
    still = [i + 1 for i, pair in enumerate(pairs) if pair == ("1", "1")]
    named = ", ".join(map(str, still[:20])) + (" …" if len(still) > 20 else "")
    return [len(still), pairs.count(("1", "0")), pairs.count(("0", "1")), bits.count("2"), named]


def _importance(page: Page, study: optuna.Study, excluded: Collection[int]) -> None:
    page.section(
        "Parameters",
        "Importance of each search parameter (Optuna's PED-ANOVA, on the objective values reported to the search).",
    )
    shares = importances(study, excluded)
    if not shares:
        page.text(f"Importances need at least {FEWEST_TRIALS} trials with different results.")
        return
    height = 120 + 46 * len(next(iter(shares.values())))
    page.figure("importance", [figures.of_importances(shares)], height=height)


def add_geometry(page: Page, geometry: ResidualGeometry, effects: DirectionEffects | None) -> None:
    """Add the section on residual geometry to a page."""
    drawn = geometry_figures(geometry)
    count = int(geometry.harmful.sum()), int((1 - geometry.harmful).sum())
    page.section(
        "Residuals",
        "The residual stream after every block, at the last token of the training prompts. The silhouette measures how clearly "
        "harmful and harmless prompts form two clusters (1: entirely, 0: not at all), the separation is the distance of their "
        "means along the direction, in standard deviations. Clusters, separation and components use "
        f"{count[0]} harmful and {count[1]} harmless prompts.",
    )
    page.figure("separation", [drawn["separation"]], height=340)
    shown = projections(geometry)
    clearest = int(geometry.silhouette.argmax())
    page.slider("layer", "Layer", [label for label, _ in shown], clearest)
    page.figure("projection", [figure for _, figure in shown], "layer", height=460)
    page.text("The two principal components, by layer. The slider starts at the layer with the clearest clusters.")
    page.figure("norms", [drawn["norms"]], height=320)
    page.text("Cosines between the layers' directions. Layers with a cosine close to 1 share a direction.")
    page.figure("cosines", [drawn["cosines"]], height=460)
    if effects is not None and len(effects.kl) == geometry.num_layers:
        page.figure("effects", [effects_figure(effects)], height=340)
        page.text(
            "What each layer's direction does. Removed: probability that a refused prompt is still refused after its removal from "
            "every writer. Added: probability that a harmless prompt is refused after its addition to the layer's output. KL: "
            "of harmless answers after the removal."
        )


def _time(page: Page, summary: StudySummary, folder: RunFolder) -> None:
    seconds = stages(folder.path / "run.log")
    for r in summary.results:
        for phase in ("prepare", "divergence", "refusals", "scorers"):
            name = f"trials: {phase}"
            seconds[name] = seconds.get(name, 0.0) + r.scores.seconds.get(phase, 0.0)
    seconds = {name: s for name, s in seconds.items() if s >= 0.05}
    if seconds:
        page.section("Time", "Seconds by phase, over all sessions. Trial phases count fully measured trials only.")
        page.figure("time", [figures.of_phases(seconds)], height=100 + 28 * len(seconds))


def stages(log: Path) -> dict[str, float]:
    """Sum the seconds of the stages in a run's log over sessions, without those that trials measure."""
    seconds: dict[str, float] = {}
    if log.is_file():
        for line in split_lines(log.read_text(encoding="utf-8", errors="replace")):
            match = re.fullmatch(r"[\d-]+ [\d:,]+ INFO (.+): (\d+\.\d) s", line)
            if match and match[1] not in OF_EVERY_TRIAL and not match[1].startswith("Scorers: "):
                seconds[match[1]] = seconds.get(match[1], 0.0) + float(match[2])
    return seconds


def _made_with(page: Page, source: ReportInput, about: RunMetadata | None) -> None:
    page.section("Settings and environment")
    if about:
        page.facts(about.facts.items())
    page.details("Settings", source.settings_text)
    for role, texts in (source.texts or {}).items():
        numbered = "\n".join(f"{i} {text}" for i, text in enumerate(texts, start=1))
        page.details(f"Texts of {role}", numbered)
