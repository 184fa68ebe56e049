"""GPUs that are not here: so that a run can be planned before the box is rented."""

from __future__ import annotations

import re

from heretic.errors import UserError
from heretic.hardware.gpus import Gpu

# What a driver keeps for itself of a GPU with nothing on it: an assumption on the safe side. PyTorch's messages give an RTX 4090 of
# 24 GiB a capacity of 23.6 GiB (pytorch/pytorch's issues). A CUDA context is not part of it: `machine.demand.CONTEXT` is.
DRIVER = 512 * 2**20
MAX_VIRTUAL_GPUS = 64


def virtual_gpus(text: str) -> tuple[Gpu, ...]:
    """`4x24GiB`, or several kinds as `2x24GiB,1x80GiB`, as empty GPUs. Raises UserError for anything else."""
    from accelerate.utils import convert_file_size_to_int

    found: list[Gpu] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)\s*[x*]\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)", part.strip(), re.IGNORECASE)
        count = int(match[1]) if match else 0
        if match is None or not 0 < count <= MAX_VIRTUAL_GPUS - len(found) or float(match[2]) == 0:
            raise UserError(
                f"Invalid list of GPUs: {part.strip()!r}.",
                code="invalid-option",
                where="--devices",
                fix='write it like "4x24GiB"',
            )
        unit = match[3].upper().replace("I", "i")
        size = int(float(match[2]) * convert_file_size_to_int(f"1{unit}"))
        name = f"imagined, {match[2]} {unit}"
        found += [
            Gpu(len(found) + i, f"imagined-{len(found) + i}", name, size, max(0, size - DRIVER)) for i in range(count)
        ]
    return tuple(found)
