"""Value types of the export settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import StringConstraints

ExportFormat = Literal["full", "lora", "gguf", "mlx"]  # the names of `heretic.export.formats.FORMATS`
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]  # llama.cpp's names
MlxBits = Literal[4, 8, 16]
Behavior = Annotated[str, StringConstraints(max_length=60, pattern=r"^[\w ,'()-]*$")]
