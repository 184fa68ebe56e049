"""Recognize errors of devices and of device placement, as opposed to unsupported architectures."""

from __future__ import annotations

from heretic.errors import UserError, first_line
from heretic.hardware.devices import FAILURE, MISMATCH, current, usual_name
from heretic.model.batching import out_of_memory


def is_device_error(error: BaseException) -> bool:
    """Return whether an exception means out of memory, tensors on different devices, or a device failure.

    Code that treats other exceptions as "architecture not supported" re-raises these.
    """
    if out_of_memory(error):
        return True
    text = str(error) if isinstance(error, (RuntimeError, ValueError)) else ""
    return bool(MISMATCH.search(text) or FAILURE.search(text))


def device_failure(error: BaseException) -> UserError | None:
    """Return the UserError for a device that failed during a run; None for another error."""
    if not FAILURE.search(str(error)):
        return None
    kind = current()
    without = f", without a broken GPU ({kind.visibility[0]})" if kind and kind.visibility else ""
    fix = f"run the same command again{without}; finished trials are kept"
    if "device-side assert" in str(error):  # a defect of software, whose place the traceback does not show
        fix = "set CUDA_LAUNCH_BLOCKING=1, run the same command again, and report the traceback in run.log"
    return UserError(f"A device failed: {first_line(error)}", code="device-failure", fix=fix)


def device_error(error: BaseException) -> UserError:
    """Return the UserError for a device error, other than out of memory, while a model is loaded and first run."""
    if FAILURE.search(str(error)):
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
        fix=f'device_map = "planned", or one device such as "{usual_name()}"',
    )
