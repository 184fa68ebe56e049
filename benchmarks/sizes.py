"""Which sizes of model fit where, and how long a study of each would take: the planner and benchmarks/scale.py, by calculation.

    python benchmarks/sizes.py > benchmarks/sizes.md

Whether it fits is what `heretic preflight --devices` would say: the same plan, for the same empty GPUs. No weights are needed for
that, so models stand here as their shapes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from scale import DEVICES, ELEMENT, LARGE, Shape, seconds, weights

from heretic.machine.devices import Device
from heretic.machine.imagined import imagined_gpus
from heretic.machine.memory_plan import MemoryPlan, plan_for
from heretic.machine.preflight import USUAL_PROMPT
from heretic.machine.workload import Workload
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import TensorInfo
from heretic.settings import Settings

SHAPES = {
    "7B": Shape("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064),
    "14B": Shape("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064),
    "32B": replace(LARGE, name="Qwen2.5-32B"),
    "70B": Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
}
MACHINES = ("1x24GiB", "2x24GiB", "4x24GiB", "1x80GiB", "2x80GiB")
CARDS = {"24GiB": DEVICES[0], "80GiB": DEVICES[1]}  # what they are taken for
QUANTISATIONS = {"none": "16 bits", "bnb_8bit": "8 bits", "bnb_4bit": "4 bits"}
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
    """The quantisation with the most bits with which it fits, and the plan; None if it fits with none."""
    devices = [Device(f"cuda:{gpu.index}", gpu.total, gpu.free) for gpu in imagined_gpus(machine)]
    for name in QUANTISATIONS:
        settings = Settings.model_validate({"quantization": name})
        plan = plan_for(settings, checkpoint, Workload.of(settings, USUAL_PROMPT), devices)
        if plan.fits:
            return name, plan
    return None


def fitting(found: tuple[str, MemoryPlan] | None) -> str:
    """A cell of the first table."""
    if found is None:
        return "no"
    name, plan = found
    batch = f"batches of {plan.batch_size}"
    return batch if name == "none" else f"{QUANTISATIONS[name]}, {batch}"


def hours(shape: Shape, machine: str, found: tuple[str, MemoryPlan] | None) -> str:
    """A cell of the second table: a whole study at the floor and at half of its speed."""
    if found is None or found[0] != "none":
        return "-"
    least = seconds(shape, CARDS[machine.partition("x")[2]], found[1].batch_size) / 3600
    return f"{least:.1f} to {2 * least:.1f} h"


def document() -> str:
    """The whole page."""
    logging.disable(logging.WARNING)  # accelerate tells of every GPU that is not here
    rows, times = [], []
    names = " | ".join(machine.replace("x", " x ").replace("GiB", " GiB") for machine in MACHINES)
    for size, shape in SHAPES.items():
        checkpoint = checkpoint_of(shape)
        found = {machine: planned(checkpoint, machine) for machine in MACHINES}
        cells = [fitting(found[machine]) for machine in MACHINES]
        rows.append(f"| {size} ({shape.name}) | {checkpoint.nbytes / GIB:.0f} GiB | {' | '.join(cells)} |")
        blocks, head = weights(shape)
        cells = [hours(shape, machine, found[machine]) for machine in MACHINES]
        times.append(f"| {size} | {ELEMENT * (blocks + head) / 1e9:.0f} GB | {' | '.join(cells)} |")
    logging.disable(logging.NOTSET)
    return f"""# What fits where, and how long it would take

**A calculation, not a measurement**: nobody here had such a device. Made by `python benchmarks/sizes.py > benchmarks/sizes.md`.

## Will it fit

What `heretic preflight --devices 4x24GiB` plans with default settings for empty GPUs and prompts of up to {USUAL_PROMPT}
characters: the size of the batch if the weights fit in bfloat16, else the most bits with which they do
(`quantization = "bnb_8bit"` or `"bnb_4bit"`, set by you, never by itself), else no. Weights are counted exactly; the working memory
of a pass is an estimate, and a reserve of 8 % of each GPU covers the rest. An export takes as much disk as the weights in bfloat16,
and so does the download. Shorter prompts let larger batches fit: with prompts of 71 tokens four cards of 24 GiB take batches of 128
for the 32B model.

| model | weights | {names} |
|---|---|{"---|" * len(MACHINES)}
{chr(10).join(rows)}

## How long a study takes

From loading to the last of 200 trials with default settings, in bfloat16, by the arithmetic of [scale.md](scale.md): from the floor
that the data sheet sets to half of that speed. 24 GiB stand for an RTX 4090, 80 GiB for an A100. Every step of decoding reads all
weights once for each batch, so here the batches are those of the table above; in scale.md all rows are in one. Where a model needs
several cards, `balanced` keeps one of them busy at a time, so more cards are quicker only if larger batches fit. With 8 or 4 bits
nothing was calculated (`-`): bitsandbytes trades speed for memory, and how much is not known here.

| model | read for every batch | {names} |
|---|---|{"---|" * len(MACHINES)}
{chr(10).join(times)}

Not in it: downloading, and an export (reading, writing and checking all weights once).
"""


if __name__ == "__main__":
    print(document(), end="")
