"""Batches: order, limits, and memory that runs out."""

from __future__ import annotations

import pytest
import torch

from heretic.errors import Interrupted, OutOfMemory
from heretic.interrupt import StopSignal
from heretic.model.batching import Batch, Batcher
from tests.helpers.errors import raises

SEQUENCES = [[1] * n for n in (3, 9, 1, 7, 7, 2, 8)]


def test_results_come_in_the_order_given_whatever_the_batches() -> None:
    sizes = []

    def step(batch: Batch) -> list[int]:
        sizes.append(len(batch.rows))
        assert batch.attention_mask.sum(1).tolist() == [len(SEQUENCES[i]) for i in batch.rows]
        assert batch.position_ids[:, -1].tolist() == [len(SEQUENCES[i]) - 1 for i in batch.rows]
        return batch.attention_mask.sum(1).tolist()

    assert Batcher(3).run("", SEQUENCES, step) == [3, 9, 1, 7, 7, 2, 8]
    assert sizes == [3, 3, 1]
    sizes.clear()
    Batcher(100, tokens=18).run("", SEQUENCES, step)
    assert sizes == [2, 2, 3], "a batch of 9-token rows holds two within 18 tokens"


def test_out_of_memory_halves_the_batch_and_loses_nothing() -> None:
    tried = []

    def step(batch: Batch) -> list[int]:
        tried.append(len(batch.rows))
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.rows

    batcher = Batcher(6)
    assert batcher.run("", SEQUENCES, step) == list(range(7))
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1, 1] and batcher.size == 1


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    def step(batch: Batch) -> list[int]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with raises("out-of-memory", OutOfMemory):
        Batcher(4).run("", SEQUENCES, step)


def test_other_errors_pass() -> None:
    def step(batch: Batch) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Batcher(4).run("", SEQUENCES, step)


def test_a_stop_takes_effect_between_batches() -> None:
    stop = StopSignal()

    def step(batch: Batch) -> list[int]:
        stop.requested = True
        return batch.rows

    with pytest.raises(Interrupted):
        Batcher(2, stop=stop).run("", SEQUENCES, step)


def test_even_batches_hold_sequences_of_one_length() -> None:
    sequences = [[1] * n for n in (3, 5, 3, 5, 5, 2)]
    seen: list[list[int]] = []

    def step(batch: Batch) -> list[int]:
        seen.append(batch.rows)
        assert batch.attention_mask.all()
        return batch.rows

    assert Batcher(2, equal_lengths=True).run("", sequences, step) == list(range(6))
    assert seen == [[1, 3], [4], [0, 2], [5]]
