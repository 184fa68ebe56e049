"""Weights in fewer bits: loading them with bitsandbytes, and what a quantised linear map multiplies by.

Operators act on outputs, so a study needs nothing of it but the norms of rows and W W^T v, for which one weight at a time is
dequantised. Nothing here writes weights: an export edits the checkpoint's own tensors.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heretic.errors import UserError

ROWS_AT_ONCE = 1024  # of the identity, where a weight is read off what its module gives


@dataclass(frozen=True)
class Quantisation:
    """A setting's name in words, and bits a weight, with the scales that go with it (`row` bytes for each row besides)."""

    words: str
    bits: float
    row: int = 0


# By the name in the settings. NF4 has a scale of 8 bits for 64 weights, and one of 32 for 256 of these (Dettmers et al. 2023,
# section 3); LLM.int8() has one of 32 bits a row (Dettmers et al. 2022, section 3.1).
QUANTISATIONS = {
    "bnb_4bit": Quantisation("4 bits (bitsandbytes, NF4)", 4 + 8 / 64 + 32 / (64 * 256)),
    "bnb_8bit": Quantisation("8 bits (bitsandbytes, LLM.int8)", 8, row=4),
}


def loading_arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """from_pretrained's arguments for a quantisation of `QUANTISATIONS`, or `none`. Raises UserError without bitsandbytes."""
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


def require_bitsandbytes(name: str) -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{QUANTISATIONS[name].words} need the package bitsandbytes, which is not installed.",
            where=f'quantization = "{name}"',
            fix="pip install 'heretic[bnb]'",
        )


def quiet() -> None:
    """Keep bitsandbytes from saying in every pass in which number format it multiplies."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew at the first pass on some CPUs (AVX-512 with bfloat16).

    That rounds the scales, so the weights would not be those that were studied, and it needs sizes that divide by the block's.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear map holds its weight in another form than the numbers that it multiplies by."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (not weight.is_floating_point() or weight.element_size() < 2)


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
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


def stored_bytes(model: Any, name: str) -> dict[str, float]:
    """Bytes an element, by the name of a parameter, of those that a quantisation stores in fewer: the weights of all linear maps
    but the head's (as transformers chooses them)."""
    if name == "none":
        return {}
    quantisation = QUANTISATIONS[name]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        f"{path}.weight": quantisation.bits / 8 + quantisation.row / module.in_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
