"""Update a run's report while its study runs, at low cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna

from heretic.errors import Interrupted, UserError, first_line
from heretic.files import write_text
from heretic.progress import ProgressReporter
from heretic.report.report import ReportInput, report
from heretic.runs.folder import REPORT, RunFolder
from heretic.settings import Settings

log = logging.getLogger(__name__)

SHORTEST_PAUSE = 10.0  # seconds between two reports
MOST_TIME = 0.02  # share of a study's time that reports may take


@dataclass
class ReportWriter:
    """Writes the report after a batch of trials, within its share of the study's time."""

    study: optuna.Study
    settings: Settings
    folder: RunFolder
    reporter: ProgressReporter
    next: float = 0.0
    failed: bool = False

    def after_batch(self) -> None:
        """Write the report if it is due."""
        if time.monotonic() >= self.next:
            self.write()

    def write(self) -> None:
        """Write the report. A failure gives one warning and never stops the study."""
        began = time.monotonic()
        try:
            source = ReportInput.of(self.study, self.settings, self.folder)
            write_report(source, self.folder.path / REPORT)
        except Exception as error:  # no report error may stop the study
            log.info("no report", exc_info=True)
            if not self.failed:
                reason = error.what if isinstance(error, UserError) else first_line(error)
                self.reporter.warning(f"The report cannot be written: {reason}")
            self.failed = True
        took = time.monotonic() - began
        self.next = time.monotonic() + max(SHORTEST_PAUSE, took / MOST_TIME)


@contextmanager
def live_report(
    study: optuna.Study, settings: Settings, folder: RunFolder, reporter: ProgressReporter
) -> Iterator[ReportWriter]:
    """Keep the report up to date within the context; write it at the end, also after a stop or a user error."""
    writer = ReportWriter(study, settings, folder, reporter)
    try:
        yield writer
    except (Interrupted, UserError):
        writer.write()
        raise
    writer.write()


def write_report(source: ReportInput, file: Path) -> None:
    """Write the report atomically. Raises UserError."""
    write_text(file, report(source), private=file.parent == source.folder.path)
