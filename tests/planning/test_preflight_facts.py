"""Findings of the preflight."""

from __future__ import annotations

import pytest

from heretic.errors import UserError
from heretic.planning.preflight_facts import Finding, FindingList


def test_a_user_error_becomes_a_failure_with_its_fix() -> None:
    def fail() -> None:
        raise UserError("No such prompts.", code="no-prompts", where="prompts.harmful_train", fix="check the path")

    found = FindingList()
    assert found.attempt("prompts", fail) is None and found.attempt("storage", lambda: 3) == 3
    text = "No such prompts. (prompts.harmful_train)"
    assert found.findings == [Finding("failure", "prompts", text, "check the path", "no-prompts")]


def test_bugs_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        FindingList().attempt("storage", lambda: 1 / 0)
