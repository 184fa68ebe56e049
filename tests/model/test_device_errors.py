"""Errors of a device are told from those of an architecture."""

from __future__ import annotations

import pytest
import torch

from heretic.model.device_errors import device_error, is_device_error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        RuntimeError(
            "Expected all tensors to be on the same device, but got mat1 is on cuda:0, different from other tensors"
        ),
        RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cuda:1)"),
        RuntimeError("Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("HIP error: no kernel image is available for execution on the device"),
        ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"),
    ],
)
def test_error_of_a_device_is_recognized(error: Exception) -> None:
    assert is_device_error(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"),
        RuntimeError("derivative for aten::_scaled_grouped_mm is not implemented"),
        ValueError("past_key_values is not supported"),
        AttributeError("'Cache' object has no attribute 'on device cuda'"),
        TypeError("forward() got an unexpected keyword argument 'is on cpu'"),
        IndexError("The shape of the mask [3, 21] at index 1 does not match the shape of the indexed tensor"),
    ],
)
def test_error_of_an_architecture_is_none(error: Exception) -> None:
    assert not is_device_error(error)


def test_failed_device_and_mismatch_have_codes_of_their_own() -> None:
    assert device_error(RuntimeError("CUDA error: unspecified launch failure")).code == "device-failure"
    assert device_error(RuntimeError("Expected all tensors to be on the same device")).code == "device-mismatch"
