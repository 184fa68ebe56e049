"""The queues of benchmarks/card_queue.py: utilization of two cards that is known by hand."""

from __future__ import annotations

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.usefixtures("benchmarks")
STAGE = 1e-3  # seconds of each card's part of a pass


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def timeline(*, launch: float = 0.0, cards: int = 2):
    """A timeline whose kernels of 1 FLOP take `STAGE`, and whose copies take no time."""
    from card_queue import Assumptions, Card, Timeline

    card = Card("test", 1 / STAGE, 1e18, 1e18, 1e18, "")
    rates = Assumptions(launch=launch, compute=1.0, memory=1.0, links=1.0, kernel=0.0, hop=0.0)
    return Timeline([card] * cards, rates)


def decoding(passes: int, groups: int, *, through_ram: bool = True) -> list:
    """Passes of groups in turn through two cards; the tokens go back to the first before the group's next pass."""
    from launch_log import RAM, Copy, Delay, Launch, Mark, Wait

    events: list = []
    for number in range(passes):
        for group in range(groups):
            mark = number * groups + group
            if number and through_ram:
                events += [Delay(0, mark - groups), Copy(RAM, 0, 1)]
            elif number:
                events.append(Copy(1, 0, 1))
            events += [Launch(0, 1, 0, True), Copy(0, 1, 1), Launch(1, 1, 0, True)]
            events += [Copy(1, RAM, 1), Mark(1, mark)] * through_ram
    return [*events, Wait(1)]


@pytest.mark.parametrize("groups, elapsed", [(1, 20), (2, 21), (4, 41)])
def test_groups_in_turn_keep_two_cards_busy(groups: int, elapsed: int) -> None:
    line = timeline()
    line.replay(decoding(10, groups))
    assert line.end == pytest.approx(elapsed * STAGE), (
        "all passes of both cards at once, but for the filling of the pipeline"
    )
    assert line.busy == pytest.approx([10 * groups * STAGE] * 2)


def test_copies_from_the_last_card_to_the_first_undo_the_turns() -> None:
    line = timeline()
    line.replay(decoding(10, 2, through_ram=False))
    assert line.end >= 29 * STAGE, (
        "each copy back holds the first card until the second has done what was launched before"
    )


def test_the_host_waits_for_a_mark_and_not_for_what_was_launched_after_it() -> None:
    from launch_log import Launch, Mark, Wait

    line = timeline()
    line.replay([Launch(0, 1, 0, True), Mark(0, 7), Launch(0, 5, 0, True), Wait(0, 7)])
    assert line.host == pytest.approx(STAGE) and line.end == pytest.approx(6 * STAGE)
    line.replay([Wait(0)])
    assert line.host == pytest.approx(6 * STAGE)


def test_a_slow_host_is_the_limit() -> None:
    line = timeline(launch=STAGE)
    line.replay(decoding(10, 2))
    assert line.end >= 2 * 10 * 4 * STAGE, "four launches a pass"


def test_a_wait_stops_the_host_until_the_card_is_done() -> None:
    from launch_log import Launch, Wait

    line = timeline(launch=STAGE / 10)
    line.replay([Launch(0, 5, 0, True), Wait(0), Launch(1, 1, 0, True)])
    assert line.host == pytest.approx(5.2 * STAGE) and line.end == pytest.approx(6.2 * STAGE)


def test_a_kernel_takes_the_longer_of_flops_and_bytes() -> None:
    from card_queue import RTX_4090, Assumptions, Timeline
    from launch_log import Launch

    line = Timeline([RTX_4090], Assumptions(compute=0.5, memory=0.5, kernel=1e-6, links=1.0, hop=0.0))
    assert line.seconds(Launch(0, RTX_4090.flops, 0, True), RTX_4090) == pytest.approx(2.0)
    assert line.seconds(Launch(0, 0, RTX_4090.bandwidth, False), RTX_4090) == pytest.approx(2.0)
    assert line.seconds(Launch(0, 1, 1, False), RTX_4090) == 1e-6


@pytest.mark.usefixtures("cuda")
def test_the_log_of_a_model_of_shapes_repeats_its_blocks() -> None:
    import torch
    from launch_log import Launch
    from sizes import Shape
    from study_log import placed

    shape = Shape("tiny", 4, 32, 64, 4, 2, 50)
    with placed(shape, (3, 1)) as model, torch.inference_mode():
        model.log.take()
        ids = torch.zeros(2, 5, dtype=torch.long, device="cuda:0")
        model.language_model.model(ids, use_cache=False)
        (section,) = model.log.take()
    flops = [sum(e.flops for e in section.events if isinstance(e, Launch) and e.card == card) for card in (0, 1)]
    tokens, width, attention = 10, 32, 4 * 2 * 5 * 5 * 32
    block = 2 * tokens * width * (32 + 16 + 16 + 32 + 3 * 64) + attention
    assert flops == [3 * block, block + 2 * tokens * width * 50]
