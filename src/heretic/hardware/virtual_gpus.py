"""Virtual GPUs, to plan a run for another machine."""

from __future__ import annotations

import re

from heretic.errors import UserError
from heretic.hardware.devices import CUDA, KINDS
from heretic.hardware.gpus import Gpu

# Memory that the driver reserves on an idle GPU, a conservative assumption. PyTorch's messages give an RTX 4090 of 24 GiB
# a capacity of 23.6 GiB (pytorch/pytorch's issues). The CUDA context is separate: `planning.memory_model.CONTEXT`.
DRIVER = 512 * 2**20
MAX_VIRTUAL_GPUS = 64


def virtual_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse a list of empty GPUs such as `4x24GiB`, `2x24GiB,1x80GiB` or, of another kind than CUDA, `xpu:2x16GiB`.

    Raises UserError for an invalid list.
    """
    from accelerate.utils import convert_file_size_to_int

    gpus: list[Gpu] = []
    named, _, rest = text.partition(":")
    kind, text = (named.strip().lower(), rest) if rest else (CUDA, text)
    most = 0 if kind not in KINDS else MAX_VIRTUAL_GPUS if KINDS[kind].several else 1
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)\s*[x*]\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)", part.strip(), re.IGNORECASE)
        count = int(match[1]) if match else 0
        if match is None or not 0 < count <= most - len(gpus) or float(match[2]) == 0:
            raise UserError(
                f"Invalid list of GPUs: {part.strip()!r}.",
                code="invalid-option",
                where="--devices",
                fix=f'write it like "4x24GiB"; before it may stand one of {", ".join(f"{kind}:" for kind in KINDS)}',
            )
        unit = match[3].upper().replace("I", "i")
        size = int(float(match[2]) * convert_file_size_to_int(f"1{unit}"))
        name = f"virtual, {match[2]} {unit}"
        gpus += [
            Gpu(len(gpus) + i, f"virtual-{len(gpus) + i}", name, size, max(0, size - DRIVER), kind=kind)
            for i in range(count)
        ]
    return tuple(gpus)
