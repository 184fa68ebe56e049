"""Facts and findings of the preflight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from heretic.errors import UserError
from heretic.hardware.gpus import Gpu, GpuReport
from heretic.hardware.locks import LockOwner
from heretic.model.checkpoint import Checkpoint
from heretic.planning.memory_model import DeviceMemory
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.workload import Workload
from heretic.prompts.sets import PromptSets
from heretic.settings import Settings

Level = Literal["ok", "warning", "failure"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One result of the preflight."""

    level: Level
    subject: str
    text: str
    fix: str | None = None  # a line for the config, or an instruction
    code: str | None = None  # of the UserError that it comes from, if any


@dataclass
class FindingList:
    """Findings so far."""

    findings: list[Finding] = field(default_factory=list)

    def attempt(self, subject: str, action: Callable[[], T]) -> T | None:
        """Return the result of `action`; a UserError becomes a failure with its fix. Other exceptions are bugs and propagate."""
        try:
            return action()
        except UserError as error:
            where = f" ({error.where})" if error.where else ""
            self.findings.append(Finding("failure", subject, error.what + where, error.fix, error.code))
            return None


@dataclass(frozen=True)
class PreflightInputs:
    """What a run reads before it plans memory, and the findings of reading it."""

    work: Workload
    checkpoint: Checkpoint | None = None  # None: it could not be opened
    prompts: PromptSets | None = None
    findings: tuple[Finding, ...] = ()
    export_bytes: float = 0  # of the export with its temporary files


@dataclass(frozen=True)
class Folder:
    """A folder that the run writes to."""

    path: str
    free: int  # bytes
    writable: bool = True
    occupied: bool = False  # by files that are not an earlier export
    mounted: bool = False  # whether it is a mount point, which an export cannot replace
    disk: int = 0  # its number; 0: unknown


@dataclass(frozen=True)
class PreflightFacts:
    """The facts for the rules; None for unknown facts."""

    settings: Settings
    report: GpuReport
    usable: tuple[Gpu, ...]
    ram: int
    checkpoint: Checkpoint | None
    plan: MemoryPlan | None
    prompt_warnings: tuple[str, ...]
    holders: tuple[tuple[str, LockOwner], ...]
    run_folder: Folder
    export_folder: Folder | None
    hub_cache: Folder
    fitting_quantization: str | None = None  # makes a model fit that does not fit otherwise
    largest_file: int = 0  # of the weights, in bytes
    downloaded_bytes: int = 0  # of the weights, in the hub's cache, if others are missing
    export_bytes: float = 0  # of the export with its temporary files
    mappable: int | None = None  # largest mappable file in bytes; None: no limit

    @property
    def to_download(self) -> int:
        """Bytes of the weights that are not in the hub's cache yet."""
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.is_local or any(tensor.file for tensor in checkpoint.tensors.values()):
            return 0
        return max(0, checkpoint.nbytes - self.downloaded_bytes)

    @property
    def used_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs with weights in the plan."""
        names = {load.device.name for load in self.plan.loads} if self.plan else set()
        return tuple(gpu for gpu in self.usable if gpu.device.name in names)

    @property
    def fits_without_copies(self) -> bool:
        """Whether the plan fits without the copies of `cache_weights`, and not with them."""
        return self._fits_without(lambda load: load.copies)

    @property
    def fits_without_rounds(self) -> bool:
        """Whether the plan fits without the iterative rounds, and not with them."""
        return self._fits_without(lambda load: load.rounds)

    @property
    def all_on_one_of_several(self) -> bool:
        """Whether the settings put everything on one of several GPUs, and it does not fit or is tight."""
        plan = self.plan
        if plan is None or self.settings.device_map == "planned" or len(self.usable) < 2:
            return False
        return len(self.used_gpus) == 1 and (not plan.fits or plan.tight)

    @property
    def covered_by_other_rule(self) -> bool:
        """Whether a more specific rule explains why the plan does not fit."""
        return self.fits_without_copies or self.fits_without_rounds or self.all_on_one_of_several

    def _fits_without(self, part: Callable[[DeviceMemory], int]) -> bool:
        plan = self.plan
        if plan is None or plan.fits or plan.offloaded or not any(part(load) for load in plan.loads):
            return False
        return all(load.total - part(load) <= load.device.free for load in plan.loads)
