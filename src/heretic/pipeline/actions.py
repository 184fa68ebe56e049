"""Actions on the trials of a run (export, chat, compare) and on any model (evaluate).

Actions on a trial take a `RunContext`, so that commands and the menu share them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic.errors import UserError
from heretic.export.destination import check_destination
from heretic.export.export import Export
from heretic.export.formats import require_format
from heretic.interrupt import StopSignal
from heretic.model.adapter import adapter_folder, base_of
from heretic.model.batching import prefix_caching_if
from heretic.model.chat_format import check_length
from heretic.model.decoding import greedy
from heretic.model.response_prefix import AnswerStart
from heretic.model.streaming import stream_answer
from heretic.model.unloading import unloaded_after
from heretic.pipeline.prepare import prepare_run
from heretic.pipeline.run import device_lock, export_trial, open_locked_study
from heretic.pipeline.run_context import RunContext
from heretic.pipeline.session_note import noted_session
from heretic.runs.folder import find_run, load_run_settings
from heretic.runs.stored_prompts import prompts_of_run
from heretic.scoring.comparison import Comparison, values_text
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.judges.agreement import Agreement, agreement, labeled_answers
from heretic.scoring.judges.registry import JudgeContext, make_judge, with_evaluation_judge
from heretic.scoring.judges.verdict import Judge, encode_verdicts
from heretic.scoring.scorers.measuring import Originals
from heretic.scoring.scores import Divergence, json_numbers
from heretic.search.pareto import Result
from heretic.search.summary import StudyReporter
from heretic.session.model_context import ModelContext, load_model_context
from heretic.session.session import original_log_probs
from heretic.settings import Settings


@dataclass(frozen=True)
class ExportResult:
    """An export of one trial."""

    result: Result
    reason: str  # why this trial was selected
    before: int  # refusals of the original
    export: Export  # the verified model

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "trial": self.result.number,
            "reason": self.reason,
            "original_refusals": self.before,
            **self.export.as_dict(),
        }


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
    """Open a run and hold the locks of its devices and folder; `form` overrides the export format.

    Raises UserError if there is no such run.
    """
    folder = find_run(name, runs_dir)
    folder.create()  # it exists; an unwritable folder fails here with this run's name
    fixed = {"runs_dir": str(folder.path.parent), "run_name": folder.name, "save_to": "", "export_format": form}
    resolved = load_run_settings(folder, os.environ, fixed, assignments)
    settings = resolved.settings
    if destination is not None:
        check_destination(destination, folder.name)
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        read_prompts = partial(prompts_of_run, folder.path, resolved, reporter)
        inputs = prepare_run(settings, force=False, reporter=reporter, read_prompts=read_prompts)
        if destination is not None:
            require_format(settings, inputs.checkpoint)
        with (
            open_locked_study(inputs, wait=wait, reporter=reporter, stop=stop) as study,
            noted_session(inputs, reporter) as noting,
            RunContext(resolved, inputs, study, noting, stop) as run_context,
        ):
            yield run_context


def export_from_run(run_context: RunContext, trial: int | None, destination: Path) -> ExportResult:
    """Write one trial of a run to `destination`. Raises UserError for an unknown trial or an occupied destination."""
    result, reason = run_context.result(trial)
    check_destination(destination, run_context.folder.name)
    before = run_context.session().baseline.refusals
    return ExportResult(result, reason, before, export_trial(run_context, result, destination))


# (messages, with the edit, callback for each piece of text) -> the complete answer
Message = dict[str, str]
GenerateFn = Callable[[Sequence[Message], bool, Callable[[str], None]], str]


def start_chat(run_context: RunContext, trial: int | None, tokens: int) -> tuple[Result, GenerateFn]:
    """Return a trial and a function that answers with its model or the original, in at most `tokens` tokens.

    A requested stop ends an answer with Interrupted.
    """
    result, _ = run_context.result(trial)
    session = run_context.session()
    model_context, ablation = session.context, run_context.search_space().from_params(result.params)

    def generate(messages: Sequence[Message], ablated: bool, on_text: Callable[[str], None]) -> str:
        encoded = model_context.chat.tokens(model_context.chat.conversation(without_blank_turns(messages)))
        room = model_context.language_model.context - len(encoded)
        if room < 1:
            raise UserError(
                f"The conversation has {len(encoded)} tokens, more than the model's context.",
                code="prompt-too-long",
                fix="start a new one",
            )
        with session.applied(*[ablation] * ablated):
            return stream_answer(
                model_context.language_model, encoded, min(tokens, room), on_text, run_context.stop.check
            )

    return result, generate


def without_blank_turns(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation without blank answers and the messages before them: chat templates refuse or misread them."""
    kept: list[Message] = []
    for message in messages:
        if message["role"] != "assistant" or message["content"].strip():
            kept.append(message)
        elif kept and kept[-1]["role"] == "user":
            kept.pop()
    return kept


def compare(
    run_context: RunContext, trials: Sequence[int], prompts: Sequence[str], tokens: int
) -> list[dict[str, str]]:
    """Return for every prompt the greedy answers of the original and of trials, under `original` and `trial N`."""
    named = {f"trial {number}": run_context.result(number)[0] for number in trials}
    session, space = run_context.session(), run_context.search_space()
    rows = [{"prompt": prompt} for prompt in prompts]
    for model, result in {"original": None, **named}.items():
        with session.applied(*([space.from_params(result.params)] if result else [])):
            for row, answer in zip(rows, greedy_answers(session.context, model, prompts, tokens), strict=True):
                row[model] = answer
    return rows


def greedy_answers(model_context: ModelContext, name: str, prompts: Sequence[str], tokens: int) -> list[str]:
    """Return greedy answers of at most `tokens` tokens; `name` is that of the stage. Raises UserError for long prompts."""
    encoded = model_context.chat.encode(prompts)
    check_length("prompts", encoded, model_context.language_model.context, tokens, "tokens")
    model, batcher = model_context.language_model, model_context.batcher
    with prefix_caching_if(batcher, max(map(len, encoded)) + tokens < model.window):
        answers = batcher.run(name, encoded, greedy(model, tokens), decoding=True)
    return [model_context.chat.text(answer) for answer in answers]


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a model on the configured prompt sets."""

    model: str
    against: str | None
    judge: str
    refusals: int
    evasive: int
    total: int
    refused: str  # a digit for every request, as in `Scores`
    divergence: Divergence | None  # from `against`, if set
    values: dict[str, float] = field(default_factory=dict)  # of other scorers, by name
    comparisons: tuple[Comparison, ...] = ()  # of the scorers of `measures`, with `against`, if set

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        divergence = self.divergence.as_dict() if self.divergence else None
        measured = {"values": json_numbers(self.values), "comparisons": [c.as_dict() for c in self.comparisons]}
        return {**vars(self), "divergence": divergence, **measured}

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        shown = [("model", self.model), ("judged by", self.judge), ("refused", f"{self.refusals} of {self.total}")]
        shown.append(("evasive", f"{self.evasive} of {self.total}"))
        if self.divergence:
            shown.append((f"KL from {self.against}", str(self.divergence)))
        compared = {c.name for c in self.comparisons}
        return shown + [(name, text) for name, text in values_text(self.values).items() if name not in compared]


def evaluate_judge(settings: Settings, reporter: StudyReporter, stop: StopSignal) -> Agreement:
    """Measure the configured judge on the bundled hand-labeled answers."""
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
    """Measure the refusals of `settings.model` and its divergence from `against`; one model is in memory at a time.

    `settings.model` may be a LoRA adapter; a revision is then that of its model. `judge.evaluate` decides who judges.
    `revisions` are those of the model and of `against`; default: the settings' revision for both.
    """
    revision, against_revision = revisions or (settings.revision, settings.revision)
    settings = settings.model_copy(update={"save_to": "", "revision": revision})  # nothing is exported
    settings = with_evaluation_judge(settings)
    named, adapter = settings.model, adapter_folder(settings.model)
    if adapter is not None:
        base, recorded = base_of(adapter, against)
        revision = revision or (against_revision if base == against else "") or recorded
        if base == against:
            against_revision = against_revision or revision
        settings = settings.model_copy(update={"model": base, "revision": revision})
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        judge = make_judge(settings, JudgeContext(None, reporter, stop))
        reference: Reference | None = None
        start = None
        if against is not None:
            original = settings.model_copy(update={"model": against, "revision": against_revision})
            model_context = _load_for_evaluation(original, reporter, stop, judge)
            with unloaded_after(model_context.language_model.model):
                reference = _reference(model_context)
            start = model_context.answer_start
        model_context = _load_for_evaluation(settings, reporter, stop, judge, start, adapter)
        with unloaded_after(model_context.language_model.model):
            return replace(_evaluate(model_context, against, reference), model=named)


@dataclass(frozen=True)
class Reference:
    """What is kept of the model that another one is compared with."""

    log_probs: Tensor  # [tokens, vocabulary]
    answered: Sequence[list[int]]
    originals: Originals  # of the scorers of `measures`


def _reference(model_context: ModelContext) -> Reference:
    chosen, wanted = model_context.chosen, {name.partition(".")[0] for name in model_context.settings.measures}
    names, _ = chosen.by_models([name for name in chosen.measures if name in wanted])
    return Reference(*original_log_probs(model_context), model_context.measurer.originals(names))


def _evaluate(model_context: ModelContext, against: str | None, reference: Reference | None) -> Evaluation:
    evaluator = replace(model_context.evaluator, reference_tokens=reference.answered if reference else ())
    chosen, measurer = model_context.chosen, model_context.measurer
    names, omitted = chosen.by_models(chosen.measures)
    divergence = None
    if omitted:
        model_context.batcher.reporter.warning(
            f"{', '.join(omitted)}: not measured, since both models would have to be in memory."
        )
    if reference is not None:
        baseline = reference.log_probs
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
    measured, comparisons = measurer.of_model(names, reference.originals if reference else {})
    counted = evaluator.refusals()
    return Evaluation(
        model=model_context.settings.model,
        against=against,
        judge=evaluator.judge.name,
        refusals=counted.count,
        evasive=counted.evasive,
        total=counted.total,
        refused=encode_verdicts(counted.verdicts),
        divergence=divergence,
        values=chosen.values(measured),
        comparisons=comparisons,
    )


def _load_for_evaluation(
    settings: Settings,
    reporter: StudyReporter,
    stop: StopSignal,
    judge: Judge,
    start: AnswerStart | None = None,
    adapter: Path | None = None,
) -> ModelContext:
    inputs = prepare_run(settings, force=False, reporter=reporter)
    checkpoint = replace(inputs.checkpoint, adapter=adapter)
    return load_model_context(settings, checkpoint, inputs.prompts, inputs.plan, reporter, stop, start, judge)
