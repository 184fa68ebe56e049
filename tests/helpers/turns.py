"""Steps of tests that take no turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from heretic.model.batching import Batch
from heretic.model.turns import Turns


def at_once(work: Callable[[Batch], list[Any]]) -> Callable[[Batch], Turns[list[Any]]]:
    """Make a step of a function that launches and reads in one go."""

    @wraps(work)
    def step(batch: Batch) -> Turns[list[Any]]:
        return work(batch)
        yield

    return step
