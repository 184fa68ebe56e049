"""Where a study is kept: SQLite in the run's folder, or any storage URL that Optuna knows."""

from __future__ import annotations

import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy
from optuna.trial import TrialState

from heretic.errors import StudyMismatch, UserError, first_line
from heretic.fingerprint import differences
from heretic.search.seal import broken
from heretic.settings import Settings

METRICS = ["KL divergence", "refusals"]
FACTS = "heretic:fingerprint"
REFUSALS_BEFORE = "heretic:refusals_before"
SETTINGS = "heretic:settings"  # user attribute of the study, for whoever sees nothing but the storage
SECRET = re.compile(r"((?:^|(?<=&))[^=&]*(?:pass|pwd|secret|token|key|auth|cred)[^=&]*=)[^&]*", re.IGNORECASE)
SECONDS_TO_WAIT = 60  # for another process that has the SQLite file locked


def storage_url(storage: str, folder: Path) -> str:
    """The URL of the study's storage."""
    return storage or f"sqlite:///{(folder / 'study.db').resolve()}"


def study_name(storage: str, folder: Path) -> str:
    """The study's name: fixed in a run's own file, so that a renamed folder stays readable; the run's name where shared."""
    return folder.name if storage else "heretic"


def masked(url: str) -> str:
    """A storage URL without its password and whatever else in it may be a secret, for messages and manifests."""
    # A password may hold any character, unescaped ones too: it ends at the last @. Rather too much is masked than too little.
    place, mark, query = re.sub(r"://([^:/@]*):.*@", r"://\1:***@", url, flags=re.DOTALL).partition("?")
    return place + mark + SECRET.sub(r"\1***", query)


def connect(url: str) -> optuna.storages.RDBStorage:
    """Open a storage. Raises UserError where it cannot be reached or written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    arguments = {"connect_args": {"timeout": SECONDS_TO_WAIT}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UserError(
            f"The study's storage cannot be opened: {cause}",
            where=masked(url),
            fix="check that the place exists and can be written; a damaged study.db can be set aside with --fresh",
        ) from None


STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def unwritable(url: str, error: BaseException) -> UserError:
    """A storage that failed in the middle: a full disk, a server that is gone."""
    cause = error.__cause__ or error
    return UserError(
        f"The study cannot be written: {str(getattr(cause, 'orig', None) or cause).splitlines()[0]}.",
        where=masked(url),
        fix="make room or bring the storage back, then run the same command again; nothing finished is lost",
    )


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Within the context what a damaged database does to its reader becomes a UserError: broken pages, values of other kinds."""
    try:
        yield
    except (*STORAGE_ERRORS, ValueError, TypeError, LookupError, RecursionError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"The study cannot be read: {first_line(getattr(cause, 'orig', None) or cause)[:200]}",
            where=masked(url),
            fix="put back a copy of it, or begin anew with --fresh (the old run is kept aside)",
        ) from None


def open_study(url: str, name: str, facts: dict[str, Any]) -> optuna.Study:
    """Create the study or continue it; `facts` are what its results depend on.

    Raises StudyMismatch, naming every difference, if the stored study was made with other facts.
    """
    storage = connect(url)
    with reading(url):
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
            )
            stored = study.user_attrs.get(FACTS)
            if stored is None and not study.get_trials(deepcopy=False):
                study.set_user_attr(FACTS, json.dumps(facts))
                study.set_metric_names(METRICS)
                return study
        except STORAGE_ERRORS as error:
            raise unwritable(url, error) from None
        found = differences(json.loads(stored) if stored else {}, facts)
    if found:
        shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
        raise StudyMismatch(
            f"The study '{name}' was made with other settings: {shown}.",
            where=masked(url),
            fix="take those settings back, choose another run_name, or begin anew with --fresh (the old run is kept aside)",
        )
    check_seals(study, url)
    return study


def check_seals(study: optuna.Study, url: str) -> None:
    """Raise UserError if what is stored of a trial is not what was measured."""
    with reading(url):
        damaged = broken(study)
    if damaged:
        raise UserError(
            f"The study is damaged: what is stored of trial {damaged[0]} is not what was measured.",
            where=masked(url),
            fix="put back a copy of it, or begin anew with --fresh (the old run is kept aside)",
        )


def keep_settings(study: optuna.Study, settings: Settings) -> None:
    """Store the settings with the study, without the password of its storage."""
    kept = settings.model_copy(update={"storage": masked(settings.storage)})
    study.set_user_attr(SETTINGS, kept.model_dump_json())


def settings_of(study: optuna.Study) -> Settings | None:
    """The settings that a study was last worked on with; None in those made before they were stored."""
    stored = study.user_attrs.get(SETTINGS)
    return Settings.model_validate_json(stored) if stored else None


def worker() -> dict[str, Any]:
    """Who runs a trial: host, process and when that process began (a process number alone is used again)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def _began(pid: int) -> float:
    """When a process began, in seconds since the machine did: no clock that is set, and no sleep of a laptop, changes it."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def fail_abandoned(study: optuna.Study) -> list[int]:
    """Mark the running trials of dead processes of this host as failed; returns their numbers."""
    abandoned = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not alive(trial.user_attrs.get("worker")):
            study.tell(trial.number, state=TrialState.FAIL)
            abandoned.append(trial.number)
    return abandoned


def alive(who: dict[str, Any] | None) -> bool:
    """Whether the worker that signed a trial may still be at it; one of another host is believed to be."""
    if who is None:  # killed between asking for the trial and signing it
        return False
    if who["host"] != socket.gethostname():
        return True  # not ours to judge
    try:
        return abs(_began(who["pid"]) - who["began"]) < 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
