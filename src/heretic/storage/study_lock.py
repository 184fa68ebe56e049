"""One worker at a time: what is decided about a study while no other worker of it decides anything.

The storage is the arbiter. On PostgreSQL it is a lock that belongs to a transaction, so it goes with the connection of a worker
that dies; on SQLite a lock of the operating system on a file beside the database, which goes with the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout

from heretic.errors import UserError
from heretic.storage.retrying import RetryingRDBStorage

LOCK_NOT_AVAILABLE = "55P03"
LOCK_TIMEOUT = 60  # seconds after which the server ends the turn of a worker that hangs in it


class LockLost(Exception):
    """The connection was cut during a turn: another worker may have had one at the same time."""


def rdb_storage(study: optuna.Study) -> optuna.storages.RDBStorage | None:
    """The database behind a study; None for one in memory."""
    storage: Any = study._storage
    backend = getattr(storage, "_backend", storage)
    return backend if isinstance(backend, optuna.storages.RDBStorage) else None


@contextmanager
def study_lock(study: optuna.Study) -> Iterator[None]:
    """Within the context no other worker is in a turn of this study.

    Keep it short. Raises TurnLost at its end if that cannot be vouched for: then take back what was decided.
    """
    storage = rdb_storage(study)
    if storage is None:
        yield
    elif storage.engine.dialect.name == "sqlite":
        lock = FileLock(f"{Path(storage.engine.url.database or '')}.lock", mode=0o600)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout:
            raise UserError(
                f"Another process has kept its turn on the study for {LOCK_TIMEOUT} seconds.",
                code="storage-locked",
                where=lock.lock_file,
                fix="end the worker that hangs, then run the same command again; nothing finished is lost",
            ) from None
        try:
            yield
        finally:
            lock.release()
    else:
        assert isinstance(storage, RetryingRDBStorage)
        while (connection := storage._retry(_try_lock, storage, study.study_name)) is None:
            if storage.policy.stop is not None:
                storage.policy.stop.check()
        try:
            yield
            try:
                connection.commit()
            except sqlalchemy.exc.SQLAlchemyError as error:
                raise LockLost from error
        finally:
            _close(connection)


def _close(connection: sqlalchemy.Connection) -> None:
    """Give a connection back. One that was cut cannot be rolled back; its turn went with it, and that hides no other error."""
    with suppress(sqlalchemy.exc.SQLAlchemyError):
        connection.close()


def _try_lock(storage: RetryingRDBStorage, name: str) -> sqlalchemy.Connection | None:
    """A connection in whose transaction the study's lock is held; None where another worker kept it for some seconds."""
    if storage.engine.dialect.name != "postgresql":
        raise UserError(
            f"Unsupported storage: {storage.engine.dialect.name}.",
            code="unsupported-storage",
            where="storage",
            fix="use SQLite or PostgreSQL",
        )
    key = int.from_bytes(hashlib.sha256(f"heretic {name}".encode()).digest()[:8], "big", signed=True)
    connection = storage.engine.connect()
    try:
        # One round trip for the limits: they end a turn whose worker hangs, and a wait that a Ctrl-C wants to end.
        limits = f"set local idle_in_transaction_session_timeout = '{LOCK_TIMEOUT}s'; set local lock_timeout = '5s'"
        connection.exec_driver_sql(limits)
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({key})")
    except BaseException as error:
        _close(connection)
        if getattr(getattr(error, "orig", None), "sqlstate", None) == LOCK_NOT_AVAILABLE:
            return None
        raise
    return connection
