"""The manifest of an exported model: from what, with what and how it was made, and what it scored; written, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.errors import UserError
from heretic.files import read_tensors, sha256
from heretic.interrupt import StopSignal
from heretic.runs.stored_tensors import directions_from_tensors
from heretic.scoring.evaluator import Scores
from heretic.settings import Settings
from heretic.settings.ablation import AblationSettings
from heretic.settings.export import Behavior, GgufType
from heretic.settings.sources import Resolved

MANIFEST = "manifest.json"
# Beside the manifest, in a folder of their own: some programs read every .safetensors file of a model's folder as weights.
DIRECTIONS = Path("heretic") / "directions.safetensors"
LARGEST = 16 << 20  # bytes; a manifest has a few hundred kilobytes at most
FARTHEST = (
    1e6  # of a number of an edit; what is measured is below ten, and the arithmetic in float32 has to stay finite
)
OWN_MANIFEST = "use the manifest.json that heretic export wrote"


def scores_text(scores: Scores) -> dict[str, Any]:
    """Scores for a manifest."""
    data = scores.as_dict()
    data.pop("seconds")
    return data


def _plain(name: str) -> str:
    if Path(name).name != name or name in (".", "..") or "\\" in name:
        raise ValueError("it should be the name of a file, not a path")
    return name


def _inside(name: str) -> str:
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError("it should be the path of a file in the folder")
    return name


FileName = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_plain)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Files = dict[FileName, Sha256]
FilePath = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_inside)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-FARTHEST, le=FARTHEST)]
Numbers = tuple[Number, ...]


class _Part(BaseModel):
    """What is there and is not asked for is left alone: later versions may say more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Base(_Part):
    """The original: its name, the commit on the hub if it has one, and the hashes of its files of weights."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    revision: str | None = None
    sha256: Files = Field(min_length=1)


class Hashes(_Part):
    """Hashes of files."""

    sha256: Files


class Companions(_Part):
    """Hashes of what went with the weights, by the path in the folder."""

    sha256: dict[FilePath, Sha256]


class Inventory(_Part):
    """Every file of an export but its manifest, with its hash, and whose export it is."""

    made_with: Literal["heretic"]
    run: str
    files: dict[FilePath, Sha256]


class WrittenFiles(Hashes):
    """What was written: in which format, and of which rank or type where the format has several."""

    format: str = "full"
    rank: Annotated[int, Field(ge=1)] | None = None
    type: GgufType = "f16"


class Edit(_Part):
    """An ablation as `Ablation.as_dict` gives it."""

    strengths: dict[str, Numbers]
    mixture: Numbers | None = None
    shift: Number = 0.0
    vector: Numbers | None = None

    @property
    def ablation(self) -> Ablation:
        """The ablation itself."""
        return Ablation(self.strengths, self.mixture, self.shift, self.vector)


class DirectionSpec(_Part):
    """How many directions a layer has."""

    count: Annotated[int, Field(ge=1)] = 1
    iterative_rounds: Annotated[int, Field(ge=0)] = 0

    @property
    def per_layer(self) -> int:
        """All rounds together."""
        return self.count * (1 + self.iterative_rounds)


class UsedSettings(_Part):
    """Of the settings what the edit needs."""

    ablation: AblationSettings
    directions: DirectionSpec = DirectionSpec()


class DirectionsFile(_Part):
    """The hash of the layers' directions that lie beside the manifest, in `heretic/directions.safetensors`."""

    sha256: Sha256


class TemplateFile(_Part):
    """The hash of the chat template of the settings, which lies beside the manifest as `chat_template.jinja`."""

    sha256: Sha256


class QuantizedStudy(_Part):
    """How the model was quantized that the edit was computed on."""

    study: Literal["none", "bnb_4bit", "bnb_8bit"] = "none"


class Manifest(_Part):
    """What is read of a manifest: all that the model's weights follow from, and what was measured of it."""

    made_with: Literal["heretic"]
    run: str
    fingerprint: str
    trial: int
    model: Base
    written: WrittenFiles
    copied: Companions = Companions(sha256={})
    changed: Companions = Companions(sha256={})
    files: dict[FilePath, Sha256] = {}
    chat_template: TemplateFile | None = None
    directions: DirectionsFile | None = None
    settings: UsedSettings
    dtype: Literal["float16", "bfloat16", "float32"]
    quantization: QuantizedStudy = QuantizedStudy()
    computed_on: str = ""
    ablation: Edit
    versions: dict[str, str]
    behavior: Behavior = ""


def read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of an exported model, checked, and all that its file holds. `path` may be the model's folder.

    Raises UserError for what is no manifest, whatever the file holds: it may come from anywhere.
    """
    file = path / MANIFEST if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(
                f"The manifest is larger than {LARGEST >> 20} MiB; heretic does not write such files.",
                code="invalid-manifest",
                where=str(file),
                fix=OWN_MANIFEST,
            )
        text = file.read_text(encoding="utf-8")
        return Manifest.model_validate_json(text, strict=True), json.loads(text)
    except FileNotFoundError:
        raise UserError(
            "There is no manifest.", code="no-manifest", where=str(file), fix="name the folder of an exported model"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])[:100]
        raise UserError(
            f"The manifest cannot be used: {key or 'it'}: {problem['msg'].removeprefix('Value error, ')[:200]}.",
            code="invalid-manifest",
            where=str(file),
            fix=OWN_MANIFEST,
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The manifest is not readable JSON: {str(error)[:200]}.",
            code="invalid-manifest",
            where=str(file),
            fix=OWN_MANIFEST,
        ) from None


def read_inventory(folder: Path) -> Inventory | None:
    """Which files an export's manifest names; None for a folder that holds none, whatever its manifest.json is."""
    file = folder / MANIFEST
    try:
        if file.is_symlink() or file.stat().st_size > LARGEST:
            return None
        return Inventory.model_validate_json(file.read_bytes(), strict=True)
    except (OSError, ValueError, RecursionError):  # pydantic's own error is a ValueError
        return None


def settings_of(path: Path) -> Resolved:
    """The settings that decided the results of a manifest's study; what does not change results has its default.

    Code that came with a model is not trusted because a manifest says so. Raises UserError, also for settings that this version
    does not know.
    """
    manifest, data = read_manifest(path)
    told = {**data["settings"], "trust_remote_code": []}
    told |= {"model": manifest.model.name, "revision": manifest.model.revision or told.get("revision", "")}
    try:
        return Resolved(Settings.model_validate(told), None, dict.fromkeys(told, str(path)))
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])[:100]
        raise UserError(
            f"This version of heretic does not accept the manifest's setting {key}.",
            code="unknown-setting",
            where=str(path),
            fix="use the version of heretic that wrote the manifest",
        ) from None


def template_file(manifest: Manifest, home: Path) -> Path | None:
    """The chat template of the study's settings, beside the manifest; None where it was the model's own. Raises UserError."""
    if manifest.chat_template is None:
        return None
    file = home / "chat_template.jinja"
    if file.is_symlink() or not file.is_file() or sha256(file) != manifest.chat_template.sha256:
        raise UserError(
            "The chat template of the manifest is not beside it, or was changed.",
            code="template-not-of-the-manifest",
            where=str(file),
            fix="put the file there that heretic export wrote with the manifest",
        )
    return file


def inventory_of(folder: Path, known: Mapping[str, str], stop: StopSignal) -> dict[str, str]:
    """SHA-256 of every file of a finished export but its manifest; `known` ones are not read again. Raises Interrupted."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            stop.check()
            found[name] = known.get(name) or sha256(file)
    return found


def read_directions(manifest: Manifest, home: Path) -> Directions | None:
    """The layers' directions that lie beside the manifest; None where the edit has a direction of its own and needs none. Raises
    UserError."""
    file = home / DIRECTIONS
    if manifest.directions is None or not file.is_file():
        if manifest.ablation.vector is not None:
            return None
        raise UserError(
            "The directions of the edit are not beside the manifest.",
            code="missing-file",
            where=str(file),
            fix="put the file there that heretic export wrote with the manifest",
        )
    if sha256(file) != manifest.directions.sha256:
        raise UserError(
            "The directions are not those of the manifest: their hash differs.",
            code="hash-mismatch",
            where=str(file),
            fix="restore the file that heretic export wrote with the manifest",
        )
    try:
        return directions_from_tensors(read_tensors(file)[0])
    except ValueError as error:
        raise UserError(
            f"{file.name} is damaged: {error}.",
            code="damaged-file",
            where=str(file),
            fix="put the file there that heretic export wrote with the manifest",
        ) from None
