"""Write card and manifest of a model rebuilt from a manifest, with the result of the comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.export.base_card import read_base_card
from heretic.export.card import card
from heretic.export.companions import copy_license_files
from heretic.export.manifest import DIRECTIONS, MANIFEST, OPERATORS, inventory_of
from heretic.export.markdown import escape
from heretic.export.request import WriteRequest, WriteResult
from heretic.files import sha256, write_text
from heretic.interrupt import StopSignal
from heretic.model.template import read_template
from heretic.runs.environment import now, versions

NOT_MEASURED = """\
**None of these scores was measured on this model.** `heretic reproduce` rebuilt it from a manifest and copied the scores that the
manifest states. It compared the weights with the hashes in the manifest: {words} ({why})."""

NEVER_MEASURED = """\
**Nothing was measured, neither on this model nor on the one that it rebuilds.** `heretic reproduce` compared the weights with the
hashes in the manifest: {words} ({why})."""


@dataclass(frozen=True)
class Rebuilt:
    """A source manifest, its folder, and the comparison of the rebuilt model, as data and in words."""

    manifest: Mapping[str, Any]
    home: Path
    comparison: Mapping[str, Any]
    words: str


def describe_rebuilt(
    rebuilt: Rebuilt, partial: Path, order: WriteRequest, written: WriteResult, stop: StopSignal
) -> None:
    """Write card and manifest beside the rebuilt weights. Raises UserError if the manifest lacks data for the card."""
    data, hashes, folder = rebuilt.manifest, written.hashes, order.checkpoint.folder
    content = {**data, "written": {**data["written"], "sha256": hashes["written"], **written.facts}}
    content |= {kind: {"sha256": hashes.get(kind, {})} for kind in ("copied", "changed")}
    content["reproduced"] = {"made_at": now(), "versions": versions(), **rebuilt.comparison}
    copy_license_files(folder, partial, read_template(order.settings))
    for key, path in (("directions", DIRECTIONS), ("operators", OPERATORS)):
        source = rebuilt.home / path
        # Only the file with the manifest's hash is copied, never a link to something else.
        if source.is_file() and sha256(source) == (data.get(key) or {}).get("sha256"):
            (partial / path.parent).mkdir(exist_ok=True)
            shutil.copyfile(source, partial / path)
    without_scores = "scores" in data and data["scores"] is None
    text = NEVER_MEASURED if without_scores else NOT_MEASURED
    measured = text.format(words=rebuilt.words, why=escape(rebuilt.comparison["why"]))
    try:
        text = card(content, read_base_card(folder), written, measured)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(
            "The manifest lacks data for the model card: model, scores or settings.",
            code="manifest-without-card",
            where="the manifest",
            fix="use the manifest.json that heretic export wrote",
        ) from None
    write_text(partial / "README.md", text)
    content["files"] = inventory_of(partial, hashes["written"], stop)
    write_text(partial / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
