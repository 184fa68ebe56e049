"""One tensor of a checkpoint, as the header of its file describes it; the headers of safetensors and pickle files."""

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
# Checkpoints that come quantized, by transformers' name of the method. These are opened while they are loaded, on every device:
# their kernels are for some GPUs only, have no backward, and the weights of the writers are wanted.
OPENED = {"fp8": "FP8", "mxfp4": "MXFP4"}
# By method, the format whose every element holds several numbers.
PACKED_BY = {"mxfp4": "U8", "bitsandbytes": "U8", "gptq": "I32", "awq": "I32"}
SCALES = (
    "_scales", ".weight_scale_inv", ".weight_scale", ".activation_scale", ".SCB", ".weight_format", ".absmax", ".quant_map",
    ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
    ".scales", ".qzeros", ".g_idx",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint; `file` is None while its shard has not been downloaded."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the checkpoint, in bytes."""
        return int(self.elements * BYTES_PER_ELEMENT.get(self.dtype, 2))

    @property
    def is_packed(self) -> bool:
        """Whether it holds quantized numbers or what goes with them."""
        return self.dtype not in PLAIN or self.name.endswith(SCALES)


def quantization_entry(config: Any) -> Any:
    """The entry `quantization_config` of a config or of its text part, where transformers looks for it; None without one."""
    for part in (config, config.get_text_config(decoder=True)):
        if (found := getattr(part, "quantization_config", None)) is not None:
            return found
    return None


def quantization_method(config: Any) -> str | None:
    """The method that a config names ("fp8", "bitsandbytes", …); None where it names none."""
    entry = quantization_entry(config)
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    if method is None and isinstance(entry, dict) and (entry.get("load_in_4bit") or entry.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(getattr(method, "value", method) or "an unnamed method")


def packed_bits(config: Any) -> int:
    """Bits of a number in a checkpoint that comes quantized, by its config; 4 where that does not say."""
    entry = quantization_entry(config)
    bits = entry.get("bits") if isinstance(entry, dict) else getattr(entry, "bits", None)
    return bits if isinstance(bits, int) and bits > 0 else 4


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """The tensors of weight files by name, as transformers reads them: of two with one name the later file's. Raises UserError."""
    found: dict[str, TensorInfo] = {}
    for file in files:
        found.update(_pickled(file) if file.suffix in PICKLED else _header(file))
    return found


def missing_file(file: Path) -> UserError:
    """A weight file that is named and is not there."""
    return UserError(
        f"A file of the weights is missing: {file.name}",
        code="missing-shard",
        where=str(file.parent),
        fix="download the model again",
    )


def _header(file: Path) -> dict[str, TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            found = {}  # nothing but the header is read; PyTorch would map the file as if it were to write to it
            for name in opened.keys():  # noqa: SIM118  (the handle is not a mapping)
                piece = opened.get_slice(name)
                found[name] = TensorInfo(name, tuple(piece.get_shape()), str(piece.get_dtype()), file)
            return found
    except FileNotFoundError:
        raise missing_file(file) from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"A file of the weights is damaged: {first_line(error)[:200]}",
            code="damaged-weights",
            where=str(file),
            fix="download the model again",
        ) from None


def _pickled(file: Path) -> dict[str, TensorInfo]:
    formats = {f"torch.{name}": short for short, name in TORCH_NAMES.items()}
    return {
        name: TensorInfo(name, tuple(tensor.shape), formats.get(str(tensor.dtype), "F32"), file)
        for name, tensor in pickled_tensors(file).items()
    }


def pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle file, by PyTorch's reader that makes nothing but tensors; their bytes stay in the file until they are
    used. Raises UserError for a file with anything else in it."""
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    except FileNotFoundError:
        raise missing_file(file) from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError, LookupError, ValueError) as error:
        raise UserError(
            f"{file.name} holds more than tensors, or is damaged; it is not read: {first_line(error)[:120]}",
            code="unsafe-pickle",
            where=str(file),
            fix="convert the weights to safetensors on a machine where running the file's code does no harm",
        ) from None
