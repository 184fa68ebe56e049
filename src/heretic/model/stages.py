"""Stages of a model that is spread over several GPUs: the blocks on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn


def stages_of(blocks: Iterable[nn.Module]) -> list[torch.device]:
    """Return the GPUs that have blocks, in the order of the blocks; one device if weights are offloaded or on the CPU."""
    devices = list(dict.fromkeys(parameter.device for block in blocks for parameter in block.parameters()))
    return devices if len({device.type for device in devices}) == 1 and devices[0].type != "meta" else devices[:1]


def device_of(block: nn.Module) -> torch.device:
    """Return the device that a block runs on, also if its weights are offloaded between passes."""
    device = next(block.parameters()).device
    return device if device.type != "meta" else torch.device(cast(Any, block)._hf_hook.execution_device)


def share_inputs(blocks: nn.ModuleList) -> None:
    """Let what all blocks of a spread model read (masks, positions) travel from GPU to GPU with the hidden states.

    accelerate copies it from the first GPU to every single block. PyTorch's copy between two GPUs waits for both, so the first GPU
    could not work on one batch while another one is on the last. Nothing to do for a model on one device.
    """
    if len(stages_of(blocks)) < 2:
        return
    shared = _Shared()
    blocks[0].register_forward_pre_hook(shared.forget)
    for block in blocks:
        block.register_forward_pre_hook(partial(shared.bring, device_of(block)), with_kwargs=True)
    blocks[-1].register_forward_hook(shared.forget)


class _Shared:
    """Inputs of the current pass's blocks: by identity of the first GPU's tensor, this and its copy on the current GPU."""

    def __init__(self) -> None:
        self.newest: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self, *_: object) -> None:
        self.newest.clear()

    def bring(self, device: torch.device, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace a block's inputs, without the hidden states, by their copies on its GPU."""
        there = partial(self._there, device)
        named = {name: each if name == "hidden_states" else _mapped(there, each) for name, each in kwargs.items()}
        return (*args[:1], *_mapped(there, args[1:])), named

    def _there(self, device: torch.device, tensor: Tensor) -> Tensor:
        if tensor.device == device or tensor.device.type != device.type:
            return tensor
        first, newest = self.newest.get(id(tensor), (tensor, tensor))
        if newest.device != device:
            newest = newest.to(device, non_blocking=True)
            self.newest[id(tensor)] = first, newest
        return newest


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, each) for each in value)
    if type(value) is dict:
        return {key: _mapped(function, each) for key, each in value.items()}
    return value
