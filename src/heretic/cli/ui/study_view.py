"""How a study stands, in a few lines and a drawing: the same on the live screen and in `heretic status`."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from heretic.cli.ui.console import printable, spell
from heretic.cli.ui.plot import draw
from heretic.search.summary import Standing


def rows(stands: Standing) -> list[tuple[str, str]]:
    """Names and values; what is not known yet is left out."""
    counts = [f"{stands.done} of {stands.n_trials}"]
    counts += [f"{n} {what}" for n, what in ((stands.stopped, "left early"), (stands.failed, "failed")) if n]
    shown = [("trials", ", ".join(counts))]
    if stands.trials_per_hour is not None:
        shown.append(("speed", f"{_rounded(stands.trials_per_hour)} trials per hour"))
    if stands.seconds_left is not None:
        shown.append(("time left", f"about {spell(stands.seconds_left)}"))
    if stands.before is not None and stands.found:
        shown.append(("original", f"{stands.before} of {stands.found[0].scores.total} refused"))
    if stands.best is not None:
        best, _ = stands.best
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
        text.append_text(Text.from_markup(printable(value)))
    return text


def drawing(stands: Standing, console: Console, width: int, height: int) -> Text:
    """The front, in the characters that the console knows."""
    best = stands.best[0] if stands.best else None
    return draw(stands.found, best, width, height, ascii_only=not console.encoding.startswith("utf"))


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
