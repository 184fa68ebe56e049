"""The demo: a complete run on a model whose state before the guard is known.

It can therefore measure the ablated model's KL divergence from the model without the guard, on the guarded requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from torch import Tensor

from heretic.interrupt import StopSignal
from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.model.unloading import unloaded_after
from heretic.pipeline.demo.guarded_model import build_base, build_guarded
from heretic.pipeline.run import Outcome, run
from heretic.planning import preflight
from heretic.prompts.sets import load_all
from heretic.scoring.divergence import divergences, first_token_log_probs
from heretic.search.summary import StudyReporter
from heretic.settings import Settings
from heretic.settings.sources import resolve


@dataclass(frozen=True)
class DemoOutcome:
    """The run's outcome and the distances from the unguarded model."""

    outcome: Outcome
    guarded_from_base: float  # mean KL(unguarded || guarded) on the guarded requests
    ablated_from_base: float | None  # mean KL(unguarded || ablated) on the guarded requests
    seconds: float


def run_demo(
    folder: Path,
    *,
    trials: int | None,
    assignments: Sequence[str] = (),
    wait: bool = False,
    reporter: StudyReporter,
    stop: StopSignal,
    on_preflight: Callable[[preflight.PreflightReport], None],
) -> DemoOutcome:
    """Build the guarded model, run the study, export, and compare with the unguarded model. Resumes like any run.

    `assignments` are additional settings in the form of `--set`.
    """
    began = time.monotonic()
    written = folder / "ablated-model"
    guarded = folder / "guarded-model"
    options = {"model": str(guarded), "save_to": str(written), "runs_dir": str(folder / "runs"), "n_trials": trials}
    with resources.as_file(resources.files("heretic") / "pipeline" / "demo" / "demo.toml") as file:
        resolved = resolve(file, options, assignments)  # invalid settings fail before the work
    with reporter.stage("Unpacking SmolLM2-135M-Instruct and merging the guard", None):
        base = build_base(folder / "base-model")
        build_guarded(base, guarded)
    outcome = run(resolved, wait=wait, reporter=reporter, stop=stop, on_preflight=on_preflight)
    with reporter.stage("Comparing with the model before the guard", 3) as stage:
        measured = []
        for model in (base, guarded, written if outcome.export else None):
            measured.append(_log_probs(model, resolved.settings, stop) if model else None)
            stage.advance()
    reference, before, after = measured
    assert reference is not None and before is not None
    return DemoOutcome(
        outcome,
        float(divergences(reference, before).mean()),
        None if after is None else float(divergences(reference, after).mean()),
        time.monotonic() - began,
    )


def _log_probs(folder: Path, settings: Settings, stop: StopSignal) -> Tensor:
    """Return next-token log-probabilities on the guarded requests [prompts, vocabulary]."""
    model = load(open_checkpoint(str(folder)), ["float32"], {"device_map": {"": "cpu"}})
    chat = ChatFormat.of(model.tokenizer, settings)
    sequences = chat.encode(load_all(settings.prompts).harmful_eval.prompts)
    with unloaded_after(model.model):
        return first_token_log_probs(model, sequences, Batcher(32, stop=stop))
