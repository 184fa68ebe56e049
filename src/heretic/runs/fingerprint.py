"""What the results of a study depend on, as data that can be hashed, stored and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heretic.files import sha256
from heretic.model.checkpoint import Checkpoint
from heretic.prompts import PromptSets
from heretic.settings import Settings

FORMAT = 4  # raised when a change of the program makes old studies incomparable


def facts(
    settings: Settings, checkpoint: Checkpoint, prompts: PromptSets, dtypes: Sequence[str], chat_template: str
) -> dict[str, Any]:
    """Settings that change results, and the contents of what they name: weights, prompts, template, number formats planned."""
    part = settings.fingerprint_fields()
    for name in ("model", "revision", "prompts", "trust_remote_code"):
        part.pop(name)
    if part["quantization"] == "none":
        part.pop("quantization")  # so that studies from before there was this setting go on; likewise below
    if not part["judge"]["llm"]["instruction"]:
        part["judge"]["llm"].pop("instruction")
    return {
        "format": FORMAT,
        "model": checkpoint.identity(),
        **part,
        "dtypes": list(dtypes),
        "chat_template": hashlib.sha256(chat_template.encode()).hexdigest() if chat_template else "",
        "prompts": {s.role: s.sha256 for s in prompts.all},
        **_judge(settings),
    }


def _judge(settings: Settings) -> dict[str, str]:
    """The contents of a classifier that lies in a local folder."""
    folder = Path(settings.judge.classifier.model)
    if settings.judge.kind != "classifier" or not folder.is_dir():
        return {}
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    text = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return {"classifier": hashlib.sha256(text.encode()).hexdigest()}


def short_hash(data: dict[str, Any]) -> str:
    """Eight hexadecimal digits for a folder's name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
