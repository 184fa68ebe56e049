"""Which sizes of model fit where, and how long a study of each would take: the planner and benchmarks/scale.py, by calculation.

`python benchmarks/results_page.py sizes` prints it.

Whether it fits is what `heretic preflight --devices` would say: the same plan, for the same empty GPUs. No weights are needed for
that, so models stand here as their shapes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from scale import DEVICES, LARGE, Shape, seconds

from heretic.hardware.devices import Device
from heretic.hardware.virtual_gpus import virtual_gpus
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import TensorInfo
from heretic.planning.memory_plan import MemoryPlan, plan_for
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.settings import Settings

SHAPES = {
    "7B": Shape("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064),
    "14B": Shape("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064),
    "32B": replace(LARGE, name="Qwen2.5-32B"),
    "70B": Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
}
MACHINES = ("1x24GiB", "2x24GiB", "4x24GiB", "1x80GiB", "2x80GiB")
CARDS = {"24GiB": DEVICES[0], "80GiB": DEVICES[1]}  # what they are taken for
QUANTIZATIONS = {"none": "16 bits", "bnb_8bit": "8 bits", "bnb_4bit": "4 bits"}
GIB = 2**30


def checkpoint_of(shape: Shape) -> Checkpoint:
    """A checkpoint in bfloat16 that exists only as names and shapes."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    kind = LlamaConfig if shape.name.startswith("Llama") else Qwen2Config
    config = kind(
        num_hidden_layers=shape.blocks,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {n: TensorInfo(n, tuple(p.shape), "BF16", Path("a.safetensors")) for n, p in model.named_parameters()}
    return Checkpoint(shape.name, Path("/nowhere"), config, tensors)


def planned(checkpoint: Checkpoint, machine: str) -> tuple[str, MemoryPlan] | None:
    """The quantization with the most bits with which it fits, and the plan; None if it fits with none."""
    devices = [Device(f"cuda:{gpu.index}", gpu.total, gpu.free) for gpu in virtual_gpus(machine)]
    for name in QUANTIZATIONS:
        settings = Settings.model_validate({"quantization": name})
        plan = plan_for(settings, checkpoint, Workload.of(settings, USUAL_PROMPT), devices)
        if plan.fits:
            return name, plan
    return None


def rows() -> list[tuple[str, ...]]:
    """Return a row per model: its weights, and for each machine bits, batch size and hours of a study."""
    logging.disable(logging.WARNING)  # accelerate warns about every GPU that is not here
    try:
        found = [("model", "weights", *(name.replace("x", " x ").replace("GiB", " GiB") for name in MACHINES))]
        for size, shape in SHAPES.items():
            checkpoint = checkpoint_of(shape)
            cells = [cell(shape, machine, planned(checkpoint, machine)) for machine in MACHINES]
            found.append((f"{size} ({shape.name})", f"{checkpoint.nbytes / GIB:.0f} GiB", *cells))
        return found
    finally:
        logging.disable(logging.NOTSET)


def cell(shape: Shape, machine: str, found: tuple[str, MemoryPlan] | None) -> str:
    """Describe a plan: the batch size, and hours of a study at the floor and at half of its speed in bfloat16."""
    if found is None:
        return "no"
    name, plan = found
    if name != "none":
        return f"{plan.batch_size} in {QUANTIZATIONS[name]}"
    least = seconds(shape, CARDS[machine.partition("x")[2]], plan.batch_size) / 3600
    return f"{plan.batch_size}, {least:.1f}-{2 * least:.1f} h"
