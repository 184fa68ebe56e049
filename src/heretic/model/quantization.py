"""Weights in fewer bits: loading them with bitsandbytes, checkpoints that come so, and what a quantized linear map multiplies by.

Operators act on outputs, so a study needs nothing of it but the norms of rows and W W^T v, for which one weight at a time is
dequantized. Nothing here writes weights: an export edits the checkpoint's own tensors.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heretic.errors import UserError
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import OPENED, SCALES, quantization_entry

ROWS_AT_ONCE = 1024  # of the identity, where a weight is read off what its module gives


@dataclass(frozen=True)
class Quantization:
    """A setting's name in words, and bits a weight, with the scales that go with it (`row` bytes for each row besides)."""

    words: str
    bits: float
    row: int = 0


# By the name in the settings. NF4 has a scale of 8 bits for 64 weights, and one of 32 for 256 of these (Dettmers et al. 2023,
# section 3); LLM.int8() has one of 32 bits a row (Dettmers et al. 2022, section 3.1).
QUANTIZATIONS = {
    "bnb_4bit": Quantization("4 bits (bitsandbytes, NF4)", 4 + 8 / 64 + 32 / (64 * 256)),
    "bnb_8bit": Quantization("8 bits (bitsandbytes, LLM.int8)", 8, row=4),
}


KEPT = "bitsandbytes"  # stays as it is
# By method, what a linear map's weight lies in where it stays as it is, the packed numbers first. GPTQ's and AWQ's packages have
# modules of their own for it.
STAY_PACKED = {
    KEPT: ("weight", "SCB", *(f"weight{scale}" for scale in SCALES)),
    **dict.fromkeys(("gptq", "awq"), ("qweight", "qzeros", "scales", "g_idx")),
}
# Those that need packages of their own, which we have not tried: a module to look for, and what to install.
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
    """from_pretrained's arguments for a quantization of `QUANTIZATIONS`, or `none`, and for a checkpoint that comes quantized.
    Raises UserError where a package that this needs is missing."""
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
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    require_package(checkpoint)
    quiet()
    method = checkpoint.quantized_by
    if method not in OPENED:
        return {}
    told: Any = quantization_entry(checkpoint.config)
    skipped = told.get("modules_to_not_convert") if isinstance(told, dict) else told.modules_to_not_convert
    kinds: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    return {"quantization_config": kinds[str(method)](modules_to_not_convert=skipped, dequantize=True)}


def require_package(checkpoint: Checkpoint) -> None:
    """Raises UserError where the package is missing that a quantized checkpoint needs to be loaded, and for one of a method that
    transformers does not know: it would take the packed numbers for weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = str(checkpoint.quantized_by)
    if method != KEPT and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UserError(
            f"{checkpoint.model} comes quantized by {method}, which the installed transformers does not know.",
            code="unknown-quantization",
            where=str(checkpoint.folder / "config.json"),
            fix="take the model in full precision or as FP8, MXFP4 or bitsandbytes; or update transformers",
        )
    module, install = ("bitsandbytes", "bitsandbytes") if method == KEPT else PACKAGES.get(method, ("", ""))
    if module and not _is_installed(module):
        raise UserError(
            f"{checkpoint.model} comes quantized by {method}, which needs the package {module}; it is not installed.",
            code="missing-package",
            where=str(checkpoint.folder / "config.json"),
            fix=f"take the model in full precision or as FP8, MXFP4 or bitsandbytes; or, untried: pip install {install}",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False


def require_bitsandbytes(name: str) -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{QUANTIZATIONS[name].words} need the package bitsandbytes, which is not installed.",
            code="missing-package",
            where=f'quantization = "{name}"',
            fix="pip install bitsandbytes",
        )


def quiet() -> None:
    """Keep bitsandbytes from saying in every pass in which number format it multiplies."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@torch.no_grad()
def balanced_4bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what was not quantized in a checkpoint that was opened the number format of the rest, which transformers leaves as it is
    stored. What a model keeps in float32 beside half precision stays so."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dtype != dtype and not tensor.is_meta:
            tensor.data = tensor.data.to(dtype)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew at the first pass on some CPUs (AVX-512 with bfloat16).

    That rounds the scales, so the weights would not be those that were studied, and it needs sizes that divide by the block's.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear map holds its weight in another form than the numbers that it multiplies by."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (not weight.is_floating_point() or weight.element_size() < 2)


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """The weight [out, in] that a linear map multiplies by, in a floating-point format, on its device."""
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = module.state
        return int8_vectorwise_dequant(weight.data, state.SCB if state.SCB is not None else weight.SCB)
    return _read_off(module, weight.device)


def _read_off(module: Any, device: torch.device) -> Tensor:
    """What any linear map makes of the unit vectors, without its bias."""
    inputs = int(module.in_features)
    bias = module.bias if isinstance(module.bias, Tensor) else None
    rows = []
    for start in range(0, inputs, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, inputs - start)
        unit = torch.zeros(count, inputs, dtype=torch.bfloat16 if bias is None else bias.dtype, device=device)
        unit[torch.arange(count), start + torch.arange(count)] = 1
        given = module(unit).float()
        rows.append(given if bias is None else given - bias.float())
    return torch.cat(rows).T


def kept_bytes(model: Any, checkpoint: Checkpoint) -> dict[str, float]:
    """Bytes an element, by the name of a parameter, of those that stay as the checkpoint holds them."""
    found = {}
    names = STAY_PACKED.get(checkpoint.quantized_by or "", ())
    for path, module in model.named_modules() if names else ():
        parts = [checkpoint.tensors.get(f"{path}.{name}") for name in names]
        if isinstance(module, nn.Linear) and parts[0] is not None and parts[0].dtype in ("U8", "I8", "I32"):
            found[f"{path}.weight"] = sum(part.nbytes for part in parts if part is not None) / module.weight.numel()
    return found


def stored_bytes(model: Any, name: str) -> dict[str, float]:
    """Bytes an element, by the name of a parameter, of those that a quantization stores in fewer: the weights of all linear maps
    but the head's (as transformers chooses them)."""
    if name == "none":
        return {}
    quantization = QUANTIZATIONS[name]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        f"{path}.weight": quantization.bits / 8 + quantization.row / module.in_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
