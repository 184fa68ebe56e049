"""The table of formats, and who takes names from it."""

from __future__ import annotations

from typing import get_args

import pytest

from heretic.export.formats import FORMATS
from heretic.settings import ExportFormat
from tests.helpers.command import heretic


def test_the_settings_know_every_format() -> None:
    assert set(get_args(ExportFormat)) == set(FORMATS)


def test_a_format_that_there_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = heretic(capsys, monkeypatch, "run", "model", "--set", "export_format=pickle")
    assert ran.status == 1 and "export_format" in ran.err and "'full'" in ran.err
