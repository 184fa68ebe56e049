"""Read the dimensions of a language model from its config and its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

COMPOSED = ("gelu_new", "gelu_fast", "quick_gelu", "gelu_10")  # activation functions without a kernel of their own


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the decoder: counts of elements, and the bytes of one element."""

    blocks: int
    hidden: int
    vocabulary: int
    intermediate: int  # of a dense MLP, elements per token
    experts: int  # of a mixture; 0: none
    experts_used: int  # by a token; 0: no mixture
    expert: int  # intermediate elements per token of one expert
    query: int  # elements per token of all query heads
    attended: int  # elements per token of attention's output
    cache_per_token: int  # elements of keys and values per token and block
    repeated_cache: int  # the same with keys and values repeated for every query head, as in masked attention
    expanded: int  # elements per token that latent attention expands and then copies into queries and keys; else 0
    heads: int  # query heads
    normalized: int  # elements per token that the norms of one block read
    edited: int  # elements of the weights of one block that an ablation edits
    fused: bool  # gate and up are one tensor, which stays until the MLP ends
    limited: bool  # GPT-OSS: experts with biases and limits, computed in several steps
    composed: bool  # the activation function is computed in several steps
    windowed: bool  # some blocks attend to a sliding window
    eager: bool  # attention with its weights in memory, instead of a fused kernel
    element: int  # bytes

    @property
    def widest_writer(self) -> int:
        """Inputs of the widest writer's matrix."""
        return max(self.attended, self.expert, self.intermediate)

    @classmethod
    def of(cls, config: PretrainedConfig, model: PreTrainedModel) -> ModelDims:
        """Read the dimensions from the text model's config, and norms and the bytes per element from the model."""
        hidden = _size(config, "hidden_size")
        heads = _size(config, "num_attention_heads") or 1
        key = _size(config, "head_dim") or hidden // heads
        value, key_heads = key, _size(config, "num_key_value_heads") or heads
        without_position = _size(config, "qk_nope_head_dim")
        if without_position:  # latent attention: transformers keeps the expanded keys and values
            key = without_position + _size(config, "qk_rope_head_dim")
            value, key_heads = _size(config, "v_head_dim"), heads
        intermediate = _size(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
        dense = max(intermediate, _size(config, "intermediate_size_mlp"))
        experts = _size(config, "num_experts", "num_local_experts", "n_routed_experts")
        expert = _size(config, "moe_intermediate_size") or intermediate
        used = (_size(config, "num_experts_per_tok") or 1) if experts else 0
        blocks = _size(config, "num_hidden_layers")
        return cls(
            blocks=blocks,
            hidden=hidden,
            vocabulary=_size(config, "vocab_size"),
            intermediate=dense,
            experts=experts,
            # Llama 4 computes all experts for every token, those that are not chosen with zeros.
            experts_used=experts if _size(config, "interleave_moe_layer_step") else used,
            expert=expert if experts else 0,
            query=heads * key,
            attended=heads * value,
            cache_per_token=key_heads * (key + value),
            repeated_cache=heads * (key + value),
            expanded=heads * (key + without_position) if without_position else 0,
            heads=heads,
            normalized=_normalized(model, {key, value}, heads, key_heads, hidden),
            edited=hidden * (heads * value + (expert * experts or intermediate)),
            fused=any("gate_up_proj" in name and p.ndim == 2 for name, p in model.named_parameters()),
            limited=bool(_size(config, "swiglu_limit")),
            composed=(getattr(config, "activation_function", "") or getattr(config, "hidden_act", "")) in COMPOSED,
            windowed=bool(_size(config, "sliding_window")) and getattr(config, "use_sliding_window", True) is not False,
            eager=getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager",
            element=model.dtype.itemsize,
        )


def _normalized(model: nn.Module, of_head: set[int], heads: int, key_heads: int, hidden: int) -> int:
    """Return the elements per token that all norms of one block read, of the block with the most."""
    by_block: dict[str, int] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in type(module).__name__.lower() or weight is None or weight.ndim != 1:
            continue
        path = name.split(".")
        block = next((".".join(path[: i + 1]) for i, part in enumerate(path) if part.isdigit()), "")
        width = int(weight.shape[0])
        if width in of_head and width < hidden:  # one vector for all heads
            width *= key_heads if path[-1].startswith("k") else heads
        if block:
            by_block[block] = by_block.get(block, 0) + width
    return max(by_block.values(), default=2 * hidden)


def _size(config: PretrainedConfig, *names: str) -> int:
    """Return the config's first value of these names, 0 if there is none; the maximum if it differs by layer."""
    for name in names:
        value: Any = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if value:
            return int(value)
    return 0
