"""Place a model's blocks in order on several GPUs, so that the worst of them is as well off as possible.

accelerate's `balanced` keeps room for offloading on the first GPU: of 32B it puts 14, 18, 18 and 14 blocks on four GPUs, this
module 15, 17, 17 and 15.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from heretic.hardware.devices import Device
from heretic.model.forward import forward_supported
from heretic.model.masks import known_padding
from heretic.planning.placement import block_names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Cost = tuple[float, int]  # of the worst GPU, and the sum of the squares of all bytes
# What is worst of a GPU, from its bytes, its room and its number of blocks; less is better.
Weigh = Callable[[int, int, int], float]
WEIGHS: tuple[Weigh, ...] = (
    lambda load, room, blocks: load,  # as even as possible: no GPU waits for another
    lambda load, room, blocks: load - room,  # the most free memory on the fullest GPU
    lambda load, room, blocks: (load - room) / blocks,  # for keys and values, which a GPU has for each of its blocks
)


def partitions(
    model: PreTrainedModel,
    blocks: int,
    room: Mapping[str, int],
    gpus: Sequence[Device],
    bytes_per_element: Mapping[str, float] = MappingProxyType({}),
    weighs: Sequence[Weigh] = WEIGHS[:1],
) -> list[dict[str, int | str]]:
    """Place everything before the blocks with the first one, everything after them with the last one, in several ways.

    Args:
        model: the meta model.
        blocks: number of decoder blocks.
        room: bytes for weights by device name.
        gpus: the devices, in the order of the blocks.
        bytes_per_element: bytes per element of quantized parameters, by name.
        weighs: what the worst GPU should have little of, one for each way.

    Returns:
        Devices by module name, each table once; none if the weights do not fit, blocks share weights, or the model has no list
        of its blocks.
    """
    names = block_names(model, blocks)
    if not names:
        return []
    modules = list(_in_order(model, "", set(names)))
    sizes = _sizes(model, modules, bytes_per_element)
    sharing = _sharing(model, modules)
    if sharing & set(names):  # accelerate keeps blocks with one weight (Zamba 2) together
        return []
    # A head that shares the embedding's weight stays beside it.
    last = _after_blocks(model, modules, names, sizes) - sharing
    before = [name for name in modules if name not in {*names, *last}]
    after = [name for name in modules if name in last]
    ends = sum(sizes[name] for name in before), sum(sizes[name] for name in after)
    tables: list[dict[str, int | str]] = []
    for weigh in weighs:
        counts = _counts([sizes[name] for name in names], ends, [room.get(gpu.name, 0) for gpu in gpus], weigh)
        if counts is None:
            return []
        cards = [gpu.key for gpu, count in zip(gpus, counts, strict=True) for _ in range(count)]
        on_gpu = dict(zip(names, cards, strict=True))
        table = dict.fromkeys(before, cards[0]) | on_gpu | dict.fromkeys(after, cards[-1])
        if table not in tables:
            tables.append(table)
    return tables


def _in_order(module: nn.Module, prefix: str, blocks: set[str]) -> Iterator[str]:
    """Yield the names of the blocks, and of the largest modules and tensors without any of them, in the model's order."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + name
    for name, child in module.named_children():
        path = prefix + name
        if path in blocks or not any(block.startswith(f"{path}.") for block in blocks):
            yield path
        else:
            yield from _in_order(child, f"{path}.", blocks)


def _after_blocks(
    model: PreTrainedModel, modules: Sequence[str], blocks: Sequence[str], sizes: Mapping[str, int]
) -> set[str]:
    """Return the modules that run after all blocks.

    The model's order decides for tensors, and for models that look at their inputs. There, what has no weights counts as before:
    rotary embeddings compute what the blocks read.
    """
    first = modules.index(blocks[0])
    guessed = {name for name in modules[first:] if sizes[name]} - set(blocks)
    order = _execution_order(model, modules, set(blocks))
    if blocks[-1] not in order:
        return guessed
    return {*order[order.index(blocks[-1]) :]} - set(blocks) | (guessed - {*order})


def _execution_order(model: PreTrainedModel, modules: Sequence[str], blocks: set[str]) -> list[str]:
    """Return the modules of which a part runs in a pass on the meta device, by its first call, as far as the pass comes."""
    order: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, owner=owner: order.setdefault(owner))
        for name, module in model.named_modules()
        if (owner := _owner(name, modules)) and (owner == name or owner not in blocks)
    ]
    tokens = torch.ones(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.inference_mode(), known_padding(False):
            forward_supported(model, tokens, attention_mask=tokens, position_ids=tokens, use_cache=False)
    except Exception as error:  # of the model's own code: some read a mask or count tokens, which have no values here
        log.debug("a pass on the meta device ended early: %s", error)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _sizes(model: nn.Module, modules: Sequence[str], bytes_per_element: Mapping[str, float]) -> dict[str, int]:
    """Return the bytes of modules; tied weights count where they appear first."""
    sizes = dict.fromkeys(modules, 0)
    for name, parameter in model.named_parameters():
        sizes[_owner(name, sizes)] += int(parameter.numel() * bytes_per_element.get(name, parameter.element_size()))
    return sizes


def _sharing(model: nn.Module, modules: Sequence[str]) -> set[str]:
    """Return the modules with a weight that appears in an earlier one too."""
    first = {name for name, _ in model.named_parameters()}
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {_owner(name, modules) for name in every if name not in first}


def _owner(name: str, modules: Container[str]) -> str:
    """Return which of the modules and tensors is or holds this one; empty for a container of several of them."""
    parts = name.split(".")
    return next((owner for n in range(len(parts), 0, -1) if (owner := ".".join(parts[:n])) in modules), "")


def _counts(
    blocks: Sequence[int], ends: tuple[int, int], room: Sequence[int], weigh: Weigh = WEIGHS[0]
) -> list[int] | None:
    """Return how many blocks each GPU holds, by dynamic programming over GPUs and blocks; None if they do not fit."""
    total, sums = len(blocks), [0]
    for size in blocks:
        sums.append(sums[-1] + size)
    # The best way to place the first `stop` blocks on the GPUs so far: cost and counts.
    best: dict[int, tuple[Cost, list[int]]] = {0: ((-math.inf, 0), [])}
    for most in room:
        found: dict[int, tuple[Cost, list[int]]] = {}
        for start, ((worst, squares), counts) in best.items():
            for stop in range(start, total + 1):
                load = sums[stop] - sums[start]
                if stop > start:
                    load += ends[0] * (start == 0) + ends[1] * (stop == total)
                if load > most:
                    break
                own = weigh(load, most, stop - start) if stop > start else -math.inf
                candidate = (max(worst, own), squares + load * load), [*counts, stop - start]
                if stop not in found or candidate[0] < found[stop][0]:
                    found[stop] = candidate
        best = found
    return best[total][1] if total in best else None
