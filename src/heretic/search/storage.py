"""Where a study is kept: SQLite in the run's folder, or PostgreSQL for workers on several machines."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy
from optuna.trial import TrialState

from heretic.errors import StudyMismatch, UserError, first_line
from heretic.files import open_private
from heretic.fingerprint import differences, versions_that_matter
from heretic.search.patience import Patience, PatientStorage, borne, reason
from heretic.search.seal import broken
from heretic.settings import Settings, Workers

METRICS = ["KL divergence", "refusals"]
FACTS = "heretic:fingerprint"
REFUSALS_BEFORE = "heretic:refusals_before"
SETTINGS = "heretic:settings"  # user attribute of the study, for whoever sees nothing but the storage
EXPORTED = "heretic:exported "  # and a trial's number: by whom, where to
SECRET = re.compile(r"((?:^|(?<=&))[^=&]*(?:pass|pwd|secret|token|key|auth|cred)[^=&]*=)[^&]*", re.IGNORECASE)
SECONDS_TO_WAIT = 60  # for another process that has the SQLite file locked, or is making the tables on a server
OPENING = int.from_bytes(b"heretic", "big")  # PostgreSQL's lock on making the tables
# A connection whose other end is gone is noticed within half a minute, on both sides: the locks of a machine that lost its power
# must not stay.
SERVER_ARGUMENTS = {
    "connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000,
    "application_name": "heretic",
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c tcp_user_timeout=25000",
}  # fmt: skip


def storage_url(storage: str, folder: Path) -> str:
    """The URL of the study's storage. Raises UserError for a folder that a URL cannot name."""
    if storage:
        return storage
    file = (folder / "study.db").resolve()
    if "?" in str(file):  # what follows it would be taken for options
        raise UserError(
            "A run cannot lie in a folder with a '?' in its path.",
            where=str(folder),
            fix="another run_name or runs_dir",
        )
    return f"sqlite:///{file}"


def study_name(storage: str, folder: Path) -> str:
    """The study's name: fixed in a run's own file, so that a renamed folder stays readable; the run's name where shared."""
    return folder.name if storage else "heretic"


def masked(url: str) -> str:
    """A storage URL without its password and whatever else in it may be a secret, for messages and manifests."""
    # A password may hold any character, unescaped ones too: it ends at the last @. Rather too much is masked than too little.
    place, mark, query = re.sub(r"://([^:/@]*):.*@", r"://\1:***@", url, flags=re.DOTALL).partition("?")
    return place + mark + SECRET.sub(r"\1***", query)


def on_server(url: str) -> bool:
    """Whether a storage can have workers on several machines."""
    return bool(url) and not url.startswith("sqlite")


def sqlite_file(url: str) -> Path | None:
    """The file of a storage in SQLite, which a URL may also name as a URI of its own (`sqlite:///file:PATH?uri=true`); None for
    any other storage."""
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database.removeprefix("file:"))


def connect(url: str, workers: Workers | None = None, patience: Patience | None = None) -> optuna.storages.RDBStorage:
    """Open a storage. Raises UserError where it cannot be reached or written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage")  # search/lives.py records them
    try:
        if not on_server(url):
            _make_private(url)
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": SECONDS_TO_WAIT}})
        workers = workers or Workers()
        driven = _with_driver(url)
        with _only_one_opens(driven):
            return PatientStorage(
                driven,
                patience or Patience(),
                engine_kwargs={"pool_pre_ping": True, "connect_args": SERVER_ARGUMENTS},
                heartbeat_interval=workers.heartbeat,
                grace_period=borne(workers),
            )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        lacks_driver = isinstance(error, ImportError)
        cause = "its driver is not installed" if lacks_driver else reason(error)
        raise UserError(
            f"The study's storage cannot be opened: {cause}",
            where=masked(url),
            fix="pip install 'psycopg[binary]'"
            if lacks_driver
            else "check that the place exists and can be written; a damaged study.db can be set aside with --fresh",
        ) from None


def _make_private(url: str) -> None:
    """Make the file of a new SQLite storage, which only its owner may read; SQLite gives its journals the same mode."""
    file = sqlite_file(url)
    if file is not None and str(file) != ":memory:" and not os.path.lexists(file):
        with suppress(OSError):  # SQLite says what is wrong with the place
            os.close(open_private(file, "a"))


@contextmanager
def _only_one_opens(url: str) -> Iterator[None]:
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
        connection.exec_driver_sql(f"set local lock_timeout = '{SECONDS_TO_WAIT}s'")
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({OPENING})")
        yield


def _with_driver(url: str) -> str:
    """Raises UserError for a database that several workers could not take turns on."""
    kind, _, rest = url.partition("://")
    if kind.partition("+")[0] not in ("postgresql", "postgres"):
        raise UserError(
            f"A study cannot be kept in {kind or 'this'}.",
            where="storage",
            fix="postgresql://user@host/database, or sqlite:///file, or leave it empty for study.db in the run's folder",
        )
    return f"postgresql+psycopg://{rest}"


STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def unwritable(url: str, error: BaseException) -> UserError:
    """A storage that failed in the middle: a full disk, a server that is gone."""
    return UserError(
        f"The study cannot be written: {reason(error)}.",
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


def open_study(
    url: str,
    name: str,
    facts: dict[str, Any],
    workers: Workers | None = None,
    patience: Patience | None = None,
) -> optuna.Study:
    """Create the study or continue it; `facts` are what its results depend on.

    Raises StudyMismatch, naming every difference, if the stored study was made with other facts; on a server, where several
    machines work on it, also if it was made with other versions of what computes.
    """
    if on_server(url):
        facts = {**facts, "versions": versions_that_matter()}
    storage = connect(url, workers, patience)
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
        before = json.loads(stored) if stored else {}
        found = differences(before, facts)
    if found and before.get("format") != facts.get("format"):
        raise StudyMismatch(
            f"The study '{name}' was made by another version of heretic: it has format {before.get('format')}, this version "
            f"makes {facts.get('format')}.",
            where=masked(url),
            fix="take that version, choose another run_name, or begin anew with --fresh (the old run is kept aside)",
        )
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
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }


@functools.cache
def _machine() -> str:
    """What tells this start of this machine, or this container, from others of its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _began(pid: int) -> float:
    """When a process began, in seconds since the machine did: no clock that is set, and no sleep of a laptop, changes it."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def fail_abandoned(study: optuna.Study) -> list[int]:
    """Mark the running trials of processes that are gone as failed; returns their numbers. For one who holds the lock of a run in
    SQLite: there are no workers elsewhere, so a trial of another host or start of the machine was cut off."""
    abandoned = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        who = trial.user_attrs.get("worker")
        if not (here(who) and alive(who)):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            abandoned.append(trial.number)
    return abandoned


def here(who: dict[str, Any] | None) -> bool:
    """Whether a signature is of this start of this machine."""
    return who is not None and who["host"] == socket.gethostname() and who.get("machine", _machine()) == _machine()


def alive(who: dict[str, Any] | None) -> bool:
    """Whether the worker that signed a trial may still be at it; one of another host is believed to be."""
    if who is None:  # killed between asking for the trial and signing it
        return False
    if not here(who):
        return True  # not ours to judge
    try:
        return abs(_began(who["pid"]) - who["began"]) < 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
