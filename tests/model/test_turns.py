"""Works that take turns: who launches when, and how many at a time."""

from __future__ import annotations

from heretic.model.turns import Turns, finish, take_turns


def test_works_launch_in_turn_and_a_new_one_begins_where_one_has_ended() -> None:
    told: list[str] = []

    def work(name: str, turns: int) -> Turns[str]:
        for turn in range(turns):
            told.append(f"{name}{turn}")
            yield
        told.append(f"{name} read")
        return name.upper()

    lengths = {"a": 2, "b": 1, "c": 1, "d": 0}
    ended = list(take_turns(((name, work(name, turns)) for name, turns in lengths.items()), 2))
    assert ended == [("b", "B"), ("a", "A"), ("d", "D"), ("c", "C")]
    assert told == ["a0", "b0", "a1", "b read", "c0", "a read", "d read", "c read"]


def test_one_work_alone_gives_its_result() -> None:
    def work() -> Turns[int]:
        yield
        return 7

    assert finish(work()) == 7
