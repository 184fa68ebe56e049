"""Differences between the weights of two folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from heretic.export.weight_diff import Difference, weight_difference
from heretic.interrupt import StopSignal

FILE = "adapter_model.safetensors"


def compared(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> Difference | str:
    folders = []
    for name, tensors in (("ours", ours), ("theirs", theirs)):
        folders.append(Path(name))
        folders[-1].mkdir(exist_ok=True)
        save_file(tensors, folders[-1] / FILE)
    return weight_difference(folders[0], folders[1], [FILE], StopSignal())


def test_of_an_adapter_the_products_are_compared() -> None:
    a, b, bias = torch.randn(4, 30), torch.randn(20, 4), torch.randn(20)
    signs = torch.tensor([1.0, -1, 1, -1])
    names = [f"base_model.model.x.lora_{kind}" for kind in ("A.weight", "B.weight", "B.bias")]
    adapter = dict(zip(names, (a, b, bias), strict=True))
    turned = dict(zip(names, (a * signs[:, None] * 2, b * signs / 2, bias), strict=True))
    same = compared(adapter, turned)
    assert isinstance(same, Difference) and same.within and same.elements == 20 * 30 + 20
    for changed in ({**turned, names[1]: b * 1.01}, {**turned, names[2]: bias + 1}):
        other = compared(adapter, changed)
        assert isinstance(other, Difference) and not other.within
    assert isinstance(compared(adapter, {names[0]: a, names[1]: b}), str)
    assert isinstance(compared(adapter, {**adapter, names[1]: torch.randn(20, 3)}), str), "factors of unequal ranks"
