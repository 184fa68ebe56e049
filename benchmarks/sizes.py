"""Which sizes of model fit where: what `heretic preflight --devices` would say, for models that exist only as shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heretic.hardware.devices import Device
from heretic.hardware.virtual_gpus import virtual_gpus
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import TensorInfo
from heretic.planning.memory_plan import MemoryPlan, plan_for
from heretic.planning.placement import lookup
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.settings import Settings


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with gated MLPs, as its config.json has them."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    head_width: int = 0  # of an attention head; 0: hidden / heads
    dtype: torch.dtype = torch.bfloat16

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.head_width or self.hidden // self.heads


SHAPES = {
    "0.5B": Shape("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936),
    "1.5B": Shape("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 151936),
    "7B": Shape("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064),
    "14B": Shape("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064),
    "32B": Shape("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 152064),
    "70B": Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
}
QUANTIZATIONS = ("none", "bnb_8bit", "bnb_4bit")
# A study with default settings and short prompts: prompts of each kind, tokens of a prompt and of the beginning that all share, as
# in Qwen2.5's template.
EVALUATION, PROMPT, SHARED = 100, 40, 24


def checkpoint_of(shape: Shape) -> Checkpoint:
    """A checkpoint in bfloat16 that exists only as names and shapes."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    kind: Any = LlamaConfig if shape.name.startswith("Llama") else Qwen2Config
    config = kind(
        num_hidden_layers=shape.blocks,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    tensors = {n: TensorInfo(n, tuple(p.shape), "BF16", Path("a.safetensors")) for n, p in model.named_parameters()}
    return Checkpoint(shape.name, Path("/nowhere"), config, tensors)


def planned(shape: Shape, machine: str) -> tuple[str, MemoryPlan, Checkpoint] | None:
    """Return the quantization with the most bits with which a model fits, the plan and the checkpoint; None if it does not fit.

    Whether it fits is decided for prompts of up to 600 characters, as `heretic preflight` does before it has read them. The
    batch size is that of a study with short prompts, which has counted their tokens.
    """
    checkpoint = checkpoint_of(shape)
    devices = [Device(f"cuda:{gpu.index}", gpu.total, gpu.free) for gpu in virtual_gpus(machine)]
    for name in QUANTIZATIONS:
        settings = Settings.model_validate({"quantization": name})
        work = Workload.of(settings, USUAL_PROMPT)
        if plan_for(settings, checkpoint, work, devices).fits:
            rest = EVALUATION * (PROMPT - SHARED)
            counted = replace(work, prompt_tokens=PROMPT, shared_tokens=SHARED, extra_tokens=(rest, rest))
            return name, plan_for(settings, checkpoint, counted, devices), checkpoint
    return None


def blocks_of(plan: MemoryPlan, shape: Shape) -> list[int]:
    """Return the number of blocks on each card, in order."""
    cards = [int(lookup(plan.device_map, f"model.layers.{layer}") or 0) for layer in range(shape.blocks)]
    return [cards.count(card) for card in sorted(set(cards))]
