"""Interface for progress reports; `heretic.cli.ui` implements it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)


class Stage(Protocol):
    """One stage of work with a number of steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Add `steps` completed steps; `note` describes the current state."""


class ProgressReporter(Protocol):
    """Receives stages, messages and warnings."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """Open a stage that ends with the context; `total` None means that the number of steps is unknown."""

    def info(self, text: str) -> None:
        """Report a fact in one line."""

    def warning(self, text: str) -> None:
        """Report something that the user may want to change."""


class _NullStage:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class NullReporter:
    """Discard all reports."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See ProgressReporter."""
        yield _NullStage()

    def info(self, text: str) -> None:
        """See ProgressReporter."""

    def warning(self, text: str) -> None:
        """See ProgressReporter."""

    def study_updated(self, summary: object) -> None:
        """See StudyReporter."""


class PythonReporter(NullReporter):
    """Log messages, and show warnings as Python does."""

    def info(self, text: str) -> None:
        """See ProgressReporter."""
        log.info(text)

    def warning(self, text: str) -> None:
        """See ProgressReporter."""
        if log.hasHandlers():  # else Python would print it a second time
            log.warning(text)
        warnings.warn(text, stacklevel=2)


NULL_REPORTER = NullReporter()
PYTHON_REPORTER = PythonReporter()
