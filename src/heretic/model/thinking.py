"""Thinking blocks: the markers that open and close them in templates and answers of known models."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Opening marker -> what closes the block before the answer. Of markers with a common prefix the longer one comes first.
MARKERS = {
    "<think>": "\n</think>\n\n",
    "<thinking>": "\n</thinking>\n\n",
    "<thought>": "\n</thought>\n\n",
    "<reasoning>": "\n</reasoning>\n\n",
    "<seed:think>": "</seed:think>",
    "<|think|>": "<|end|><|begin|>assistant<|content|>",  # Solar Open
    "Here are my reasoning steps:": "\n[BEGIN FINAL RESPONSE]\n",  # Apriel
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
# Template variables that control thinking, and their value for off.
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


def open_block(text: str, last_message: str = "") -> str:
    """Return the marker of the thinking block that a rendered conversation ends in; empty if none.

    Args:
        text: The conversation up to the start of the answer.
        last_message: Its last message. Markers in it, or before it, do not count.
    """
    position = text.rfind(last_message.strip()) if last_message.strip() else -1
    tail = text if position < 0 else text[position + len(last_message.strip()) :]
    last_marker = max(((tail.rfind(marker), len(marker), marker) for marker in MARKERS), default=(-1, 0, ""))
    if last_marker[0] >= 0:
        return "" if MARKERS[last_marker[2]].strip() in tail[last_marker[0] + last_marker[1] :] else last_marker[2]
    # A short message may occur inside the marker itself.
    return next((marker for marker in MARKERS if text.rstrip().endswith(marker)), "")


def begun_block(text: str) -> str:
    """Return the marker of the thinking block that an answer begins with; empty if none."""
    return next((marker for marker in MARKERS if text.lstrip().startswith(marker)), "")


def closed_immediately(text: str) -> str:
    """Return an empty thinking block with the marker that a text begins with; empty if there is none.

    It has the line breaks that models write (`<think>\\n\\n</think>\\n\\n`). Without them, they would be the next tokens, nearly
    certain before and after any edit.
    """
    begun, marker = text.lstrip(), begun_block(text)
    if not marker:
        return ""
    closing = MARKERS[marker]
    if closed := re.match(rf"{re.escape(marker)}\s*{re.escape(closing.strip())}\s*", begun):  # by the model itself
        return closed[0]
    breaks = "\n" if begun[len(marker) :][:1].isspace() and closing.endswith("\n\n") else ""
    return f"{marker}{breaks}{closing}"


def thought_length(tokens: Sequence[int], decode: Callable[[list[int]], Any], opened: str = "") -> int | None:
    """Return how many of an answer's tokens its thinking block takes, markers included.

    Args:
        tokens: of the answer.
        decode: returns the text of tokens, with special tokens.
        opened: the marker that the prompt ends with, empty if none.

    Returns:
        0 if the answer has no thinking block, None if the block does not end.
    """

    def text(count: int) -> str:
        return str(decode(list(tokens[:count])))

    whole = text(len(tokens))
    marker = opened or begun_block(whole)
    if not marker:
        return 0
    closing = MARKERS[marker].strip()
    if closing not in whole:
        return None
    return bisect.bisect_left(range(len(tokens)), True, key=lambda count: closing in text(count))


def switches_in(template: str) -> Iterator[dict[str, Any]]:
    """Yield the template's variables that may disable thinking, one at a time."""
    return ({name: value} for name, value in SWITCHES if re.search(rf"\b{name}\b", template))
