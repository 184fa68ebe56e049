"""A run's folder: everything that has been computed, each file whole or not there."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from torch import Tensor

from heretic.ablation.directions import Directions
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.errors import SettingsError, UserError, first_line
from heretic.files import expand_user, open_private, read_tensors, write_tensors
from heretic.progress import ProgressReporter
from heretic.runs.stored_tensors import Baseline, directions_of, geometry_of, state_of, state_tensors
from heretic.search.path_optimizer import OptimizerState
from heretic.settings import Settings
from heretic.settings.sources import Resolved, read_toml, resolve
from heretic.settings.toml import resolved_text
from heretic.storage.url import masked

T = TypeVar("T")
BASELINE, GEOMETRY, REPORT = "baseline.safetensors", "geometry.safetensors", "report.html"


@dataclass(frozen=True)
class RunFolder:
    """Paths and contents of `runs/<name>`.

    `stamp` is the fingerprint that stored tensors must carry: those of other settings under the same name are not used.
    """

    path: Path
    fingerprint: str = ""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def lock(self) -> Path:
        """The lock that a process working on this run holds."""
        return self.path / ".lock"

    def create(self) -> None:
        """Make the folder, readable by its owner only: prompts, answers and logs lie in it.

        Raises:
            UserError: if it cannot be written, or if a file in it is a link (`link-in-run-folder`).
        """
        there = (self.path / "run.log").is_file()
        try:
            # Not writable by others: they could put another folder in the run's place.
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            for entry in self.path.iterdir():
                if entry.is_symlink() and not entry.is_dir():
                    raise UserError(
                        f"{entry.name} is a link, which heretic does not write through.",
                        code="link-in-run-folder",
                        where=str(entry),
                        fix="remove the link, or put the file itself in its place",
                    )
            check_writable(self.path)
        except OSError as error:
            raise UserError(
                f"The run's folder cannot be written: {error.strerror or error}",
                code="run-folder-unwritable",
                where=str(self.path),
                fix=f"copy it to a writable folder and name the copy: cp -r {quote(str(self.path))} FOLDER"
                if there
                else "set runs_dir to a writable folder",
            ) from None

    def archive(self) -> Path | None:
        """Rename an existing run so that a new one can begin; nothing is deleted. Returns where it went."""
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for number in itertools.count(1):  # a second one within the same second gets a number
            aside = self.path.with_name(f"{self.path.name}.{stamp}" + (f"-{number}" if number > 1 else ""))
            if not aside.exists():
                break
        self.path.rename(aside)
        return aside

    def load_directions(self, reporter: ProgressReporter) -> Directions | None:
        """The stored directions; None if there are none, or if the file is damaged, which is said."""
        return self._read("directions.safetensors", directions_of, reporter)

    def save_directions(self, directions: Directions) -> None:
        """Store the directions."""
        write_directions(self.path / "directions.safetensors", directions, self.fingerprint, private=True)

    def load_geometry(self) -> ResidualGeometry | None:
        """How the residuals that gave the directions lie; None if that is not stored or damaged. Changes nothing."""
        try:
            tensors, metadata = read_tensors(self.path / GEOMETRY)
            return geometry_of(tensors) if self.fingerprint in ("", metadata.get("fingerprint")) else None
        except (UserError, ValueError):
            return None

    def save_geometry(self, geometry: ResidualGeometry) -> None:
        """Store how the residuals lie, for the report and for `heretic geometry`."""
        write_tensors(self.path / GEOMETRY, geometry.tensors(), {"fingerprint": self.fingerprint}, private=True)

    def load_baseline(self, reporter: ProgressReporter) -> Baseline | None:
        """The stored baseline; None if there is none or it is damaged, which is said."""
        return self._read(BASELINE, Baseline.of, reporter)

    def save_baseline(self, baseline: Baseline) -> None:
        """Store the baseline."""
        write_tensors(self.path / BASELINE, baseline.tensors(), {"fingerprint": self.fingerprint}, private=True)

    def load_path_state(self, reporter: ProgressReporter) -> OptimizerState | None:
        """The stored state of a descent under way; None if there is none or it is damaged, which is said."""
        return self._read("gradient_path.safetensors", state_of, reporter)

    def path_steps(self) -> int:
        """How far the stored descent has come; 0 if there is none that can be read. Changes nothing."""
        try:
            tensors, _ = read_tensors(self.path / "gradient_path.safetensors")
            return state_of(tensors).steps
        except (UserError, ValueError):
            return 0

    def save_path_state(self, state: OptimizerState) -> None:
        """Store the state of a descent: a few kilobytes, after every step."""
        write_tensors(
            self.path / "gradient_path.safetensors",
            state_tensors(state),
            {"fingerprint": self.fingerprint},
            private=True,
        )

    def _read(
        self, name: str, reader: Callable[[Mapping[str, Tensor]], T | None], reporter: ProgressReporter
    ) -> T | None:
        """What a file of this run holds; a damaged one is moved out of the way."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            tensors, metadata = read_tensors(file)
            return reader(tensors) if metadata.get("fingerprint") == self.fingerprint else None
        except UserError as error:
            problem = error.what
        except ValueError as error:
            problem = f"{name} is damaged: {first_line(error)}."
        reporter.warning(f"{problem} heretic makes it again.")
        file.rename(file.with_suffix(".damaged"))
        return None


def check_writable(folder: Path) -> None:
    """Make a file in a folder and delete it. Raises OSError if that is not possible."""
    probe = folder / f".probe.{os.getpid()}"
    probe.unlink(missing_ok=True)
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    probe.unlink()


def write_directions(
    path: Path, directions: Directions, stamp: str, more: Mapping[str, str] | None = None, *, private: bool = False
) -> None:
    """Write the layers' directions in float32 as a tensor `directions` [layers, width], and `extra` [layers, count - 1, width]
    where a layer has several; `stamp` is their run's fingerprint, `more` goes into the metadata too."""
    layout = {"layout": "row l: unit direction after block l; extra: the others of each", "fingerprint": stamp}
    extra = {} if directions.extra is None else {"extra": directions.extra}
    write_tensors(path, {"directions": directions.vectors, **extra}, {**layout, **(more or {})}, private=private)


class _LogFile(logging.FileHandler):
    def _open(self) -> Any:
        return os.fdopen(open_private(Path(self.baseFilename), "a"), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk lines are lost in silence: what is stopped by the disk says so itself, once."""


def log_to(path: Path) -> logging.Handler:
    """Send what heretic logs to a file, with the time; the caller removes the handler."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("heretic")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def find_run(name: str, runs_dir: str) -> RunFolder:
    """The run of this name or path; the one worked on last if no name is given. Raises UserError."""
    root = Path(runs_dir)
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise UserError(
            "The folder of runs cannot be read.",
            code="unreadable-file",
            where=str(root.resolve()),
            fix="check its permissions",
        )
    if name:
        for path in (Path(name), root / name):
            if (path / "config.toml").is_file():
                return RunFolder(path if path.name not in ("", "..") else path.resolve())
        known = ", ".join(p.name for p in _runs(root)[-5:])
        raise UserError(
            f"There is no run '{name}'.",
            code="run-not-found",
            where=str(root.resolve()),
            fix=f"one of: {known}" if known else "start one: heretic MODEL",
        )
    runs = _runs(root)
    if not runs:
        raise UserError(
            "There is no run yet.", code="run-not-found", where=str(root.resolve()), fix="start one: heretic MODEL"
        )
    return RunFolder(runs[-1])


def find_existing_run(name: str, runs_dir: str) -> RunFolder | None:
    """The run of this name or folder; None if it means something else, such as a model."""
    if not name or (Path(name) / "config.json").is_file():
        return None
    places = (Path(name), Path(runs_dir) / name)
    return find_run(name, runs_dir) if any((path / "config.toml").is_file() for path in places) else None


def exported_folder(source: str, runs_dir: str, trial: int | None) -> Path:
    """The exported model that is meant: a folder with a manifest, or what a run has exported into its own folder.

    Raises UserError where there is none, or several and no trial is named.
    """
    folder = expand_user(source)
    if (folder / "manifest.json").is_file():
        return folder
    if folder.is_dir() and not (folder / "config.toml").is_file():
        raise UserError(
            "The folder does not contain a model that heretic exported.",
            code="export-not-found",
            where=str(folder),
            fix="name a run or the folder of an exported model",
        )
    run = find_run(source, runs_dir)
    wanted = "*" if trial is None else f"trial-{trial}"
    found = sorted(p.parent for p in run.path.glob(f"models/{wanted}/manifest.json"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"The run has exported {len(found)} trials.",
            code="several-exports",
            where=str(run.path),
            fix=f"choose one with --trial N, for example {found[0].name}",
        )
    raise UserError(
        "The run has no exported model in its own folder.",
        code="export-not-found",
        where=str(run.path / "models"),
        fix=f"name the folder of the exported model, or: heretic export {run.path} -o FOLDER --upload user/name",
    )


def load_run_settings(
    folder: RunFolder,
    environment: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> Resolved:
    """The settings that a run was made with; of the environment only the storage counts, whose password is not stored.

    Raises SettingsError as `resolve` does: the file may have been edited, or be another version's.
    """
    file = read_toml(folder.path / "config.toml")
    # For the password, which the file lacks: a run whose study lies in its own folder stays there.
    shared = bool(file.values.get("storage"))
    storage = {k: v for k, v in environment.items() if k == "HERETIC_STORAGE" and shared}
    try:
        resolved = resolve(file, options, assignments, storage)
    except SettingsError as error:
        if error.code != "unknown-setting" or not (error.where or "").startswith(str(file.path)):
            raise
        fix = f"{error.fix}; or use the version of heretic that wrote the file"
        raise SettingsError(error.what, code=error.code, where=error.where, fix=fix) from None
    before = file.written_origins()
    origins = {k: before.get(k, o) if o.startswith(f"{file.path}:") else o for k, o in resolved.origins.items()}
    return Resolved(resolved.settings, file.path, origins)


def load_settings(folder: RunFolder, environment: Mapping[str, str]) -> Settings:
    """As `stored`, without where they came from."""
    return load_run_settings(folder, environment).settings


def _runs(root: Path) -> list[Path]:
    """The runs' folders, the one changed last at the end."""
    return sorted((p for p in root.glob("*") if (p / "config.toml").is_file()), key=_last_change)


def _last_change(path: Path) -> float:
    return max(f.stat().st_mtime for f in (path, path / "config.toml", path / "study.db") if f.exists())


def settings_text(resolved: Resolved) -> str:
    """The settings as kept in the run's folder, without the password that a storage URL may hold."""
    settings = resolved.settings
    kept = settings.model_copy(update={"storage": masked(settings.storage)})
    return resolved_text(Resolved(kept, resolved.file, resolved.origins))
