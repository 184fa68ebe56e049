"""The workload that the memory is planned for."""

from __future__ import annotations

from typing import Any

import pytest

from heretic.planning.workload import Workload
from heretic.settings import Settings


@pytest.mark.parametrize(
    ("changes", "new_tokens", "read_tokens"),
    [
        ({}, 100, 1),
        ({"kl_tokens": 4}, 100, 4),
        ({"measures": ["refusals_by_length"]}, 256, 1),
        ({"constraints": {"arithmetic": 0.5}, "max_response_length": 16}, 24, 1),
        ({"objectives": ["own_answer_kl", "refusals"], "scorers": {"own_answer_kl": {"tokens": 120}}}, 120, 120),
        ({"measures": ["own_perplexity"]}, 100, 100),
        ({"measures": ["no_such_scorer"]}, 100, 1),
    ],
)
def test_longest_answer_of_any_scorer_is_planned(changes: dict[str, Any], new_tokens: int, read_tokens: int) -> None:
    found = Workload.of(Settings(model="-", **changes), 600)
    assert (found.new_tokens, found.read_tokens) == (new_tokens, read_tokens)
