"""The formats in which an ablated model can be written.

A new one is a file beside this one that makes a `Format` (see `export.job`), a line here, and its name in `ExportFormat` of
`settings/export.py`. Everything else (command line, menu, proof, card, manifest) takes it from this table.
"""

from __future__ import annotations

from heretic.export import full, gguf_file, lora
from heretic.export.job import Format

FORMATS: dict[str, Format] = {"full": full.FORMAT, "lora": lora.FORMAT, "gguf": gguf_file.FORMAT}
