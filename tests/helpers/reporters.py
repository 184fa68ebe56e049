"""A reporter that stores what it receives."""

from __future__ import annotations

from heretic.progress import NullReporter


class RecordingReporter(NullReporter):
    """Stores messages and warnings: `lines` has both in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.infos: list[str] = []
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        """Store a message."""
        self.lines.append(text)
        self.infos.append(text)

    def warning(self, text: str) -> None:
        """Store a warning."""
        self.lines.append(text)
        self.warnings.append(text)
