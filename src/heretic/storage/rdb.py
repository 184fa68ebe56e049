"""Database of a study: SQLite in the run folder, or PostgreSQL for workers on several machines."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from heretic.errors import StudyMismatch, UserError
from heretic.files import open_private
from heretic.hardware.processes import is_running, process_start
from heretic.scoring.objectives import DEFAULT_OBJECTIVES, Objective
from heretic.settings import Settings, WorkerSettings
from heretic.storage import attributes
from heretic.storage.attributes import FINGERPRINT, OBJECTIVES, SETTINGS, Signature
from heretic.storage.fingerprint_diff import differences, relevant_versions
from heretic.storage.retrying import RetryingRDBStorage, RetryPolicy, effective_grace_period, reason
from heretic.storage.url import masked, on_server, require_url, sqlite_file

METRICS = {"kl": "KL divergence"}  # names in Optuna's own tools that differ from those of the objectives
BUSY_TIMEOUT = 60  # seconds to wait for another process that locks the SQLite file, or creates the tables on a server
OPTUNA_TABLES = {"studies", "trials", "version_info", "alembic_version"}
TABLES_LOCK_KEY = int.from_bytes(b"heretic", "big")  # PostgreSQL's advisory lock for creating the tables
# Both sides detect a dead connection within half a minute, so that the locks of a machine without power do not stay.
SERVER_ARGUMENTS = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000,
    "application_name": "heretic",
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c tcp_user_timeout=25000",
}  # fmt: skip


def connect(
    url: str, workers: WorkerSettings | None = None, retry_policy: RetryPolicy | None = None
) -> optuna.storages.RDBStorage:
    """Open a storage. Raises UserError if it cannot be reached or written."""
    require_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # storage/heartbeat.py records them
    try:
        if not on_server(url):
            _check_file(url)
            _make_private(url)
            arguments = {"connect_args": {"timeout": BUSY_TIMEOUT}}
            storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments, skip_compatibility_check=True)
            _check_schema(storage)
            return storage
        workers = workers or WorkerSettings()
        driver_url = _with_driver(url)
        with _table_creation_lock(driver_url):
            server = RetryingRDBStorage(
                driver_url,
                retry_policy or RetryPolicy(),
                engine_kwargs={"pool_pre_ping": True, "connect_args": SERVER_ARGUMENTS},
                heartbeat_interval=workers.heartbeat,
                grace_period=effective_grace_period(workers),
                skip_compatibility_check=True,
            )
            _check_schema(server)
            return server
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, LookupError, RuntimeError) as error:
        lacks_driver = isinstance(error, ImportError)
        cause = "its driver is not installed" if lacks_driver else reason(error)
        raise UserError(
            f"Cannot open the study's storage: {cause}",
            code="storage-unavailable",
            where=masked(url),
            fix="pip install 'psycopg[binary]'"
            if lacks_driver
            else "check that it exists and is writable; --fresh sets a damaged study.db aside",
        ) from None


def _check_file(url: str) -> None:
    """Raise UserError if the file belongs to another program or another process has locked it."""
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
        return  # Optuna opens it next and reports the error
    if tables and tables.isdisjoint(OPTUNA_TABLES):
        raise UserError(
            "The database belongs to another program: it has no Optuna tables.",
            code="not-a-study",
            where=masked(url),
            fix="name another file, or leave storage empty for study.db in the run's folder",
        )


def _check_schema(storage: optuna.storages.RDBStorage) -> None:
    """Raise UserError unless the tables are those of the installed Optuna, in place of Optuna's own check.

    Nothing is upgraded here: an interrupted upgrade of SQLite is not undone, and other machines may have an older Optuna.
    """
    stored, needed = storage.get_current_version(), storage.get_head_version()
    if stored == needed:
        return
    is_older = stored in storage.get_all_versions()
    raise UserError(
        f"The study was made by {'an older' if is_older else 'a newer'} Optuna: its tables are {stored}, Optuna "
        f"{optuna.__version__} needs {needed}.",
        code="study-version",
        where=masked(storage.url),
        fix=_upgrade_command(storage.url) if is_older else "update optuna: pip install -U optuna",
    )


def _upgrade_command(url: str) -> str:
    """Return the shell command that copies a SQLite file and upgrades a study's tables; the password is masked."""
    file = sqlite_file(url)
    copy = f"cp {quote(str(file))} {quote(f'{file}.copy')} && " if file else ""
    program = "optuna" if shutil.which("optuna") else str(Path(sys.executable).with_name("optuna"))
    return f"{copy}{quote(program)} storage upgrade --storage {quote(masked(url))}"


def locked(url: str) -> UserError:
    """Create the error for a database that another process did not release in time."""
    return UserError(
        f"Another process has locked the study for {BUSY_TIMEOUT} seconds.",
        code="storage-locked",
        where=masked(url),
        fix="end that process, then run the same command again; heretic status names it if it is heretic",
    )


def _make_private(url: str) -> None:
    """Create the file of a new SQLite storage, readable only by its owner; SQLite gives its journals the same mode."""
    file = sqlite_file(url)
    if file is not None and not os.path.lexists(file):
        with suppress(OSError):  # SQLite reports the error
            os.close(open_private(file, "a"))


@contextmanager
def _table_creation_lock(url: str) -> Iterator[None]:
    """Hold a lock within the context if Optuna's tables do not exist yet: of several concurrent creations only one succeeds."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=SERVER_ARGUMENTS)
    with engine.connect() as connection:
        # Optuna writes this row last when it creates the tables.
        tables_exist = (
            sqlalchemy.inspect(connection).has_table("alembic_version")
            and connection.exec_driver_sql("select 1 from alembic_version").first()
        )
    if tables_exist:
        yield
        return
    with engine.begin() as connection:  # the lock ends with the transaction, also if this process dies
        connection.exec_driver_sql(f"set local lock_timeout = '{BUSY_TIMEOUT}s'")
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({TABLES_LOCK_KEY})")
        yield


SUPPORTED = "use postgresql://user@host/database or sqlite:///file, or leave it empty for study.db in the run's folder"


def _with_driver(url: str) -> str:
    """Add the driver to the URL. Raises UserError for a database without a study lock."""
    kind, _, rest = url.partition("://")
    if kind.partition("+")[0] not in ("postgresql", "postgres"):
        raise UserError(
            f"Unsupported storage: {kind or 'the URL names no database'}.",
            code="unsupported-storage",
            where="storage",
            fix=SUPPORTED,
        )
    return f"postgresql+psycopg://{rest}"


STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def storage_error(url: str, error: BaseException) -> UserError:
    """Create the error for a storage that fails during a run, such as a full disk, a lost server or a moved folder."""
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return UserError(
            "The study's file was moved or deleted while it was in use.",
            code="storage-unwritable",
            where=masked(url),
            fix="move it back, or continue the run in its new folder: heretic run FOLDER",
        )
    return UserError(
        f"Cannot write to the study: {reason(error)}.",
        code="storage-unwritable",
        where=masked(url),
        fix="free disk space or restart the server, then run the same command again; finished trials are kept",
    )


@contextmanager
def translate_storage_errors(url: str) -> Iterator[None]:
    """Translate the errors of reading a damaged database into a UserError within the context."""
    try:
        yield
    except (*STORAGE_ERRORS, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"Cannot read the study: {reason(error)[:200]}",
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
    objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
) -> optuna.Study:
    """Create the study or load it.

    Args:
        facts: everything that the results depend on; on a server, the package versions are added.
        objectives: what a new study optimizes; a stored one has them among its facts.

    Raises:
        StudyMismatch: if the stored study has other facts; the message lists the differences.
    """
    if on_server(url):
        facts = {**facts, "versions": relevant_versions()}
    storage = connect(url, workers, retry_policy)
    with translate_storage_errors(url):
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize"] * len(objectives), load_if_exists=True
            )
            stored = attributes.fingerprint(study)
            if stored is None and not study.get_trials(deepcopy=False):
                study.set_user_attr(FINGERPRINT, json.dumps(facts))
                if tuple(objectives) != DEFAULT_OBJECTIVES:
                    study.set_user_attr(OBJECTIVES, json.dumps([asdict(objective) for objective in objectives]))
                study.set_metric_names([METRICS.get(objective.name, objective.name) for objective in objectives])
                return study
        except STORAGE_ERRORS as error:
            raise storage_error(url, error) from None
        attributes.require_format(study, facts.get("format"))
        changes = differences(stored or {}, facts)
    if changes:
        shown = "; ".join(changes[:6]) + (f"; and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise StudyMismatch(
            f"The study '{name}' was made with other settings: {shown}.",
            where=masked(url),
            fix="restore those settings and files, or start a new run with another run_name or --fresh",
        )
    return study


def save_settings(study: optuna.Study, settings: Settings) -> None:
    """Store the settings in the study, with the password of its storage masked."""
    stored = settings.model_copy(update={"storage": masked(settings.storage)})
    study.set_user_attr(SETTINGS, stored.model_dump_json())


def worker() -> Signature:
    """Return the identity of this worker: host, process id and process start (process ids are reused)."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": process_start(os.getpid()),
    }


@functools.cache
def _machine() -> str:
    """Return an id of this boot of the machine and of the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def fail_abandoned(study: optuna.Study) -> list[int]:
    """Mark the running trials of dead processes as failed, and return their numbers.

    Only for a SQLite study whose run lock is held: no worker runs elsewhere, so a trial of another host or boot is dead.
    """
    abandoned = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        signature = attributes.signature(trial)
        if not (is_this_host(signature) and is_alive(signature)):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            abandoned.append(trial.number)
    return abandoned


def is_this_host(who: Signature | None) -> bool:
    """Return whether a signature is of this boot of this machine."""
    return who is not None and who["host"] == socket.gethostname() and who.get("machine", _machine()) == _machine()


def is_alive(who: Signature | None) -> bool:
    """Return whether the worker of a signature may be alive; always True for another host."""
    if who is None:  # killed between sampling and signing the trial
        return False
    if not is_this_host(who):
        return True  # cannot be checked from here
    return is_running(who["pid"], who["began"])
