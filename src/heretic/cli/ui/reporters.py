"""Which way of showing the work suits a console."""

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
    """The watcher that suits the console; `title` says what is worked on, `stop` whether a stop is awaited."""
    if plain or not on_terminal(console) or notebook():  # a cell shows what a terminal would obey
        return PlainReporter(console)
    from heretic.cli.ui.dashboard import Dashboard  # with PyTorch, which takes seconds to import

    return Dashboard(console, title, stop or StopSignal())
