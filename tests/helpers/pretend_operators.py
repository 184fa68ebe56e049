"""What is known of PyTorch's operators for `pretend_gpus`: which synchronize, which launch nothing, how the CPU computes CUDA's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
COPIES = {"_to_copy", "copy_", "copy", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# No TensorIterator: not even a 0-dim CPU tensor is taken beside tensors of a GPU.
STRICT = {
    "cat", "stack", "index_select", "gather", "embedding", "index_add", "index_add_", "index_copy_", "scatter", "scatter_",
    "scatter_add_", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "_grouped_mm",
}  # fmt: skip
SYNCHRONIZING = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero", "_local_scalar_dense",
    "bincount", "repeat_interleave",
}  # fmt: skip
# No kernel is launched for these, nor for views.
WITHOUT_KERNEL = {
    "detach", "alias", "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "_local_scalar_dense",
    "lift_fresh", "_fused_sdp_choice", "_unsafe_view", "_reshape_alias", "is_same_size", "set_",
}  # fmt: skip


@functools.cache
def traits(func: Any) -> tuple[str, bool, bool, bool]:
    """An operator's name, whether it is composed of others, whether a kernel is launched for it, whether it only views."""
    name = func.overloadpacket.__name__
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return name, composite, not view and name not in WITHOUT_KERNEL, view


def tensors_in(nested: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(nested, Tensor):
        return [nested]
    return [t for inner in nested for t in tensors_in(inner)] if isinstance(nested, (list, tuple)) else []


def map_tensors(nested: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with every tensor changed."""
    if isinstance(nested, Tensor):
        return change(nested)
    return type(nested)(map_tensors(n, change) for n in nested) if type(nested) in (list, tuple) else nested


def _copy(func: Any, args: Any, named: Any) -> Tensor:
    made = func(*args, **named)
    same = made.untyped_storage()._cdata == args[0].untyped_storage()._cdata
    return made.clone() if same else made


def _attention(_func: Any, args: Any, named: Any) -> tuple[Tensor, ...]:
    (query, key, value, mask, _, dropout, causal) = (*args, *(0.0, False)[len(args) - 5 :])
    attention, none = aten._scaled_dot_product_flash_attention_for_cpu, torch.zeros((), dtype=torch.long)
    scale = named.get("scale")
    return (*attention(query, key, value, dropout, causal, attn_mask=mask, scale=scale), none, none)


def _attention_backward(_func: Any, args: Any, named: Any) -> tuple[Tensor | None, ...]:
    grad, query, key, value, mask, out, logsumexp, _, _, dropout, _ = args[:11]
    causal = args[11] if len(args) > 11 else named.get("is_causal", False)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = backward(grad, query, key, value, out, logsumexp, dropout, causal, attn_mask=mask, scale=named.get("scale"))
    return (*found, None)


def _histogram(func: Any, args: Any, named: Any) -> Tensor | None:
    if args[0].is_floating_point():
        return None
    return func(args[0].float(), *args[1:], **named).to(args[0].dtype)  # CUDA has it for integers


# Operators that the CPU computes in another way than by the same operator; None: by the same after all.
ON_CPU: dict[str, Callable[[Any, Any, Any], Any]] = {
    "_to_copy": _copy,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "histc": _histogram,
}
