"""What the preflight found out, and what rules say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from heretic.hardware.gpus import Gpu, GpuReport
from heretic.hardware.locks import LockOwner
from heretic.model.checkpoint import Checkpoint
from heretic.planning.memory_model import DeviceMemory
from heretic.planning.memory_plan import MemoryPlan
from heretic.settings import Settings

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One result of the preflight; `fix` is a line for the config where one helps, else what to do. `code` is that of the
    UserError that it stands for; empty without one."""

    level: Level
    subject: str
    text: str
    fix: str | None = None
    code: str | None = None  # of the error that it was, if any


@dataclass(frozen=True)
class Folder:
    """A place on disk that the run writes to: `free` in bytes; `occupied` by files that are not an earlier export."""

    path: str
    free: int
    writable: bool = True
    occupied: bool = False


@dataclass(frozen=True)
class PreflightFacts:
    """Everything that rules look at; None where it could not be found out."""

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
    fitting_quantization: str | None = None  # with which a model fits that does not fit as it is
    largest_file: int = 0  # of the weights, in bytes
    mappable: int | None = None  # bytes that it may have; None: any

    @property
    def used_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that the plan puts weights on."""
        names = {load.device.name for load in self.plan.loads} if self.plan else set()
        return tuple(gpu for gpu in self.usable if f"cuda:{gpu.index}" in names)

    @property
    def fits_without_copies(self) -> bool:
        """Whether the plan does not fit only because of the copies that `cache_weights` keeps."""
        return self._fits_without(lambda load: load.copies)

    @property
    def fits_without_rounds(self) -> bool:
        """Whether the plan does not fit only because of what iterative rounds add."""
        return self._fits_without(lambda load: load.rounds)

    @property
    def all_on_one_of_several(self) -> bool:
        """Whether one GPU has to hold everything, too much for it, beside others that hold nothing."""
        plan = self.plan
        if plan is None or self.settings.device_map == "planned" or len(self.usable) < 2:
            return False
        return len(self.used_gpus) == 1 and (not plan.fits or plan.tight)

    @property
    def covered_by_other_rule(self) -> bool:
        """Whether another rule says why it does not fit, with the better remedy."""
        return self.fits_without_copies or self.fits_without_rounds or self.all_on_one_of_several

    def _fits_without(self, part: Callable[[DeviceMemory], int]) -> bool:
        plan = self.plan
        if plan is None or plan.fits or plan.offloaded or not any(part(load) for load in plan.loads):
            return False
        return all(load.total - part(load) <= load.device.free for load in plan.loads)
