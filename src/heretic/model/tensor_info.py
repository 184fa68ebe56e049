"""One tensor of a checkpoint, as the header of its file describes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES_PER_ELEMENT = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Checkpoints that come quantised, by transformers' name of the method. These are opened while they are loaded, on every device:
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
        return self.elements * BYTES_PER_ELEMENT.get(self.dtype, 2)


def packed_bits(config: Any) -> int:
    """Bits of a number in a checkpoint that comes quantised, by its config; 4 where that does not say."""
    found = getattr(config, "quantization_config", None)
    bits = found.get("bits") if isinstance(found, dict) else getattr(found, "bits", None)
    return bits if isinstance(bits, int) and bits > 0 else 4
