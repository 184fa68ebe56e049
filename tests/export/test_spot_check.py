"""Written tensors against their edits: right ones pass in every layout, and one wrong tensor is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic.ablation.operator import Operator
from heretic.errors import VerificationFailed
from heretic.export.full import read_back
from heretic.export.request import WriteRequest
from heretic.export.save import plan_edits, write_weights
from heretic.export.spot_check import check_edits, expectation
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import load
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import NULL_REPORTER
from heretic.settings import Settings
from tests.helpers.errors import raises
from tests.tiny import save_tiny

FAMILIES = ["qwen2", "gpt2", "gemma3", "mixtral", "gpt_oss"]


def order(folder: Path, strength: float = 1.0, scaled: bool = True) -> WriteRequest:
    """Random operators of every writer, planned."""
    model = load(open_checkpoint(str(folder)), ["float32"], {})
    torch.manual_seed(1)
    operators = {}
    for writer in model.structure.writers:
        v = torch.nn.functional.normalize(torch.randn(model.structure.width), dim=0)
        n = 1 + 0.1 * torch.rand(model.structure.width) if scaled else None
        operators[writer.name] = Operator(strength * v, v, n)
    edits = plan_edits(model.checkpoint, model.structure.writers, operators, model.model)
    settings = Settings(model=str(folder))
    return WriteRequest("full", settings, model.checkpoint, LoadPlan(["float32"], {}, 1, "none"), operators, edits)


def write(wanted: WriteRequest, folder: Path) -> Path:
    folder.mkdir()
    write_weights(wanted.checkpoint, wanted.prepared, folder, NULL_REPORTER, StopSignal())
    return folder


def check(wanted: WriteRequest, folder: Path) -> int:
    read = read_back(wanted, folder)
    assert read is not None
    return check_edits(wanted.checkpoint, wanted.operators, read, NULL_REPORTER, StopSignal())


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    file = next(t.file for n, t in open_checkpoint(str(folder)).tensors.items() if n == name)
    assert file is not None
    save_file(load_file(file) | {name: tensor.contiguous()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_ones_pass(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = order(save_tiny(tmp_path / "m", family, dtype=dtype, max_shard_size="20KB"))
    assert check(wanted, write(wanted, tmp_path / "out")) == len(wanted.prepared) > 7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_each_missing_edit_is_seen_and_named(family: str, strength: float, tmp_path: Path) -> None:
    """Stored in bfloat16, whose steps hide a good part of an edit of strength 0.05."""
    wanted = order(save_tiny(tmp_path / "m", family, dtype=torch.bfloat16), strength, scaled=False)
    out = write(wanted, tmp_path / "out")
    for name, edit in wanted.prepared.items():
        right, before = open_checkpoint(str(out)).read(name), wanted.checkpoint.read(name)
        if edit.is_bias and strength < 1:
            continue  # of so few numbers all may change by less than rounding does
        change(out, name, before)
        with raises("verification-failed", VerificationFailed) as error:
            check(wanted, out)
        assert error.value.where == name
        change(out, name, right)
    assert check(wanted, out)


def test_a_wrong_strength_is_seen(tmp_path: Path) -> None:
    wanted = order(save_tiny(tmp_path / "m", "qwen2"))
    name, edit = next(iter(wanted.prepared.items()))
    off = replace(edit, operator=replace(edit.operator, u=edit.operator.u * 1.001))
    other = replace(wanted, prepared=wanted.prepared | {name: off})
    with raises("verification-failed", VerificationFailed) as error:
        check(wanted, write(other, tmp_path / "out"))
    assert error.value.where == name


def test_one_expert_of_many_left_out_is_seen(tmp_path: Path) -> None:
    wanted = order(save_tiny(tmp_path / "m", "gpt_oss"))
    out = write(wanted, tmp_path / "out")
    name = next(n for n in wanted.prepared if len(wanted.checkpoint.tensors[n].shape) == 3)
    tensor = open_checkpoint(str(out)).read(name).clone()
    tensor[-1] = wanted.checkpoint.read(name)[-1]
    change(out, name, tensor)
    with raises("verification-failed", VerificationFailed) as error:
        check(wanted, out)
    assert error.value.where == name


def test_a_tensor_that_no_edit_is_for_must_be_the_originals(tmp_path: Path) -> None:
    wanted = order(save_tiny(tmp_path / "m", "qwen2"))
    out = write(wanted, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    change(out, name, open_checkpoint(str(out)).read(name) + 1e-3)
    with raises("verification-failed", VerificationFailed) as error:
        check(wanted, out)
    assert error.value.where == name


def test_an_operator_that_no_tensor_was_planned_for_is_seen(tmp_path: Path) -> None:
    wanted = order(save_tiny(tmp_path / "m", "qwen2"))
    name = next(iter(wanted.prepared))
    fewer = replace(wanted, prepared={n: e for n, e in wanted.prepared.items() if n != name})
    with raises("verification-failed", VerificationFailed) as error:
        check(fewer, write(fewer, tmp_path / "out"))
    assert error.value.where == name.removesuffix(".weight")


def test_the_expectation_is_the_edit_of_the_design() -> None:
    """plain: what is left along v is (1 - s) of what was; nothing else changes."""
    torch.manual_seed(0)
    v, weight = torch.nn.functional.normalize(torch.randn(16), dim=0), torch.randn(16, 5)
    after, error = expectation(Operator(0.7 * v, v), weight)
    v = v.double()
    assert torch.allclose(v @ after, 0.3 * (v @ weight.double()), atol=1e-6)
    rest = torch.eye(16, dtype=torch.float64) - torch.outer(v, v)
    assert torch.allclose(rest @ after, rest @ weight.double(), atol=1e-6) and (error < 1e-3).all()


def test_a_checkpoint_reads_parts_of_a_tensor(llama: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(str(llama))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(checkpoint.slice_of(name)[:, 3:7], checkpoint.read(name)[:, 3:7])
