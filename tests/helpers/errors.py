"""Assertions on errors by their code, which is stable, not by their text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from heretic.errors import UserError


@contextmanager
def raises(code: str, kind: type[UserError] = UserError) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect an error of this kind with this code.

    Args:
        code: The expected `UserError.code`.
        kind: The expected class.

    Yields:
        What `pytest.raises` yields; its `value` is the error, after the block.
    """
    with pytest.raises(kind) as error:
        yield error
    assert error.value.code == code, str(error.value)
