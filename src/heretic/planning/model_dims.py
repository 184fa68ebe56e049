"""Read the dimensions of a language model from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SHARE_FOR_GRADIENTS = 0.3  # of the memory free beside the weights, for the tensors saved by a pass with gradients
FEWEST_ROWS = 4  # in such a pass; if fewer fit, gradient checkpointing is used
# Longer passes are not faster on a CPU, and they save more tensors (Qwen2.5-Coder-0.5B: 1.5 GB for 32 prompts at once).
CPU_TOKENS_WITH_GRADIENTS = 512


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the decoder: counts of elements, and the bytes of one element."""

    blocks: int
    hidden: int
    vocabulary: int
    widest: int  # elements per token of the widest tensor inside a block
    cache_per_token: int  # elements of keys and values per token and block
    repeated_cache: int  # the same with keys and values repeated for every query head, as in masked attention
    edited: int  # elements of the weights of one block that an ablation edits
    element: int  # bytes

    @property
    def kept_for_gradients(self) -> int:
        """Bytes per token that one block saves for a gradient with frozen weights, an upper estimate.

        Norms, queries, keys, values, attention output, both writers' outputs before and after their operators; gate, up, product.
        """
        return 4 * (14 * self.hidden + 4 * self.widest)

    def gradient_bytes(self, rows: int, tokens: int, blocks: int, *, twice: bool = True) -> int:
        """Return the bytes that a pass with gradients saves on a device with this number of blocks.

        With `twice` (gradient checkpointing), only the activations of one block exist at a time.
        """
        if twice:
            return rows * tokens * (blocks * self.hidden * self.element + self.kept_for_gradients)
        return rows * tokens * blocks * self.kept_for_gradients

    def prefix_bytes(self, rows: int, tokens: int, blocks: int) -> int:
        """Return the bytes of the keys and values of a shared prefix in a pass with gradients.

        Every row's cache contains them, and attention saves them again for the backward pass.
        """
        return rows * tokens * blocks * (self.cache_per_token + self.repeated_cache) * self.element

    def rows_with_gradients(self, budget: int, tokens: int, own: int, *, on_cpu: bool) -> tuple[int, bool]:
        """Return the rows of a pass with gradients in `budget` bytes (at least 1), and whether it needs gradient checkpointing.

        Args:
            tokens: of the longest row.
            own: of these, the tokens after the shared prefix.
        """
        whole = budget // self.gradient_bytes(1, tokens, self.blocks, twice=False)
        if whole >= FEWEST_ROWS:
            enough = max(FEWEST_ROWS, CPU_TOKENS_WITH_GRADIENTS // own) if on_cpu else whole
            return min(whole, enough), False
        return max(1, budget // self.gradient_bytes(1, tokens, self.blocks)), True

    @classmethod
    def of(cls, config: PretrainedConfig, model: PreTrainedModel) -> ModelDims:
        """Read the dimensions from the text model's config, and the bytes per element from the model."""
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
    """Return the config's first value of these names, 0 if there is none; the maximum if it differs by layer."""
    for name in names:
        value: Any = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if value:
            return int(value)
    return 0
