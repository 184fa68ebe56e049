"""Work on what exists already: exporting a trial of a finished or unfinished run, and measuring any model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.export.export import Export, ExportJob, plan_export, write_export
from heretic.export.save import check_destination
from heretic.model.batching import Batch, free_memory
from heretic.model.chat_format import check_length
from heretic.model.decoding import decode
from heretic.model.talking import answer
from heretic.progress import Watcher
from heretic.prompts import load as load_prompts
from heretic.run import Inputs, device_lock, look, pick, study_of
from heretic.run_folder import find_run, stored_settings
from heretic.scoring.divergence import Divergence, first_token_log_probs, measure_divergence
from heretic.search.front import Result, results
from heretic.search.walk import Walk
from heretic.session import Bench, Session, open_bench, open_session
from heretic.settings import PromptSource, Settings
from heretic.stop import Stop


@dataclass(frozen=True)
class Exported:
    """An export on command: the trial, why it was chosen, what the original scored, and the proven model."""

    result: Result
    reason: str
    before: int
    export: Export


@dataclass(frozen=True)
class Opened:
    """A run that is opened to work with its trials: its inputs, its walk, and its results."""

    inputs: Inputs
    walk: Walk | None
    found: list[Result]

    def result(self, trial: int | None) -> tuple[Result, str]:
        """A trial by its number, or the one that the settings prefer; why it is that one. Raises UserError."""
        if trial is not None:
            return _named(self.found, trial)
        picked = pick(self.inputs.settings, self.found)
        if picked is None:
            raise UserError(
                "The run has no finished trial yet.",
                where=str(self.inputs.folder.path),
                fix="go on with it: heretic run",
            )
        return picked

    def session(self, watcher: Watcher, stop: Stop) -> Session:
        """The model in memory, with what the run's folder holds."""
        inputs = self.inputs
        return open_session(
            inputs.settings, inputs.checkpoint, inputs.prompts, inputs.plan, inputs.folder, watcher, stop
        )


@contextmanager
def opened(
    name: str,
    runs_dir: str,
    assignments: Sequence[str],
    *,
    destination: Path | None = None,
    wait: bool,
    watcher: Watcher,
    stop: Stop,
) -> Iterator[Opened]:
    """Hold a run's devices and folder while its trials are worked with. Raises UserError if there is no such run."""
    folder = find_run(name, runs_dir)
    fixed = {"runs_dir": str(folder.path.parent), "run_name": folder.name, "save_to": ""}
    settings = stored_settings(folder, os.environ, fixed, assignments)
    if destination is not None:
        check_destination(destination, folder.name)
    with device_lock(settings, wait=wait, watcher=watcher, stop=stop):
        inputs = look(settings, force=False, watcher=watcher)
        with study_of(inputs, wait=wait, stop=stop) as study:
            yield Opened(inputs, Walk.of(study), results(study))


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
    held = opened(name, runs_dir, assignments, destination=destination, wait=wait, watcher=watcher, stop=stop)
    with held as run:
        result, reason = run.result(trial)
        job = _plan(run, result, destination, watcher, stop)
        return Exported(result, reason, job.baseline.refusals, write_export(job, watcher, stop))


def _plan(run: Opened, result: Result, destination: Path, watcher: Watcher, stop: Stop) -> ExportJob:
    """The part of an export that needs the model in memory; it is free again when this returns."""
    session = run.session(watcher, stop)
    return plan_export(session, run.inputs.plan, session.space(run.walk), result, run.inputs.folder, destination)


Said = Callable[[Sequence[dict[str, str]], bool, Callable[[str], None]], str]


@contextmanager
def talking(
    name: str, runs_dir: str, trial: int | None, tokens: int, *, wait: bool, watcher: Watcher, stop: Stop
) -> Iterator[tuple[Result, Said]]:
    """A trial's model and the original to talk to, on the same loaded weights: a function of the conversation, of whether the
    edit is on, and of what to do with every piece of the answer."""
    with opened(name, runs_dir, (), wait=wait, watcher=watcher, stop=stop) as run:
        result, _ = run.result(trial)
        session = run.session(watcher, stop)
        bench, ablation = session.bench, session.space(run.walk).from_params(result.params)

        def say(messages: Sequence[dict[str, str]], ablated: bool, on_text: Callable[[str], None]) -> str:
            encoded = bench.chat.tokenizer(bench.chat.conversation(messages), add_special_tokens=False)["input_ids"]
            with session.applied(*[ablation] * ablated):
                return answer(bench.language_model, encoded, tokens, on_text)

        yield result, say


def compare_trials(
    name: str,
    runs_dir: str,
    trials: Sequence[int],
    source: str,
    tokens: int,
    *,
    wait: bool,
    watcher: Watcher,
    stop: Stop,
) -> list[dict[str, str]]:
    """For every prompt of a file or set the greedy answers of the original and of trials, by `original` and `trial N`."""
    asked = load_prompts("prompts", PromptSource(source=source)).prompts
    with opened(name, runs_dir, (), wait=wait, watcher=watcher, stop=stop) as run:
        named = {f"trial {number}": run.result(number)[0] for number in trials}
        session = run.session(watcher, stop)
        bench, space = session.bench, session.space(run.walk)
        encoded = bench.chat.encode(asked)
        check_length("prompts", encoded, bench.language_model.context, tokens)
        found = [{"prompt": prompt} for prompt in asked]
        for model, result in {"original": None, **named}.items():
            edits = [space.from_params(result.params)] if result else []

            def step(batch: Batch) -> list[list[int]]:
                return decode(bench.language_model.model, batch, tokens, bench.language_model.end_tokens)

            with session.applied(*edits):
                for row, said in zip(found, bench.batcher.run(model, encoded, step), strict=True):
                    row[model] = bench.chat.text(said)
    return found


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
