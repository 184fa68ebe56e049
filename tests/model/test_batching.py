"""Batches: order, limits, and memory that runs out."""

from __future__ import annotations

import pytest
import torch

from heretic.errors import Interrupted, OutOfMemory
from heretic.interrupt import StopSignal
from heretic.model import batching
from heretic.model.batching import Batch, Batcher
from heretic.model.turns import Turns
from tests.helpers.errors import raises
from tests.helpers.turns import at_once

SEQUENCES = [[1] * n for n in (3, 9, 1, 7, 7, 2, 8)]


def test_results_come_in_the_order_given_whatever_the_batches() -> None:
    sizes = []

    @at_once
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

    @at_once
    def step(batch: Batch) -> list[int]:
        tried.append(len(batch.rows))
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.rows

    batcher = Batcher(6)
    assert batcher.run("", SEQUENCES, step) == list(range(7))
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1, 1] and batcher.size == 1


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    @at_once
    def step(batch: Batch) -> list[int]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with raises("out-of-memory", OutOfMemory):
        Batcher(4).run("", SEQUENCES, step)


def test_other_errors_pass() -> None:
    @at_once
    def step(batch: Batch) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Batcher(4).run("", SEQUENCES, step)


def test_a_stop_takes_effect_between_batches() -> None:
    stop = StopSignal()

    @at_once
    def step(batch: Batch) -> list[int]:
        stop.requested = True
        return batch.rows

    with pytest.raises(Interrupted):
        Batcher(2, stop=stop).run("", SEQUENCES, step)


def test_even_batches_hold_sequences_of_one_length() -> None:
    sequences = [[1] * n for n in (3, 5, 3, 5, 5, 2)]
    seen: list[list[int]] = []

    @at_once
    def step(batch: Batch) -> list[int]:
        seen.append(batch.rows)
        assert batch.attention_mask.all()
        return batch.rows

    assert Batcher(2, equal_lengths=True).run("", sequences, step) == list(range(6))
    assert seen == [[1, 3], [4], [0, 2], [5]]


def in_turn(batcher: Batcher, monkeypatch: pytest.MonkeyPatch, sequences: list[list[int]], most: int = 100, **options):
    """Run steps that launch and read; returns what happened, and the results."""
    monkeypatch.setattr(batching, "FEWEST_TOKENS", 2)
    told: list[tuple[str, int]] = []

    def step(batch: Batch) -> Turns[list[int]]:
        told.append(("launch", len(batch.rows)))
        if sum(n if what == "launch" else -n for what, n in told) > most:
            told.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield
        told.append(("read", len(batch.rows)))
        return batch.rows

    results = batcher.run("", sequences, step, **options)
    return told, results


def test_rows_under_way_are_divided_into_micro_batches_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    told, results = in_turn(Batcher(6, groups=3), monkeypatch, [[1] * 4] * 9)
    assert results == list(range(9))
    assert told[:5] == [("launch", 2)] * 3 + [("read", 2), ("launch", 2)]
    assert [what for what, _ in told].count("launch") == 5


@pytest.mark.parametrize(
    ("groups", "rows", "decoding", "expected"),
    [(1, 8, False, 1), (4, 8, False, 4), (4, 3, False, 3), (4, 8, True, 4), (4, 5, True, 2), (4, 1, True, 1)],
)
def test_a_micro_batch_computes_enough_tokens(
    groups: int, rows: int, decoding: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, _ = in_turn(Batcher(8, groups=groups), monkeypatch, [[1] * 4] * rows, decoding=decoding)
    assert len(told) == 2 * expected and told[expected - 1][0] == "launch"


def test_memory_that_runs_out_in_turn_gives_up_all_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(8, groups=4)
    told, results = in_turn(batcher, monkeypatch, [[1] * 4] * 8, most=4)
    assert results == list(range(8)) and batcher.size == 3, "six rows were under way"
    assert told[:3] == [("launch", 1)] * 3
