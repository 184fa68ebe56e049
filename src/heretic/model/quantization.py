"""Quantization: loading with bitsandbytes, quantized checkpoints, and dequantizing single weights.

Operators act on outputs, so a study needs only row norms and W W^T v, and dequantizes one weight at a time. An export edits the
checkpoint's own tensors, not these.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heretic.errors import UserError
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import DEQUANTIZED, SCALES, quantization_entry

ROWS_AT_ONCE = 1024  # of the identity that a module is applied to, to read its weight


@dataclass(frozen=True)
class Quantization:
    """A kind of quantization that heretic can apply."""

    words: str  # on the screen
    bits: float  # per weight, scales included
    row: int = 0  # further bytes per row


# By the name in the settings. NF4 has a scale of 8 bits for 64 weights, and one of 32 for 256 of these (Dettmers et al. 2023,
# section 3); LLM.int8() has one of 32 bits a row (Dettmers et al. 2022, section 3.1).
QUANTIZATIONS = {
    "bnb_4bit": Quantization("4 bits (bitsandbytes, NF4)", 4 + 8 / 64 + 32 / (64 * 256)),
    "bnb_8bit": Quantization("8 bits (bitsandbytes, LLM.int8)", 8, row=4),
}


BITSANDBYTES = "bitsandbytes"  # the method whose weights stay packed in memory
# By method, the tensors of a linear layer that stay packed, the packed weights first. GPTQ's and AWQ's packages have their own
# modules for them.
STAY_PACKED = {
    BITSANDBYTES: ("weight", "SCB", *(f"weight{scale}" for scale in SCALES)),
    **dict.fromkeys(("gptq", "awq"), ("qweight", "qzeros", "scales", "g_idx")),
}
# By method, the module that it needs and the packages to install; tested only for the methods in DEQUANTIZED.
PACKAGES = {
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "awq": ("gptqmodel", "gptqmodel optimum"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "hqq": ("hqq", "hqq"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "aqlm": ("aqlm", "aqlm[cpu]"),
}


def loading_arguments(name: str, dtype: torch.dtype, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Return from_pretrained's arguments for a quantization (`none` or one of `QUANTIZATIONS`) or a quantized checkpoint.

    Raises:
        UserError: "missing-package" or "unknown-quantization".
    """
    if checkpoint is not None and checkpoint.quantized_by:
        return _for_quantized(checkpoint)
    if name == "none":
        return {}
    require_bitsandbytes(name)
    from transformers import BitsAndBytesConfig

    quiet()
    if name == "bnb_8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four}


def _for_quantized(checkpoint: Checkpoint) -> dict[str, Any]:
    from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

    require_package(checkpoint)
    quiet()
    method = checkpoint.quantized_by
    if method not in DEQUANTIZED:
        return {}
    if method == "compressed-tensors":  # its NVFP4 is opened too
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    entry: Any = quantization_entry(checkpoint.config)
    skipped = entry.get("modules_to_not_convert") if isinstance(entry, dict) else entry.modules_to_not_convert
    kinds: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    return {"quantization_config": kinds[str(method)](modules_to_not_convert=skipped, dequantize=True)}


def require_package(checkpoint: Checkpoint) -> None:
    """Raise UserError if a quantized checkpoint needs a missing package, or a method that transformers does not know and whose
    packed numbers it would load as weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = str(checkpoint.quantized_by)
    if method != BITSANDBYTES and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UserError(
            f"{checkpoint.model} is quantized with {method}, which the installed transformers does not support.",
            code="unknown-quantization",
            where=str(checkpoint.folder / "config.json"),
            fix="use the model in full precision or as FP8, MXFP4 or bitsandbytes; or update transformers",
        )
    if method == "compressed-tensors" and len(_schemes(quantization_entry(checkpoint.config))) > 1:
        raise UserError(
            f"{checkpoint.model} is quantized with several schemes; transformers would read all weights by the first one.",
            code="mixed-quantization",
            where=str(checkpoint.folder / "config.json"),
            fix="use the model in full precision",
        )
    module, install = ("bitsandbytes", "bitsandbytes") if method == BITSANDBYTES else PACKAGES.get(method, ("", ""))
    if module and not _is_installed(module):
        untested = "" if method in (*DEQUANTIZED, BITSANDBYTES) else " (untested)"
        raise UserError(
            f"{checkpoint.model} is quantized with {method}, which needs the package {module}; it is not installed.",
            code="missing-package",
            where=str(checkpoint.folder / "config.json"),
            fix=f"use the model in full precision or as FP8, MXFP4 or bitsandbytes; or{untested}: pip install {install}",
        )


def _schemes(entry: Any) -> set[tuple[str, ...]]:
    """Return the different number formats of weights in a config of compressed-tensors."""
    groups = entry.get("config_groups") if isinstance(entry, dict) else None
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
    found = groups.values() if isinstance(groups, dict) else ()
    return {
        (str(group.get("format")), *(str(group["weights"].get(key)) for key in keys))
        for group in found
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    }


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def require_bitsandbytes(name: str) -> None:
    """Raise UserError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"Quantization to {QUANTIZATIONS[name].words} needs the package bitsandbytes, which is not installed.",
            code="missing-package",
            where=f'quantization = "{name}"',
            fix="pip install bitsandbytes",
        )


def quiet() -> None:
    """Silence bitsandbytes, which logs its compute dtype in every pass, and transformers' warning that a checkpoint's own
    `quantization_config` counts."""
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@torch.no_grad()
def cast_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert tensors that were not quantized in a dequantized checkpoint to `dtype`; transformers leaves their half precision
    as stored. Tensors in float32 stay."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dtype != dtype and not tensor.is_meta:
            tensor.data = tensor.data.to(dtype)


def keep_layout(model: nn.Module) -> None:
    """Disable bitsandbytes' repacking of 4-bit weights in the first pass on some CPUs (AVX-512 with bfloat16).

    Repacking rounds the scales, so it changes the weights, and it needs sizes divisible by the block's.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Return whether a linear layer stores its weight packed."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (not weight.is_floating_point() or weight.element_size() < 2)


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """Return a linear layer's weight [out, in] in a floating-point format, on its device."""
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = module.state
        return int8_vectorwise_dequant(weight.data, state.SCB if state.SCB is not None else weight.SCB)
    return _weight_from_outputs(module, weight.device)


def _weight_from_outputs(module: Any, device: torch.device) -> Tensor:
    """The weight, as the layer's output for unit vectors without its bias."""
    inputs = int(module.in_features)
    bias = module.bias if isinstance(module.bias, Tensor) else None
    rows = []
    for start in range(0, inputs, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, inputs - start)
        unit = torch.zeros(count, inputs, dtype=torch.bfloat16 if bias is None else bias.dtype, device=device)
        unit[torch.arange(count), start + torch.arange(count)] = 1
        output = module(unit).float()
        rows.append(output if bias is None else output - bias.float())
    return torch.cat(rows).T


def kept_bytes(model: Any, checkpoint: Checkpoint) -> dict[str, float]:
    """Return bytes per element of the weights that stay packed as in the checkpoint, by parameter name."""
    bytes_by_name = {}
    names = STAY_PACKED.get(checkpoint.quantized_by or "", ())
    for path, module in model.named_modules() if names else ():
        parts = [checkpoint.tensors.get(f"{path}.{name}") for name in names]
        if isinstance(module, nn.Linear) and parts[0] is not None and parts[0].dtype in ("U8", "I8", "I32"):
            bytes_by_name[f"{path}.weight"] = (
                sum(part.nbytes for part in parts if part is not None) / module.weight.numel()
            )
    return bytes_by_name


def stored_bytes(model: Any, name: str) -> dict[str, float]:
    """Return bytes per element of the weights that a quantization packs, by parameter name: those of all linear layers but the
    head (transformers' choice)."""
    if name == "none":
        return {}
    quantization = QUANTIZATIONS[name]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        f"{path}.weight": quantization.bits / 8 + quantization.row / module.in_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
