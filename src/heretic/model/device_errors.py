"""Errors that come from a device or from where tensors are, not from what a model can do."""

from __future__ import annotations

import re

from heretic.errors import UserError, first_line
from heretic.model.batching import out_of_memory

# PyTorch raises plain RuntimeErrors for these (aten/src/ATen/TensorIterator.cpp, c10/cuda/CUDAException.h), and Triton raises
# ValueErrors, so their texts decide.
_MISMATCH = re.compile(
    r"same device|expected device|different devices|\bis on (cpu|gpu|cuda)|torch\.cuda\.\w*Tensor|cannot be accessed from Triton",
    re.IGNORECASE,
)
_FAILURE = re.compile(
    r"\b(CUDA|HIP|XPU|MPS)( runtime| driver)? error|\b(CU|ROC|HIP)[A-Z]+_STATUS_|\bcuDNN\b|\bNCCL\b"
    r"|device-side assert|no kernel image|illegal memory access",
    re.IGNORECASE,
)


def is_device_error(error: BaseException) -> bool:
    """Whether an exception means memory that ran out, tensors on different devices, or a device that failed.

    Code that takes other exceptions for "this architecture cannot do it" lets these pass.
    """
    if out_of_memory(error):
        return True
    text = str(error) if isinstance(error, (RuntimeError, ValueError)) else ""
    return bool(_MISMATCH.search(text) or _FAILURE.search(text))


def device_error(error: BaseException) -> UserError:
    """What to tell the user about a device error, other than memory that ran out, while a model is loaded and first run."""
    if _FAILURE.search(str(error)):
        return UserError(
            f"A device failed: {first_line(error)}",
            code="device-failure",
            where="device_map",
            fix='check the driver and the PyTorch build (heretic doctor), or run on the CPU: device_map = "cpu"',
        )
    return UserError(
        f"The model does not run across its devices: {first_line(error)}",
        code="device-mismatch",
        where="device_map",
        fix='device_map = "balanced", or one device such as "cuda:0"',
    )
