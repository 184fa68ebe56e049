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
from heretic.interrupt import Stop
from heretic.model.batching import Batch
from heretic.model.chat_format import check_length
from heretic.model.decoding import decode
from heretic.model.response_prefix import AnswerStart
from heretic.model.streaming import answer
from heretic.model.unloading import unloaded_after
from heretic.pipeline.prepare import look
from heretic.pipeline.run import device_lock, study_of, write
from heretic.pipeline.run_context import Desk
from heretic.runs.folder import RunFolder, find_run, stored
from heretic.scoring.divergence import Divergence, measure_divergence
from heretic.scoring.harmless_metrics import Conduct
from heretic.scoring.judges.agreement import Agreement, agreement, labelled_answers
from heretic.scoring.judges.registry import Surroundings, make_judge
from heretic.scoring.judges.verdict import Judge, digits
from heretic.search.pareto import Result
from heretic.search.summary import StudyWatcher
from heretic.session.session import Bench, geometry_of, open_bench, original_log_probs
from heretic.settings import Settings


@dataclass(frozen=True)
class Exported:
    """An export on command: the trial, why it was chosen, what the original scored, and the proven model."""

    result: Result
    reason: str
    before: int
    export: Export

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"trial": self.result.number, "reason": self.reason, "before": self.before, **self.export.as_dict()}


@contextmanager
def opened(
    name: str,
    runs_dir: str,
    assignments: Sequence[str],
    *,
    destination: Path | None = None,
    form: str | None = None,
    wait: bool,
    watcher: StudyWatcher,
    stop: Stop,
) -> Iterator[Desk]:
    """Hold a run's devices and folder while its trials are worked with; `form` is another format to export in.

    Raises UserError if there is no such run.
    """
    folder = find_run(name, runs_dir)
    folder.create()  # it is there; where it cannot be written, that is said of this run, not of where new runs go
    fixed = {"runs_dir": str(folder.path.parent), "run_name": folder.name, "save_to": "", "export_format": form}
    resolved = stored(folder, os.environ, fixed, assignments)
    settings = resolved.settings
    if destination is not None:
        check_destination(destination, folder.name)
    with device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        inputs = look(settings, force=False, watcher=watcher)
        if destination is not None:
            require_format(settings, inputs.checkpoint)
        with (
            study_of(inputs, wait=wait, watcher=watcher, stop=stop) as study,
            Desk(resolved, inputs, study, watcher, stop) as desk,
        ):
            yield desk


def export_trial(desk: Desk, trial: int | None, destination: Path) -> Exported:
    """Write one trial of a run to `destination`. Raises UserError if there is no such trial or the place is taken."""
    result, reason = desk.result(trial)
    check_destination(destination, desk.folder.name)
    before = desk.session().baseline.refusals
    return Exported(result, reason, before, write(desk, result, destination))


# (messages, with the edit, what to do with every piece of text) -> the whole answer
Said = Callable[[Sequence[dict[str, str]], bool, Callable[[str], None]], str]


def talk(desk: Desk, trial: int | None, tokens: int) -> tuple[Result, Said]:
    """A trial's model and the original to talk to, on the same loaded weights; answers have at most so many tokens."""
    result, _ = desk.result(trial)
    session = desk.session()
    bench, ablation = session.bench, desk.space.from_params(result.params)

    def say(messages: Sequence[dict[str, str]], ablated: bool, on_text: Callable[[str], None]) -> str:
        encoded = bench.chat.tokens(bench.chat.conversation(messages))
        room = bench.language_model.context - len(encoded)
        if room < 1:
            raise UserError(
                f"The conversation has {len(encoded)} tokens, more than the model's context.",
                code="prompt-too-long",
                fix="start a new one: /new",
            )
        with session.applied(*[ablation] * ablated):
            return answer(bench.language_model, encoded, min(tokens, room), on_text)

    return result, say


def compare(desk: Desk, trials: Sequence[int], asked: Sequence[str], tokens: int) -> list[dict[str, str]]:
    """For every prompt the greedy answers of the original and of trials, by `original` and `trial N`."""
    named = {f"trial {number}": desk.result(number)[0] for number in trials}
    session = desk.session()
    bench, space = session.bench, desk.space
    encoded = bench.chat.encode(asked)
    check_length("prompts", encoded, bench.language_model.context, tokens)
    found = [{"prompt": prompt} for prompt in asked]

    def step(batch: Batch) -> list[list[int]]:
        return decode(bench.language_model.model, batch, tokens, bench.language_model.end_tokens)

    for model, result in {"original": None, **named}.items():
        edits = [space.from_params(result.params)] if result else []
        with session.applied(*edits):
            for row, said in zip(found, bench.batcher.run(model, encoded, step), strict=True):
                row[model] = bench.chat.text(said)
    return found


def residual_geometry(
    settings: Settings, folder: RunFolder | None, *, wait: bool, watcher: StudyWatcher, stop: Stop
) -> ResidualGeometry:
    """How a model's residuals lie on the training prompts: as a run's folder holds it, else measured on the loaded model and, with
    a folder, kept there."""
    settings = settings.model_copy(update={"save_to": ""})  # nothing is written, so no place for it has to be free
    stored = folder.geometry() if folder else None
    if stored is not None:
        return stored
    with device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        inputs = look(settings, force=False, watcher=watcher)
        bench = open_bench(settings, inputs.checkpoint, inputs.prompts, inputs.plan, watcher, stop)
        with unloaded_after(bench.language_model.model):
            found = geometry_of(bench)
        if folder is not None:
            inputs.folder.keep_geometry(found)
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
    declined: str
    divergence: Divergence | None
    conduct: Conduct | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        parts = {"divergence": self.divergence, "conduct": self.conduct}
        return {**vars(self), **{name: part.as_dict() if part else None for name, part in parts.items()}}

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        shown = [("model", self.model), ("judged by", self.judge), ("declined", f"{self.refusals} of {self.total}")]
        shown.append(("evasive", f"{self.evasive} of {self.total}"))
        if self.conduct:
            shown.append(("harmless declined", f"{self.conduct.over_refusals} of {self.conduct.total}"))
            shown.append(("harmless degenerate", f"{self.conduct.degenerate} of {self.conduct.total}"))
        if self.divergence:
            shown.append((f"KL from {self.against}", str(self.divergence)))
        return shown


def evaluate_judge(settings: Settings, watcher: StudyWatcher, stop: Stop) -> Agreement:
    """The judge that the settings name, on the answers that ship with the project."""
    return agreement(make_judge(settings, Surroundings(None, watcher, stop)), labelled_answers())


def evaluate_model(
    settings: Settings,
    against: str | None,
    *,
    revisions: tuple[str, str] | None = None,
    wait: bool,
    watcher: StudyWatcher,
    stop: Stop,
) -> Evaluation:
    """Refusals of `settings.model`, and its divergence from `against`; one model is in memory at a time. `revisions` are those of
    the two; left out: for both what the settings say."""
    own, others = revisions or (settings.revision, settings.revision)
    settings = settings.model_copy(update={"save_to": "", "revision": own})  # nothing is written
    with device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        judge = make_judge(settings, Surroundings(None, watcher, stop))
        baseline = start = None
        answered: Sequence[list[int]] = ()
        if against is not None:
            original = settings.model_copy(update={"model": against, "revision": others})
            bench = _bench(original, watcher, stop, judge)
            with unloaded_after(bench.language_model.model):
                baseline, answered = original_log_probs(bench)
            start = bench.start
        bench = _bench(settings, watcher, stop, judge, start)
        with unloaded_after(bench.language_model.model):
            return _evaluate(bench, against, baseline, answered)


def _evaluate(bench: Bench, against: str | None, baseline: Tensor | None, answered: Sequence[list[int]]) -> Evaluation:
    ladder = replace(bench.ladder, answered=answered)
    divergence = None
    if baseline is not None:
        if bench.language_model.model.config.get_text_config().vocab_size != baseline.shape[1]:
            raise UserError(
                "The two models have different vocabularies, so their answers cannot be compared.",
                code="vocabulary-mismatch",
                where="--against",
                fix="compare with a model that has the same tokenizer",
            )
        divergence = measure_divergence(bench.language_model, ladder.taught, baseline, bench.batcher)[0]
    counted, conduct = ladder.refusals(), ladder.conduct()
    return Evaluation(
        model=bench.settings.model,
        against=against,
        judge=ladder.judge.name,
        refusals=counted.count,
        evasive=counted.evasive,
        total=counted.total,
        declined=digits(counted.verdicts),
        divergence=divergence,
        conduct=conduct[0] if conduct else None,
    )


def _bench(
    settings: Settings, watcher: StudyWatcher, stop: Stop, judge: Judge, start: AnswerStart | None = None
) -> Bench:
    inputs = look(settings, force=False, watcher=watcher)
    return open_bench(settings, inputs.checkpoint, inputs.prompts, inputs.plan, watcher, stop, start, judge)
