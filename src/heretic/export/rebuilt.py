"""Card and manifest of a model that was rebuilt from a manifest: what that one says, and what the comparison came to."""

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
from heretic.export.manifest import DIRECTIONS, MANIFEST, inventory_of
from heretic.export.markdown import escape
from heretic.export.request import WriteRequest, WriteResult
from heretic.files import sha256, write_text
from heretic.interrupt import StopSignal
from heretic.model.template import read_template
from heretic.runs.environment import now, versions

NOT_MEASURED = """\
**None of these scores was measured on this model.** `heretic reproduce` rebuilt it from a manifest and copied them from there, as
whoever wrote the manifest states them. It compared the weights with the hashes in the manifest: {words} ({why})."""


@dataclass(frozen=True)
class Rebuilt:
    """The manifest that a model was rebuilt from, the folder it lies in, and the comparison, as data and in a word."""

    manifest: Mapping[str, Any]
    home: Path
    comparison: Mapping[str, Any]
    words: str


def describe_rebuilt(
    rebuilt: Rebuilt, partial: Path, order: WriteRequest, written: WriteResult, stop: StopSignal
) -> None:
    """Write card and manifest beside the rebuilt weights. Raises UserError where the manifest lacks what a card is made of."""
    data, hashes, folder = rebuilt.manifest, written.hashes, order.checkpoint.folder
    told = {**data, "written": {**data["written"], "sha256": hashes["written"], **written.facts}}
    told |= {kind: {"sha256": hashes.get(kind, {})} for kind in ("copied", "changed")}
    told["reproduced"] = {"made_at": now(), "versions": versions(), **rebuilt.comparison}
    copy_license_files(folder, partial, read_template(order.settings))
    source = rebuilt.home / DIRECTIONS
    # Whatever else lies there under this name, a link out of the folder for example, is not copied.
    if source.is_file() and sha256(source) == (data.get("directions") or {}).get("sha256"):
        (partial / DIRECTIONS.parent).mkdir()
        shutil.copyfile(source, partial / DIRECTIONS)
    measured = NOT_MEASURED.format(words=rebuilt.words, why=escape(rebuilt.comparison["why"]))
    try:
        text = card(told, read_base_card(folder), written, measured)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(
            "The manifest lacks what a model card is made of: model, scores, settings.",
            code="manifest-without-card",
            where="the manifest",
            fix="take the manifest.json of a model that heretic export has written",
        ) from None
    write_text(partial / "README.md", text)
    told["files"] = inventory_of(partial, hashes["written"], stop)
    write_text(partial / MANIFEST, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
