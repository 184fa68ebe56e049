"""What the work tells whoever watches it; `heretic.cli.ui` shows it, everything else only calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Stage(Protocol):
    """One stretch of work with a known number of steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done; `note` says how things stand."""


class ProgressReporter(Protocol):
    """Receives the course of the work."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """A stretch of work begins; it ends with the context. `total` None: the number of steps is not known."""

    def info(self, text: str) -> None:
        """A fact worth a line."""

    def warning(self, text: str) -> None:
        """Something the user should know and may want to change."""


class _SilentStage:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class NullReporter:
    """Nobody watches."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See Watcher."""
        yield _SilentStage()

    def info(self, text: str) -> None:
        """See Watcher."""

    def warning(self, text: str) -> None:
        """See Watcher."""

    def study_updated(self, summary: object) -> None:
        """See StudyWatcher."""


NULL_REPORTER = NullReporter()
