"""What a finished run, export or demo came to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from heretic.cli.ui.console import escape_terminal, format_duration, is_interactive, non_interactive_reason, on_terminal
from heretic.cli.ui.tables import show_front, show_lines
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


def show_outcome(console: Console, outcome: Outcome, *, seen: bool = False) -> None:
    """The front, unless it was `seen` in the menu; the chosen trial and the written model."""
    if not seen:
        show_front(
            console, outcome.results, outcome.original_refusals, outcome.selected.number if outcome.selected else None
        )
    if outcome.selected is None:
        if any(not r.scores.within_limits for r in outcome.results):
            console.print(
                "No trial keeps to the limits of [constraints]; raise them, or run more trials.", markup=False
            )
            return
        console.print("No trial left a usable model; try other settings, such as a wider search.max_weight.")
        return
    console.print(f"Chosen: trial {outcome.selected.number}, {escape_terminal(outcome.reason)}.", soft_wrap=True)
    report = outcome.folder.path / REPORT
    if report.is_file():
        console.print(f"Report: {escape_terminal(str(report))}", soft_wrap=True)
    if outcome.export is not None:
        _show_export_summary(console, outcome.export, outcome.original_refusals)
    if outcome.export is not None and outcome.export.trial != outcome.selected.number:
        console.print(
            f"What is written there is trial {outcome.export.trial}, which was chosen before.", soft_wrap=True
        )
    if outcome.export is None or outcome.export.trial != outcome.selected.number:
        name = outcome.folder.path
        console.print(f"To write it: heretic export {escape_terminal(str(name))} -o FOLDER", soft_wrap=True)


def show_export(console: Console, outcome: ExportResult) -> None:
    """One exported trial."""
    console.print(f"Trial {outcome.result.number}, {escape_terminal(outcome.reason)}.")
    _show_export_summary(console, outcome.export, outcome.before)


def _show_export_summary(console: Console, export: Export, before: int | None) -> None:
    proof = export.verification
    evasive = f", and {proof.scores.evasive} neither declined nor answered" if proof.scores.evasive else ""
    harmless_metrics = proof.scores.harmless_metrics
    harmless = (
        [("of harmless", f"{harmless_metrics.over_refusals} of {harmless_metrics.total} declined or evaded now")]
        if harmless_metrics
        else []
    )
    show_lines(
        console,
        [
            ("written to", str(export.destination)),
            ("refused", f"{before} of {proof.scores.total} before, {proof.scores.refusals} now{evasive}"),
            *harmless,
            ("KL", str(proof.scores.divergence)),
            ("verified", f"reloaded from disk; KL from the measured model {proof.divergence:.1e}"),
        ],
    )


def show_reproduction(console: Console, found: Reproduction) -> None:
    """What a rebuilt model is to the first one, and what is not as it was then."""
    rows = [("verdict", f"{found.words}; {found.why}")]
    rows += [("hash", f"{name}: {'the same' if same else 'another'}") for name, same in found.files.items()]
    rows += [("changed", change) for change in found.changed]
    if found.destination is not None:
        rows.append(("written to", str(found.destination)))
    show_lines(console, rows)


def confirm_upload(console: Console, planned: Upload, *, yes: bool, stop: StopSignal) -> None:
    """Say what goes where, and ask. Raises UserError where nobody can answer, and where the answer is no."""
    who = "everyone can see it" if planned.public else "private: only you and those you let in"
    show_lines(
        console,
        [
            ("model", str(planned.folder)),
            ("files", f"{len(planned.files)}, {format_bytes(planned.nbytes)}"),
            ("goes to", f"{planned.repository} on the Hugging Face hub; {who}"),
        ],
    )
    check_answerable(console, yes=yes)
    if yes:
        return
    with stop.idle():
        said = console.input("[bold]Upload it?[/bold] [dim]\\[y/N][/dim] ").strip().lower()
    if said not in ("y", "yes"):
        raise UserError("Nothing was uploaded.", code="not-uploaded", fix="answer y, or --yes")


def check_answerable(console: Console, *, yes: bool) -> None:
    """Raise UserError where nobody said yes and nobody can be asked."""
    if not yes and not (is_interactive() and on_terminal(console)):
        why = non_interactive_reason() or "the output is not a terminal"
        raise UserError(
            f"heretic asks before an upload, but nobody can answer here: {why}.", code="nobody-to-ask", fix="--yes"
        )


def show_demo(console: Console, demo: DemoOutcome) -> None:
    """The run's outcome, and how close the ablated model came back to the one before the guard."""
    show_outcome(console, demo.outcome)
    rows = [("KL from the model before the guard, on guarded requests", f"{demo.guarded_from_base:.2f} with the guard")]
    if demo.ablated_from_base is not None:
        rows.append(("", f"{demo.ablated_from_base:.2f} after the ablation"))
    rows.append(("time", format_duration(demo.seconds)))
    folder, settings = demo.outcome.folder.path, demo.outcome.folder.path / "config.toml"
    rows.append(("look again", f"heretic status {folder}"))
    rows.append(("talk to it", f"heretic chat {folder}"))
    rows.append(("measure it", f"heretic evaluate MODEL --config {settings}"))
    show_lines(console, rows)
