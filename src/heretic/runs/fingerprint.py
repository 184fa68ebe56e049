"""Compute the fingerprint of a study: all data that its results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.files import expand_user, sha256
from heretic.model.checkpoint import Checkpoint
from heretic.prompts.sets import PromptSets
from heretic.scoring.judges.trained import head_text
from heretic.scoring.scorers.unanswered import Unanswered
from heretic.settings import Settings
from heretic.settings.languages import ENGLISH, language
from heretic.storage.attributes import FORMAT


def facts(
    settings: Settings, checkpoint: Checkpoint, prompts: PromptSets, dtypes: Sequence[str], chat_template: str
) -> dict[str, Any]:
    """Return the settings that affect results, with the contents that they refer to: weights, prompts, template, formats."""
    fields = settings.fingerprint_fields()
    for name in ("model", "revision", "prompts", "trust_remote_code"):
        fields.pop(name)
    if fields["quantization"] == "none":
        fields.pop("quantization")  # keeps the fingerprints of studies older than this setting; likewise below
    if not settings.template_variables:
        fields.pop("template_variables")
    if not fields["ablation"]["readers"]:
        fields["ablation"].pop("readers")
    if not fields["judge"]["llm"]["instruction"]:
        fields["judge"]["llm"].pop("instruction")
    if settings.judge.kind != "trained":
        fields["judge"].pop("trained")
    if settings.language == ENGLISH:
        fields.pop("language")
    else:
        phrases = language(settings.language)
        fields["language_markers"] = [*phrases.refusal_markers, *phrases.evasive_markers]
    _set_scorers(fields, settings)
    return {
        "format": FORMAT,
        "model": checkpoint.identity(),
        **fields,
        "dtypes": list(dtypes),
        "chat_template": hashlib.sha256(chat_template.encode()).hexdigest() if chat_template else "",
        "prompts": {s.role: s.sha256 for s in prompts.all},
        **_judge_hash(settings),
    }


def _set_scorers(fields: dict[str, Any], settings: Settings) -> None:
    """Replace the facts on scorers by those that the search depends on, in the form of studies older than the scorers."""
    limits, files = fields.pop("constraints"), fields.pop("scorer_files")
    old = {f"max_{name}": int(limits.pop(name, -1)) for name in ("over_refusals", "degenerate")}
    fields["constraints"] = {**old, **limits}
    if settings.objectives == ["kl", "refusals"]:
        fields.pop("objectives")
    used = _searched(settings)
    options = {name: table for name, table in fields.pop("scorers").items() if name in used}
    if options:
        fields["scorers"] = options
    contents = [v for table in options.values() for v in table.values() if isinstance(v, str)]
    hashes = {}
    for name in (*files, *contents):
        with suppress(OSError, UserError):  # a text option need not be a path
            if name and (path := expand_user(name)).is_file():
                hashes[name] = sha256(path)
    if hashes:
        fields["scorer_files"] = hashes


def _searched(settings: Settings) -> set[str]:
    """Return the scorers of objectives and constraints."""
    return {name.partition(".")[0] for name in (*settings.objectives, *settings.constraints)}


def _judge_hash(settings: Settings) -> dict[str, str]:
    """Return hashes of what a judge of the tables `trained` and `classifier`, or the scorer `unanswered`, reads from files."""
    judge, found = settings.judge, {}
    models = {"classifier": judge.classifier.model, "trained": judge.trained.encoder}
    model: object = models.get(judge.kind, "")
    if judge.kind == "trained" or Unanswered.name in _searched(settings):
        found["judge_head"] = hashlib.sha256(head_text().encode()).hexdigest()
        model = model or settings.scorers.get(Unanswered.name, {}).get("encoder") or judge.trained.encoder
    folder = Path(str(model))
    if model and folder.is_dir():
        files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
        text = "".join(f"{path.name} {sha256(path)}\n" for path in files)
        found["classifier"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def short_hash(data: dict[str, Any]) -> str:
    """Return eight hexadecimal digits for the name of a run's folder."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
