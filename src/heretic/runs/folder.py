"""Read and write a run's folder; every file is written atomically."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar

from heretic.errors import SettingsError, UserError, first_line
from heretic.files import expand_user, link_error, open_private, read_tensors, split_lines, write_tensors
from heretic.progress import ProgressReporter
from heretic.runs.local_paths import with_absolute_paths
from heretic.settings import Settings
from heretic.settings.sources import Resolved, read_toml, resolve
from heretic.settings.toml import resolved_text
from heretic.storage.url import masked

if TYPE_CHECKING:  # `heretic status` opens runs without torch: the methods for tensors import what they need
    from torch import Tensor

    from heretic.ablation.directions import Directions
    from heretic.ablation.geometries.conditional import InputMap
    from heretic.ablation.residual_geometry import ResidualGeometry
    from heretic.runs.stored_tensors import Baseline
    from heretic.scoring.direction_effects import DirectionEffects
    from heretic.search.path_optimizer import OptimizerState

T = TypeVar("T")
MOST_LOG_READ = 64 << 10  # bytes from its end
PATH_STATE, DENSE_PATH_STATE = "gradient_path", "dense_path"  # of the gradient search, and of a second one
BASELINE, GEOMETRY, REPORT = "baseline.safetensors", "geometry.safetensors", "report.html"
INPUT_MAPS, EFFECTS = "input_maps.safetensors", "effects.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Paths and contents of `runs/<name>`."""

    path: Path
    fingerprint: str = ""  # stored tensors with another fingerprint belong to other settings and are ignored

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def lock(self) -> Path:
        """The lock file of the process that works on this run."""
        return self.path / ".lock"

    def create(self) -> None:
        """Create the folder, private to its owner because it contains prompts, responses and logs.

        Raises:
            UserError: with code run-folder-unwritable, or link-in-run-folder if a file in it is a link.
        """
        has_run = (self.path / "run.log").is_file()
        try:
            # Not writable by others, who could otherwise replace the run's folder.
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            for entry in self.path.iterdir():
                if entry.is_symlink() and not entry.is_dir():
                    raise link_error(entry)
            check_writable(self.path)
        except OSError as error:
            raise UserError(
                f"The run's folder cannot be written: {error.strerror or error}",
                code="run-folder-unwritable",
                where=str(self.path),
                fix=f"copy it to a writable folder and use the copy: cp -r {quote(str(self.path))} FOLDER"
                if has_run
                else "set runs_dir to a writable folder",
            ) from None

    def archive(self) -> Path | None:
        """Rename an existing run's folder, so that a new run can use its name; return the new path. Raises UserError."""
        if not self.path.exists():
            return None
        timestamp = time.strftime("%Y%m%d-%H%M%S")
        for number in itertools.count(1):  # several within one second
            archive = self.path.with_name(f"{self.path.name}.{timestamp}" + (f"-{number}" if number > 1 else ""))
            if not archive.exists():
                break
        try:
            self.path.rename(archive)
        except OSError as error:  # a mount point, or a folder of a container's image
            raise UserError(
                f"The earlier run cannot be renamed: {error.strerror}.",
                code="run-folder-unwritable",
                where=str(self.path),
                fix="choose another run_name",
            ) from None
        return archive

    def log_end(self, lines: int) -> list[str]:
        """Return the last lines of the run's log; empty without one."""
        file = self.path / "run.log"
        if not file.is_file():
            return []
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - MOST_LOG_READ))
            return split_lines(opened.read().decode("utf-8", "replace"))[-lines:]

    def load_directions(self, reporter: ProgressReporter) -> Directions | None:
        """Load the directions; None if there are none or, with a warning, if the file is damaged."""
        from heretic.runs import stored_tensors

        return self._read("directions.safetensors", stored_tensors.directions_from_tensors, reporter)

    def save_directions(self, directions: Directions) -> None:
        """Store the directions."""
        write_directions(self.path / "directions.safetensors", directions, self.fingerprint, private=True)

    def load_input_maps(self, reporter: ProgressReporter) -> dict[str, InputMap] | None:
        """Load the input maps of the writers; None if there are none or, with a warning, if the file is damaged."""
        from heretic.runs import stored_tensors

        return self._read(INPUT_MAPS, stored_tensors.input_maps_from_tensors, reporter)

    def save_input_maps(self, input_maps: Mapping[str, InputMap]) -> None:
        """Store the input maps of the writers."""
        from heretic.runs import stored_tensors

        tensors = stored_tensors.input_map_tensors(input_maps)
        write_tensors(self.path / INPUT_MAPS, tensors, {"fingerprint": self.fingerprint}, private=True)

    def load_geometry(self) -> ResidualGeometry | None:
        """Load the residual geometry; None if it is missing or damaged. Never changes the folder."""
        from heretic.runs import stored_tensors

        return self._peek(GEOMETRY, stored_tensors.geometry_from_tensors)

    def load_effects(self) -> DirectionEffects | None:
        """Load the effects of the directions; None if they are missing or damaged. Never changes the folder."""
        from heretic.runs import stored_tensors

        return self._peek(EFFECTS, stored_tensors.effects_from_tensors)

    def _peek(self, name: str, reader: Callable[[Mapping[str, Tensor]], T]) -> T | None:
        try:
            tensors, metadata = read_tensors(self.path / name)
            return reader(tensors) if self.fingerprint in ("", metadata.get("fingerprint")) else None
        except (UserError, ValueError):
            return None

    def save_geometry(self, geometry: ResidualGeometry) -> None:
        """Store the residual geometry for the report and `heretic geometry`."""
        write_tensors(self.path / GEOMETRY, geometry.tensors(), {"fingerprint": self.fingerprint}, private=True)

    def save_effects(self, effects: DirectionEffects) -> None:
        """Store the effects of the directions for the report and `heretic geometry`."""
        write_tensors(self.path / EFFECTS, effects.tensors(), {"fingerprint": self.fingerprint}, private=True)

    def load_baseline(self, reporter: ProgressReporter) -> Baseline | None:
        """Load the baseline; None if there is none or, with a warning, if the file is damaged."""
        from heretic.runs import stored_tensors

        return self._read(BASELINE, stored_tensors.Baseline.from_tensors, reporter)

    def save_baseline(self, baseline: Baseline) -> None:
        """Store the baseline."""
        write_tensors(self.path / BASELINE, baseline.tensors(), {"fingerprint": self.fingerprint}, private=True)

    def load_path_state(self, reporter: ProgressReporter, name: str = PATH_STATE) -> OptimizerState | None:
        """Load the state of a gradient search; None if there is none or, with a warning, if it is damaged."""
        from heretic.runs import stored_tensors

        return self._read(f"{name}.safetensors", stored_tensors.optimizer_state_from_tensors, reporter)

    def path_steps(self, name: str = PATH_STATE) -> int:
        """Return the completed steps of a gradient search; 0 if its state is not readable. Never changes the folder."""
        from heretic.runs import stored_tensors

        try:
            tensors, _ = read_tensors(self.path / f"{name}.safetensors")
            return stored_tensors.optimizer_state_from_tensors(tensors).steps
        except (UserError, ValueError):
            return 0

    def save_path_state(self, state: OptimizerState, name: str = PATH_STATE) -> None:
        """Store the state of the gradient search, a few kilobytes after every step."""
        from heretic.runs import stored_tensors

        write_tensors(
            self.path / f"{name}.safetensors",
            stored_tensors.optimizer_state_tensors(state),
            {"fingerprint": self.fingerprint},
            private=True,
        )

    def _read(
        self, name: str, reader: Callable[[Mapping[str, Tensor]], T | None], reporter: ProgressReporter
    ) -> T | None:
        """Read a file of this run; rename a damaged one, with a warning."""
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
        reporter.warning(f"{problem} heretic recomputes it.")
        file.rename(file.with_suffix(".damaged"))
        return None


def check_writable(folder: Path) -> None:
    """Create a file in a folder and delete it. Raises OSError if the folder is not writable."""
    probe = folder / f".probe.{os.getpid()}"
    probe.unlink(missing_ok=True)
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    probe.unlink()


def write_directions(
    path: Path,
    directions: Directions,
    fingerprint: str,
    metadata: Mapping[str, str] | None = None,
    *,
    private: bool = False,
) -> None:
    """Write the directions in float32.

    The tensors are `directions` [layers, width] and, if a layer has several, `extra` [layers, count - 1, width].

    Args:
        path: the safetensors file.
        directions: the directions.
        fingerprint: the fingerprint of their run.
        metadata: further metadata.
        private: if true, only the owner can read the file.
    """
    layout = {"layout": "row l: unit direction after block l; extra: the others of each", "fingerprint": fingerprint}
    extra = {} if directions.extra is None else {"extra": directions.extra}
    write_tensors(path, {"directions": directions.vectors, **extra}, {**layout, **(metadata or {})}, private=private)


class _LogFile(logging.FileHandler):
    def _open(self) -> Any:
        return os.fdopen(open_private(Path(self.baseFilename), "a"), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line on a full disk; the operation that needs the disk reports the problem once."""


def log_to(path: Path) -> logging.Handler:
    """Write heretic's log with timestamps to a file; the caller removes the returned handler."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("heretic")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def find_run(name: str, runs_dir: str) -> RunFolder:
    """Return the run of this name or path; without a name, the latest one. Raises UserError if there is none."""
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
        known = ", ".join(p.name for p in existing_runs(root)[-5:])
        is_model = any((Path(name) / file).is_file() for file in ("config.json", "manifest.json"))
        raise UserError(
            f"'{name}' is a model's folder, not a run." if is_model else f"Unknown run '{name}'.",
            code="run-not-found",
            where=str(root.resolve()),
            fix=f"use one of: {known}" if known else "start one: heretic MODEL",
        )
    runs = existing_runs(root)
    if not runs:
        raise UserError(
            "There are no runs.", code="run-not-found", where=str(root.resolve()), fix="start one: heretic MODEL"
        )
    return RunFolder(runs[-1])


def find_existing_run(name: str, runs_dir: str) -> RunFolder | None:
    """Return the run of this name or folder; None if the name is not a run's, for example a model's."""
    if not name or (Path(name) / "config.json").is_file():
        return None
    candidates = (Path(name), Path(runs_dir) / name)
    return find_run(name, runs_dir) if any((path / "config.toml").is_file() for path in candidates) else None


def exported_folder(source: str, runs_dir: str, trial: int | None) -> Path:
    """Return the folder of an exported model.

    Args:
        source: a folder with a manifest, or a run with exports in its own folder.
        runs_dir: the folder of all runs.
        trial: number of the trial, if the run exported several.

    Raises:
        UserError: with code export-not-found or several-exports.
    """
    folder = expand_user(source)
    if (folder / "manifest.json").is_file():
        return folder
    if folder.is_dir() and not (folder / "config.toml").is_file():
        raise UserError(
            "The folder does not contain a model that heretic exported.",
            code="export-not-found",
            where=str(folder),
            fix="use the name of a run or the folder of an exported model",
        )
    run = find_run(source, runs_dir)
    pattern = "*" if trial is None else f"trial-{trial}"
    exports = sorted(p.parent for p in run.path.glob(f"models/{pattern}/manifest.json"))
    if len(exports) == 1:
        return exports[0]
    if exports:
        raise UserError(
            f"The run has exported {len(exports)} trials.",
            code="several-exports",
            where=str(run.path),
            fix=f"choose one with --trial N, for example {exports[0].name}",
        )
    raise UserError(
        "The run has no exported model in its own folder.",
        code="export-not-found",
        where=str(run.path / "models"),
        fix=f"use the folder of the exported model, or run: heretic export {quote(str(run.path))} -o FOLDER --upload user/name",
    )


def load_run_settings(
    folder: RunFolder,
    environment: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> Resolved:
    """Load the settings of a run.

    From the environment it uses only HERETIC_STORAGE, for the password, which the file does not contain.

    Raises:
        SettingsError: as `resolve`, for an edited file or one of another version.
    """
    file = read_toml(folder.path / "config.toml")
    shared = bool(file.values.get("storage"))  # a study in the run's own folder stays there
    storage = {k: v for k, v in environment.items() if k == "HERETIC_STORAGE" and shared}
    try:
        resolved = resolve(file, options, assignments, storage)
    except SettingsError as error:
        own = (error.where or "").startswith(str(file.path))
        if not own or error.code not in ("unknown-setting", "invalid-setting"):
            raise
        fix = f"{error.fix}; or use the version of heretic that wrote the file"
        raise SettingsError(error.what, code=error.code, where=error.where, fix=fix) from None
    if resolved.origin("revision").startswith(f"{file.path}:") and resolved.settings.model != file.values.get("model"):
        resolved = replace(resolved, settings=resolved.settings.model_copy(update={"revision": ""}))
    resolved = with_absolute_paths(resolved, folder.path, file.values)
    written = file.written_origins()
    origins = {k: written.get(k, o) if o.startswith(f"{file.path}:") else o for k, o in resolved.origins.items()}
    return replace(resolved, origins=origins)


def load_settings(folder: RunFolder, environment: Mapping[str, str]) -> Settings:
    """Load the settings of a run without their origins, as `load_run_settings`."""
    return load_run_settings(folder, environment).settings


def existing_runs(root: Path) -> list[Path]:
    """Return the runs' folders, the most recently changed last."""
    return sorted(
        (p for p in root.glob("*") if os.access(p, os.X_OK) and (p / "config.toml").is_file()), key=_last_change
    )


def _last_change(path: Path) -> float:
    return max(f.stat().st_mtime for f in (path, path / "config.toml", path / "study.db") if f.exists())


def settings_text(resolved: Resolved) -> str:
    """Return the settings as TOML for the run's folder, without a password in the storage URL."""
    settings = resolved.settings
    without_password = settings.model_copy(update={"storage": masked(settings.storage)})
    return resolved_text(replace(resolved, settings=without_password))
