"""How a study stands, in a few lines and a drawing: the same on the live screen and in `heretic status`."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from heretic.cli.ui.console import escape_terminal, format_duration
from heretic.cli.ui.plot import draw
from heretic.search.summary import StudySummary


def rows(summary: StudySummary) -> list[tuple[str, str]]:
    """Names and values; what is not known yet is left out."""
    counts = [f"{summary.n_complete} of {summary.n_trials}"]
    counts += [f"{n} {what}" for n, what in ((summary.n_pruned, "left early"), (summary.n_failed, "failed")) if n]
    shown = [("trials", ", ".join(counts))]
    if summary.trials_per_hour is not None:
        shown.append(("speed", f"{_rounded(summary.trials_per_hour)} trials per hour"))
    if summary.seconds_left is not None:
        shown.append(("time left", f"about {format_duration(summary.seconds_left)}"))
    if summary.original_refusals is not None and summary.results:
        shown.append(("original", f"{summary.original_refusals} of {summary.results[0].scores.total} refused"))
    if summary.best is not None:
        best, _ = summary.best
        scores = best.scores
        evasive = f", {scores.evasive} evasive" if scores.evasive else ""
        shown.append(
            (
                "best so far",
                f"trial {best.number}: {scores.refusals} of {scores.total} refused{evasive}, KL {scores.divergence.mean:.4f}",
            )
        )
    return shown


def aligned(pairs: list[tuple[str, str]]) -> Text:
    """One line each, the values below each other."""
    width = max((len(name) for name, _ in pairs), default=0)
    text = Text(no_wrap=True, overflow="ellipsis")
    for i, (name, value) in enumerate(pairs):
        text.append("\n" * (i > 0) + f"{name:<{width}}  ", style="dim")
        text.append_text(Text.from_markup(escape_terminal(value)))
    return text


def pareto_plot(summary: StudySummary, console: Console, width: int, height: int) -> Text:
    """The front, in the characters that the console knows."""
    best = summary.best[0] if summary.best else None
    return draw(summary.results, best, width, height, ascii_only=not console.encoding.startswith("utf"))


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
