"""What the workers of a study make once: one makes it, the others wait for it and use the same.

The study says who is at it, and the hash of what it came to. Files lie in the run's folder; workers that do not share it get
them from an artifact store, or make their own and must come to the same.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
from heretic.storage.study_lock import LockLost, study_lock

POLL_SECONDS = 1.0


class ComputeOnce(Protocol):
    """Where things are that are made once."""

    def shared_file(self, name: str) -> Any:
        """A context in which a file of the run's folder is there, or is to be made by us before the context ends."""

    def once(self, name: str, exists: Callable[[], bool]) -> Any:
        """A context in which something is there, or is to be made by us before the context ends."""


class LocalComputeOnce:
    """Nobody else is there."""

    @contextmanager
    def shared_file(self, name: str) -> Iterator[None]:
        """See Shelf."""
        yield

    @contextmanager
    def once(self, name: str, exists: Callable[[], bool]) -> Iterator[None]:
        """See Shelf."""
        yield


LOCAL = LocalComputeOnce()


@dataclass
class DistributedComputeOnce:
    """The shelf of a study that several workers have open."""

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
        """See Shelf. Raises StudyMismatch if what we have, or make, is not what the other workers use."""
        with self.once(name, lambda: self._is_available(name)):
            yield
            self._register(name)

    @contextmanager
    def once(self, name: str, exists: Callable[[], bool]) -> Iterator[None]:
        """See Shelf. Raises Interrupted."""
        reported = False
        while not exists():
            self.stop.check()
            if self._try_claim(name, exists):
                with self._claim_heartbeat(name):
                    yield
                return
            if not reported:
                self.reporter.info(f"Waiting for {name}, which {self._claim_owner(name)} makes.")
                reported = True
            time.sleep(POLL_SECONDS)
        yield

    def _is_available(self, name: str) -> bool:
        """Whether the file is in the folder as the study knows it, fetched if that is possible; True also where only we
        can make it for ourselves, since it is made and out of reach."""
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
                f"{name} was made by another worker and cannot be had from it; it is made again and compared."
            )
        return True

    def _fetch(self, name: str, made: ComputedResult) -> bool:
        """Get a published file, whole and with its hash, or leave things as they are."""
        if not self.artifacts or not made["artifact"]:
            return False
        beside = self.folder / f".{name}.{os.getpid()}.fetched"
        beside.unlink(missing_ok=True)
        try:
            optuna.artifacts.download_artifact(
                artifact_store=artifact_store(self.artifacts), file_path=str(beside), artifact_id=made["artifact"]
            )
            if self._hash(beside) != made["sha256"]:
                self.reporter.warning(f"The published {name} is damaged; it is not used.")
                return False
            os.replace(beside, self.folder / name)
        except Exception as error:  # whatever the store's client raises
            self.reporter.warning(f"The published {name} cannot be fetched: {first_line(error)}")
            return False
        finally:
            beside.unlink(missing_ok=True)
        self.reporter.info(f"{name} comes from {made['worker']}.")
        return True

    def _register(self, name: str) -> None:
        """Say what the file came to, and publish it; the first one counts."""
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
                        f"{name} cannot be published: {first_line(error)}",
                        code="artifacts-unwritable",
                        where=self.artifacts,
                        fix="make the place writable, or leave artifacts empty",
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
        """The hash of the tensors in a file; empty where there is none that is whole and of these settings."""
        if not path.is_file():
            return ""
        try:
            _, kept = read_tensors(path)
        except UserError:
            return ""
        return kept["sha256"] if kept.get("fingerprint") == self.fingerprint else ""

    def _mismatch(self, name: str, made: ComputedResult) -> StudyMismatch:
        return StudyMismatch(
            f"The {name} of this machine differs from the study's (made by {made['worker']}). Different hardware rounds "
            "differently, so the scores would not be comparable.",
            code="artifact-mismatch",
            where=str(self.folder / name),
            fix='set artifacts = "/folder/that/all/see" on every machine, and delete the file here'
            if not self.artifacts
            else "delete the file here; heretic fetches the study's",
        )

    def _try_claim(self, name: str, exists: Callable[[], bool]) -> bool:
        """Whether it falls to us to make it: nobody is at it, or who was is dead."""
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
        """A process of this machine that is gone; one elsewhere whose count of signs of life has stood still for the grace
        period, by our clock."""
        silent = self.claim_timers.setdefault(name, StalenessTimer()).seconds(claim)
        return not is_alive(claim["worker"]) or silent > max(self.workers.grace_period, 2 * self.workers.heartbeat)

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
    """Optuna's artifact store at a folder or an S3 address. Raises UserError."""
    if not place.startswith("s3://"):
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder for artifacts cannot be created: {error.strerror}.",
                code="artifacts-unwritable",
                where=place,
                fix="name a folder that can be written, or leave artifacts empty",
            ) from None
        return optuna.artifacts.FileSystemArtifactStore(place)
    bucket, _, prefix = place.removeprefix("s3://").strip("/").partition("/")
    try:
        store = optuna.artifacts.Boto3ArtifactStore(bucket)
    except ImportError:
        raise UserError(
            "Artifacts on S3 need the package boto3.", code="missing-package", where=place, fix="pip install boto3"
        ) from None
    return _PrefixedStore(store, prefix) if prefix else store


@dataclass
class _PrefixedStore:
    """A part of an artifact store: all names begin with a prefix."""

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
