"""Errors in words."""

from __future__ import annotations

import pytest

from heretic.errors import first_line, plain_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\x1b[2J", "a\\x0ab\\x1b[2J"),
        ("می\u200cخواهم 👩\u200d👩", "می\u200cخواهم 👩\u200d👩"),
        ("\u202eevil", "\\x202eevil"),
    ],
)
def test_control_characters_are_escaped_and_joiners_are_not(text: str, shown: str) -> None:
    assert plain_line(text) == shown


def test_the_first_line_of_an_error_steers_no_terminal() -> None:
    assert first_line(ValueError("\x1b[2J bad\nmore")) == "\\x1b[2J bad" and first_line(KeyError()) == "KeyError"
