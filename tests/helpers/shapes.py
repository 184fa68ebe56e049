"""Checkpoints that exist only as shapes, made from a config."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from heretic.hardware.devices import Device
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import TensorInfo

GIB = 2**30
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def checkpoint_of(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Checkpoint:
    """A checkpoint with the tensors that a model of this config saves, tied weights once."""
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {
        n: TensorInfo(n, tuple(p.shape), NAMES[p.dtype], Path("a.safetensors")) for n, p in model.named_parameters()
    }
    return Checkpoint("owner/model", Path("/nowhere"), config, tensors, **more)


def packed_of(checkpoint: Checkpoint, method: str, group: int = 128) -> Checkpoint:
    """The same in 4 bits, as GPTQ and AWQ store it: eight numbers in one of 32 bits, scales and zero points by group."""
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        (rows, columns), path = tensor.shape, name.removesuffix(".weight")
        groups = columns // group
        parts = {
            "qweight": ((columns // 8, rows), "I32"),
            "qzeros": ((groups, rows // 8), "I32"),
            "scales": ((groups, rows), "F16"),
        }
        tensors |= {f"{path}.{part}": TensorInfo(f"{path}.{part}", *said, tensor.file) for part, said in parts.items()}
    config = copy.deepcopy(checkpoint.config)
    config.quantization_config = {"quant_method": method, "bits": 4, "group_size": group}
    return replace(checkpoint, config=config, tensors=tensors)


def qwen_32b() -> Qwen2Config:
    """The shape of Qwen2.5-Coder-32B-Instruct."""
    return Qwen2Config(
        num_hidden_layers=64,
        hidden_size=5120,
        intermediate_size=27648,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    )


def small(**changes: Any) -> LlamaConfig:
    """A Llama of about 130 million parameters, tied, so that sizes are far above rounding and building is quick."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 6,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(sizes | changes))


def gpus(number: int, gib: float, free: float | None = None) -> list[Device]:
    """Equal GPUs of `gib` GiB."""
    total = int(gib * GIB)
    return [Device(f"cuda:{i}", total, int((gib if free is None else free) * GIB)) for i in range(number)]


def cpu(gib: float, *, native_bfloat16: bool = False) -> Device:
    """A CPU with so much RAM, all of it free."""
    return Device("cpu", int(gib * GIB), int(gib * GIB), native_bfloat16)
