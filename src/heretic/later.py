"""Work on what exists already: exporting a trial of a finished or unfinished run, and measuring any model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.export.export import Export, ExportJob, plan_export, write_export
from heretic.export.save import check_destination
from heretic.model.batching import free_memory
from heretic.progress import Watcher
from heretic.run import Inputs, device_lock, look, pick, study_of
from heretic.run_folder import find_run, stored_settings
from heretic.scoring.divergence import Divergence, first_token_log_probs, measure_divergence
from heretic.search.front import Result, results
from heretic.search.walk import Walk
from heretic.session import Bench, open_bench, open_session
from heretic.settings import Settings
from heretic.stop import Stop


@dataclass(frozen=True)
class Exported:
    """An export on command: the trial, why it was chosen, what the original scored, and the proven model."""

    result: Result
    reason: str
    before: int
    export: Export


def export_run(
    name: str,
    runs_dir: str,
    trial: int | None,
    destination: Path,
    assignments: Sequence[str],
    *,
    wait: bool,
    watcher: Watcher,
    stop: Stop,
) -> Exported:
    """Write one trial of a run to `destination`. Raises UserError if there is no such run or trial."""
    folder = find_run(name, runs_dir)
    fixed = {"runs_dir": str(folder.path.parent), "run_name": folder.name, "save_to": ""}
    settings = stored_settings(folder, os.environ, fixed, assignments)
    check_destination(destination, folder.name)
    with device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        inputs = look(settings, force=False, watcher=watcher)
        with study_of(inputs, wait=wait, stop=stop) as study:
            found = results(study)
            result, reason = _named(found, trial) if trial is not None else (pick(settings, found) or (None, ""))
            if result is None:
                raise UserError(
                    "The run has no finished trial yet.", where=str(folder.path), fix="go on with it: heretic run"
                )
            job = _plan(inputs, Walk.of(study), result, destination, watcher, stop)
            return Exported(result, reason, job.baseline.refusals, write_export(job, watcher, stop))


def _plan(
    inputs: Inputs, walk: Walk | None, result: Result, destination: Path, watcher: Watcher, stop: Stop
) -> ExportJob:
    """The part of an export that needs the model in memory; it is free again when this returns."""
    session = open_session(
        inputs.settings, inputs.checkpoint, inputs.prompts, inputs.plan, inputs.folder, watcher, stop
    )
    return plan_export(session, inputs.plan, session.space(walk), result, inputs.folder, destination)


def _named(found: list[Result], number: int) -> tuple[Result, str]:
    for result in found:
        if result.number == number:
            return result, "as asked"
    numbers = [r.number for r in found]
    known = f"one of {numbers[0]} to {numbers[-1]}" if numbers else "go on with the run: heretic run"
    raise UserError(f"There is no finished trial {number}.", fix=known)


@dataclass(frozen=True)
class Evaluation:
    """A model measured on the configured sets; `divergence` from `against` if that was given."""

    model: str
    against: str | None
    refusals: int
    total: int
    divergence: Divergence | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**vars(self), "divergence": self.divergence.as_dict() if self.divergence else None}

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        shown = [("model", self.model), ("declined", f"{self.refusals} of {self.total}")]
        if self.divergence:
            shown.append((f"KL from {self.against}", str(self.divergence)))
        return shown


def evaluate_model(settings: Settings, against: str | None, *, wait: bool, watcher: Watcher, stop: Stop) -> Evaluation:
    """Refusals of `settings.model`, and its divergence from `against`; one model is in memory at a time."""
    settings = settings.model_copy(update={"save_to": ""})  # nothing is written, so no place for it has to be free
    with device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        baseline = prefix = None
        if against is not None:
            bench = _bench(settings.model_copy(update={"model": against}), watcher, stop)
            baseline = first_token_log_probs(bench.language_model, bench.ladder.harmless, bench.batcher)
            prefix = bench.chat.response_prefix
            del bench
            free_memory()
        bench = _bench(settings, watcher, stop, prefix)
        divergence = None
        if baseline is not None:
            if bench.language_model.model.config.get_text_config().vocab_size != baseline.shape[1]:
                raise UserError("The two models have different vocabularies, so their answers cannot be compared.")
            divergence = measure_divergence(bench.language_model, bench.ladder.harmless, baseline, bench.batcher)[0]
        counted = bench.ladder.refusals()
        return Evaluation(settings.model, against, counted.count, counted.total, divergence)


def _bench(settings: Settings, watcher: Watcher, stop: Stop, prefix: str | None = None) -> Bench:
    inputs = look(settings, force=False, watcher=watcher)
    return open_bench(settings, inputs.checkpoint, inputs.prompts, inputs.plan, watcher, stop, prefix)
