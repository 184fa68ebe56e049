"""A file in the run's folder on the session at work; the next session finds it if this one was killed, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from heretic.errors import UserError, shortened
from heretic.files import read_text, write_text
from heretic.hardware.host import format_bytes, memory
from heretic.hardware.processes import PROBABLE_CAUSE
from heretic.pipeline.prepare import RunInputs
from heretic.pipeline.worker_process import parent_pid
from heretic.progress import Stage
from heretic.search.summary import StudyReporter, StudySummary
from heretic.storage.rdb import is_alive, is_this_host, worker
from heretic.storage.url import on_server

FILE = ".session.json"


@contextmanager
def noted_session(inputs: RunInputs, reporter: StudyReporter) -> Iterator[StudyReporter]:
    """Yield a reporter that notes each stage in the run's folder, whose lock the caller holds; remove the note at any end.

    Workers have no note, nor have studies on a server, whose sessions may share the folder.
    """
    if parent_pid() or on_server(inputs.settings.storage):
        yield reporter
        return
    file = inputs.folder.path / FILE
    if words := _words_on_last(file):
        reporter.warning(words)
    noting = _NotingReporter(reporter, file, inputs.plan.batch_size)
    noting.note()
    try:
        yield noting
    finally:
        with suppress(OSError):
            file.unlink()


def _words_on_last(file: Path) -> str:
    """Return the warning about the session that left the file; empty without one, for a damaged one, or if it runs."""
    try:
        left = json.loads(read_text(file, largest=1 << 14))
        if is_this_host(left["process"]) and is_alive(left["process"]):
            return ""  # the folder was copied
        during = f" during '{shortened(str(left['stage']))}'" if left["stage"] else ""
        at_work = f"batch_size = {int(left['batch_size'])}, {format_bytes(int(left['free']))} of RAM were free"
        return f"The last session ended without a message{during}, {PROBABLE_CAUSE}: {at_work}."
    except (OSError, UserError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return ""


@dataclass
class _NotingReporter:
    """Passes all on to a reporter, and notes the outermost stage."""

    reporter: StudyReporter
    file: Path
    batch_size: int
    depth: int = 0

    def note(self, stage: str = "") -> None:
        content = {"process": worker(), "stage": stage, "batch_size": self.batch_size, "free": memory()[1]}
        with suppress(OSError, UserError):
            write_text(self.file, json.dumps(content), private=True)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        if not self.depth:
            self.note(name)
        self.depth += 1
        try:
            with self.reporter.stage(name, total) as stage:
                yield stage
        finally:
            self.depth -= 1
            if not self.depth:
                self.note()

    def info(self, text: str) -> None:
        self.reporter.info(text)

    def warning(self, text: str) -> None:
        self.reporter.warning(text)

    def study_updated(self, summary: StudySummary) -> None:
        self.reporter.study_updated(summary)
