"""Work in turns: of several batches under way, each launches a part of its work, then the next one does.

A model that is spread over several GPUs works on one batch on one GPU at a time. GPUs work through what the host has launched while
it launches more, so a batch keeps the first GPU busy while another one is on the second, as long as nothing makes the host wait in
between (GPipe's micro-batches: Huang et al. 2018, arXiv 1811.06965; here without its threads).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")
Key = TypeVar("Key")

# Work that yields after it has launched something, before it reads any of it. Others launch meanwhile; no context that changes the
# model or PyTorch may be open then.
Turns = Generator[None, None, Result]


def take_turns(work: Iterable[tuple[Key, Turns[Result]]], most: int) -> Iterator[tuple[Key, Result]]:
    """Run works in turns, at most `most` at a time; yields the result of each as it ends, with its key.

    A work is taken from the iterable when it begins.
    """
    coming = iter(work)
    under_way: deque[tuple[Key, Turns[Result]]] = deque()
    while True:
        new = next(coming, None) if len(under_way) < most else None
        if new is None and not under_way:
            return
        key, turns = new or under_way.popleft()
        try:
            next(turns)
        except StopIteration as ended:
            yield key, ended.value
        else:
            under_way.append((key, turns))


def finish(turns: Turns[Result]) -> Result:
    """Run one work alone to its end."""
    ((_, result),) = take_turns([(None, turns)], 1)
    return result
