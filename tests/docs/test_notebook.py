"""The example notebook runs from top to bottom, on a tiny model in place of the demo's, and is stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heretic.model.checkpoint import open_checkpoint
from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "examples" / "first_study.ipynb"


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run_in_order(llama: Path, prompt_files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {
        "MODEL": str(llama),
        "PROMPTS": {role: {"source": str(path)} for role, path in prompt_files.items()},
        "SETTINGS": {
            "n_trials": 2, "max_response_length": 6, "refusal_markers": ["sorry", "bread"], "max_kl": 5.0,
            "search": {"start": "kernels", "n_startup_trials": 2},
        },
    }  # fmt: skip
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}: {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):  # as papermill does
            assert set(tiny) <= set(names)
            names.update(tiny)
    printed = capsys.readouterr().out
    assert "<- selected" in printed and "original: " in printed and "ablated: " in printed
    assert open_checkpoint("ablated-model").tensors.keys() == open_checkpoint(str(llama)).tensors.keys()


def test_it_has_no_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())
