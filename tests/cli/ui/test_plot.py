"""The drawing of the front: where marks are, and that it keeps to its room."""

from __future__ import annotations

import pytest

from heretic.cli.ui.plot import draw
from tests.helpers.summaries import RESULTS, result


def test_gentle_trials_are_left_and_refusing_ones_above() -> None:
    lines = draw(RESULTS, RESULTS[2], 60, 12).plain.splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 60
    assert lines[0].startswith("      40│●") and lines[9].startswith("       4│")
    assert lines[9].rstrip().endswith("●"), "the strictest measured trial is on the front, low and right of the middle"
    assert "".join(lines).count("●") == 3 and "".join(lines).count("◆") == 1 and "".join(lines).count("·") == 2
    assert "0.001" in lines[-1] and "0.3" in lines[-1] and "KL divergence" in lines[-1]


def test_marks_that_fall_on_each_other_show_the_better_one() -> None:
    crowd = [result(i, 0.1 + i * 1e-6, 5 + i % 2) for i in range(9)]
    text = draw(crowd, crowd[0], 40, 8).plain
    assert text.count("◆") == 1 and text.count("·") == 1


def test_a_terminal_of_ascii_gets_ascii() -> None:
    assert draw(RESULTS, RESULTS[2], 60, 12, ascii_only=True).plain.isascii()


@pytest.mark.parametrize(("width", "height"), [(20, 12), (60, 4), (0, 0)])
def test_without_room_or_trials_there_is_nothing(width: int, height: int) -> None:
    assert not draw(RESULTS, None, width, height)
    assert not draw([], None, 60, 12)
