"""Thinking blocks: how they begin and end in the templates and answers of known models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# How a thinking block begins, and what closes it so that the answer follows. Of two that begin alike the longer one comes first.
MARKERS = {
    "<think>": "\n</think>\n\n",
    "<thinking>": "\n</thinking>\n\n",
    "<thought>": "\n</thought>\n\n",
    "<reasoning>": "\n</reasoning>\n\n",
    "<seed:think>": "</seed:think>",
    "<longcat_think>": "\n</longcat_think>\n",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|channel>thought": "\n<channel|>",
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>analysis": "<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
    "<unused94>thought": "<unused95>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}
# What templates call the switch of thinking, and its value when it is off.
SWITCHES: tuple[tuple[str, Any], ...] = (
    ("enable_thinking", False),
    ("thinking", False),
    ("enable_reasoning", False),
    ("reasoning", False),
    ("think", False),
    ("thinking_mode", "off"),
    ("reasoning_mode", "off"),
    ("reasoning_effort", "none"),
    ("reasoning_effort", "low"),
    ("thinking_budget", 0),
    ("no_think", True),
)


def open_block(text: str, said: str = "") -> str:
    """The marker of the thinking block in which a rendered conversation ends; empty if it ends in none.

    Args:
        text: The conversation up to where the answer begins.
        said: Its last message. A marker in it, or before it, opens nothing.
    """
    place = text.rfind(said.strip()) if said.strip() else -1
    tail = text if place < 0 else text[place + len(said.strip()) :]
    begun = max(((tail.rfind(marker), len(marker), marker) for marker in MARKERS), default=(-1, 0, ""))
    if begun[0] >= 0:
        return "" if MARKERS[begun[2]].strip() in tail[begun[0] + begun[1] :] else begun[2]
    # A short message may be found inside the marker itself.
    return next((marker for marker in MARKERS if text.rstrip().endswith(marker)), "")


def closed_immediately(text: str) -> str:
    """Where a text begins with a thinking block: the same block, empty; else nothing."""
    return next((m + closing.strip() for m, closing in MARKERS.items() if text.lstrip().startswith(m)), "")


def switches_in(template: str) -> Iterator[dict[str, Any]]:
    """The variables that may switch thinking off in this template, one at a time."""
    return ({name: value} for name, value in SWITCHES if re.search(rf"\b{name}\b", template))
