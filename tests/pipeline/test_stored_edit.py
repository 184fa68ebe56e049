"""A manifest's stored operators: used as they are if they fit the base model, refused otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic.ablation.operator import Operator
from heretic.export.manifest import OPERATORS, Manifest, read_operators
from heretic.files import sha256, write_tensors
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.pipeline.stored_edit import stored_edit
from heretic.progress import NULL_REPORTER
from heretic.runs.stored_tensors import operator_tensors
from tests.helpers.errors import raises


def manifest(**more: Any) -> Manifest:
    return Manifest.model_validate(
        {
            "made_with": "heretic", "run": "r", "fingerprint": "f", "trial": 0, "dtype": "float32", "versions": {},
            "model": {"name": "m", "sha256": {"w": "0" * 64}}, "written": {"sha256": {}},
            "settings": {"ablation": {"geometry": "conditional"}},
            "ablation": {"strengths": {"mlp": (1.0,) * 4}, "vector": (1.0,) * 32}, **more,
        }
    )  # fmt: skip


def test_stored_operators_must_fit_the_model(llama: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    writer = next(w for w in model.structure.writers if w.component == "mlp")
    right = Operator(torch.randn(32), None, a=torch.randn(48))
    assert stored_edit(manifest(), model, None, {writer.name: right}, NULL_REPORTER) == {writer.name: right}
    wrong = (
        {"other": right},
        {writer.name: replace(right, a=torch.randn(32))},
        {writer.name: replace(right, u=torch.ones(8))},
    )
    for operators in wrong:
        with raises("manifest-mismatch"):
            stored_edit(manifest(), model, None, operators, NULL_REPORTER)


def test_the_file_of_operators_is_checked(tmp_path: Path) -> None:
    file = tmp_path / OPERATORS
    file.parent.mkdir()
    operators = {"a.b": Operator(torch.randn(2, 8), None, a=torch.randn(2, 5))}
    write_tensors(file, operator_tensors(operators), {})
    named = manifest(operators={"file": "x", "sha256": sha256(file)})
    found = read_operators(named, tmp_path)
    assert found is not None and torch.equal(found["a.b"].a, operators["a.b"].a) and found["a.b"].w is None  # type: ignore[arg-type]
    assert read_operators(manifest(), tmp_path) is None
    with raises("hash-mismatch"):
        read_operators(manifest(operators={"file": "x", "sha256": "0" * 64}), tmp_path)
    write_tensors(file, {"a.b.u": torch.randn(8), "a.b.a": torch.full((5,), torch.nan)}, {})
    with raises("damaged-file"):
        read_operators(manifest(operators={"file": "x", "sha256": sha256(file)}), tmp_path)
    file.unlink()
    with raises("missing-file"):
        read_operators(named, tmp_path)


@pytest.mark.parametrize("key", ["u", "a"])
def test_tensors_that_make_no_operator_are_refused(key: str) -> None:
    from heretic.runs.stored_tensors import operators_from_tensors

    with pytest.raises(ValueError, match="lacks"):
        operators_from_tensors({f"w.{key}": torch.randn(3)})
