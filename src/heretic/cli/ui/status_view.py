"""Output of `heretic status`, once or repeated."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from heretic.cli.ui.console import escape_terminal, on_terminal, restored_while_stopped
from heretic.cli.ui.study_view import aligned, pareto_plot, rows
from heretic.cli.ui.tables import pareto_table
from heretic.errors import UserError
from heretic.runs.status import Status

MAX_PLOT_WIDTH = 80
PLOT_LINES = 14


def show_status(console: Console, status: Status) -> None:
    """Print the study's facts, plot and Pareto front."""
    console.print(_view(console, status), soft_wrap=False)


def watch_status(console: Console, read: Callable[[], Status], every: float) -> None:
    """Show the status every `every` seconds until the study is complete or Ctrl-C.

    Uses a full screen on a terminal, elsewhere one block after another.
    """
    try:
        if not on_terminal(console):
            while not _complete(status := read()):
                show_status(console, status)
                time.sleep(every)
        else:
            _full_screen(console, read, every)
    except KeyboardInterrupt:
        return
    show_status(console, read())


def _full_screen(console: Console, read: Callable[[], Status], every: float) -> None:
    status: Status | None = None
    note = Text("")

    def render() -> Group:
        return Group(*([_view(console, status)] if status else []), note)

    live = Live(console=console, screen=True, get_renderable=render, refresh_per_second=2)
    with live, restored_while_stopped(live.stop, live.start):
        while status is None or not _complete(status):
            try:
                status, note = read(), Text(f"Updated at {time.strftime('%H:%M:%S')}; Ctrl-C quits.", style="dim")
            except UserError as error:  # the study may not exist yet
                note = Text(str(error), style="yellow")
            time.sleep(every)


def _complete(status: Status) -> bool:
    return status.summary.end is not None and not status.state.startswith("running")


def _view(console: Console, status: Status) -> Group:
    summary = status.summary
    facts = [("run", status.place), ("model", status.model), ("state", status.state), *rows(summary)]
    if status.gradient_path:
        facts.append(("gradient search", status.gradient_path))
    facts += list(status.memory.items())
    if status.latest:
        facts.append(("latest", status.latest))
    error = summary.history.proxy_error
    if error is not None:
        facts.append(("estimates", f"off by {error:.1f} refusals on average"))
    parts: list[object] = [aligned(facts)]
    plot = pareto_plot(summary, console, min(console.width, MAX_PLOT_WIDTH), PLOT_LINES)
    if plot:
        parts += [Text(), plot]
    parts += [
        Text(),
        pareto_table(
            summary.results,
            summary.original_refusals,
            summary.best.result.number if summary.best else None,
            summary.original_values,
        ),
    ]
    parts += [Text.from_markup(f"[yellow]Warning:[/yellow] {escape_terminal(text)}") for text in status.warnings]
    return Group(*parts)  # type: ignore[arg-type]
