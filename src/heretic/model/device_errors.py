"""Recognize errors of devices and of device placement, as opposed to unsupported architectures."""

from __future__ import annotations

import re

from heretic.errors import UserError, first_line
from heretic.model.batching import out_of_memory

# PyTorch raises plain RuntimeErrors for these (aten/src/ATen/TensorIterator.cpp, c10/cuda/CUDAException.h), Triton ValueErrors:
# only their texts tell.
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
    """Return whether an exception means out of memory, tensors on different devices, or a device failure.

    Code that treats other exceptions as "architecture not supported" re-raises these.
    """
    if out_of_memory(error):
        return True
    text = str(error) if isinstance(error, (RuntimeError, ValueError)) else ""
    return bool(_MISMATCH.search(text) or _FAILURE.search(text))


def device_error(error: BaseException) -> UserError:
    """Return the UserError for a device error, other than out of memory, while a model is loaded and first run."""
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
