"""What `heretic status` prints, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from heretic.cli.ui.console import escape_terminal, on_terminal
from heretic.cli.ui.study_view import aligned, pareto_plot, rows
from heretic.cli.ui.tables import front_table
from heretic.errors import UserError
from heretic.runs.status import Status

WIDEST_PLOT = 80
PLOT_LINES = 14


def show_status(console: Console, seen: Status) -> None:
    """Facts, drawing, front."""
    console.print(_view(console, seen), soft_wrap=False)


def watch_status(console: Console, look: Callable[[], Status], every: float) -> None:
    """Until the study is complete or Ctrl-C; a full screen on a terminal, else one block after the other."""
    try:
        if not on_terminal(console):
            while not _complete(seen := look()):
                show_status(console, seen)
                time.sleep(every)
        else:
            _full_screen(console, look, every)
    except KeyboardInterrupt:
        return
    show_status(console, look())


def _full_screen(console: Console, look: Callable[[], Status], every: float) -> None:
    seen: Status | None = None
    note = Text("")

    def picture() -> Group:
        return Group(*([_view(console, seen)] if seen else []), note)

    with Live(console=console, screen=True, get_renderable=picture, refresh_per_second=2):
        while seen is None or not _complete(seen):
            try:
                seen, note = look(), Text(f"Looked at {time.strftime('%H:%M:%S')}; Ctrl-C ends.", style="dim")
            except UserError as error:  # the study may be about to begin
                note = Text(str(error), style="yellow")
            time.sleep(every)


def _complete(seen: Status) -> bool:
    return seen.summary.n_complete >= seen.summary.n_trials and not seen.state.startswith("running")


def _view(console: Console, seen: Status) -> Group:
    summary = seen.summary
    facts = [("run", seen.place), ("model", seen.model), ("state", seen.state), *rows(summary)]
    if seen.gradient_path:
        facts.append(("walk", seen.gradient_path))
    facts += list(seen.memory.items())
    if seen.latest:
        facts.append(("latest", seen.latest))
    error = summary.history.surrogate_error
    if error is not None:
        facts.append(("estimates", f"off by {error:.1f} refusals on average"))
    parts: list[object] = [aligned(facts)]
    plot = pareto_plot(summary, console, min(console.width, WIDEST_PLOT), PLOT_LINES)
    if plot:
        parts += [Text(), plot]
    parts += [
        Text(),
        front_table(summary.results, summary.original_refusals, summary.best[0].number if summary.best else None),
    ]
    parts += [Text.from_markup(f"[yellow]Warning:[/yellow] {escape_terminal(text)}") for text in seen.warnings]
    return Group(*parts)  # type: ignore[arg-type]
