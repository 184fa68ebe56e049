"""The names that `heretic` exports, and the sizes of its files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import heretic

MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION = 400, 60


def test_every_exported_name_can_be_imported() -> None:
    assert all(getattr(heretic, name) is not None for name in heretic.__all__)


def test_no_file_and_no_function_is_too_long() -> None:
    too_long = []
    for file in Path(heretic.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MOST_LINES_OF_FILE:
            too_long.append(f"{file}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION:
                    too_long.append(f"{file}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long, too_long
