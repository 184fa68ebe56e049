"""What the results of a study depend on, as data that can be hashed, stored and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heretic import __version__
from heretic.files import sha256
from heretic.model.checkpoint import Checkpoint
from heretic.prompts import PromptSets
from heretic.settings import Settings

FORMAT = 3  # raised when a change of the program makes old studies incomparable


def facts(
    settings: Settings, checkpoint: Checkpoint, prompts: PromptSets, dtypes: Sequence[str], chat_template: str
) -> dict[str, Any]:
    """Settings that change results, and the contents of what they name: weights, prompts, template, number formats planned."""
    part = settings.results_part()
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


def versions_that_matter() -> dict[str, str]:
    """Versions whose change can change what a trial measures: PyTorch and transformers without their last number, heretic whole.

    They are compared where several machines work on one study. A run of one machine may go on after an update.
    """
    named = {name: version(name).split("+")[0].split(".") for name in ("torch", "transformers")}
    return {"heretic": __version__, **{name: ".".join(parts[:2]) for name, parts in named.items()}}


def short_hash(data: dict[str, Any]) -> str:
    """Eight hexadecimal digits for a folder's name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


def differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Every key whose value differs, as 'key: stored, now'; hashes are shortened to eight digits."""
    before, after = _flat(json.loads(json.dumps(stored))), _flat(json.loads(json.dumps(now)))
    return [
        f"{key}: was {_short(before.get(key))}, now {_short(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:8]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"
