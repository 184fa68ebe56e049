"""Thinking blocks in rendered prompts: open, closed, and markers that open nothing."""

from __future__ import annotations

import pytest

from heretic.model.thinking import MARKERS, closed_immediately, open_block, switches_in, thought_length


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("space", ["", " ", "\n", "\n\n"])
def test_every_marker_opens_and_its_closing_closes_whatever_the_whitespace(marker: str, space: str) -> None:
    text = f"<user>tell me<assistant>{marker}{space}"
    assert open_block(text, "tell me") == marker
    assert open_block(text + MARKERS[marker], "tell me") == ""
    assert open_block(text + MARKERS[marker].strip(), "tell me") == ""
    assert open_block(closed_immediately(marker)) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<system>reason within <think> first<user>tell me<assistant>", "tell me"),
        ("<user>what does <think> mean?<assistant>", "what does <think> mean?"),
        ("<user>a<assistant>", "a"),
        ("<assistant>", ""),
    ],
)
def test_markers_before_the_answer_open_nothing(text: str, said: str) -> None:
    assert open_block(text, said) == ""


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("<think>\nOkay", "<think>\n\n</think>\n\n"),
        ("<think>\n\nOkay", "<think>\n\n</think>\n\n"),
        ("<think>\n\n</think>\n\nSure", "<think>\n\n</think>\n\n"),
        ("<think></think>Sure", "<think></think>"),
        ("[THINK] Okay", "[THINK][/THINK]"),
        ("Sure", ""),
    ],
)
def test_an_empty_block_has_the_line_breaks_of_models(text: str, block: str) -> None:
    assert closed_immediately(text) == block


def test_text_behind_the_marker_leaves_the_block_open() -> None:
    assert open_block("<user>tell me<assistant><think>\nOkay, ", "tell me") == "<think>"
    assert open_block("<user>think<assistant><think>\n", "think") == "<think>", "the message stands in the marker too"


def test_the_last_of_several_blocks_decides() -> None:
    assert open_block("<user>x y<assistant><think></think><think>\n", "x y") == "<think>"
    assert open_block("<user>x y<assistant><think><think></think>\n", "x y") == ""


def test_only_switches_that_the_template_names_are_tried() -> None:
    assert list(switches_in("{% if enable_thinking %}{% endif %}")) == [{"enable_thinking": False}]
    assert list(switches_in("{{ messages }}")) == []


WORDS = ["<think>", "hmm", "</think>", "sure", "."]


def decode(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "opened", "length"),
    [
        ([0, 1, 1, 2, 3, 4], "", 4),
        ([1, 2, 3], "<think>", 2),
        ([2], "<think>", 1),
        ([0, 1, 1], "", None),
        ([1, 1, 3], "<think>", None),
        ([3, 4], "", 0),
        ([3, 0, 1, 2], "", 0),
        ([], "", 0),
        ([], "<think>", None),
    ],
)
def test_length_of_a_thought(tokens: list[int], opened: str, length: int | None) -> None:
    assert thought_length(tokens, decode, opened) == length
