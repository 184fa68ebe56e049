"""The format `lora`: an adapter that turns the base model into the ablated one.

An edit without scaling changes a weight by -u (w^T W + a), a matrix of rank 1 for each direction, so the adapter is exact with as
many ranks as there are directions: B = -u and A = w^T W + a. One that scales rows afterwards changes it by
n * (W - u (w^T W)) - W, of full rank; the nearest matrix of a given rank is what its largest singular values make (Eckart and
Young 1936), found by random projection (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1). The error is reported. Biases are
exact.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heretic.ablation.bake import bake_bias
from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.export.request import Format, WriteRequest, WriteResult
from heretic.export.save import hashed, is_language_model_alone
from heretic.files import expand_user, write_tensors, write_text
from heretic.interrupt import StopSignal
from heretic.model.adapter import WEIGHTS
from heretic.model.checkpoint import Checkpoint
from heretic.model.lazy_tensor import materialize
from heretic.model.loading import LanguageModel
from heretic.model.meta_model import meta_model
from heretic.model.quantization import QUANTIZATIONS
from heretic.model.weight_files import ADAPTER
from heretic.model.writer import ResidualWriter
from heretic.progress import ProgressReporter
from heretic.session.session import weight_reader
from heretic.settings import Settings

# Values that vLLM accepts for --max-lora-rank (MaxLoRARanks in vllm/config/lora.py).
RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
OVERSAMPLED, ITERATIONS = 8, 4
LARGEST = 2**30  # bytes; adapters have some megabytes
# What peft 0.13, vLLM (vllm/lora/peft_helper.py) and llama.cpp (convert_lora_to_gguf.py) know of an adapter's config.
KNOWN_KEYS = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules", "bias", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora",
})  # fmt: skip


@dataclass(frozen=True)
class LowRankChange:
    """What an adapter adds to a weight [width, inputs]: `b` [width, rank] times `a` [rank, inputs]; `bias` [width] to its bias.

    `size` and `left` are the squared Frobenius norms of the edit's change and of what of it is not in b times a; all in float32.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    size: float
    left: float


@dataclass(frozen=True)
class Adapter:
    """The changes by the name of the module, all of one rank; `transposed`: the modules store their weights [inputs, width]."""

    rank: int
    changes: Mapping[str, LowRankChange]
    transposed: bool
    alone: str = ""  # the class of the language model, if transformers opens it without the rest of a composite model

    @property
    def biased(self) -> bool:
        """Whether a bias is changed, which only peft can load."""
        return any(change.bias is not None and bool(change.bias.any()) for change in self.changes.values())

    @property
    def exact(self) -> bool:
        """Whether the adapter holds every change exactly."""
        return all(change.left == 0 for change in self.changes.values())

    @property
    def error(self) -> float:
        """Norm of the missing part of the change, as a share of the change's norm."""
        size = sum(change.size for change in self.changes.values())
        return math.sqrt(sum(change.left for change in self.changes.values()) / size) if size else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors as peft stores them; if one module changes a bias, all have one."""
        biased = self.biased
        tensors = {}
        for name, change in self.changes.items():
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = change.a.clone()
            tensors[f"{stem}.lora_B.weight"] = change.b.clone()
            if biased:
                zeros = torch.zeros(len(change.b))
                tensors[f"{stem}.lora_B.bias"] = zeros if change.bias is None else change.bias.clone()
        return tensors


@torch.no_grad()
def low_rank_change(operator: Operator, weight: Tensor, rank: int) -> LowRankChange:
    """Compute an operator's change of a weight [width, inputs], exact without scaling; on the CPU, without bias."""
    operator = operator.to(weight.device)
    if operator.n is None:
        a, b = operator.reads(weight), -torch.atleast_2d(operator.u).mT
        return LowRankChange(a.cpu(), b.cpu(), None, float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0)
    delta = operator.on_weight(weight) - weight.float()
    delta = delta.cpu()  # where the random projection is the same on every machine
    rank = min(rank, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, q=min(rank + OVERSAMPLED, *delta.shape), niter=ITERATIONS)
    size, root = float(delta.square().sum()), s[:rank].sqrt()
    a, b = (v[:, :rank] * root).T, u[:, :rank] * root
    signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()  # of a pair they are arbitrary, and differ between CPUs
    a, b = a * signs, b * signs.T
    return LowRankChange(a, b, None, size, max(0.0, size - float(s[:rank].square().sum())))


def require(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise UserError for a mixture whose experts are in one tensor, before the study that the export would follow."""
    parameters = meta_model(checkpoint, "bfloat16").named_parameters()
    if (name := next((name for name, p in parameters if p.ndim == 3 and "experts" in name), None)) is not None:
        raise _fused(name, checkpoint)


def _fused(name: str, checkpoint: Checkpoint) -> UserError:
    return UserError(
        f"{name} stores all experts in one tensor, which a LoRA adapter cannot edit.",
        code="export-format-not-supported",
        where='export_format = "lora"',
        fix='export_format = "full"'
        if checkpoint.is_dequantized or not checkpoint.quantized_by
        else f"run the study on the model that it was quantized from ({checkpoint.quantized_by})",
    )


def prepare(
    model: LanguageModel, operators: Mapping[str, Operator], settings: Settings, reporter: ProgressReporter
) -> Adapter:
    """Compute the adapter from the loaded weights. Raises UserError for a writer that no adapter can edit."""
    names = {module: name for name, module in model.model.named_modules()}
    edited = [writer for writer in model.structure.writers if writer.name in operators]
    if held := next((writer for writer in edited if writer.mixture), None):
        raise _fused(held.name, model.checkpoint)
    directions = max((len(torch.atleast_2d(o.u)) for o in operators.values()), default=1)
    scaled = any(o.n is not None for o in operators.values())
    rank = max(settings.lora_rank, directions) if scaled else directions
    read = weight_reader(model)
    changes: dict[str, LowRankChange] = {}
    with reporter.stage("Computing the adapter", len(edited)) as stage:
        for writer in edited:
            operator = operators[writer.name]
            (weight,) = read(writer)
            change = replace(low_rank_change(operator, materialize(weight), rank), bias=_bias(writer, operator))
            changes.update({names[module]: change for module in writer.modules})
            stage.advance()
    alone = type(model.model).__name__ if is_language_model_alone(model.model.config, model.checkpoint) else ""
    adapter = Adapter(rank, _padded_to_rank(changes, rank), any(writer.transposed for writer in edited), alone)
    if refused := _incompatible_programs(adapter):
        reporter.warning(f'{refused} Use export_format = "full" for those programs.')
    return adapter


def write(order: WriteRequest, folder: Path, reporter: ProgressReporter, stop: StopSignal) -> WriteResult:
    """Write the adapter's two files in peft's format."""
    from peft import LoraConfig

    adapter: Adapter = order.prepared
    tensors = adapter.tensors()
    # Not a relative path, which peft would look up on the hub.
    base, commit = order.checkpoint.on_hub or (os.path.abspath(expand_user(order.settings.model)), None)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=commit,
        r=adapter.rank,
        lora_alpha=adapter.rank,  # a scale of 1
        lora_dropout=0.0,
        target_modules=sorted(adapter.changes),
        fan_in_fan_out=adapter.transposed,
        lora_bias=adapter.biased,
        inference_mode=True,
    )
    config.target_modules = sorted(adapter.changes)  # peft makes an unordered set of it
    config.save_pretrained(str(folder))
    _drop_defaults(folder / ADAPTER, LoraConfig().to_dict())
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    checkpoint = order.checkpoint
    sources = [checkpoint.folder / checkpoint.gguf_file] if checkpoint.gguf_file else checkpoint.shards()
    hashes = {"source": hashed(sources, stop), "written": hashed([folder / WEIGHTS], stop)}
    facts = {"rank": adapter.rank, "exact": adapter.exact, "relative_error": adapter.error}
    return WriteResult(
        hashes, adapter.exact, library="peft", relation="adapter", about=_about(order, adapter), facts=facts
    )


def _drop_defaults(file: Path, defaults: Mapping[str, Any]) -> None:
    """Take the keys of newer options at their defaults out of a config: an older peft refuses keys that it does not know."""
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key in KNOWN_KEYS or value != defaults.get(key)}
    write_text(file, json.dumps(kept, indent=2, sort_keys=True) + "\n")


def open_written(order: WriteRequest, folder: Path) -> Checkpoint:
    """Open the base model with the adapter."""
    return replace(order.checkpoint, adapter=folder)


def options(settings: Settings) -> dict[str, Any]:
    """Return the rank, which an exact adapter ignores."""
    return {"rank": settings.lora_rank}


FORMAT = Format(
    "a LoRA adapter for the base model",
    prepare,
    write,
    open_written,
    require=require,
    size=lambda *_: LARGEST,
    options=options,
    full_precision=False,
)


def _rank_for_vllm(rank: int) -> int:
    return next(allowed for allowed in RANKS_OF_VLLM if allowed >= rank)


def _bias(writer: ResidualWriter, operator: Operator) -> Tensor | None:
    for part in writer.parts:
        if part.is_bias:
            bias = part.tensor.detach().cpu().float()
            return bake_bias(operator.to("cpu"), bias) - bias
    return None


def _padded_to_rank(changes: Mapping[str, LowRankChange], rank: int) -> dict[str, LowRankChange]:
    """Pad changes of a smaller rank with zeros: all modules share one rank."""
    padded = {}
    for name, change in changes.items():
        missing = rank - len(change.a)
        a = torch.cat([change.a, change.a.new_zeros(missing, change.a.shape[1])])
        b = torch.cat([change.b, change.b.new_zeros(len(change.b), missing)], dim=1)
        padded[name] = replace(change, a=a, b=b)
    return padded


def _incompatible_programs(adapter: Adapter) -> str:
    """Which programs other than peft cannot load the adapter, as a sentence or two; empty where all can.

    vLLM raises for any tensor but `lora_A.weight` and `lora_B.weight` (`parse_fine_tuned_lora_name` in vllm/lora/utils.py), and
    llama.cpp's convert_lora_to_gguf.py ends.
    """
    if adapter.alone:
        return (
            f"The adapter is for the language model alone ({adapter.alone}, which AutoModelForCausalLM opens). vLLM opens the "
            "whole model, whose modules have other names, and would ignore the adapter."
        )
    if adapter.biased:
        return "The edit changes biases, so the adapter has `lora_B.bias` tensors: peft loads them, vLLM and llama.cpp refuse them."
    if adapter.rank > RANKS_OF_VLLM[-1]:
        return f"The adapter's rank is {adapter.rank}: peft loads it, vLLM refuses ranks above {RANKS_OF_VLLM[-1]}."
    return ""


def _about(order: WriteRequest, adapter: Adapter) -> str:
    """The card's section on the adapter: how to load it, and its error."""
    on_hub = order.checkpoint.on_hub
    model = on_hub[0] if on_hub else Path(order.settings.model).name  # a local path is private
    quantized = order.plan.quantization != "none"
    lines: list[str] = [
        f"This is a LoRA adapter of rank {adapter.rank}, not a whole model. With [peft](https://github.com/huggingface/peft):",
        "",
        "```python",
        f"base = AutoModelForCausalLM.from_pretrained({model!r})",
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "```",
        "",
        _incompatible_programs(adapter)
        or f"vLLM loads it with `--enable-lora --max-lora-rank {_rank_for_vllm(adapter.rank)}`.",
    ]
    if quantized:
        words = QUANTIZATIONS[order.plan.quantization].words
        lines.append(f"It was computed for and measured on the base model quantized to {words}.")
    if adapter.exact:
        lines.append("The adapter holds every edit exactly.")
    else:
        lines.append(
            f"The edits have a higher rank: the adapter omits {adapter.error:.1%} of them (Frobenius norm). The scores below are "
            "those of the base model with this adapter."
        )
    return "\n".join(lines)
