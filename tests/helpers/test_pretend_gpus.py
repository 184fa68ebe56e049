"""The pretend GPUs follow CUDA's rules, and leave nothing behind."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers.utils import is_torch_cuda_available

from tests.helpers.pretend_gpus import PretendGpus

pytestmark = pytest.mark.usefixtures("cuda")


def test_operands_on_two_gpus_are_refused() -> None:
    with PretendGpus(2):
        one, two = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
        with pytest.raises(RuntimeError, match="same device"):
            one + two
        with pytest.raises(RuntimeError, match="same device"):
            one + torch.ones(3)
        assert (one * torch.tensor(2.0)).tolist() == [2, 2, 2], "a scalar in RAM is allowed"
        assert (one + two.to("cuda:0")).device == torch.device("cuda:0")


def test_bytes_count_on_their_gpu_while_a_tensor_lives() -> None:
    with PretendGpus(2, memory=1000) as gpus:
        kept = torch.zeros(50, device="cuda:1")
        view = kept[:10]
        assert gpus.used == [0, 200]
        del kept
        assert gpus.used == [0, 200]
        del view
        assert gpus.used == [0, 0] and gpus.peak == [0, 200]
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(300, device="cuda:0")
        assert gpus.used == [0, 0] and gpus.ooms == 1


def test_gradients_cross_gpus() -> None:
    with PretendGpus(2):
        weight = torch.ones(4, device="cuda:0", requires_grad=True)
        (weight.to("cuda:1") * 3).sum().backward()
        assert weight.grad.tolist() == [3, 3, 3, 3] and weight.grad.device == torch.device("cuda:0")


def test_host_waits_and_launches_are_counted() -> None:
    with PretendGpus(1) as gpus, gpus.phase("work"):
        made = torch.ones(4, device="cuda:0") + 1
        assert gpus.launches["work"] == 2 and not gpus.syncs["work"]
        made.sum().item()
        assert sum(gpus.syncs["work"].values()) == 1


def test_leaving_restores_everything() -> None:
    own = (torch.nn.functional.scaled_dot_product_attention, sys.modules.get("pynvml"), torch.cuda.device_count)
    assert not torch.cuda.is_available() and not is_torch_cuda_available()
    with pytest.raises(ZeroDivisionError), PretendGpus(1) as gpus:
        assert torch.cuda.is_available() and is_torch_cuda_available()
        1 / len([t for t in range(0)])
    assert not torch.cuda.is_available() and not is_torch_cuda_available()
    assert own == (torch.nn.functional.scaled_dot_product_attention, sys.modules.get("pynvml"), torch.cuda.device_count)
    assert torch.autograd.is_multithreading_enabled() and not torch._C._only_lift_cpu_tensors()
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [2, 2] and gpus.used == [0]
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda:0")
