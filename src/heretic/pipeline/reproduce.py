"""A model made again from its base and its manifest, without a study, and compared with the one that the manifest is of."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from heretic.ablation.ablation import OperatorFactory
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
    template_file,
)
from heretic.export.rebuilt import Rebuilt, describe_rebuilt
from heretic.export.request import WriteRequest, WriteResult
from heretic.export.weight_diff import Difference, weight_difference
from heretic.files import expand_user, sha256
from heretic.hardware.gpus import gpus_here
from heretic.hardware.host import devices
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.model.template import read_template
from heretic.model.unloading import unloaded_after
from heretic.pipeline.run import device_lock
from heretic.planning.memory_plan import LoadPlan, make_plan
from heretic.planning.workload import Workload
from heretic.progress import ProgressReporter
from heretic.runs.environment import computed_on, versions
from heretic.session.session import weight_reader
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
    """What the rebuilt weights are to those that the manifest was written for.

    `files`: by name, whether a written file has the manifest's hash. `changed`: versions, device and files of the base that are not
    what they were. `why`: what the verdict rests on, besides the hashes.
    """

    verdict: Verdict
    files: Mapping[str, bool]
    changed: tuple[str, ...]
    why: str
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
    """Make the model of a manifest again, in `destination` or only to compare it.

    `base` is where the base model is now; `trust` lets it run Python code of its own, `allow_pickle` be read from pickle files;
    `force` goes on where its files are not those of the manifest. Raises UserError: a manifest that cannot be used, a base that is
    not to be had or not the same.
    """
    manifest, data = read_manifest(path)
    home = path if path.is_dir() else path.parent
    destination = None if destination is None else expand_user(destination)
    directions = read_directions(manifest, home)
    if destination is not None:
        _check_place(destination, home, manifest.run)
    settings = _settings(manifest, base or manifest.model.name, device_map, template_file(manifest, home))
    checkpoint = _open(manifest, base, trust, allow_pickle)
    changed = _differs("base", *_base_files(manifest, checkpoint, reporter, stop))
    if changed and not force:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"The base model differs from the manifest's: {'; '.join(changed[:3])}{more}.",
            code="manifest-mismatch",
            where=str(checkpoint.folder),
            fix="name the right one with --base, or rebuild from this one anyway with --force",
        )
    with device_lock(settings, wait=wait, reporter=reporter, stop=stop):
        place = (destination or Path("reproduced")).resolve()
        if destination is not None:
            check_unchanged(place, stop)
        partial = staging_dir(place)
        try:
            order, written, where = _rebuild(manifest, checkpoint, settings, directions, trust, partial, reporter, stop)
            changed += _differs("versions", manifest.versions, versions())
            changed += _differs("computed", {"on": manifest.computed_on}, {"on": where})
            changed += _differs("base", manifest.copied.sha256, written.hashes.get("copied", {}))
            changed = list(dict.fromkeys(changed))
            found = _verdict(manifest, home, partial, written, changed, destination, reporter, stop)
            if destination is not None:
                told = {"from_sha256": sha256(_file(path)), **found.as_dict()}
                describe_rebuilt(Rebuilt(data, home, told, found.words), partial, order, written, stop)
                commit(partial, place, reporter)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The model cannot be written: {error}",
                code="file-unwritable",
                where=str(partial.parent),
                fix="make room, then run the same command again",
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return found


def _file(path: Path) -> Path:
    return path / MANIFEST if path.is_dir() else path


def _check_place(destination: Path, home: Path, run: str) -> None:
    """Raise UserError if the destination holds anything but an earlier reproduction of this run."""
    if destination.resolve() == home.resolve():
        raise UserError(
            "The destination is the manifest's own folder, which heretic does not overwrite.",
            code="destination-is-export",
            where=str(destination),
            fix="name another folder",
        )
    check_destination(destination, run)
    held = destination / MANIFEST
    if held.is_file() and '"reproduced": {' not in held.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            "The destination holds an export, which heretic does not overwrite.",
            code="destination-is-export",
            where=str(destination),
            fix="name another folder",
        )


def _settings(manifest: Manifest, source: str, device_map: str, template: Path | None) -> Settings:
    """What of the manifest's settings writing depends on; never what code to trust or what files to read, but for the
    template beside it, whose hash was checked."""
    name = manifest.written.format
    if name not in FORMATS:
        raise UserError(
            f"The manifest's format {name[:40]!r} is unknown to this version of heretic.",
            code="unknown-format",
            fix=f"one of: {', '.join(FORMATS)}; or install the version that the manifest names",
        )
    return Settings.model_validate(
        {
            "model": source,
            "device_map": device_map,
            "dtypes": [manifest.dtype],
            "export_format": name,
            "lora_rank": manifest.written.rank or 1,
            "gguf_type": manifest.written.type,
            "behavior": manifest.behavior,
            "quantization": manifest.quantization.study,
            "chat_template": str(template or ""),
        }
    )


def _open(manifest: Manifest, base: str | None, trust: bool, allow_pickle: bool) -> Checkpoint:
    source = base or manifest.model.name
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
        fix = error.fix if base else "name the place where the base model is now: --base FOLDER"
        if pickled:
            fix = "--allow-pickle, which reads tensors and nothing else, if you trust who made the base model"
        raise UserError(error.what, code=error.code, where=error.where or "the base model", fix=fix) from None


def _base_files(
    manifest: Manifest, checkpoint: Checkpoint, reporter: ProgressReporter, stop: StopSignal
) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes by name of the base's files, in the manifest and now."""
    weights = [checkpoint.folder / checkpoint.gguf_file] if checkpoint.gguf_file else checkpoint.shards()
    then, small = {**manifest.model.sha256, **manifest.copied.sha256}, copied_files(checkpoint.folder)
    files = {file.name: file for file in weights} | {n: f for n, f in small.items() if n in then}
    hashes = {}
    with reporter.stage("Checking the base model", len(files)) as stage:
        for name, file in files.items():
            stop.check()
            hashes[name] = sha256(file)
            stage.advance()
    if checkpoint.gguf_file and set(hashes.values()) == set(manifest.model.sha256.values()):
        return {}, {}  # one file, which may have been renamed
    return then, hashes


def _plan(settings: Settings, checkpoint: Checkpoint) -> LoadPlan:
    """Where the base model goes: nothing is decoded, so that it needs little more than its weights. Raises UserError."""
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
    directions: Directions | None,
    trust: bool,
    partial: Path,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> tuple[WriteRequest, WriteResult, str]:
    """Write the edited model as the export did, and say on what the edit was computed."""
    plan = _plan(settings, checkpoint)
    model = load(
        checkpoint,
        plan.dtypes,
        plan.arguments,
        quantization=plan.quantization,
        trust_remote_code=[checkpoint.model] if trust else [],
        chat_template=read_template(settings) or None,
        reporter=reporter,
    )
    form = FORMATS[settings.export_format]
    with unloaded_after(model.model):
        where = computed_on(model.device)
        operators = _operators(manifest, model, directions, reporter)
        prepared = form.prepare(model, operators, settings, reporter)
    # A GGUF file is named after the base, and names it within.
    (named, *_) = manifest.written.sha256 or ("",)
    called = replace(checkpoint, called=named.removesuffix(f"-{manifest.written.type}.gguf"))
    order = WriteRequest(
        settings.export_format, settings, called if named.endswith(".gguf") else checkpoint, plan, operators, prepared
    )
    written = form.write(order, partial, reporter, stop)
    return order, form.convert(order, partial, written, reporter, stop) if form.convert else written, where


def _operators(
    manifest: Manifest, model: LanguageModel, directions: Directions | None, reporter: ProgressReporter
) -> dict[str, Operator]:
    """The edit made anew from strengths and directions. Raises UserError where they do not fit the model."""
    edit = manifest.ablation
    _check_fit(manifest, model, directions)
    if directions is None:
        directions = Directions(torch.zeros(1, model.structure.width))  # nothing is taken from them
    asked = manifest.settings.ablation
    model_context = OperatorFactory.prepare(
        directions,
        model.structure.writers,
        asked.geometry,
        weight_reader(model),
        reporter,
        norm_aware=asked.norm_aware,
    )
    return model_context.operators(edit.ablation)


def _check_fit(manifest: Manifest, model: LanguageModel, directions: Directions | None) -> None:
    """Raise UserError where the edit names what the model does not have, or has other sizes than the model and the settings."""
    layers, width, edit = model.structure.num_layers, model.structure.width, manifest.ablation
    each = manifest.settings.directions.per_layer  # several lie one behind the other
    sizes = [(f"strengths.{component}", len(profile), layers) for component, profile in edit.strengths.items()]
    sizes += [("mixture", len(edit.mixture), layers)] if edit.mixture is not None else []
    sizes += [("vector", len(edit.vector), each * width)] if edit.vector is not None else []
    if directions is not None:
        sizes += [("directions", directions.num_layers, layers), ("each direction", directions.vectors.shape[1], width)]
        sizes += [("each layer", directions.count * width, each * width)]
    problems = [
        f"there is no component {name[:60]!r}; it has {', '.join(model.structure.components)}"
        for name in edit.strengths
        if name not in model.structure.components
    ]
    problems += [
        f"{what[:60]} has {found} numbers where {wanted} belong" for what, found, wanted in sizes if found != wanted
    ]
    if problems:
        raise UserError(
            f"The manifest does not match the model: {problems[0]}.",
            code="manifest-mismatch",
            where=str(model.checkpoint.folder),
            fix="use manifest.json and heretic/directions.safetensors as heretic export wrote them",
        )


def _verdict(
    manifest: Manifest,
    home: Path,
    partial: Path,
    made: WriteResult,
    changed: list[str],
    destination: Path | None,
    reporter: ProgressReporter,
    stop: StopSignal,
) -> Reproduction:
    """Compare what was written with the manifest's hashes, and with the weights beside it where these differ."""
    then, written = manifest.written.sha256, made.hashes["written"]
    files = {name: then.get(name) == written.get(name) for name in sorted({*then, *written})}
    others = all(
        then_.sha256 == made.hashes.get(kind, {})
        for kind, then_ in (("copied", manifest.copied), ("changed", manifest.changed))
    )

    def verdict(said: Verdict, why: str, apart: Difference | None = None) -> Reproduction:
        if said != "different" and not others:
            said, why = "different", f"the weights are {WORDS[said]}, but other files of the base are not the same"
        return Reproduction(said, files, tuple(changed), why, apart, destination)

    if all(files.values()):
        return verdict("identical", "every file of the weights has the hash that the manifest names")
    if set(then) != set(written):
        return verdict("different", "the weights lie in other files")
    if not all(name.endswith(".safetensors") for name in written):
        return verdict("different", "the hashes differ; by how much is only said of safetensors files")
    with reporter.stage("Comparing with the exported weights", None):
        apart = weight_difference(partial, home, written, stop)
        spoilt = [n for n in written if (home / n).is_file() and sha256(home / n) != then[n]]
    if isinstance(apart, str):
        return verdict("different", f"the hashes differ, and by how much cannot be said: {apart}")
    if spoilt:
        return verdict("different", f"{spoilt[0]} beside the manifest is not the file that the manifest names", apart)
    if apart.differing == 0:
        return verdict("identical", "every number is the same; only the files' headers are not", apart)
    if apart.within:
        return verdict("equal", f"no number is further away than rounding explains: {apart}", apart)
    return verdict("different", str(apart), apart)


def _differs(what: str, then: Mapping[str, str], now_: Mapping[str, str]) -> list[str]:
    return differences({what: dict(then)}, {what: dict(now_)})
