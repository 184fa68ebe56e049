"""Rebuild of an exported model from its base and its manifest, without a study, and comparison of the two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from safetensors import SafetensorError

from heretic.ablation.directions import Directions
from heretic.ablation.operator import Operator
from heretic.errors import UserError
from heretic.export.companions import copied_files
from heretic.export.destination import check_destination, check_unchanged, commit, staging_dir
from heretic.export.formats import FORMATS
from heretic.export.manifest import (
    MANIFEST,
    Manifest,
    read_directions,
    read_manifest,
    read_operators,
    template_file,
)
from heretic.export.rebuilt import Rebuilt, describe_rebuilt
from heretic.export.request import WriteRequest, WriteResult
from heretic.export.weight_diff import Difference, weight_difference
from heretic.files import expand_user, sha256
from heretic.hardware.gpus import gpus_here
from heretic.hardware.host import devices, format_bytes
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import load
from heretic.model.template import read_template
from heretic.model.unloading import unloaded_after
from heretic.pipeline.run import device_lock
from heretic.pipeline.stored_edit import stored_edit
from heretic.planning.memory_plan import LoadPlan, make_plan
from heretic.planning.workload import Workload
from heretic.progress import ProgressReporter
from heretic.runs.environment import computed_on, versions
from heretic.settings import Settings
from heretic.storage.fingerprint_diff import differences

Verdict = Literal["identical", "equal", "different"]
WORDS: Mapping[Verdict, str] = {
    "identical": "bit-identical",
    "equal": "equal within tolerance",
    "different": "different",
}


@dataclass(frozen=True)
class Reproduction:
    """Comparison of the rebuilt weights with the exported ones."""

    verdict: Verdict
    files: Mapping[str, bool]  # by name, whether a written file has the manifest's hash
    changed: tuple[str, ...]  # versions, device and base files that differ from the manifest's
    why: str  # reason for the verdict
    difference: Difference | None
    destination: Path | None

    @property
    def words(self) -> str:
        """The verdict, for the screen."""
        return WORDS[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """For --json and for the new manifest."""
        return {
            "verdict": self.verdict,
            "files": dict(self.files),
            "changed": list(self.changed),
            "why": self.why,
            "difference": asdict(self.difference) if self.difference else None,
            "written_to": str(self.destination) if self.destination else None,
        }


def reproduce(
    path: Path,
    destination: Path | None,
    *,
    base: str | None = None,
    device_map: str = "planned",
    trust: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    wait: bool = False,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> Reproduction:
    """Rebuild the model of a manifest and compare it with the exported one.

    Args:
        path: The manifest or the folder of the exported model.
        destination: Folder for the rebuilt model; None: compare only.
        base: Base model; None: the manifest's.
        device_map: As the setting.
        trust: Let the base model run its own Python code.
        allow_pickle: Read base weights from pickle files.
        force: Rebuild even if the base model's files differ from the manifest's.
        wait: Wait for devices that another process holds.

    Raises:
        UserError: The manifest is unusable, or the base model is missing or differs.
    """
    # 1. Read the manifest and check the base model
    manifest, data = read_manifest(path)
    home = path if path.is_dir() else path.parent
    destination = None if destination is None else expand_user(destination)
    directions, operators = read_directions(manifest, home), read_operators(manifest, home)
    if destination is not None:
        _check_rebuild_destination(destination, home, manifest.run)
    settings = _settings(manifest, base or manifest.model.name, device_map, template_file(manifest, home))
    checkpoint = _open_base(manifest, base, trust, allow_pickle)
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    reporter.info(f"The base model is {checkpoint.model}. The rebuild takes about {format_bytes(size)} of disk.")
    changed = _changes("base", *_base_hashes(manifest, checkpoint, reporter, stop))
    if changed and not force:
        _raise_changed_base(checkpoint, changed)
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        target = (destination or Path("reproduced")).resolve()
        if destination is not None:
            check_unchanged(target, stop)
        with _staging(target) as staging:
            # 2. Write the model
            request, written, device = _rebuild(
                manifest, checkpoint, settings, (directions, operators), trust, staging, reporter, stop
            )
            # 3. Compare it with the manifest
            changed = list(dict.fromkeys([*changed, *_changes_of_rebuild(manifest, written, device)]))
            result = _compare(manifest, home, staging, written, changed, destination, reporter, stop)
            # 4. Describe the model and move it to its destination
            if destination is not None:
                description = {"from_sha256": sha256(_manifest_file(path)), **result.as_dict()}
                describe_rebuilt(Rebuilt(data, home, description, result.words), staging, request, written, stop)
                commit(staging, target, reporter)
    return result


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield a staging folder beside the target and remove it at the end. Raises UserError if writing within fails."""
    staging = staging_dir(target)
    try:
        yield staging
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The model cannot be written: {error}",
            code="file-unwritable",
            where=str(staging.parent),
            fix="free disk space, then run the same command again",
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _raise_changed_base(checkpoint: Checkpoint, changed: Sequence[str]) -> NoReturn:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise UserError(
        f"The base model differs from the manifest's: {'; '.join(changed[:3])}{more}.",
        code="manifest-mismatch",
        where=str(checkpoint.folder),
        fix="name the right base model with --base, or rebuild from this one with --force",
    )


def _manifest_file(path: Path) -> Path:
    return path / MANIFEST if path.is_dir() else path


def _check_rebuild_destination(destination: Path, home: Path, run: str) -> None:
    """Raise UserError if the destination holds anything but an earlier rebuild of this run."""
    if destination.resolve() == home.resolve():
        raise UserError(
            "The destination is the manifest's own folder, which heretic does not overwrite.",
            code="destination-is-export",
            where=str(destination),
            fix="name another folder",
        )
    check_destination(destination, run)
    existing = destination / MANIFEST
    if existing.is_file() and '"reproduced": {' not in existing.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            "The destination holds an export, which heretic does not overwrite.",
            code="destination-is-export",
            where=str(destination),
            fix="name another folder",
        )


def _settings(manifest: Manifest, source: str, device_map: str, template: Path | None) -> Settings:
    """Return the manifest's settings that affect writing.

    A manifest never decides which code to trust or which files to read, except its own template, whose hash was checked.
    """
    name = manifest.written.format
    if name not in FORMATS:
        raise UserError(
            f"The manifest's format {name[:40]!r} is unknown to this version of heretic.",
            code="unknown-format",
            fix=f"one of: {', '.join(FORMATS)}; or install the version in the manifest",
        )
    return Settings.model_validate(
        {
            "model": source,
            "device_map": device_map,
            "dtypes": [manifest.dtype],
            "export_format": name,
            "lora_rank": manifest.written.rank or 1,
            "gguf_type": manifest.written.type,
            "gguf_imatrix": manifest.written.imatrix,
            "mlx_bits": manifest.written.bits,
            "behavior": manifest.behavior,
            "quantization": manifest.quantization.study,
            "chat_template": str(template or ""),
        }
    )


def _open_base(manifest: Manifest, base: str | None, trust: bool, allow_pickle: bool) -> Checkpoint:
    source = base or manifest.model.name
    if not base and manifest.model.revision is None and not expand_user(source).exists():
        raise UserError(  # its name may be that of another model on the hub
            f"The base model was a folder, {source}, which does not exist here.",
            code="no-model-folder",
            fix="name it: --base FOLDER",
        )
    trusted = [source] if trust else []
    try:
        return open_checkpoint(
            source,
            "" if base else manifest.model.revision or "",
            trust_remote_code=trusted,
            allow_pickle=allow_pickle,
        )
    except UserError as error:
        pickled = not allow_pickle and "allow_pickle" in (error.fix or "")
        fix = error.fix if base else "name the base model's folder: --base FOLDER"
        if pickled:
            fix = "pass --allow-pickle, which reads only tensors, if you trust the base model's authors"
        raise UserError(error.what, code=error.code, where=error.where or "the base model", fix=fix) from None


def _base_hashes(
    manifest: Manifest, checkpoint: Checkpoint, reporter: ProgressReporter, stop: StopSignal
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the SHA-256 hashes of the base model's files by name: the manifest's and the current ones."""
    weights = [checkpoint.folder / checkpoint.gguf_file] if checkpoint.gguf_file else checkpoint.shards()
    expected, companions = {**manifest.model.sha256, **manifest.copied.sha256}, copied_files(checkpoint.folder)
    files = {file.name: file for file in weights} | {n: f for n, f in companions.items() if n in expected}
    hashes = {}
    with reporter.stage("Checking the base model", len(files)) as stage:
        for name, file in files.items():
            stop.check()
            hashes[name] = sha256(file)
            stage.advance()
    if checkpoint.gguf_file and set(hashes.values()) == set(manifest.model.sha256.values()):
        return {}, {}  # the same single file, possibly renamed
    return expected, hashes


def _plan(settings: Settings, checkpoint: Checkpoint) -> LoadPlan:
    """Plan the memory for the base model; without decoding it needs little more than its weights. Raises UserError."""
    plan = make_plan(
        checkpoint,
        Workload(prompt_tokens=8, new_tokens=1, needs_weight_stats=False),
        device_map=settings.device_map,
        max_memory={},
        dtypes=list(settings.dtypes),
        batch_size=1,
        devices=devices(gpus_here()),
        quantization=settings.quantization,
    )
    return LoadPlan.of(settings, plan)


def _rebuild(
    manifest: Manifest,
    checkpoint: Checkpoint,
    settings: Settings,
    edit: tuple[Directions | None, dict[str, Operator] | None],
    trust: bool,
    staging: Path,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> tuple[WriteRequest, WriteResult, str]:
    """Write the edited model like the export; also returns the device that computed the edit."""
    plan = _plan(settings, checkpoint)
    model = load(
        checkpoint,
        plan.dtypes,
        plan.arguments,
        quantization=plan.quantization,
        trust_remote_code=[checkpoint.model] if trust else [],
        chat_template=read_template(settings) or None,
        readers=manifest.settings.ablation.readers,
        reporter=reporter,
    )
    form = FORMATS[settings.export_format]
    with unloaded_after(model.model):
        device = computed_on(model.device)
        operators = stored_edit(manifest, model, *edit, reporter)
        prepared = form.prepare(model, operators, settings, reporter)
    # The name of a GGUF file and its metadata contain the base model's name.
    (file_name, *_) = manifest.written.sha256 or ("",)
    if file_name.endswith(".gguf"):
        checkpoint = replace(checkpoint, called=file_name.removesuffix(f"-{manifest.written.type}.gguf"))
    request = WriteRequest(settings.export_format, settings, checkpoint, plan, operators, prepared)
    written = form.write(request, staging, reporter, stop)
    return request, form.convert(request, staging, written, reporter, stop) if form.convert else written, device


def _compare(
    manifest: Manifest,
    home: Path,
    staging: Path,
    written: WriteResult,
    changed: list[str],
    destination: Path | None,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> Reproduction:
    """Compare the written files with the manifest's hashes and, if these differ, with the exported weights."""
    expected, actual = manifest.written.sha256, written.hashes["written"]
    files = {name: expected.get(name) == actual.get(name) for name in sorted({*expected, *actual})}
    same_companions = all(
        companions.sha256 == written.hashes.get(kind, {})
        for kind, companions in (("copied", manifest.copied), ("changed", manifest.changed))
    )

    def reproduction(verdict: Verdict, why: str, difference: Difference | None = None) -> Reproduction:
        if verdict != "different" and not same_companions:
            why = f"the weights are {WORDS[verdict]}, but other files of the base model differ"
            verdict = "different"
        return Reproduction(verdict, files, tuple(changed), why, difference, destination)

    # 1. Compare the hashes
    if all(files.values()):
        return reproduction("identical", "every weight file has the manifest's hash")
    if set(expected) != set(actual):
        return reproduction("different", "the weights are in other files")
    if not all(name.endswith(".safetensors") for name in actual):
        return reproduction("different", "the hashes differ; the size of the difference is known only for safetensors")
    # 2. Compare the numbers
    with reporter.stage("Comparing with the exported weights", None):
        difference = weight_difference(staging, home, actual, stop)
        modified = [n for n in actual if (home / n).is_file() and sha256(home / n) != expected[n]]
    if isinstance(difference, str):
        return reproduction("different", f"the hashes differ, and the size of the difference is unknown: {difference}")
    if modified:
        return reproduction("different", f"{modified[0]} next to the manifest has been modified", difference)
    if difference.differing == 0:
        return reproduction("identical", "all numbers are equal; only file headers differ", difference)
    if difference.within:
        return reproduction("equal", f"all differences are within rounding: {difference}", difference)
    return reproduction("different", str(difference), difference)


def _changes_of_rebuild(manifest: Manifest, written: WriteResult, device: str) -> list[str]:
    """List the versions, the device and the copied files of a rebuild that differ from the manifest's."""
    return [
        *_changes("versions", manifest.versions, versions()),
        *_changes("computed", {"on": manifest.computed_on}, {"on": device}),
        *_changes("base", manifest.copied.sha256, written.hashes.get("copied", {})),
    ]


def _changes(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return differences({what: dict(before)}, {what: dict(now)})
