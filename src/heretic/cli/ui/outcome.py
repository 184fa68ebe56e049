"""Results of a finished run, export, reproduction or demo, and the question before an upload."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console

from heretic.cli.ui.console import escape_terminal, format_duration, is_interactive, non_interactive_reason, on_terminal
from heretic.cli.ui.tables import show_comparisons, show_lines, show_pareto_front
from heretic.errors import UserError
from heretic.hardware.host import format_bytes
from heretic.runs.folder import REPORT

if TYPE_CHECKING:
    from heretic.export.export import Export
    from heretic.export.upload import Upload
    from heretic.interrupt import StopSignal
    from heretic.pipeline.actions import ExportResult
    from heretic.pipeline.demo.demo import DemoOutcome
    from heretic.pipeline.reproduce import Reproduction
    from heretic.pipeline.run import Outcome


MANY_LEFT = 0.5  # share of the original's refusals
STILL_REFUSED = (
    "This trial removes less than half of the refusals. "
    "Try more varied harmful_train prompts, or directions.iterative_rounds = 1."
)


def show_outcome(console: Console, outcome: Outcome, *, with_pareto_front: bool = True) -> None:
    """Print the Pareto front (the menu has shown it already), the selected trial and the written model."""
    if with_pareto_front:
        show_pareto_front(
            console,
            outcome.results,
            outcome.original_refusals,
            outcome.selected.number if outcome.selected else None,
            outcome.summary.original_values,
        )
    if (end := outcome.summary.end) is not None:
        console.print(f"The study is complete: {end[1]}.", soft_wrap=True)
    if outcome.selected is None:
        if any(not r.scores.within_limits for r in outcome.results):
            console.print("No trial meets the limits of [constraints]. Raise them, or run more trials.", markup=False)
            return
        console.print("No trial left a usable model. Try other settings, such as another search.max_weight.")
        return
    console.print(f"Selected: trial {outcome.selected.number}, {escape_terminal(outcome.reason)}.", soft_wrap=True)
    if outcome.original_refusals and outcome.selected.scores.unanswered > MANY_LEFT * outcome.original_refusals:
        console.print(STILL_REFUSED, soft_wrap=True, markup=False)
    report = outcome.folder.path / REPORT
    if report.is_file():
        console.print(f"Report: {escape_terminal(str(report))}", soft_wrap=True)
    if outcome.export is not None:
        show_export_summary(console, outcome.export, outcome.original_refusals)
    if outcome.export is not None and outcome.export.trial != outcome.selected.number:
        console.print(f"That folder holds trial {outcome.export.trial}, which was selected earlier.", soft_wrap=True)
    if outcome.export is None or outcome.export.trial != outcome.selected.number:
        name = quote(str(outcome.folder.path))
        console.print(f"To export it: heretic export {escape_terminal(name)} -o FOLDER", soft_wrap=True)


def show_export(console: Console, outcome: ExportResult) -> None:
    """Print the summary of one exported trial."""
    console.print(f"Trial {outcome.result.number}, {escape_terminal(outcome.reason)}.")
    show_export_summary(console, outcome.export, outcome.before)


def show_export_summary(console: Console, export: Export, before: int | None) -> None:
    """Print where a model was written, its scores and its verification."""
    verification = export.verification
    scores = verification.scores
    if scores is None:
        checked = f"{verification.tensors_checked} edited tensors compared with the definition of the edit"
        show_lines(
            console,
            [("written to", str(export.destination)), ("scores", "not measured"), ("verified", checked)],
        )
        return
    evasive = f", {scores.evasive} evasive" if scores.evasive else ""
    show_lines(
        console,
        [
            ("written to", str(export.destination)),
            ("refused", f"{before} of {scores.total} before, {scores.refusals} after{evasive}"),
            ("KL", str(scores.divergence)),
            ("verified", f"reloaded from disk; KL from the measured model {verification.divergence:.1e}"),
        ],
    )
    if verification.comparisons:
        show_comparisons(console, verification.comparisons)


def show_reproduction(console: Console, reproduction: Reproduction) -> None:
    """Print how a rebuilt model compares with the exported one, and which inputs changed."""
    rows = [("verdict", f"{reproduction.words}; {reproduction.why}")]
    rows += [("hash", f"{name}: {'the same' if same else 'different'}") for name, same in reproduction.files.items()]
    rows += [("changed", change) for change in reproduction.changed]
    if reproduction.destination is not None:
        rows.append(("written to", str(reproduction.destination)))
    show_lines(console, rows)


def confirm_upload(console: Console, planned: Upload, *, yes: bool, stop: StopSignal) -> None:
    """Describe the upload and ask for confirmation. Raises UserError if no user can answer or the answer is no."""
    visibility = "public: everyone can see it" if planned.public else "private: only you and people with access"
    show_lines(
        console,
        [
            ("model", str(planned.folder)),
            ("files", f"{len(planned.files)}, {format_bytes(planned.nbytes)}"),
            ("goes to", f"{planned.repository} on the Hugging Face hub; {visibility}"),
        ],
    )
    check_answerable(console, yes=yes)
    if yes:
        return
    with stop.raise_immediately():
        answer = console.input("[bold]Upload it?[/bold] [dim]\\[y/N][/dim] ").strip().lower()
    if answer not in ("y", "yes"):
        raise UserError("Nothing was uploaded.", code="not-uploaded", fix="answer y, or --yes")


def check_answerable(console: Console, *, yes: bool) -> None:
    """Raise UserError without --yes if no user can be asked."""
    if not yes and not (is_interactive() and on_terminal(console)):
        why = non_interactive_reason() or "the output is not a terminal"
        raise UserError(f"An upload needs your confirmation, but {why}.", code="nobody-to-ask", fix="pass --yes")


def show_demo(console: Console, demo: DemoOutcome) -> None:
    """Print the run's outcome and the ablated model's KL divergence from the model before the guard."""
    show_outcome(console, demo.outcome)
    rows = [("KL from the model before the guard, on guarded requests", f"{demo.guarded_from_base:.2f} with the guard")]
    if demo.ablated_from_base is not None:
        rows.append(("", f"{demo.ablated_from_base:.2f} after the ablation"))
    rows.append(("time", format_duration(demo.seconds)))
    folder, settings = (quote(str(demo.outcome.folder.path / name)) for name in ("", "config.toml"))
    rows.append(("status", f"heretic status {folder}"))
    rows.append(("chat", f"heretic chat {folder}"))
    rows.append(("evaluate", f"heretic evaluate MODEL --config {settings}"))
    show_lines(console, rows)
