"""What is written of a chosen trial."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["full", "lora"]  # the names of `heretic.export.formats.FORMATS`
