"""Prompts through a model in batches: sorted by length, padded on the left, halved when memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic.errors import UserError
from heretic.progress import SILENT, Watcher
from heretic.stop import Stop

Result = TypeVar("Result")

WORTH_SHARING = 8  # tokens; fewer are not worth the copying of a cache


@dataclass
class Beginning:
    """Tokens that all sequences of a run begin with, and the model's cache of them once it has been computed.

    It lives as long as one `Batcher.run`: an ablation changes what the cache holds, and none begins within a run.
    """

    tokens: list[int]
    cache: Any = None


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, tokens] without the shared beginning, the mask over both [rows, beginning + tokens] (0 on padding,
    which lies between the two), and which sequences the rows are."""

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    beginning: Beginning | None = None

    @property
    def position_ids(self) -> Tensor:
        """Positions of `input_ids`, counted over each row's real tokens [rows, tokens]; padding gets one that is masked."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -self.input_ids.shape[1] :]


@dataclass
class Batcher:
    """Cuts sequences into batches of at most `size` rows and `tokens` tokens, padding included.

    With `share` the tokens that all sequences begin with are run once and their cache is used for every row (see
    `model.forward`). `size` only ever falls: memory that did not suffice once will not suffice later, and a study that goes
    on at half the speed is worth more than one that stops.
    """

    size: int
    device: torch.device | str = "cpu"
    tokens: int = 16384
    pad: int = 0
    share: bool = False
    stop: Stop = field(default_factory=Stop)
    watcher: Watcher = SILENT

    def run(self, name: str, sequences: Sequence[list[int]], step: Callable[[Batch], list[Result]]) -> list[Result]:
        """Results of `step` for every sequence, in the order given; `step` returns one result a row.

        The longest sequences come first, so that a batch that does not fit is found at once. Raises Interrupted between
        batches and UserError when a single row does not fit.
        """
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        beginning = (
            Beginning(shared) if self.share and len(shared := shared_tokens(sequences)) >= WORTH_SHARING else None
        )
        results: dict[int, Result] = {}
        with self.watcher.stage(name, len(order)) as stage:
            while order:
                self.stop.check()
                longest = max(1, len(sequences[order[0]]))
                rows = order[: max(1, min(self.size, self.tokens // longest))]
                try:
                    found: list[Result] | None = step(self.batch(rows, sequences, beginning))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    found = None  # the error itself holds the failed pass's tensors until this block is left
                if found is None:
                    self._halve(len(rows))
                    continue
                results.update(zip(rows, found, strict=True))
                order = order[len(rows) :]
                stage.advance(len(rows))
        return [results[i] for i in range(len(sequences))]

    def batch(self, rows: list[int], sequences: Sequence[list[int]], beginning: Beginning | None = None) -> Batch:
        """The named sequences as one batch, padded on the left of what is not shared."""
        start = len(beginning.tokens) if beginning else 0
        length = max(len(sequences[i]) for i in rows)
        ids = [[self.pad] * (length - len(sequences[i])) + sequences[i][start:] for i in rows]
        mask = [[1] * start + [0] * (length - len(sequences[i])) + [1] * (len(sequences[i]) - start) for i in rows]
        return Batch(rows, torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device), beginning)

    def _halve(self, rows: int) -> None:
        free_memory()
        if rows == 1:
            raise UserError(
                "Out of memory with a single prompt in the batch.",
                fix='free memory on the device, spread the model (device_map = "balanced"), or shorten the prompts',
            )
        self.size = rows // 2
        self.watcher.warn(
            f"Out of memory with {rows} prompts at once; going on with {self.size} (batch_size = {self.size})."
        )


def free_memory() -> None:
    """Give back what nothing refers to any more, on the GPU too."""
    gc.collect()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # glibc keeps freed memory to itself; other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shared_tokens(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with, short of a last one that each keeps for itself."""
    if len(sequences) < 2:
        return []
    first, last = min(sequences), max(sequences)  # in lexical order, all others lie between these two
    most = min(len(s) for s in sequences) - 1
    length = next((i for i in range(most) if first[i] != last[i]), most)
    return first[:length]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
