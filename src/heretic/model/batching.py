"""Prompts through a model in batches: sorted by length, padded on the left, halved when memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic.errors import OutOfMemory
from heretic.interrupt import StopSignal
from heretic.model.activation_cache import ActivationCache
from heretic.progress import NULL_REPORTER, ProgressReporter

Result = TypeVar("Result")

TOKENS_AT_ONCE = 16384  # in a batch, padding included
WORTH_SHARING = 8  # tokens; fewer are not worth the copying of a cache


@dataclass(frozen=True)
class EditSpec:
    """How the model is edited while it runs: how many trials share each pass, and the first block that any of them edits.

    As it comes out of a checkpoint nothing is known about it, so block 0 counts as edited.
    """

    trials: int = 1
    first_layer: int = 0


UNEDITED = EditSpec()


@dataclass
class SharedPrefix:
    """Tokens that all sequences of a run begin with, and the model's cache of them once it has been computed, a row a trial.

    It lives as long as one `Batcher.run`: an ablation changes what the cache holds, and none begins within a run.
    """

    tokens: list[int]
    cache: Any = None


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, tokens] without the shared beginning, the mask over both [rows, beginning + tokens] (0 on padding,
    which lies between the two), which sequences the rows are, and to which trial each belongs (None: all to one).

    `entries` holds what the original's blocks receive for these sequences, if that is kept.
    """

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    shared_prefix: SharedPrefix | None = None
    trial_of_row: Tensor | None = None
    edited: EditSpec = UNEDITED
    activation_cache: ActivationCache | None = None

    @property
    def items(self) -> list[tuple[int, int]]:
        """(trial, sequence) of every row."""
        trials = [0] * len(self.rows) if self.trial_of_row is None else self.trial_of_row.tolist()
        return list(zip(trials, self.rows, strict=True))

    @property
    def position_ids(self) -> Tensor:
        """Positions of `input_ids`, counted over each row's real tokens [rows, tokens]; padding gets one that is masked."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -self.input_ids.shape[1] :]


@dataclass
class Batcher:
    """Cuts sequences into batches of at most `size` rows and `tokens` tokens, padding included.

    With `share` the tokens that all sequences begin with are run once and their cache is used for every row (see
    `model.forward`). With `even` a batch holds sequences of one length only, for models to which padding is not nothing
    (recurrences and convolutions that see it).
    `size` only ever falls: memory that did not suffice once will not suffice later, and a study that goes
    on at half the speed is worth more than one that stops.
    """

    size: int
    device: torch.device | str = "cpu"
    tokens: int = TOKENS_AT_ONCE
    pad: int = 0
    prefix_caching: bool = False
    equal_lengths: bool = False
    stop: StopSignal = field(default_factory=StopSignal)
    reporter: ProgressReporter = NULL_REPORTER

    def run(self, name: str, sequences: Sequence[list[int]], step: Callable[[Batch], list[Result]]) -> list[Result]:
        """Results of `step` for every sequence under the model as it is, in the order given."""
        results = self.run_items(name, sequences, step)
        return [results[i] for i in range(len(sequences))]

    def run_items(
        self,
        name: str,
        sequences: Sequence[list[int]],
        step: Callable[[Batch], list[Result]],
        *,
        edited: EditSpec = UNEDITED,
        entries: ActivationCache | None = None,
        items: Sequence[int] | None = None,
    ) -> dict[int, Result]:
        """Results of `step` for every item; `step` returns one result a row.

        An item is a sequence under one of the trials that share the pass: `trial * len(sequences) + sequence`. They are all
        run, the longest first, so that a batch that does not fit is found at once; or those of `items`, in that order.
        Raises Interrupted between batches and OutOfMemory when a single row does not fit.
        """
        count = len(sequences)
        order = list(items) if items is not None else self.longest_first(sequences, edited)
        beginning = self.shared_prefix(sequences)
        results: dict[int, Result] = {}
        with self.reporter.stage(name, len(order)) as stage:
            while order:
                self.stop.check()
                rows = order[: self.rows_at_once(sequences, order)]
                try:
                    batch = self.batch([i % count for i in rows], sequences, beginning, entries)
                    if edited != UNEDITED:
                        trials = torch.tensor([i // count for i in rows], device=self.device)
                        batch = replace(batch, trial_of_row=trials if edited.trials > 1 else None, edited=edited)
                    found: list[Result] | None = step(batch)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    found = None  # the error itself holds the failed pass's tensors until this block is left
                if found is None:
                    self.reduce_batch(len(rows))
                    continue
                results.update(zip(rows, found, strict=True))
                order = order[len(rows) :]
                stage.advance(len(rows))
        return results

    def longest_first(self, sequences: Sequence[list[int]], edited: EditSpec = UNEDITED) -> list[int]:
        """All items, the longest first."""
        items = range(len(sequences) * edited.trials)
        return sorted(items, key=lambda i: -len(sequences[i % len(sequences)]))

    def rows_at_once(self, sequences: Sequence[list[int]], items: Sequence[int]) -> int:
        """How many of the items, taken in their order, go into one batch."""
        lengths = [len(sequences[i % len(sequences)]) for i in items[: self.size]]
        most = max(1, min(self.size, self.tokens // max(1, *lengths), len(items)))
        return next((n for n, length in enumerate(lengths[:most]) if self.equal_lengths and length != lengths[0]), most)

    def shared_prefix(self, sequences: Sequence[list[int]]) -> SharedPrefix | None:
        """What all sequences begin with, if running it once is allowed and worth it."""
        shared = shared_tokens(sequences) if self.prefix_caching else []
        return SharedPrefix(shared) if len(shared) >= WORTH_SHARING else None

    def batch(
        self,
        rows: list[int],
        sequences: Sequence[list[int]],
        beginning: SharedPrefix | None = None,
        entries: ActivationCache | None = None,
    ) -> Batch:
        """The named sequences as one batch, padded on the left of what is not shared."""
        start = len(beginning.tokens) if beginning else 0
        length = max(len(sequences[i]) for i in rows)
        ids = [[self.pad] * (length - len(sequences[i])) + sequences[i][start:] for i in rows]
        mask = [[1] * start + [0] * (length - len(sequences[i])) + [1] * (len(sequences[i]) - start) for i in rows]
        input_ids, attention_mask = torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)
        return Batch(rows, input_ids, attention_mask, beginning, activation_cache=entries)

    def reduce_batch(self, rows: int) -> None:
        """So many rows did not fit into memory, and nothing refers to them any more. Raises OutOfMemory where it was one."""
        free_memory()
        if rows == 1:
            raise OutOfMemory(
                "Out of memory with a single prompt in the batch.",
                fix='free memory on the device, spread the model (device_map = "balanced"), or shorten the prompts',
            )
        self.size = rows // 2
        self.reporter.warning(
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
