"""The data of an export: job, result, and the interface of formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.ablation.operator import Operator
from heretic.export.spot_check import WrittenTensors
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.model.loading import LanguageModel
from heretic.model.response_prefix import AnswerStart
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets
from heretic.runs.folder import RunFolder
from heretic.runs.stored_tensors import Baseline
from heretic.scoring.comparison import Comparison
from heretic.scoring.judges.verdict import Judge
from heretic.scoring.scorers.measuring import Originals
from heretic.scoring.scores import Scores
from heretic.settings import Settings


@dataclass(frozen=True)
class WriteRequest:
    """Input for writing a model, without the loaded model."""

    format: str
    settings: Settings
    checkpoint: Checkpoint
    plan: LoadPlan
    operators: Mapping[str, Operator]
    prepared: Any  # the result of the format's `prepare`


@dataclass(frozen=True)
class EditJob(WriteRequest):
    """Input for writing a model and checking its tensors, without the loaded model and without scores."""

    prompts: PromptSets
    folder: RunFolder
    destination: Path
    trial: int
    params: Mapping[str, Any]  # of the trial
    ablation: Ablation
    directions: Directions
    computed_on: str  # hardware that computed the edit
    start: AnswerStart  # of the answers


@dataclass(frozen=True)
class ExportJob(EditJob):
    """Input for writing a measured model and verifying its answers, without the loaded model."""

    scores: Scores  # of the trial
    baseline: Baseline  # of the original
    attached: Tensor  # log-probabilities of the ablated model [tokens, vocabulary]
    ablated_by: float  # mean KL between original and ablated model, nats
    judge: Judge
    comparisons: tuple[Comparison, ...]  # by scorers that need both models in memory, so measured before writing
    originals: Originals  # of all other scorers, for the written model


@dataclass(frozen=True)
class WriteResult:
    """What a format wrote."""

    hashes: dict[str, dict[str, str]]  # SHA-256 by file name, under "source", "written", "copied" and "changed"
    exact: bool = True  # whether it equals the ablated model up to rounding
    library: str = "transformers"  # the card's library_name
    relation: str = "finetune"  # the card's base_model_relation
    about: str = ""  # Markdown for the card
    facts: dict[str, Any] = field(default_factory=dict)  # for the manifest
    rounding: float = 0.0  # mean KL in nats that the format's rounding may add


@dataclass(frozen=True)
class Format:
    """A way to write an ablated model. Card, manifest and the final folder name are the same for all formats."""

    description: str
    # Plans while the model is loaded; raises UserError if the format cannot hold it.
    prepare: Callable[[LanguageModel, Mapping[str, Operator], Settings, ProgressReporter], Any]
    # Writes to an empty folder, without the model.
    write: Callable[[WriteRequest, Path, ProgressReporter, StopSignal], WriteResult]
    # Opens what was written, for verification and scores.
    open: Callable[[WriteRequest, Path], Checkpoint]
    # Bytes of an export with its temporary files.
    size: Callable[[Checkpoint, Settings], float]
    # The settings that decide what is written, as the manifest's `written` has them.
    options: Callable[[Settings], dict[str, Any]] = lambda _: {}
    full_precision: bool = True  # writes full precision even if the study quantized the model
    # Reads single written tensors; None if they are not the checkpoint's.
    read_back: Callable[[WriteRequest, Path], WrittenTensors | None] | None = None
    # Raises UserError if a program is missing; called before the study.
    require: Callable[[Settings, Checkpoint], None] | None = None
    # Turns the verified folder into the final file, verifies that, and deletes the rest.
    convert: Callable[[WriteRequest, Path, WriteResult, ProgressReporter, StopSignal], WriteResult] | None = None
