"""The sizes of a language model that memory depends on, read from its config with the names that architectures use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SHARE_FOR_GRADIENTS = 0.3  # of the memory that is free beside the weights, for what a pass with gradients keeps
FEWEST_ROWS = 4  # in such a pass; where fewer fit, blocks are computed twice instead
# A CPU gains nothing from longer passes, and what they keep grows with them (Qwen2.5-Coder-0.5B: 1.5 GB for 32 prompts at once).
CPU_TOKENS_WITH_GRADIENTS = 512


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the decoder: counts of elements, and the bytes of one element."""

    blocks: int
    hidden: int
    vocabulary: int
    widest: int  # elements per token of the widest tensor inside a block
    cache_per_token: int  # elements of keys and values per token and block
    repeated_cache: (
        int  # the same with keys and values repeated for every query head, as attention with a mask reads them
    )
    edited: int  # elements of the weights of one block that an ablation edits
    element: int  # bytes

    @property
    def kept_for_gradients(self) -> int:
        """Bytes a token that one block keeps for a gradient with frozen weights, an upper estimate: the norms, queries, keys and
        values, the attention's output, the two writers' outputs and what their operators make of them; gate, up, product."""
        return 4 * (14 * self.hidden + 4 * self.widest)

    def gradient_bytes(self, rows: int, tokens: int, blocks: int, *, twice: bool = True) -> int:
        """Bytes that a pass with gradients keeps for so many rows of so many tokens on a device with so many blocks.

        With `twice` the insides of a block are computed again when its gradient is wanted: only one block's exist at a time.
        """
        if twice:
            return rows * tokens * (blocks * self.hidden * self.element + self.kept_for_gradients)
        return rows * tokens * blocks * self.kept_for_gradients

    def prefix_bytes(self, rows: int, tokens: int, blocks: int) -> int:
        """Bytes of the keys and values of a shared prefix of so many tokens in a pass with gradients: every row's cache holds them,
        and attention keeps what it has read for the backward pass."""
        return rows * tokens * blocks * (self.cache_per_token + self.repeated_cache) * self.element

    def rows_with_gradients(self, budget: int, tokens: int, *, on_cpu: bool) -> tuple[int, bool]:
        """How many rows of so many tokens a pass with gradients takes within `budget` bytes, at least one, and whether blocks have
        to be computed twice for it."""
        whole = budget // self.gradient_bytes(1, tokens, self.blocks, twice=False)
        if whole >= FEWEST_ROWS:
            enough = max(FEWEST_ROWS, CPU_TOKENS_WITH_GRADIENTS // tokens) if on_cpu else whole
            return min(whole, enough), False
        return max(1, budget // self.gradient_bytes(1, tokens, self.blocks)), True

    @classmethod
    def of(cls, config: PretrainedConfig, model: PreTrainedModel) -> ModelDims:
        """Read the text part's config; the bytes of an element are those of the model's number format."""
        hidden = _size(config, "hidden_size")
        heads = _size(config, "num_attention_heads") or 1
        key = _size(config, "head_dim") or hidden // heads
        value, key_heads = key, _size(config, "num_key_value_heads") or heads
        if _size(config, "qk_nope_head_dim"):  # latent attention: transformers keeps the expanded keys and values
            key = _size(config, "qk_nope_head_dim") + _size(config, "qk_rope_head_dim")
            value, key_heads = _size(config, "v_head_dim"), heads
        intermediate = _size(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
        experts = _size(config, "num_experts", "num_local_experts", "n_routed_experts")
        expert = _size(config, "moe_intermediate_size") or intermediate
        active = expert * (_size(config, "num_experts_per_tok") or 1) if experts else intermediate
        return cls(
            blocks=_size(config, "num_hidden_layers"),
            hidden=hidden,
            vocabulary=_size(config, "vocab_size"),
            widest=max(intermediate, active, 3 * hidden),
            cache_per_token=key_heads * (key + value),
            repeated_cache=heads * (key + value),
            edited=hidden * (heads * value + (expert * experts or intermediate)),
            element=model.dtype.itemsize,
        )


def _size(config: PretrainedConfig, *names: str) -> int:
    """The first of these that the config has, 0 if none; where it differs by layer, the largest."""
    for name in names:
        value: Any = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if value:
            return int(value)
    return 0
