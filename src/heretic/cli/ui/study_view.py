"""Summary lines and plot of a study, for the dashboard and for `heretic status`."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from heretic.cli.ui.console import escape_terminal, format_duration
from heretic.cli.ui.plot import draw
from heretic.search.summary import StudySummary


def rows(summary: StudySummary) -> list[tuple[str, str]]:
    """Return names and values; omits unknown values."""
    counts = [f"{summary.n_complete} of {summary.n_trials}"]
    counts += [f"{n} {what}" for n, what in ((summary.n_pruned, "pruned"), (summary.n_failed, "failed")) if n]
    pairs = [("trials", ", ".join(counts))]
    if summary.end is not None:
        pairs.append(("ended", summary.end[1]))
    if summary.trials_per_hour is not None:
        pairs.append(("speed", f"{_rounded(summary.trials_per_hour)} trials per hour"))
    if summary.seconds_left is not None:
        pairs.append(("time left", f"at most {format_duration(summary.seconds_left)}"))
    if summary.original_refusals is not None and summary.results:
        pairs.append(("original", f"{summary.original_refusals} of {summary.results[0].scores.total} refused"))
    if summary.best is not None:
        best = summary.best.result
        scores = best.scores
        evasive = f", {scores.evasive} evasive" if scores.evasive else ""
        pairs.append(
            (
                "best so far",
                f"trial {best.number}: {scores.refusals} of {scores.total} refused{evasive}, KL {scores.divergence.mean:.4f}",
            )
        )
    return pairs


def aligned(pairs: list[tuple[str, str]]) -> Text:
    """Return a line for each pair, with aligned values."""
    width = max((len(name) for name, _ in pairs), default=0)
    text = Text(no_wrap=True, overflow="ellipsis")
    for i, (name, value) in enumerate(pairs):
        text.append("\n" * (i > 0) + f"{name:<{width}}  ", style="dim")
        text.append_text(Text.from_markup(escape_terminal(value)))
    return text


def pareto_plot(summary: StudySummary, console: Console, width: int, height: int) -> Text:
    """Draw the trials and the Pareto front, in ASCII if the console does not support Unicode."""
    best = summary.best.result if summary.best else None
    return draw(summary.results, best, width, height, ascii_only=not console.encoding.startswith("utf"))


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
