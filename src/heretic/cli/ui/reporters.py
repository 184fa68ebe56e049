"""Choice of the progress reporter for a console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from heretic.cli.ui.console import PlainReporter, notebook, on_terminal
from heretic.interrupt import StopSignal

if TYPE_CHECKING:
    from heretic.search.summary import StudyReporter


def make_reporter(
    console: Console, *, plain: bool = False, title: str = "", stop: StopSignal | None = None
) -> StudyReporter:
    """Return the dashboard on a terminal, otherwise plain lines; `title` and the state of `stop` appear on the dashboard."""
    if plain or not on_terminal(console) or notebook():  # a notebook cell would print control sequences
        return PlainReporter(console)
    from heretic.cli.ui.dashboard import Dashboard  # imports PyTorch, which takes seconds

    return Dashboard(console, title, stop or StopSignal())
