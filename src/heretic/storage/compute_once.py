"""Compute a file once for all workers of a study: one computes it, the others wait and use the same file.

The study stores which worker computes, and the hash of the result. Workers without a shared run folder download the file from
an artifact store, or recompute it and compare the hash.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna

from heretic.errors import StudyMismatch, UserError, first_line
from heretic.files import read_tensors
from heretic.interrupt import StopSignal
from heretic.progress import ProgressReporter
from heretic.settings import WorkerSettings
from heretic.storage import attributes
from heretic.storage.attributes import CLAIM, RESULT, Claim, ComputedResult, Signature
from heretic.storage.heartbeat import StalenessTimer, heartbeat_thread
from heretic.storage.rdb import is_alive, worker
from heretic.storage.retrying import effective_grace_period
from heretic.storage.study_lock import LockLost, study_lock

POLL_SECONDS = 1.0


class ComputeOnce:
    """Coordinates computations that are needed once per study; this class does so for a single worker."""

    @contextmanager
    def shared_file(self, name: str) -> Iterator[None]:
        """Enter a context in which the file exists, or which must write it before its end."""
        yield

    @contextmanager
    def once(self, name: str, exists: Callable[[], bool]) -> Iterator[None]:
        """Enter a context in which `exists()` is true, or which must make it true before its end."""
        yield


LOCAL = ComputeOnce()


@dataclass
class DistributedComputeOnce(ComputeOnce):
    """Implementation for a study with several workers."""

    study: optuna.Study
    folder: Path
    fingerprint: str  # the fingerprint that the folder's files must carry
    artifacts: str
    workers: WorkerSettings
    reporter: ProgressReporter
    stop: StopSignal
    claim_timers: dict[str, StalenessTimer] = field(default_factory=dict)

    @contextmanager
    def shared_file(self, name: str) -> Iterator[None]:
        """See ComputeOnce. Raises StudyMismatch if this worker's file differs from that of the other workers."""
        with self.once(name, lambda: self._is_available(name)):
            yield
            self._register(name)

    @contextmanager
    def once(self, name: str, exists: Callable[[], bool]) -> Iterator[None]:
        """See ComputeOnce. Raises Interrupted."""
        reported = False
        while not exists():
            self.stop.check()
            if self._try_claim(name, exists):
                with self._claim_heartbeat(name):
                    yield
                return
            if not reported:
                self.reporter.info(f"Waiting for {name}, which {self._claim_owner(name)} is computing.")
                reported = True
            time.sleep(POLL_SECONDS)
        yield

    def _is_available(self, name: str) -> bool:
        """Return whether no other worker has to be waited for: the folder has the study's file, or could download it.

        Also True if the file is computed but cannot be downloaded: this worker then recomputes it.
        """
        made, path = attributes.computed_result(self.study, name), self.folder / name
        if made is None:
            if self._hash(path):
                self._register(name)
                return True
            return False
        if self._hash(path) != made["sha256"] and not self._fetch(name, made):
            if self._hash(path):
                raise self._mismatch(name, made)
            self.reporter.info(
                f"Another worker computed {name}, but it cannot be downloaded. Recomputing it and comparing the result."
            )
        return True

    def _fetch(self, name: str, made: ComputedResult) -> bool:
        """Download a published file and check its hash; on failure change nothing and return False."""
        if not self.artifacts or not made["artifact"]:
            return False
        download = self.folder / f".{name}.{os.getpid()}.fetched"
        download.unlink(missing_ok=True)
        try:
            optuna.artifacts.download_artifact(
                artifact_store=artifact_store(self.artifacts), file_path=str(download), artifact_id=made["artifact"]
            )
            if self._hash(download) != made["sha256"]:
                self.reporter.warning(f"Ignoring the published {name}: it does not match its checksum.")
                return False
            os.replace(download, self.folder / name)
        except Exception as error:  # whatever the store's client raises
            self.reporter.warning(f"Cannot download the published {name}: {first_line(error)}")
            return False
        finally:
            download.unlink(missing_ok=True)
        self.reporter.info(f"Downloaded {name}, computed by {made['worker']}.")
        return True

    def _register(self, name: str) -> None:
        """Store the file's hash in the study and publish the file; the first worker's file counts."""
        sha256 = self._hash(self.folder / name)
        made = attributes.computed_result(self.study, name)
        if made is None:
            artifact = ""
            if self.artifacts:
                try:
                    artifact = optuna.artifacts.upload_artifact(
                        artifact_store=artifact_store(self.artifacts),
                        file_path=str(self.folder / name),
                        study_or_trial=self.study,
                    )
                except Exception as error:  # whatever the store's client raises
                    raise UserError(
                        f"Cannot publish {name}: {first_line(error)}",
                        code="artifacts-unwritable",
                        where=self.artifacts,
                        fix="make it writable, or leave artifacts empty",
                    ) from None
            mine: ComputedResult = {"sha256": sha256, "artifact": artifact, "worker": _process_name(worker())}
            try:
                with study_lock(self.study):
                    made = attributes.computed_result(self.study, name)
                    if made is None:
                        self.study.set_user_attr(RESULT + name, json.dumps(mine))
                        made = mine
            except LockLost:
                made = attributes.computed_result(self.study, name) or mine
        if made["sha256"] != sha256:
            raise self._mismatch(name, made)

    def _hash(self, path: Path) -> str:
        """Return the hash of the tensors in a file; empty if it is missing, damaged or of other settings."""
        if not path.is_file():
            return ""
        try:
            _, metadata = read_tensors(path)
        except UserError:
            return ""
        return metadata["sha256"] if metadata.get("fingerprint") == self.fingerprint else ""

    def _mismatch(self, name: str, made: ComputedResult) -> StudyMismatch:
        return StudyMismatch(
            f"The {name} of this machine differs from the study's (computed by {made['worker']}). Different hardware rounds "
            "differently, so the scores would not be comparable.",
            code="artifact-mismatch",
            where=str(self.folder / name),
            fix='set artifacts = "/folder/that/all/see" on every machine, and delete the file here'
            if not self.artifacts
            else "delete the file here; heretic downloads the study's",
        )

    def _try_claim(self, name: str, exists: Callable[[], bool]) -> bool:
        """Claim the computation; False if it is done or another live worker has claimed it."""
        try:
            with study_lock(self.study):
                claim = attributes.claim(self.study, name)
                if exists() or (claim and not self._claim_expired(name, claim)):
                    return False
                self._sign(name, 0)
                return True
        except LockLost:
            return False

    def _claim_expired(self, name: str, claim: Claim) -> bool:
        """Return whether the claiming worker is dead: its local process is gone, or no heartbeat for the grace period."""
        silent = self.claim_timers.setdefault(name, StalenessTimer()).seconds(claim)
        return not is_alive(claim["worker"]) or silent > effective_grace_period(self.workers)

    @contextmanager
    def _claim_heartbeat(self, name: str) -> Iterator[None]:
        count = 0

        def beat() -> None:
            nonlocal count
            count += 1
            self._sign(name, count)

        try:
            with heartbeat_thread(beat, self.workers.heartbeat):
                yield
        finally:
            self.study.set_user_attr(CLAIM + name, None)

    def _sign(self, name: str, count: int) -> None:
        self.study.set_user_attr(CLAIM + name, json.dumps({"worker": worker(), "signs": count}))

    def _claim_owner(self, name: str) -> str:
        claim = attributes.claim(self.study, name)
        return _process_name(claim["worker"]) if claim else "another worker"


def artifact_store(place: str) -> Any:
    """Open Optuna's artifact store at a folder or an s3:// address. Raises UserError."""
    if not place.startswith("s3://"):
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot create the folder for artifacts: {error.strerror}.",
                code="artifacts-unwritable",
                where=place,
                fix="set artifacts to a writable folder, or leave it empty",
            ) from None
        return optuna.artifacts.FileSystemArtifactStore(place)
    bucket, _, prefix = place.removeprefix("s3://").strip("/").partition("/")
    try:
        store = optuna.artifacts.Boto3ArtifactStore(bucket)
    except ImportError:
        raise UserError(
            "Artifacts on S3 require the package boto3.", code="missing-package", where=place, fix="pip install boto3"
        ) from None
    return _PrefixedStore(store, prefix) if prefix else store


@dataclass
class _PrefixedStore:
    """Artifact store that adds a prefix to all names."""

    store: Any
    prefix: str

    def open_reader(self, artifact_id: str) -> Any:
        return self.store.open_reader(f"{self.prefix}/{artifact_id}")

    def write(self, artifact_id: str, content_body: Any) -> None:
        self.store.write(f"{self.prefix}/{artifact_id}", content_body)

    def remove(self, artifact_id: str) -> None:
        self.store.remove(f"{self.prefix}/{artifact_id}")


def _process_name(who: Signature) -> str:
    return f"process {who['pid']} on {who['host']}"
