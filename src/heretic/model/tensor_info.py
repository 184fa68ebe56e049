"""Tensors of a checkpoint as the headers of safetensors and pickle files describe them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

BYTES_PER_ELEMENT = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "I8": 1, "U8": 1, "BOOL": 1,
    "F6_E2M3": 0.75, "F6_E3M2": 0.75, "F4": 0.5,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
# Number formats of weights that are not quantized, and of buffers.
PLAIN = ("F64", "F32", "F16", "BF16", "BOOL", "I64")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Quantization methods, by transformers' name, that loading dequantizes on every device: their kernels need certain GPUs and have
# no backward, and heretic needs the writers' weights.
DEQUANTIZED = {"fp8": "FP8", "mxfp4": "MXFP4", "compressed-tensors": "compressed-tensors"}
# By method, the formats whose every element holds several numbers.
PACKED_BY = {
    "mxfp4": ("U8",),
    "bitsandbytes": ("U8",),
    "gptq": ("I32",),
    "awq": ("I32",),
    "compressed-tensors": ("I32", "U8"),
}
SCALES = (
    "_scales", ".weight_scale_inv", ".weight_scale", ".activation_scale", ".SCB", ".weight_format", ".absmax", ".quant_map",
    ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
    ".scales", ".qzeros", ".g_idx",
    ".weight_zero_point", ".weight_global_scale", ".weight_shape", ".weight_g_idx", ".input_scale", ".input_global_scale",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    file: Path | None  # None until its shard is downloaded

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return int(self.elements * BYTES_PER_ELEMENT.get(self.dtype, 2))

    @property
    def is_packed(self) -> bool:
        """Whether it holds quantized numbers or their scales."""
        return self.dtype not in PLAIN or self.name.endswith(SCALES)


def quantization_entry(config: Any) -> Any:
    """Return `quantization_config` of a config or of its text part; None without one."""
    for part in (config, config.get_text_config(decoder=True)):
        if (entry := getattr(part, "quantization_config", None)) is not None:
            return entry
    return None


def quantization_method(config: Any) -> str | None:
    """Return the quantization method of a config ("fp8", "bitsandbytes", …); None without one."""
    entry = quantization_entry(config)
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    if method is None and isinstance(entry, dict) and (entry.get("load_in_4bit") or entry.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(getattr(method, "value", method) or "an unnamed method")


def packed_bits(config: Any) -> int:
    """Return the bits per number of a quantized checkpoint, by its config; 4 if it does not say."""
    entry = quantization_entry(config)
    bits = entry.get("bits") if isinstance(entry, dict) else getattr(entry, "bits", None)
    if isinstance(entry, dict) and isinstance(groups := entry.get("config_groups"), dict):  # compressed-tensors
        weights: Any = next((g["weights"] for g in groups.values() if isinstance(g, dict) and g.get("weights")), None)
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
    return bits if isinstance(bits, int) and bits > 0 else 4


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Read the tensors of weight files by name; a later file wins, as in transformers. Raises UserError."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(_pickled_header(file) if file.suffix in PICKLED else _safetensors_header(file))
    return tensors


def missing_file(file: Path) -> UserError:
    """Return the error for a missing file of weights."""
    return UserError(
        f"Weight file {file.name} is missing.",
        code="missing-shard",
        where=str(file.parent),
        fix="download the model again",
    )


def _safetensors_header(file: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            tensors = {}  # numpy reads only the header; PyTorch would map the file for writing
            for name in handle.keys():  # noqa: SIM118  (the handle is not a mapping)
                tensor = handle.get_slice(name)
                tensors[name] = TensorInfo(name, tuple(tensor.get_shape()), str(tensor.get_dtype()), file)
            return tensors
    except FileNotFoundError:
        raise missing_file(file) from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"Weight file {file.name} is damaged: {first_line(error)[:200]}",
            code="damaged-weights",
            where=str(file),
            fix="download the model again",
        ) from None


def _pickled_header(file: Path) -> dict[str, TensorInfo]:
    formats = {f"torch.{name}": short for short, name in TORCH_NAMES.items()}
    return {
        name: TensorInfo(name, tuple(tensor.shape), formats.get(str(tensor.dtype), "F32"), file)
        for name, tensor in pickled_tensors(file).items()
    }


def pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Open the tensors of a pickle file with PyTorch's weights-only reader, memory-mapped.

    Raises:
        UserError: "unsafe-pickle" for a file with anything but tensors in it.
    """
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    except FileNotFoundError:
        raise missing_file(file) from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError, LookupError, ValueError) as error:
        raise UserError(
            f"{file.name} holds more than tensors or is damaged, so heretic does not read it: {first_line(error)[:120]}",
            code="unsafe-pickle",
            where=str(file),
            fix="convert the weights to safetensors on an isolated machine, where the file's code can do no harm",
        ) from None
