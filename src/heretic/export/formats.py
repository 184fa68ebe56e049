"""The formats in which an ablated model can be written.

A new one is a file beside this one that makes a `Format` (see `export.job`), a line here, and its name in `ExportFormat` of
`settings/export.py`. Everything else (command line, menu, proof, card, manifest) takes it from this table.
"""

from __future__ import annotations

from heretic.export import full, gguf, lora
from heretic.export.request import Format
from heretic.model.checkpoint import Checkpoint
from heretic.settings import Settings

FORMATS: dict[str, Format] = {"full": full.FORMAT, "lora": lora.FORMAT, "gguf": gguf.FORMAT}


def require_format(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise UserError where the format of the settings needs what is not here, or cannot hold this model."""
    if (require := FORMATS[settings.export_format].require) is not None:
        require(settings, checkpoint)
