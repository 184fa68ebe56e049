"""Which way of showing the work suits a console."""

from __future__ import annotations

from rich.console import Console

from heretic.screen.console import Plain, notebook, on_terminal
from heretic.screen.dashboard import Dashboard
from heretic.search.standing import StudyWatcher
from heretic.stop import Stop


def make_watcher(console: Console, *, plain: bool = False, title: str = "", stop: Stop | None = None) -> StudyWatcher:
    """The watcher that suits the console; `title` says what is worked on, `stop` whether a stop is awaited."""
    if plain or not on_terminal(console) or notebook():  # a cell shows what a terminal would obey
        return Plain(console)
    return Dashboard(console, title, stop or Stop())
