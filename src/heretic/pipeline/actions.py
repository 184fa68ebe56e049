"""Work on what exists already: the trials of a finished or unfinished run, and any model.

What is done with a trial takes a `Desk`, so that a command and the menu do it the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.errors import UserError
from heretic.export.destination import check_destination
from heretic.export.export import Export
from heretic.export.formats import require_format
from heretic.interrupt import StopSignal
from heretic.model.batching import Batch
from heretic.model.chat_format import check_length
from heretic.model.decoding import decode
from heretic.model.response_prefix import AnswerStart
from heretic.model.streaming import stream_answer
from heretic.model.unloading import unloaded_after
from heretic.pipeline.prepare import prepare_run
from heretic.pipeline.run import device_lock, export_trial, open_locked_study
from heretic.pipeline.run_context import RunContext
from heretic.runs.folder import RunFolder, find_run, load_run_settings
from heretic.scoring.divergence import Divergence, measure_divergence
from heretic.scoring.harmless_metrics import HarmlessMetrics
from heretic.scoring.judges.agreement import Agreement, agreement, labeled_answers
from heretic.scoring.judges.registry import JudgeContext, make_judge
from heretic.scoring.judges.verdict import Judge, encode_verdicts
from heretic.search.pareto import Result
from heretic.search.summary import StudyReporter
from heretic.session.session import ModelContext, load_model_context, measure_residual_geometry, original_log_probs
from heretic.settings import Settings


@dataclass(frozen=True)
class ExportResult:
    """An export on command: the trial, why it was chosen, what the original scored, and the proven model."""

    result: Result
    reason: str
    before: int
    export: Export

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"trial": self.result.number, "reason": self.reason, "before": self.before, **self.export.as_dict()}


@contextmanager
def open_run(
    name: str,
    runs_dir: str,
    assignments: Sequence[str],
    *,
    destination: Path | None = None,
    form: str | None = None,
    wait: bool,
    reporter: StudyReporter,
    stop: StopSignal,
) -> Iterator[RunContext]:
    """Hold a run's devices and folder while its trials are worked with; `form` is another format to export in.

    Raises UserError if there is no such run.
    """
    folder = find_run(name, runs_dir)
    folder.create()  # it is there; where it cannot be written, that is said of this run, not of where new runs go
    fixed = {"runs_dir": str(folder.path.parent), "run_name": folder.name, "save_to": "", "export_format": form}
    resolved = load_run_settings(folder, os.environ, fixed, assignments)
    settings = resolved.settings
    if destination is not None:
        check_destination(destination, folder.name)
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        inputs = prepare_run(settings, force=False, reporter=reporter)
        if destination is not None:
            require_format(settings, inputs.checkpoint)
        with (
            open_locked_study(inputs, wait=wait, reporter=reporter, stop=stop) as study,
            RunContext(resolved, inputs, study, reporter, stop) as run_context,
        ):
            yield run_context


def export_from_run(run_context: RunContext, trial: int | None, destination: Path) -> ExportResult:
    """Write one trial of a run to `destination`. Raises UserError if there is no such trial or the place is taken."""
    result, reason = run_context.result(trial)
    check_destination(destination, run_context.folder.name)
    before = run_context.session().baseline.refusals
    return ExportResult(result, reason, before, export_trial(run_context, result, destination))


# (messages, with the edit, what to do with every piece of text) -> the whole answer
GenerateFn = Callable[[Sequence[dict[str, str]], bool, Callable[[str], None]], str]


def start_chat(run_context: RunContext, trial: int | None, tokens: int) -> tuple[Result, GenerateFn]:
    """A trial's model and the original to talk to, on the same loaded weights; answers have at most so many tokens."""
    result, _ = run_context.result(trial)
    session = run_context.session()
    model_context, ablation = session.context, run_context.space.from_params(result.params)

    def say(messages: Sequence[dict[str, str]], ablated: bool, on_text: Callable[[str], None]) -> str:
        encoded = model_context.chat.tokens(model_context.chat.conversation(messages))
        room = model_context.language_model.context - len(encoded)
        if room < 1:
            raise UserError(
                f"The conversation has {len(encoded)} tokens, more than the model's context.",
                code="prompt-too-long",
                fix="start a new one: /new",
            )
        with session.applied(*[ablation] * ablated):
            return stream_answer(model_context.language_model, encoded, min(tokens, room), on_text)

    return result, say


def compare(run_context: RunContext, trials: Sequence[int], asked: Sequence[str], tokens: int) -> list[dict[str, str]]:
    """For every prompt the greedy answers of the original and of trials, by `original` and `trial N`."""
    named = {f"trial {number}": run_context.result(number)[0] for number in trials}
    session = run_context.session()
    model_context, space = session.context, run_context.space
    encoded = model_context.chat.encode(asked)
    check_length("prompts", encoded, model_context.language_model.context, tokens)
    found = [{"prompt": prompt} for prompt in asked]

    def step(batch: Batch) -> list[list[int]]:
        return decode(model_context.language_model.model, batch, tokens, model_context.language_model.end_tokens)

    for model, result in {"original": None, **named}.items():
        edits = [space.from_params(result.params)] if result else []
        with session.applied(*edits):
            for row, said in zip(found, model_context.batcher.run(model, encoded, step), strict=True):
                row[model] = model_context.chat.text(said)
    return found


def residual_geometry(
    settings: Settings, folder: RunFolder | None, *, wait: bool, reporter: StudyReporter, stop: StopSignal
) -> ResidualGeometry:
    """How a model's residuals lie on the training prompts: as a run's folder holds it, else measured on the loaded model and, with
    a folder, kept there."""
    settings = settings.model_copy(update={"save_to": ""})  # nothing is written, so no place for it has to be free
    stored = folder.load_geometry() if folder else None
    if stored is not None:
        return stored
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        inputs = prepare_run(settings, force=False, reporter=reporter)
        model_context = load_model_context(settings, inputs.checkpoint, inputs.prompts, inputs.plan, reporter, stop)
        with unloaded_after(model_context.language_model.model):
            found = measure_residual_geometry(model_context)
        if folder is not None:
            inputs.folder.save_geometry(found)
        return found


@dataclass(frozen=True)
class Evaluation:
    """A model measured on the configured sets; `divergence` from `against` if that was given. `declined` has a digit for every
    request, as in `Scores`."""

    model: str
    against: str | None
    judge: str
    refusals: int
    evasive: int
    total: int
    refused: str
    divergence: Divergence | None
    harmless_metrics: HarmlessMetrics | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        parts = {"divergence": self.divergence, "harmless_metrics": self.harmless_metrics}
        return {**vars(self), **{name: part.as_dict() if part else None for name, part in parts.items()}}

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        shown = [("model", self.model), ("judged by", self.judge), ("refused", f"{self.refusals} of {self.total}")]
        shown.append(("evasive", f"{self.evasive} of {self.total}"))
        if self.harmless_metrics:
            shown.append(
                ("harmless declined", f"{self.harmless_metrics.over_refusals} of {self.harmless_metrics.total}")
            )
            shown.append(
                ("harmless degenerate", f"{self.harmless_metrics.degenerate} of {self.harmless_metrics.total}")
            )
        if self.divergence:
            shown.append((f"KL from {self.against}", str(self.divergence)))
        return shown


def evaluate_judge(settings: Settings, reporter: StudyReporter, stop: StopSignal) -> Agreement:
    """The judge that the settings name, on the answers that ship with the project."""
    return agreement(make_judge(settings, JudgeContext(None, reporter, stop)), labeled_answers())


def evaluate_model(
    settings: Settings,
    against: str | None,
    *,
    revisions: tuple[str, str] | None = None,
    wait: bool,
    reporter: StudyReporter,
    stop: StopSignal,
) -> Evaluation:
    """Refusals of `settings.model`, and its divergence from `against`; one model is in memory at a time. `revisions` are those of
    the two; left out: for both what the settings say."""
    own, others = revisions or (settings.revision, settings.revision)
    settings = settings.model_copy(update={"save_to": "", "revision": own})  # nothing is written
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        judge = make_judge(settings, JudgeContext(None, reporter, stop))
        baseline = start = None
        answered: Sequence[list[int]] = ()
        if against is not None:
            original = settings.model_copy(update={"model": against, "revision": others})
            model_context = _bench(original, reporter, stop, judge)
            with unloaded_after(model_context.language_model.model):
                baseline, answered = original_log_probs(model_context)
            start = model_context.answer_start
        model_context = _bench(settings, reporter, stop, judge, start)
        with unloaded_after(model_context.language_model.model):
            return _evaluate(model_context, against, baseline, answered)


def _evaluate(
    model_context: ModelContext, against: str | None, baseline: Tensor | None, answered: Sequence[list[int]]
) -> Evaluation:
    evaluator = replace(model_context.evaluator, reference_tokens=answered)
    divergence = None
    if baseline is not None:
        if model_context.language_model.model.config.get_text_config().vocab_size != baseline.shape[1]:
            raise UserError(
                "The two models have different vocabularies, so their answers cannot be compared.",
                code="vocabulary-mismatch",
                where="--against",
                fix="compare with a model that has the same tokenizer",
            )
        divergence = measure_divergence(
            model_context.language_model, evaluator.harmless_texts, baseline, model_context.batcher
        )[0]
    counted, harmless_metrics = evaluator.refusals(), evaluator.harmless_metrics()
    return Evaluation(
        model=model_context.settings.model,
        against=against,
        judge=evaluator.judge.name,
        refusals=counted.count,
        evasive=counted.evasive,
        total=counted.total,
        refused=encode_verdicts(counted.verdicts),
        divergence=divergence,
        harmless_metrics=harmless_metrics[0] if harmless_metrics else None,
    )


def _bench(
    settings: Settings, reporter: StudyReporter, stop: StopSignal, judge: Judge, start: AnswerStart | None = None
) -> ModelContext:
    inputs = prepare_run(settings, force=False, reporter=reporter)
    return load_model_context(settings, inputs.checkpoint, inputs.prompts, inputs.plan, reporter, stop, start, judge)
