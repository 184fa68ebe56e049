"""An open run: its inputs, its study, and the model, loaded on first use."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from shlex import quote
from types import TracebackType

import optuna

from heretic.errors import UserError
from heretic.export.formats import FORMATS
from heretic.files import write_text
from heretic.interrupt import StopSignal
from heretic.model.unloading import unload
from heretic.pipeline.prepare import RunInputs
from heretic.pipeline.worker_process import parent_pid
from heretic.runs.folder import RunFolder, settings_text
from heretic.runs.hub_commit import with_commit
from heretic.runs.local_paths import with_relative_paths
from heretic.runs.stored_prompts import store_prompts
from heretic.scoring.scores import json_numbers
from heretic.search.gradient_path import GradientPath
from heretic.search.pareto import Result, Selection, results, select_trial
from heretic.search.space import SearchSpace
from heretic.search.summary import StudyReporter
from heretic.session.session import Session, open_session
from heretic.settings import Settings
from heretic.settings.sources import Resolved
from heretic.storage.attributes import REFUSALS_BEFORE, REQUESTED_TRIALS, VALUES_BEFORE, refusals_before, values_before
from heretic.storage.compute_once import LOCAL, ComputeOnce, DistributedComputeOnce
from heretic.storage.rdb import save_settings
from heretic.storage.url import on_server


@dataclass
class RunContext:
    """One run, whose locks the caller holds; all actions on its trials share one loaded model."""

    resolved: Resolved
    inputs: RunInputs
    study: optuna.Study
    reporter: StudyReporter
    stop: StopSignal
    loaded: Session | None = field(default=None, repr=False)

    @property
    def settings(self) -> Settings:
        """The run's settings."""
        return self.inputs.settings

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return self.inputs.folder

    @property
    def results(self) -> list[Result]:
        """The fully measured trials."""
        return results(self.study)

    @property
    def original_refusals(self) -> int | None:
        """Number of requests that the original refuses; None until it is measured."""
        return refusals_before(self.study)

    @property
    def original_values(self) -> dict[str, float]:
        """Numbers of other scorers that the search uses, on the original, by name."""
        return values_before(self.study)

    def session(self) -> Session:
        """Return the loaded model with its directions and baseline; loads it on first use."""
        inputs = self.inputs
        if self.loaded is None:
            self.loaded = open_session(
                inputs.settings,
                inputs.checkpoint,
                inputs.prompts,
                inputs.plan,
                inputs.folder,
                self.reporter,
                self.stop,
                self.compute_once,
            )
        return self.loaded

    def save_original_scores(self) -> None:
        """Store the original's number of refusals, and its numbers of other scorers that the search uses, in the study."""
        session = self.session()
        self.study.set_user_attr(REFUSALS_BEFORE, session.baseline.refusals)
        chosen = session.context.chosen
        if values := chosen.values(session.context.measurer.of_original(chosen.of_trials)):
            self.study.set_user_attr(VALUES_BEFORE, json.dumps(json_numbers(values)))

    @property
    def shared(self) -> bool:
        """Whether other processes may work on the study too."""
        return on_server(self.settings.storage) or parent_pid() != 0

    @property
    def compute_once(self) -> ComputeOnce:
        """Coordinates computations that all workers of the study share."""
        if not self.shared:
            return LOCAL
        folder, settings = self.folder, self.settings
        return DistributedComputeOnce(
            self.study, folder.path, folder.fingerprint, settings.artifacts, settings.workers, self.reporter, self.stop
        )

    def search_space(self) -> SearchSpace:
        """Return the search space of the trials. Loads the model if needed."""
        return self.session().space(GradientPath.load(self.study))

    def unload(self) -> None:
        """Release the model's memory."""
        if self.loaded is not None:
            unload(self.loaded.context.language_model.model)
        self.loaded = None

    def __enter__(self) -> RunContext:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.unload()

    def selected(self) -> Selection | None:
        """Return the trial that the settings select."""
        settings = self.settings
        return select_trial(self.results, settings.select, settings.max_kl, settings.max_refusals)

    def result(self, trial: int | None) -> tuple[Result, str]:
        """Return a trial by its number, or the selected one, and the reason. Raises UserError."""
        if trial is not None:
            return _result_by_number(self.results, trial)
        selected = self.selected()
        if selected is None:
            raise UserError(
                "The run has no finished trial yet.",
                code="trial-not-found",
                where=str(self.folder.path),
                fix=f"continue it: heretic run {quote(str(self.folder.path))}",
            )
        return selected.result, selected.reason

    def request_trials(self, n_trials: int) -> None:
        """Set the total number of trials, now and for later sessions; the study does not converge before."""
        self.study.set_user_attr(REQUESTED_TRIALS, n_trials)
        settings = self.settings.model_copy(update={"n_trials": n_trials})
        self.inputs = replace(self.inputs, settings=settings)
        origins = {**self.resolved.origins, "n_trials": "added later"}
        self.resolved = replace(self.resolved, settings=settings, origins=origins)
        self.save_settings()

    def set_export_format(self, form: str) -> None:
        """Set the format of exports until the run is closed. Raises UserError for an unknown format."""
        if form not in FORMATS:
            raise UserError(f"Unknown format {form!r}.", code="unknown-format", fix=f"one of: {', '.join(FORMATS)}")
        settings = self.settings.model_copy(update={"export_format": form})
        self.inputs = replace(self.inputs, settings=settings)
        if self.loaded is not None:
            self.loaded = replace(self.loaded, context=replace(self.loaded.context, settings=settings))

    def save_settings(self) -> None:
        """Write the settings to the run's folder and to the storage, for workers without the folder; keep the prompts."""
        commit = self.inputs.checkpoint.commit
        resolved = replace(self.resolved, settings=with_commit(self.resolved.settings, commit))
        resolved = with_relative_paths(resolved, self.folder.path)
        write_text(self.folder.path / "config.toml", settings_text(resolved), private=True)
        store_prompts(self.folder.path, resolved.settings.prompts, self.inputs.prompts)
        save_settings(self.study, with_commit(self.settings, commit))


def _result_by_number(finished: list[Result], number: int) -> tuple[Result, str]:
    for result in finished:
        if result.number == number:
            return result, "as requested"
    numbers = [r.number for r in finished]
    known = f"one of {numbers[0]} to {numbers[-1]}" if numbers else "continue the run: heretic run"
    raise UserError(f"There is no finished trial {number}.", code="trial-not-found", fix=known)
