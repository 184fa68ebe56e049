"""Upload an exported, verified model to the Hugging Face hub: only by explicit command, private by default."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from heretic.errors import Interrupted, UserError, first_line, plain_line
from heretic.export.companions import leaves
from heretic.export.destination import abbreviated
from heretic.export.manifest import MANIFEST, ExportedFiles, read_exported_files
from heretic.files import sha256
from heretic.interrupt import StopSignal
from heretic.model.hub_model import hub_answer
from heretic.model.repository import resolve_inside
from heretic.progress import ProgressReporter

CARD = "README.md"
UNCOUNTED = {".gitattributes", ".gitignore"}  # files of a repository that the hub makes itself


@dataclass(frozen=True)
class Upload:
    """What is to go where: a folder that heretic has written, whole, to a repository `owner/name`."""

    folder: Path
    repository: str
    public: bool
    manifest: ExportedFiles
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.stat().st_size for file in self.files)


def check_upload(repository: str) -> None:
    """Raise UserError for an invalid repository name, a missing token, or offline mode."""
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository):
        raise UserError(
            f"Invalid repository name: {repository!r}.",
            code="invalid-repository-name",
            fix="write it as user/model-name",
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE is set, so heretic cannot upload.",
            code="hub-offline",
            fix="unset it, then run the same command again",
        )
    if not get_token():
        raise UserError(
            "There is no token for the Hugging Face hub.", code="no-token", fix="run hf auth login, or set HF_TOKEN"
        )


def plan_upload(folder: Path, repository: str, *, public: bool, reporter: ProgressReporter, stop: StopSignal) -> Upload:
    """Check everything that can be checked locally. Raises UserError: as `check_upload`, or for a changed export."""
    check_upload(repository)
    manifest = read_exported_files(folder)
    for name in (CARD, MANIFEST):
        resolve_inside(folder, folder / name)
    if not (folder / CARD).is_file():
        raise UserError(
            "The model card is missing, so heretic does not upload the model.",
            code="card-missing",
            where=str(folder / CARD),
            fix="export the trial again",
        )
    if not manifest.files:
        raise UserError(
            "The manifest lists no files.",
            code="manifest-without-files",
            where=str(folder / MANIFEST),
            fix="export the trial again",
        )
    with reporter.stage("Checking the upload", len(manifest.files)) as stage:
        for name, verified in manifest.files.items():
            stop.check()
            file = resolve_inside(folder, folder / name)
            if not file.is_file() or (name != CARD and sha256(file) != verified):
                raise UserError(
                    f"{name} is not the file that was verified: it is missing or was changed after the export.",
                    code="export-changed",
                    where=str(folder),
                    fix="export the trial again",
                )
            stage.advance()
    names = {*manifest.files, CARD, MANIFEST}
    others = sorted(
        name for f in folder.rglob("*") if f.is_file() and (name := f.relative_to(folder).as_posix()) not in names
    )
    if others := [name for name in others if not _hidden(Path(name))]:
        reporter.info(f"Not uploading files that the export did not write: {abbreviated(others)}.")
    if paths := local_paths(folder):
        shown = abbreviated([plain_line(path) for path in paths], 1)
        reporter.info(f"{MANIFEST} shows paths of this machine: {shown}. heretic uploads them too.")
    return Upload(folder, repository, public, manifest, tuple(sorted(folder / name for name in names)))


def local_paths(folder: Path) -> list[str]:
    """Return the absolute paths in an export's manifest and adapter config, which may hold a user's name."""
    found: set[str] = set()
    for name in (MANIFEST, "adapter_config.json"):
        with suppress(OSError, ValueError):
            data = json.loads((folder / name).read_text(encoding="utf-8"))
            found |= {v for v in leaves(data) if isinstance(v, str) and len(v) > 1 and Path(v).is_absolute()}
    return sorted(found)


def upload(planned: Upload, reporter: ProgressReporter, stop: StopSignal) -> str:
    """Create the repository, or resume an interrupted upload, and send all files; returns the address.

    Card and manifest go first: the weights are never there without them. Raises UserError and Interrupted.
    """
    api, repository = HfApi(), planned.repository
    with _describe(repository), _immediate_interrupt(stop):
        user = str(api.whoami()["name"])
        stale = _compare_with_hub(api, planned)
        if stale is None:
            api.create_repo(repository, private=not planned.public)
        reporter.info(
            f"Uploading to {repository} as {user}. If interrupted, run the same command to resume."
            if stale is None
            else f"Resuming {repository} as {user}. Files already there are not sent again."
        )
        sent = [f.relative_to(planned.folder).as_posix() for f in planned.files]
        first: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, planned.folder / name) for name in (CARD, MANIFEST)
        ]
        if gone := sorted((stale or set()) - {*sent}):
            # In the same commit: weights of another trial or format never stand beside this one's card.
            first += [CommitOperationDelete(name) for name in gone]
            reporter.info(f"Removing {len(gone)} files of the earlier export (first: {gone[0]}).")
        api.create_commit(repository, first, commit_message="Card and manifest")
        api.upload_folder(
            repo_id=repository,
            folder_path=planned.folder,
            allow_patterns=sent,
            commit_message=f"Trial {planned.manifest.trial} of {planned.manifest.run}",
        )
    return f"{api.endpoint}/{repository}"


def _compare_with_hub(api: HfApi, planned: Upload) -> set[str] | None:
    """What of the repository's files is of an earlier export of the run; None if there is no such repository. Raises UserError
    where it holds something else, or is open to more people than asked for."""
    try:
        info = api.model_info(planned.repository)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None
    if not info.private and not planned.public:
        raise UserError(
            f"The repository {planned.repository} exists and is public.",
            code="repository-public",
            fix="pass --public to upload to it, or name another repository",
        )
    if info.private and planned.public:
        raise UserError(
            f"The repository {planned.repository} exists and is private.",
            code="repository-private",
            fix="omit --public, or make it public on the hub",
        )
    names = {s.rfilename for s in info.siblings or []} - UNCOUNTED
    if not names - {CARD} and (not names or _has_bare_card(api, planned.repository)):
        return set()
    hub_manifest = _hub_files(api, planned.repository)
    if hub_manifest is None or hub_manifest.run != planned.manifest.run:
        raise UserError(
            f"The repository {planned.repository} holds no model of this run.",
            code="repository-not-ours",
            fix="name another repository, or delete that one on the hub",
        )
    return names & {*hub_manifest.files}


def _hub_files(api: HfApi, repository: str) -> ExportedFiles | None:
    """The manifest of the model that a repository holds; None for anything else."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return read_exported_files(Path(api.hf_hub_download(repository, MANIFEST, local_dir=folder)))
        except (EntryNotFoundError, UserError):
            return None


def _has_bare_card(api: HfApi, repository: str) -> bool:
    """Whether a repository's card has no text, as the hub's website makes it for a new repository with a license."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(api.hf_hub_download(repository, CARD, local_dir=folder))
        text = file.read_text(encoding="utf-8", errors="replace")
    return not re.sub(r"\A---\s*$.*?^---\s*$", "", text, flags=re.MULTILINE | re.DOTALL).strip()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def _immediate_interrupt(stop: StopSignal) -> Iterator[None]:
    """Let Ctrl-C end an upload immediately; sent files stay."""
    try:
        with stop.raise_immediately():
            yield
    except KeyboardInterrupt:
        raise Interrupted from None


@contextmanager
def _describe(repository: str) -> Iterator[None]:
    """What the hub and the network say, in words; never the token."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:  # the hub's library and the network below it raise many kinds
        refused = hub_answer(error)
        if refused is None:
            raise UserError(
                f"The upload failed: {_clean(error)}",
                code="hub-unreachable",
                where=repository,
                fix="check the network, then run the same command again; heretic does not send finished files again",
            ) from None
        status = refused.response.status_code
        what, fix = {
            401: ("The hub does not accept the token.", "run hf auth login, or set another HF_TOKEN"),
            402: (f"The hub asks for a payment: {_clean(refused)}", "see the limits of your account on the hub"),
            403: (
                f"The hub does not allow writing to {repository}: {_clean(refused)}",
                "use a token with write permission, a repository of your user or organization, and free space on the hub",
            ),
            404: (f"The hub cannot create {repository}.", "check the user or organization in its name"),
            429: ("The hub has received too many requests.", "run the same command again later"),
        }.get(status, (f"The hub answered with an error: {_clean(refused)}", "run the same command again to resume"))
        raise UserError(what, code="hub-refused", where=f"{repository}, HTTP status {status}", fix=fix) from None


def _clean(error: Exception) -> str:
    """Return the hub's own message, which the library puts behind its own, or the first line; without the token."""
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    text = (plain_line(said) or first_line(error))[:200]
    token = get_token()
    return text.replace(token, "…") if token else text
