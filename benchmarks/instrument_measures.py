"""Measures written model folders against their original, both in memory: every scorer, one decoding an answer set.

The original is loaded once, and its answers are decoded once. A folder is loaded in the same number format; within a pass its
tensors stand in for the original's. So every folder meets the same prompts, batches and rounding, whoever wrote it.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model.batching import UNEDITED, EditSpec
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.pipeline.actions import load_model_context
from heretic.pipeline.prepare import prepare_run
from heretic.progress import ProgressReporter
from heretic.scoring.comparison import Comparison, compare
from heretic.scoring.scorers.answer_kl import AnswerKl
from heretic.scoring.scorers.measuring import Measurer
from heretic.scoring.scorers.registry import choose_scorers
from heretic.scoring.scorers.scorer import Scorer
from heretic.search.summary import StudyReporter
from heretic.settings import Settings

FIRST_TOKEN = "first_token_kl"
MEASURES = (
    "refusals_by_length", "borderline_refusals", "answer_kl", "own_answer_kl", "text_perplexity", "own_perplexity",
    "repetition", "unchanged", "language_switched", "arithmetic", "copying",
)  # fmt: skip


@dataclass
class Original:
    """The original model in memory, and all scorers with its baselines."""

    settings: Settings
    language_model: LanguageModel
    measurer: Measurer
    reporter: ProgressReporter

    @classmethod
    def load(cls, settings: Settings, reporter: StudyReporter) -> Original:
        """Load the model that the settings name, with the scorers of their `measures`. Raises UserError."""
        inputs = prepare_run(settings, force=False, reporter=reporter)
        context = load_model_context(settings, inputs.checkpoint, inputs.prompts, inputs.plan, reporter, StopSignal())
        scorers: dict[str, Scorer] = dict(choose_scorers(settings).scorers)
        chosen = {name: scorers[name] for name in settings.measures}
        measurer = Measurer({FIRST_TOKEN: AnswerKl(tokens=1), **chosen}, context.measurer.parts)
        return cls(settings, context.language_model, measurer, reporter)

    def compared(self, folder: Path | None, names: Sequence[str]) -> dict[str, Any]:
        """Measure a folder, or the original itself, by these scorers; return value and standard error of every number by name.

        Raises:
            UserError: the folder cannot be loaded, or has other tensors than the original.
        """
        original = self.measurer.of_original(names)
        measured = original
        if folder is not None:
            swapped = Swapped.load(folder, self.language_model, self.reporter)
            (measured,) = self.measurer.of_trials(names, swapped, 1)
        found: list[Comparison] = []
        for name in names:
            found += renamed(name, compare(self.measurer.scorers[name], original[name], measured[name]))
        return {each.name: number_of(each) for each in found}


def renamed(name: str, found: Sequence[Comparison]) -> list[Comparison]:
    """Name the numbers after the scorer's place in the table, since one class can stand there twice."""
    return [Comparison(**{**vars(each), "name": ".".join((name, *each.name.split(".")[1:]))}) for each in found]


def number_of(each: Comparison) -> dict[str, Any]:
    """Return what the report holds of a number."""
    known = each.as_dict()
    return {"value": known["ablated"], **{k: known[k] for k in ("standard_error",) if k in known}}


@dataclass(frozen=True)
class Swapped:
    """Another model's tensors, which take the places of the loaded model's within a context."""

    own: Mapping[str, Tensor]  # parameters of the loaded model, by name
    other: Mapping[str, Tensor]

    @classmethod
    def load(cls, folder: Path, language_model: LanguageModel, reporter: ProgressReporter) -> Swapped:
        """Load a folder in the number format of the loaded model. Raises UserError if it has another layout."""
        arguments = {"device_map": {"": str(language_model.device)}}
        loaded = load(open_checkpoint(str(folder)), [language_model.dtype], arguments, reporter=reporter)
        own, other = (dict(each.model.named_parameters()) for each in (language_model, loaded))
        shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, other)]
        if shapes[0] != shapes[1]:
            raise UserError(
                "The folder has other tensors than the original.",
                code="shape-mismatch",
                where=str(folder),
                fix="measure folders of the same architecture",
            )
        return cls(own, {name: tensor.data for name, tensor in other.items()})

    @contextmanager
    def __call__(self, *_indices: int) -> Iterator[EditSpec]:
        """Make the loaded model the other one within the context."""
        kept = {name: parameter.data for name, parameter in self.own.items()}
        try:
            for name, parameter in self.own.items():
                parameter.data = self.other[name]
            yield UNEDITED
        finally:
            for name, parameter in self.own.items():
                parameter.data = kept[name]
