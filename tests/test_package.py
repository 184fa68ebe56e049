"""The names that `heretic` exports."""

from __future__ import annotations

import heretic


def test_every_exported_name_can_be_imported() -> None:
    assert all(getattr(heretic, name) is not None for name in heretic.__all__)
