"""What an export is about: the job that is planned while the model is loaded, and what every format is made of."""

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
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import ProgressReporter
from heretic.prompts import PromptSets
from heretic.runs.folder import RunFolder
from heretic.runs.stored_tensors import Baseline
from heretic.scoring.judges.verdict import Judge
from heretic.search.pareto import Result
from heretic.settings import Settings


@dataclass(frozen=True)
class WriteRequest:
    """What writing needs, none of it the model. `prepared` is what the format made of the loaded model."""

    format: str
    settings: Settings
    checkpoint: Checkpoint
    plan: LoadPlan
    operators: Mapping[str, Operator]
    prepared: Any


@dataclass(frozen=True)
class ExportJob(WriteRequest):
    """Everything that writing and proving the model needs, none of it the model.

    `baseline` is the original and `attached` the ablated model's log-probabilities [tokens, vocabulary] that the
    written one is compared with; `ablated_by` the mean KL between the two. `computed_on` says what did the arithmetic of the edit,
    `judge` is the study's.
    """

    prompts: PromptSets
    folder: RunFolder
    destination: Path
    result: Result
    ablation: Ablation
    directions: Directions
    computed_on: str
    baseline: Baseline
    attached: Tensor
    ablated_by: float
    judge: Judge


@dataclass(frozen=True)
class WriteResult:
    """What a format wrote.

    `hashes`: SHA-256 by file name of the `source`, of what was `written`, and of what was `copied` or `changed` besides. `exact`:
    whether it should answer as the attached model does, up to rounding; else it may stray further, and `about` says how far by its
    nature.
    `rounding`: the mean KL in nats that the rounding of the format itself may add.
    `about` goes into the card (Markdown), `facts` into the manifest; `library` and `relation` are the card's `library_name` and
    `base_model_relation`.
    """

    hashes: dict[str, dict[str, str]]
    exact: bool = True
    library: str = "transformers"
    relation: str = "finetune"
    about: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rounding: float = 0.0


@dataclass(frozen=True)
class Format:
    """A way to write an ablated model; `in_full`: in the checkpoint's full precision, also where the study quantized it.

    `prepare(model, operators, settings, watcher)` decides while the model is loaded what is to be written, and raises UserError
    where the format cannot hold it: before anything is written, and before the model leaves memory.
    `write(order, folder, watcher, stop)` writes to an empty folder without the model. `open(order, folder)` gives the checkpoint by
    which what was written is loaded, to be compared and measured. `rewritten(order, folder)` reads single tensors of it, where
    these are edited ones (None: not those of the checkpoint). `require(settings, checkpoint)` raises UserError where the format
    needs what is not here; it is asked before the study. `convert(order, folder, written, watcher, stop)` makes of the proven
    folder what the export is, proves that too, and leaves nothing else. Card, manifest and the folder's final name are the same
    for all and none of their business.
    """

    description: str
    prepare: Callable[[LanguageModel, Mapping[str, Operator], Settings, ProgressReporter], Any]
    write: Callable[[WriteRequest, Path, ProgressReporter, StopSignal], WriteResult]
    open: Callable[[WriteRequest, Path], Checkpoint]
    full_precision: bool = True
    read_back: Callable[[WriteRequest, Path], WrittenTensors | None] | None = None
    require: Callable[[Settings, Checkpoint], None] | None = None
    convert: Callable[[WriteRequest, Path, WriteResult, ProgressReporter, StopSignal], WriteResult] | None = None
