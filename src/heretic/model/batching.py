"""Prompts through a model in batches: sorted by length, padded on the left, halved when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from heretic.errors import UserError
from heretic.progress import SILENT, Watcher
from heretic.stop import Stop

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, tokens], the mask of the same shape (0 on padding), and which sequences the rows are."""

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from each row's first real token [rows, tokens]; padding gets 0."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)


@dataclass
class Batcher:
    """Cuts sequences into batches of at most `size` rows and `tokens` tokens, padding included.

    `size` only ever falls: memory that did not suffice once will not suffice later, and a study that goes on at half the
    speed is worth more than one that stops.
    """

    size: int
    device: torch.device | str = "cpu"
    tokens: int = 16384
    pad: int = 0
    stop: Stop = field(default_factory=Stop)
    watcher: Watcher = SILENT

    def run(self, name: str, sequences: Sequence[list[int]], step: Callable[[Batch], list[Result]]) -> list[Result]:
        """Results of `step` for every sequence, in the order given; `step` returns one result a row.

        The longest sequences come first, so that a batch that does not fit is found at once. Raises Interrupted between
        batches and UserError when a single row does not fit.
        """
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        results: dict[int, Result] = {}
        with self.watcher.stage(name, len(order)) as stage:
            while order:
                self.stop.check()
                longest = max(1, len(sequences[order[0]]))
                rows = order[: max(1, min(self.size, self.tokens // longest))]
                try:
                    found = step(self.batch(rows, sequences))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    self._halve(len(rows))
                    continue
                results.update(zip(rows, found, strict=True))
                order = order[len(rows) :]
                stage.advance(len(rows))
        return [results[i] for i in range(len(sequences))]

    def batch(self, rows: list[int], sequences: Sequence[list[int]]) -> Batch:
        """The named sequences as one batch, padded on the left."""
        length = max(len(sequences[i]) for i in rows)
        ids = [[self.pad] * (length - len(sequences[i])) + sequences[i] for i in rows]
        mask = [[0] * (length - len(sequences[i])) + [1] * len(sequences[i]) for i in rows]
        return Batch(rows, torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device))

    def _halve(self, rows: int) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rows == 1:
            raise UserError(
                "Out of memory with a single prompt in the batch.",
                fix='free memory on the device, spread the model (device_map = "balanced"), or shorten the prompts',
            )
        self.size = rows // 2
        self.watcher.warn(
            f"Out of memory with {rows} prompts at once; going on with {self.size} (batch_size = {self.size})."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
