"""What an export is about: the job that is planned while the model is loaded, and what every format is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.operator import Operator
from heretic.model.checkpoint import Checkpoint
from heretic.progress import Watcher
from heretic.prompts import PromptSets
from heretic.run_folder import Baseline, RunFolder
from heretic.search.front import Result
from heretic.session import LoadPlan, Session
from heretic.settings import Settings
from heretic.stop import Stop


@dataclass(frozen=True)
class ExportJob:
    """Everything that writing and proving the model needs, none of it the model.

    `prepared` is what the format made of the loaded model. `baseline` is the original and `attached` the ablated model's next-token
    log-probabilities [prompts, vocabulary] that the written one is compared with; `ablated_by` the mean KL between the two.
    """

    format: str
    settings: Settings
    checkpoint: Checkpoint
    prompts: PromptSets
    plan: LoadPlan
    folder: RunFolder
    destination: Path
    result: Result
    ablation: Ablation
    operators: Mapping[str, Operator]
    prepared: Any
    baseline: Baseline
    attached: Tensor
    ablated_by: float


@dataclass(frozen=True)
class Written:
    """What a format wrote.

    `hashes`: SHA-256 by file name of the `source` and of what was `written`. `exact`: whether it should answer as the attached
    model does, up to rounding; else it may stray further, and `about` says how far by its nature. `about` goes into the card
    (Markdown), `facts` into the manifest, `library` is the card's `library_name`.
    """

    hashes: dict[str, dict[str, str]]
    exact: bool = True
    library: str = "transformers"
    about: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A way to write an ablated model; `in_full`: in the checkpoint's full precision, also where the study quantised it.

    `prepare(session, operators)` decides while the model is loaded what is to be written, and raises UserError where the format
    cannot hold it: before anything is written, and before the model leaves memory. `write(job, folder, watcher, stop)` writes to
    an empty folder without the model. `open(job, folder)` gives the checkpoint by which what was written is loaded, to be
    compared and measured. Card, manifest and the folder's final name are
    the same for all and none of their business.
    """

    description: str
    prepare: Callable[[Session, Mapping[str, Operator]], Any]
    write: Callable[[ExportJob, Path, Watcher, Stop], Written]
    open: Callable[[ExportJob, Path], Checkpoint]
    in_full: bool = True
