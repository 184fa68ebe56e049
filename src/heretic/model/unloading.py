"""Giving back the memory of a model that nobody runs any more, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from heretic.model.batching import free_memory


def unload(model: nn.Module) -> None:
    """Free the parameters and buffers of `model` on all its devices, RAM included.

    accelerate's hooks put a model that is spread over devices into reference cycles, so dropping the last reference frees nothing
    until Python collects them. Whoever still refers to the model keeps a shell without memory (PyTorch's meta device).
    """
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_shell(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _shell(buffer)
    free_memory()


@contextmanager
def unloaded_after(model: nn.Module) -> Iterator[None]:
    """Within the context `model` is used; it is unloaded on the way out, whatever happens."""
    try:
        yield
    finally:
        unload(model)


def _shell(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
