"""Free the memory of a model on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from heretic.model.batching import free_memory


def unload(model: nn.Module) -> None:
    """Free the parameters and buffers of `model` on all its devices, RAM included.

    accelerate's hooks create reference cycles in a model on several devices, so dropping the last reference frees nothing at once.
    Remaining references hold a model on PyTorch's meta device, without memory.
    """
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_meta_tensor(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _meta_tensor(buffer)
    free_memory()


@contextmanager
def unloaded_after(model: nn.Module) -> Iterator[None]:
    """Unload `model` at the end of the context, also after an error."""
    try:
        yield
    finally:
        unload(model)


def _meta_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@contextmanager
def unloaded_on_error(model: nn.Module) -> Iterator[None]:
    """Unload a model that was being prepared: notebooks keep the traceback of an error, and with it the weights."""
    try:
        yield
    except BaseException:
        unload(model)
        raise
