"""Graphs of pretend GPUs: launches that are recorded without effect, and repeated on the same memory by each replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tests.helpers.pretend_operators import tensors_in

if TYPE_CHECKING:
    from tests.helpers.pretend_gpus import PretendGpus

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing (pretended)"


class PretendGraph:
    """As much of `torch.accelerator.Graph` as is used here."""

    def __init__(self, gpus: PretendGpus) -> None:
        self.gpus = gpus
        self.launches: list[tuple[Callable[[], Any], Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # storages, and what they held

    def __enter__(self) -> None:
        self.gpus.record_sync("begin of a graph", self.gpus.current)
        self.gpus.graph = self

    def __exit__(self, *_: object) -> None:
        self.gpus.graph = None
        for storage, held in self._before.values():
            storage.copy_(held)
        self._before.clear()

    def record(self, func: Any, compute: Callable[[], Any], inner: tuple[Any, ...], viewing: bool) -> Any:
        """Compute an operator for its result's shape; what it writes to is as before at the end of the capture."""
        for argument, value in zip(func._schema.arguments, inner, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = value.untyped_storage()
                self._before.setdefault(storage._cdata, (storage, storage.clone()))
        made = compute()
        if not viewing:
            self.launches.append((compute, made))
        return made

    def replay(self) -> None:
        """Launch everything again, as one launch."""
        self.gpus.launches[self.gpus.phase_name] += 1
        self.gpus.kinds[self.gpus.phase_name]["graph"] += 1
        for compute, made in self.launches:
            again = compute()
            for old, new in zip(tensors_in(made), tensors_in(again), strict=True):
                if old is not new:
                    old.copy_(new)


class NoStream:
    """A stream to capture on: there is one only."""

    def __init__(self, device: Any = None) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        """Nothing to wait for."""
