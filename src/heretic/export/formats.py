"""The formats in which an ablated model can be written.

A new format is a module that defines a `Format` (see `export.request`), a line in this table, and its name in `ExportFormat` of
`settings/export.py`. Command line, menu, verification, card and manifest use this table.
"""

from __future__ import annotations

from heretic.export import full, gguf, lora, mlx
from heretic.export.request import Format
from heretic.model.checkpoint import Checkpoint
from heretic.settings import Settings

FORMATS: dict[str, Format] = {"full": full.FORMAT, "lora": lora.FORMAT, "gguf": gguf.FORMAT, "mlx": mlx.FORMAT}


def require_format(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise UserError if the export format needs a missing program, or cannot hold this model."""
    if (require := FORMATS[settings.export_format].require) is not None:
        require(settings, checkpoint)


def export_size(settings: Settings, checkpoint: Checkpoint) -> float:
    """Return the bytes of an export in the settings' format, with its temporary files."""
    return FORMATS[settings.export_format].size(checkpoint, settings)
