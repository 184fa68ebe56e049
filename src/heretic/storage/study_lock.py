"""Lock of a study among its workers.

On PostgreSQL an advisory lock of a transaction, released when the connection ends; on SQLite an operating system lock on a
file beside the database, released when the process ends.
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
LOCK_TIMEOUT = 60  # seconds after which the server takes the lock from a hanging worker


class LockLost(Exception):
    """The connection was lost while the lock was held, so another worker may have held it too."""


def rdb_storage(study: optuna.Study) -> optuna.storages.RDBStorage | None:
    """Return the database behind a study; None for an in-memory study."""
    storage: Any = study._storage
    backend = getattr(storage, "_backend", storage)
    return backend if isinstance(backend, optuna.storages.RDBStorage) else None


@contextmanager
def study_lock(study: optuna.Study) -> Iterator[None]:
    """Hold the exclusive lock of a study within the context. Hold it only briefly.

    Raises:
        LockLost: at the end, if the lock was not held throughout; the caller must then undo its decisions.
        UserError: if another process does not release the lock in time.
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
                f"Another process has locked the study for {LOCK_TIMEOUT} seconds.",
                code="storage-locked",
                where=lock.lock_file,
                fix="end the hanging worker, then run the same command again; finished trials are kept",
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
    """Close a connection. Errors are ignored: a lost connection cannot be rolled back, and its lock is gone."""
    with suppress(sqlalchemy.exc.SQLAlchemyError):
        connection.close()


def _try_lock(storage: RetryingRDBStorage, name: str) -> sqlalchemy.Connection | None:
    """Return a connection whose transaction holds the lock; None if another worker held it for five seconds."""
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
        # One round trip sets both timeouts: for a hanging lock holder, and for a wait that Ctrl-C should end.
        limits = f"set local idle_in_transaction_session_timeout = '{LOCK_TIMEOUT}s'; set local lock_timeout = '5s'"
        connection.exec_driver_sql(limits)
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({key})")
    except BaseException as error:
        _close(connection)
        if getattr(getattr(error, "orig", None), "sqlstate", None) == LOCK_NOT_AVAILABLE:
            return None
        raise
    return connection
