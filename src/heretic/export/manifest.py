"""The manifest of an exported model: its sources, settings, edit, versions and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor

from heretic._version import __version__
from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.files import expand_user, read_tensors, sha256
from heretic.interrupt import StopSignal
from heretic.model.hub_model import fetch_files
from heretic.runs.stored_tensors import FARTHEST, directions_from_tensors, operators_from_tensors
from heretic.scoring.comparison import Comparison
from heretic.scoring.scorers.harmless_answers import Degenerate, OverRefusals
from heretic.scoring.scores import Scores
from heretic.settings import Settings
from heretic.settings.ablation import Geometry
from heretic.settings.export import Behavior, GgufType, MlxBits
from heretic.settings.sources import Resolved

MANIFEST = "manifest.json"
# Beside the manifest, in a folder of their own: some programs read every .safetensors file of a model's folder as weights.
DIRECTIONS = Path("heretic") / "directions.safetensors"
OPERATORS = Path("heretic") / "operators.safetensors"  # of an edit that reads the writers' inputs
LARGEST = 16 << 20  # bytes; a manifest has a few hundred kilobytes at most
OWN_MANIFEST = "use the manifest.json that heretic export wrote"

T = TypeVar("T")
P = TypeVar("P", bound=BaseModel)


def scores_text(scores: Scores) -> dict[str, Any]:
    """Return scores as a manifest holds them."""
    data = scores.as_dict()
    data.pop("seconds")
    return data


def comparisons_of(manifest: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """Return a manifest's measures, with those that earlier versions kept beside the scores.

    Raises LookupError, TypeError and ValueError for other data.
    """
    rows, scores = [*manifest.get("measures", [])], manifest["scores"] or {}
    before, now = (scores.get(model, {}).get("harmless_metrics") for model in ("original", "written"))
    if before and now:
        for scorer in (OverRefusals, Degenerate):
            row = {"name": scorer.name, "unit": scorer.unit, "better": scorer.better, "total": now["total"]}
            rows.append({**row, "original": before[scorer.name], "ablated": now[scorer.name]})
    return tuple(map(Comparison.from_dict, rows))


def _plain(name: str) -> str:
    if Path(name).name != name or name in (".", "..") or "\\" in name:
        raise ValueError("it must be the name of a file, not a path")
    return name


def _inside(name: str) -> str:
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError("it must be the path of a file in the folder")
    return name


FileName = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_plain)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Files = dict[FileName, Sha256]
FilePath = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_inside)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-FARTHEST, le=FARTHEST)]
Numbers = tuple[Number, ...]


class _Part(BaseModel):
    """A part of the manifest; unknown keys of later versions are ignored."""

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
    """Hashes of the files that accompany the weights, by relative path."""

    sha256: dict[FilePath, Sha256]


class Inventory(_Part):
    """Every file of an export but its manifest, with its hash, and the run."""

    made_with: Literal["heretic"]
    run: str
    files: dict[FilePath, Sha256]


class ExportedFiles(Inventory):
    """What an upload needs of a manifest, also of one that another version of heretic has written."""

    trial: int
    files: dict[FilePath, Sha256] = {}


class WrittenFiles(Hashes):
    """The written files, their format, and its rank or type."""

    format: str = "full"
    rank: Annotated[int, Field(ge=1)] | None = None
    type: GgufType = "f16"
    imatrix: bool = False
    bits: MlxBits = 16


class Edit(_Part):
    """An ablation as `Ablation.as_dict` returns it."""

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


class UsedAblation(_Part):
    """The settings of the ablation; a rebuild is compared with the hashes, whatever else a later version has set."""

    geometry: Geometry
    norm_aware: bool = True
    readers: bool = False


class UsedSettings(_Part):
    """The settings that the edit needs."""

    ablation: UsedAblation
    directions: DirectionSpec = DirectionSpec()


class TensorFile(_Part):
    """The hash of `heretic/directions.safetensors` or `heretic/operators.safetensors` beside the manifest."""

    sha256: Sha256


class TemplateFile(_Part):
    """The hash of the settings' chat template, `chat_template.jinja` beside the manifest."""

    sha256: Sha256


class QuantizedStudy(_Part):
    """How the study quantized the model."""

    study: Literal["none", "bnb_4bit", "bnb_8bit"] = "none"


class Manifest(_Part):
    """The validated part of a manifest: everything that determines the weights."""

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
    directions: TensorFile | None = None
    operators: TensorFile | None = None
    settings: UsedSettings
    dtype: Literal["float16", "bfloat16", "float32"]
    quantization: QuantizedStudy = QuantizedStudy()
    computed_on: str = ""
    ablation: Edit
    versions: dict[str, str]
    behavior: Behavior = ""


def locate_manifest(name: str) -> Path:
    """Return the local path of a manifest; from the hub, only the manifest and what stands beside it is downloaded.

    Args:
        name: A file or folder, owner/name on the hub, or the address of a model's page there.

    Raises:
        UserError: There is neither such a file nor such a model.
    """
    path = expand_user(name)
    address = re.fullmatch(
        r"(?:https?://[^/]+/)?([\w.-]+/[\w.-]+)(?:/(?:tree|resolve|blob)/([\w.-]+)(?:/.*)?)?/?", name
    )
    if path.exists() or address is None or name.startswith((".", "/", "~")) or path.suffix == ".json":
        return path
    return fetch_files(address[1], address[2] or "", (MANIFEST, "heretic/*", "chat_template.jinja"))


def read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Read and validate a manifest; `path` may be the model's folder. Returns it and the file's whole content.

    Raises:
        UserError: The file is missing or not a manifest, or one of another version that this one cannot use.
    """
    return _read(path, Manifest)


def read_exported_files(path: Path) -> ExportedFiles:
    """Read what an upload needs of a manifest, as `read_manifest`. Raises UserError."""
    return _read(path, ExportedFiles)[0]


def _read(path: Path, kind: type[P]) -> tuple[P, dict[str, Any]]:
    """Read a manifest, which is untrusted input."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(
                f"The manifest is larger than {LARGEST >> 20} MiB, so heretic did not write it.",
                code="invalid-manifest",
                where=str(file),
                fix=OWN_MANIFEST,
            )
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
        return kind.model_validate_json(text, strict=True), data
    except FileNotFoundError:
        raise UserError(
            "There is no manifest.", code="no-manifest", where=str(file), fix="name the folder of an exported model"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])[:100]
        what = f"{key or 'it'}: {problem['msg'].removeprefix('Value error, ')[:200]}."
        if writer := _other_version(data):
            raise UserError(
                f"This version of heretic cannot use the manifest: {what}",
                code="manifest-version",
                where=str(file),
                fix=f"written by heretic {writer}; install that version",
            ) from None
        raise UserError(
            f"The manifest cannot be used: {what}", code="invalid-manifest", where=str(file), fix=OWN_MANIFEST
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The manifest is not readable JSON: {str(error)[:200]}.",
            code="invalid-manifest",
            where=str(file),
            fix=OWN_MANIFEST,
        ) from None


def _other_version(data: Any) -> str:
    """Return the version of heretic that wrote a manifest; empty if it is this one or is not stated."""
    versions = data.get("versions") if isinstance(data, dict) and data.get("made_with") == "heretic" else None
    writer = versions.get("heretic") if isinstance(versions, dict) else None
    valid = isinstance(writer, str) and re.fullmatch(r"[\w.+!-]{1,40}", writer, re.ASCII) and writer != __version__
    return str(writer) if valid else ""


def read_inventory(folder: Path) -> Inventory | None:
    """Read the files that a folder's manifest names; None without a valid manifest."""
    file = folder / MANIFEST
    try:
        if file.is_symlink() or file.stat().st_size > LARGEST:
            return None
        return Inventory.model_validate_json(file.read_bytes(), strict=True)
    except (OSError, ValueError, RecursionError):  # pydantic's own error is a ValueError
        return None


def settings_of(path: Path) -> Resolved:
    """Return the settings that determined a manifest's study; all others have their defaults.

    A manifest cannot make heretic run code, neither a model's own nor a scorer's. Raises UserError, also for settings that this
    version does not know.
    """
    manifest, data = read_manifest(path)
    values = {**data["settings"], "trust_remote_code": [], "scorer_files": []}
    values |= {"model": manifest.model.name, "revision": manifest.model.revision or values.get("revision", "")}
    try:
        return Resolved(Settings.model_validate(values), None, dict.fromkeys(values, str(path)))
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])[:100]
        raise UserError(
            f"This version of heretic does not accept the manifest's setting {key}.",
            code="unknown-setting",
            where=str(path),
            fix=f"written by heretic {writer}; install that version"
            if (writer := _other_version(data))
            else "use the version of heretic that wrote the manifest",
        ) from None


def template_file(manifest: Manifest, home: Path) -> Path | None:
    """Return the file of the study's chat template; None if it was the model's own. Raises UserError."""
    if manifest.chat_template is None:
        return None
    file = home / "chat_template.jinja"
    if file.is_symlink() or not file.is_file() or sha256(file) != manifest.chat_template.sha256:
        raise UserError(
            "The chat template beside the manifest is missing or was changed.",
            code="template-not-of-the-manifest",
            where=str(file),
            fix="restore the file of the export",
        )
    return file


def inventory_of(folder: Path, known: Mapping[str, str], stop: StopSignal) -> dict[str, str]:
    """Return SHA-256 of every file of an export but its manifest; `known` hashes are reused. Raises Interrupted."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            stop.check()
            hashes[name] = known.get(name) or sha256(file)
    return hashes


def read_directions(manifest: Manifest, home: Path) -> Directions | None:
    """Read the directions beside the manifest; None if the edit holds its own direction. Raises UserError."""
    if manifest.ablation.vector is not None and not (manifest.directions and (home / DIRECTIONS).is_file()):
        return None
    return _read_beside(home / DIRECTIONS, manifest.directions, directions_from_tensors)


def read_operators(manifest: Manifest, home: Path) -> dict[str, Operator] | None:
    """Read the operators beside the manifest; None if strengths and directions determine the edit. Raises UserError."""
    if manifest.operators is None:
        return None
    return _read_beside(home / OPERATORS, manifest.operators, operators_from_tensors)


def _read_beside(file: Path, expected: TensorFile | None, convert: Callable[[Mapping[str, Tensor]], T]) -> T:
    restore = "restore the file of the export"
    if expected is None or not file.is_file():
        raise UserError(
            f"The file {file.name} beside the manifest is missing.", code="missing-file", where=str(file), fix=restore
        )
    if sha256(file) != expected.sha256:
        raise UserError(
            f"{file.name} does not match the hash in the manifest.", code="hash-mismatch", where=str(file), fix=restore
        )
    try:
        return convert(read_tensors(file)[0])
    except ValueError as error:
        raise UserError(
            f"{file.name} is damaged: {error}.", code="damaged-file", where=str(file), fix=restore
        ) from None
