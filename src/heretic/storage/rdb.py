"""Where a study is kept: SQLite in the run's folder, or PostgreSQL for workers on several machines."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy
from optuna.trial import TrialState

from heretic.errors import StudyMismatch, UserError, first_line, plain_line
from heretic.files import open_private
from heretic.settings import Settings, WorkerSettings
from heretic.storage import attributes
from heretic.storage.attributes import FINGERPRINT, SETTINGS, Signature
from heretic.storage.fingerprint_diff import differences, relevant_versions
from heretic.storage.retrying import RetryingRDBStorage, RetryPolicy, effective_grace_period, reason
from heretic.storage.url import masked, on_server, sqlite_file

METRICS = ["KL divergence", "refusals"]
BUSY_TIMEOUT = 60  # for another process that has the SQLite file locked, or is making the tables on a server
OPTUNA_TABLES = {"studies", "trials", "version_info", "alembic_version"}
TABLES_LOCK_KEY = int.from_bytes(b"heretic", "big")  # PostgreSQL's lock on making the tables
# A connection whose other end is gone is noticed within half a minute, on both sides: the locks of a machine that lost its power
# must not stay.
SERVER_ARGUMENTS = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000,
    "application_name": "heretic",
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c tcp_user_timeout=25000",
}  # fmt: skip


def connect(
    url: str, workers: WorkerSettings | None = None, retry_policy: RetryPolicy | None = None
) -> optuna.storages.RDBStorage:
    """Open a storage. Raises UserError where it cannot be reached or written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # storage/heartbeat.py records them
    try:
        if not on_server(url):
            _check_file(url)
            _make_private(url)
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_TIMEOUT}})
        workers = workers or WorkerSettings()
        driven = _with_driver(url)
        with _table_creation_lock(driven):
            return RetryingRDBStorage(
                driven,
                retry_policy or RetryPolicy(),
                engine_kwargs={"pool_pre_ping": True, "connect_args": SERVER_ARGUMENTS},
                heartbeat_interval=workers.heartbeat,
                grace_period=effective_grace_period(workers),
            )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        lacks_driver = isinstance(error, ImportError)
        cause = "its driver is not installed" if lacks_driver else reason(error)
        raise UserError(
            f"The study's storage cannot be opened: {cause}",
            code="storage-unavailable",
            where=masked(url),
            fix="pip install 'psycopg[binary]'"
            if lacks_driver
            else "check that the place exists and can be written; a damaged study.db can be set aside with --fresh",
        ) from None


def _check_file(url: str) -> None:
    """Raise UserError for a file in which Optuna must not make its tables, or that another process keeps locked."""
    file = sqlite_file(url)
    if file is None or not file.exists():
        return
    if not file.is_file():
        raise UserError(
            "The study's storage is not a regular file.",
            code="storage-unavailable",
            where=masked(url),
            fix="name a file, or leave storage empty for study.db in the run's folder",
        )
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)
        with contextlib.closing(connection):
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise locked(url) from None
        return  # Optuna opens it next, and says what is wrong
    if tables and tables.isdisjoint(OPTUNA_TABLES):
        raise UserError(
            "The database belongs to another program: it has tables, but not those of Optuna.",
            code="not-a-study",
            where=masked(url),
            fix="name another file, or leave storage empty for study.db in the run's folder",
        )


def locked(url: str) -> UserError:
    """A database that another process did not release in time."""
    return UserError(
        f"Another process has kept the study locked for {BUSY_TIMEOUT} seconds.",
        code="storage-locked",
        where=masked(url),
        fix="end that process, then run the same command again; heretic status names it if it is heretic",
    )


def _make_private(url: str) -> None:
    """Make the file of a new SQLite storage, which only its owner may read; SQLite gives its journals the same mode."""
    file = sqlite_file(url)
    if file is not None and str(file) != ":memory:" and not os.path.lexists(file):
        with suppress(OSError):  # SQLite says what is wrong with the place
            os.close(open_private(file, "a"))


@contextmanager
def _table_creation_lock(url: str) -> Iterator[None]:
    """Within the context no other worker makes Optuna's tables in this database: of several that do so at the same moment all but
    one would fail. Where they are made nobody waits."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=SERVER_ARGUMENTS)
    with engine.connect() as connection:
        # The last thing that Optuna writes while it makes them.
        made = (
            sqlalchemy.inspect(connection).has_table("alembic_version")
            and connection.exec_driver_sql("select 1 from alembic_version").first()
        )
    if made:
        yield
        return
    with engine.begin() as connection:  # the lock belongs to the transaction, and goes with the connection of who dies
        connection.exec_driver_sql(f"set local lock_timeout = '{BUSY_TIMEOUT}s'")
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({TABLES_LOCK_KEY})")
        yield


SUPPORTED = "use postgresql://user@host/database or sqlite:///file, or leave it empty for study.db in the run's folder"


def _with_driver(url: str) -> str:
    """Raises UserError for a database that several workers could not take turns on."""
    kind, _, rest = url.partition("://")
    if kind.partition("+")[0] not in ("postgresql", "postgres"):
        raise UserError(
            f"Unsupported storage: {kind or 'no kind of database is named'}.",
            code="unsupported-storage",
            where="storage",
            fix=SUPPORTED,
        )
    return f"postgresql+psycopg://{rest}"


STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def storage_error(url: str, error: BaseException) -> UserError:
    """A storage that failed in the middle: a full disk, a server that is gone."""
    return UserError(
        f"The study cannot be written: {reason(error)}.",
        code="storage-unwritable",
        where=masked(url),
        fix="make room or bring the storage back, then run the same command again; nothing finished is lost",
    )


@contextmanager
def translate_storage_errors(url: str) -> Iterator[None]:
    """Within the context what a damaged database does to its reader becomes a UserError: broken pages, unknown states."""
    try:
        yield
    except (*STORAGE_ERRORS, ValueError, TypeError, LookupError, RecursionError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"The study cannot be read: {plain_line(first_line(getattr(cause, 'orig', None) or cause))[:200]}",
            code="storage-unreadable" if isinstance(error, STORAGE_ERRORS) else "damaged-study",
            where=masked(url),
            fix="restore a copy of the study, or start over with --fresh (heretic keeps the old run)",
        ) from None


def open_study(
    url: str,
    name: str,
    facts: dict[str, Any],
    workers: WorkerSettings | None = None,
    retry_policy: RetryPolicy | None = None,
) -> optuna.Study:
    """Create the study or continue it; `facts` are what its results depend on.

    Raises StudyMismatch, naming every difference, if the stored study was made with other facts; on a server, where several
    machines work on it, also if it was made with other versions of what computes.
    """
    if on_server(url):
        facts = {**facts, "versions": relevant_versions()}
    storage = connect(url, workers, retry_policy)
    with translate_storage_errors(url):
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
            )
            stored = attributes.fingerprint(study)
            if stored is None and not study.get_trials(deepcopy=False):
                study.set_user_attr(FINGERPRINT, json.dumps(facts))
                study.set_metric_names(METRICS)
                return study
        except STORAGE_ERRORS as error:
            raise storage_error(url, error) from None
        before = stored or {}
        changes = differences(before, facts)
    if changes and before.get("format") != facts.get("format"):
        raise StudyMismatch(
            f"The study '{name}' was made by another version of heretic: it has format {before.get('format')}, this version "
            f"makes {facts.get('format')}.",
            where=masked(url),
            fix="use that version, choose another run_name, or start over with --fresh (heretic keeps the old run)",
        )
    if changes:
        shown = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise StudyMismatch(
            f"The study '{name}' was made with other settings: {shown}.",
            where=masked(url),
            fix="restore those settings, choose another run_name, or start over with --fresh (heretic keeps the old run)",
        )
    return study


def save_settings(study: optuna.Study, settings: Settings) -> None:
    """Store the settings with the study, without the password of its storage."""
    stored = settings.model_copy(update={"storage": masked(settings.storage)})
    study.set_user_attr(SETTINGS, stored.model_dump_json())


def worker() -> Signature:
    """Who runs a trial: host, process and when that process began (a process number alone is used again)."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": _process_start(os.getpid()),
    }


@functools.cache
def _machine() -> str:
    """What tells this start of this machine, or this container, from others of its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process_start(pid: int) -> float:
    """When a process began, in seconds since the machine did: no clock that is set, and no sleep of a laptop, changes it."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def fail_abandoned(study: optuna.Study) -> list[int]:
    """Mark the running trials of processes that are gone as failed; returns their numbers. For one who holds the lock of a run in
    SQLite: there are no workers elsewhere, so a trial of another host or start of the machine was cut off."""
    abandoned = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        who = attributes.signature(trial)
        if not (is_this_host(who) and is_alive(who)):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            abandoned.append(trial.number)
    return abandoned


def is_this_host(who: Signature | None) -> bool:
    """Whether a signature is of this start of this machine."""
    return who is not None and who["host"] == socket.gethostname() and who.get("machine", _machine()) == _machine()


def is_alive(who: Signature | None) -> bool:
    """Whether the worker that signed a trial may still be at it; one of another host is believed to be."""
    if who is None:  # killed between asking for the trial and signing it
        return False
    if not is_this_host(who):
        return True  # not ours to judge
    try:
        return abs(_process_start(who["pid"]) - who["began"]) < 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
