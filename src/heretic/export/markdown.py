"""Text of others in Markdown: nothing in it becomes a heading, a link, HTML, or another column."""

from __future__ import annotations

import re

# What CommonMark and GitHub's extensions read as anything but text within a line; a backslash before it makes it text.
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~<>&:@=\"$^])")
URL = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~:/?#@!$&'*+,;=%-]*)?")
LONGEST = 300  # characters


def escape(value: object) -> str:
    """A value as text within a line."""
    return SPECIAL.sub(r"\\\1", _one_line(value)).replace("www.", "www\\.")


def code(value: object) -> str:
    """A value as code within a line or a cell of a table; backticks and bars are replaced, since neither can be escaped in both."""
    return f"`{_one_line(value).replace('`', chr(39)).replace('|', '/') or ' '}`"


def is_url(value: object) -> bool:
    """Whether a value is a web address that may stand as the target of a link."""
    return isinstance(value, str) and len(value) <= LONGEST and URL.fullmatch(value) is not None


def _one_line(value: object) -> str:
    text = " ".join(str(value).split())
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
