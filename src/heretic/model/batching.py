"""Run prompts through a model in batches: sorted by length, padded on the left, halved when memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic.errors import OutOfMemory
from heretic.hardware.devices import OUT_OF_MEMORY, empty_cache
from heretic.interrupt import StopSignal
from heretic.model.activation_cache import ActivationCache
from heretic.model.transfer import to_device
from heretic.model.turns import Turns, take_turns
from heretic.progress import NULL_REPORTER, ProgressReporter

Result = TypeVar("Result")

TOKENS_AT_ONCE = 16384  # per batch, padding included
FEWEST_TOKENS = 64  # that a pass of a micro-batch computes; with fewer it takes a GPU just as long
WORTH_SHARING = 8  # shared tokens; copying the cache costs more than it saves below that


@dataclass(frozen=True)
class EditSpec:
    """How the model is edited during a run."""

    trials: int = 1  # that share each pass
    first_layer: int = 0  # first block that any of them edits; 0 also if unknown


UNEDITED = EditSpec()


@dataclass
class SharedPrefix:
    """Tokens that all sequences of a run begin with.

    It is valid for one `Batcher.run`: the next ablation changes its cache.
    """

    tokens: list[int]
    cache: Any = None  # the model's KV cache of the tokens, one row a trial; None until it is computed


@dataclass(frozen=True)
class Batch:
    """One batch of sequences, padded on the left of what follows the shared prefix."""

    rows: list[int]  # index of each row's sequence
    input_ids: Tensor  # [rows, tokens], without the shared prefix
    attention_mask: Tensor  # [rows, prefix + tokens]; 0 on the padding between the two
    shared_prefix: SharedPrefix | None = None
    trials: Sequence[int] | None = None  # of each row; None if all rows belong to one trial
    edited: EditSpec = UNEDITED
    activation_cache: ActivationCache | None = None
    padded_rows: Sequence[bool] | None = None  # whether a row's mask has zeros; None: not known without looking at it

    @property
    def items(self) -> list[tuple[int, int]]:
        """Return (trial, sequence) of every row."""
        return list(zip(self.trials or [0] * len(self.rows), self.rows, strict=True))

    @property
    def padded(self) -> bool | None:
        """Whether the mask has zeros; None: not known without looking at it."""
        return None if self.padded_rows is None else any(self.padded_rows)

    @property
    def position_ids(self) -> Tensor:
        """Positions of `input_ids` [rows, tokens], counted over each row's real tokens."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -self.input_ids.shape[1] :]


# Runs one batch, in turns with others.
Step = Callable[[Batch], Turns[list[Result]]]


def groups_in_turn(most: int, rows: int, tokens: int) -> int:
    """Return the number of micro-batches, at most `most`, for `rows` rows whose passes compute `tokens` tokens."""
    return max(1, min(most, rows, tokens // FEWEST_TOKENS))


@dataclass
class Batcher:
    """Splits sequences into batches of at most `tokens` tokens, padding included, of which at most `size` rows are under way.

    With several `groups` these rows are divided into as many micro-batches in turn (see `model.turns`). `size` only ever falls: a
    slower study is worth more than one that stops.
    """

    size: int
    device: torch.device | str = "cpu"
    tokens: int = TOKENS_AT_ONCE
    pad: int = 0
    groups: int = 1  # `LanguageModel.groups` at most
    prefix_caching: bool = False  # run the tokens that all sequences share once (see `model.forward`)
    equal_lengths: bool = False  # one length a batch, for recurrent and convolution layers that see padding
    stop: StopSignal = field(default_factory=StopSignal)
    reporter: ProgressReporter = NULL_REPORTER

    def run(
        self, name: str, sequences: Sequence[list[int]], step: Step[Result], *, decoding: bool = False
    ) -> list[Result]:
        """Return the results of `step` for every sequence, in their order, with the model as it is; see `run_items`."""
        results = self.run_items(name, sequences, step, decoding=decoding)
        return [results[i] for i in range(len(sequences))]

    def run_items(
        self,
        name: str,
        sequences: Sequence[list[int]],
        step: Step[Result],
        *,
        edited: EditSpec = UNEDITED,
        entries: ActivationCache | None = None,
        items: Sequence[int] | None = None,
        decoding: bool = False,
    ) -> dict[int, Result]:
        """Run `step` over all items and return the result of each; `step` returns one result a row.

        Args:
            name: Of the stage on the screen.
            sequences: Token ids of every prompt.
            step: Runs one batch, and yields where another one may launch. It changes nothing outside before its last turn.
            edited: How the model is edited, and how many trials share a pass.
            entries: Cached activations of the original.
            items: What to run, as `trial * len(sequences) + sequence`. Default: everything, the longest first, so that memory
                runs out in the first batch if at all.
            decoding: Whether most passes compute one token a row.

        Raises:
            Interrupted: Between batches.
            OutOfMemory: A single row does not fit.
        """
        count = len(sequences)
        order = list(items) if items is not None else self.longest_first(sequences, edited)
        run = _Run(self, sequences, self.shared_prefix(sequences), edited, entries)
        results: dict[int, Result] = {}
        with self.reporter.stage(name, len(order)) as stage:
            while left := [i for i in order if i not in results]:
                failed = 0
                groups = self.groups_of(sequences, left, decoding=decoding)
                try:
                    for rows, found in take_turns(run.begin(step, left, groups), groups):
                        if entries:
                            entries.store([i % count for i in rows])
                        results.update(zip(rows, found, strict=True))
                        run.under_way.remove(rows)
                        stage.advance(len(rows))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    failed = run.give_up()
                finally:
                    run.give_up()  # nothing, unless an error ended it
                if failed:  # outside `except`: the error holds the failed passes' tensors
                    self.reduce_batch(failed)
        return results

    def longest_first(self, sequences: Sequence[list[int]], edited: EditSpec = UNEDITED) -> list[int]:
        """Return all items, the longest first."""
        items = range(len(sequences) * edited.trials)
        return sorted(items, key=lambda i: -len(sequences[i % len(sequences)]))

    def groups_of(self, sequences: Sequence[list[int]], items: Sequence[int], *, decoding: bool = False) -> int:
        """Return the number of micro-batches in turn for these items; `decoding`: most passes compute one token a row."""
        rows = min(self.size, len(items))
        if decoding:
            return groups_in_turn(self.groups, rows, rows)
        prefix = self.shared_prefix(sequences)
        shared = len(prefix.tokens) if prefix else 0
        computed = sum(len(sequences[i % len(sequences)]) - shared for i in items[:rows])
        return groups_in_turn(self.groups, rows, computed)

    def rows_at_once(self, sequences: Sequence[list[int]], items: Sequence[int]) -> int:
        """Return how many of the items, in their order, decode together: no micro-batch waits for the end of another."""
        groups = self.groups_of(sequences, items, decoding=True)
        return self.rows_within(sequences, items, self.size, groups * self.tokens)

    def rows_within(self, sequences: Sequence[list[int]], items: Sequence[int], size: int, tokens: int) -> int:
        """Return how many of the first items have at most `size` rows and `tokens` tokens; at least one."""
        lengths = [len(sequences[i % len(sequences)]) for i in items[:size]]
        most = max(1, min(size, tokens // max(1, *lengths), len(items)))
        return next((n for n, length in enumerate(lengths[:most]) if self.equal_lengths and length != lengths[0]), most)

    def batches(self, sequences: Sequence[list[int]]) -> Iterator[Batch]:
        """Yield batches of all sequences, the longest first, without a shared prefix."""
        order = self.longest_first(sequences)
        while order:
            rows = order[: self.rows_within(sequences, order, self.size, self.tokens)]
            yield self.batch(rows, sequences)
            order = order[len(rows) :]

    def shared_prefix(self, sequences: Sequence[list[int]]) -> SharedPrefix | None:
        """Return the prefix of all sequences, if running it once is enabled and worth it."""
        shared = shared_tokens(sequences) if self.prefix_caching else []
        return SharedPrefix(shared) if len(shared) >= WORTH_SHARING else None

    def batch(
        self,
        rows: list[int],
        sequences: Sequence[list[int]],
        beginning: SharedPrefix | None = None,
        entries: ActivationCache | None = None,
    ) -> Batch:
        """Build one batch of the sequences with the indices `rows`, padded on the left after the shared prefix."""
        start = len(beginning.tokens) if beginning else 0
        length = max(len(sequences[i]) for i in rows)
        ids = [[self.pad] * (length - len(sequences[i])) + sequences[i][start:] for i in rows]
        mask = [[1] * start + [0] * (length - len(sequences[i])) + [1] * (len(sequences[i]) - start) for i in rows]
        padded = [len(sequences[i]) != length for i in rows]
        input_ids, attention_mask = to_device(ids, self.device), to_device(mask, self.device)
        return Batch(rows, input_ids, attention_mask, beginning, activation_cache=entries, padded_rows=padded)

    def reduce_batch(self, rows: int) -> None:
        """Halve the batch size after `rows` rows ran out of memory. Raises OutOfMemory if it was a single row."""
        free_memory()
        if rows == 1:
            raise OutOfMemory(
                "Out of memory with a single prompt in the batch.",
                fix='free memory on the device, spread the model (device_map = "planned"), or shorten the prompts',
            )
        self.size = rows // 2
        self.reporter.warning(
            f"Out of memory with {rows} prompts in a batch. Continuing with batch_size = {self.size}."
        )


@dataclass
class _Run:
    """The batches of one run, and which of them are under way."""

    batcher: Batcher
    sequences: Sequence[list[int]]
    prefix: SharedPrefix | None
    edited: EditSpec
    entries: ActivationCache | None
    under_way: list[list[int]] = field(default_factory=list)  # the items of each batch

    def begin(
        self, step: Step[Result], left: list[int], groups: int
    ) -> Iterator[tuple[list[int], Turns[list[Result]]]]:
        """Begin one batch of the items after the other, with its items."""
        batcher, count = self.batcher, len(self.sequences)
        most = -(-len(left) // groups) if len(left) <= batcher.size else max(1, batcher.size // groups)
        while left:
            batcher.stop.check()
            rows = left[: batcher.rows_within(self.sequences, left, most, batcher.tokens)]
            left = left[len(rows) :]
            self.under_way.append(rows)
            batch = batcher.batch([i % count for i in rows], self.sequences, self.prefix, self.entries)
            if self.edited != UNEDITED:
                trials = [i // count for i in rows] if self.edited.trials > 1 else None
                batch = replace(batch, trials=trials, edited=self.edited)
            yield rows, step(batch)

    def give_up(self) -> int:
        """Forget the batches that are under way; returns their rows."""
        rows = sum(map(len, self.under_way))
        self.under_way.clear()
        if self.entries:
            self.entries.discard_recordings()
        return rows


def free_memory() -> None:
    """Release unreferenced memory on the CPU and on the accelerator."""
    gc.collect()
    # glibc does not return freed memory by itself; other systems have no such call.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    empty_cache()


def parts_within(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Split the indices of the sizes, in order, into parts of at most `most` together; at least one index each."""
    part: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(i)
        total += size
    if part:
        yield part


def shared_tokens(sequences: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all sequences begin with; each sequence keeps at least one token of its own."""
    if len(sequences) < 2:
        return []
    first, last = min(sequences), max(sequences)  # in lexical order all others are between these two
    most = min(len(s) for s in sequences) - 1
    length = next((i for i in range(most) if first[i] != last[i]), most)
    return first[:length]


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def prefix_caching_if(batcher: Batcher, allowed: bool) -> Iterator[None]:
    """Turn prefix caching off within the context unless allowed: a sliding window would count the padding after the prefix."""
    before = batcher.prefix_caching
    batcher.prefix_caching = before and allowed
    try:
        yield
    finally:
        batcher.prefix_caching = before
