"""Opening a storage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from heretic.errors import StudyMismatch, UserError
from heretic.search import storage as storage_module
from heretic.search.storage import connect, open_study
from tests.postgres import Server


def test_several_open_a_new_database_at_once(postgres: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        storages = list(pool.map(lambda _: connect(postgres.url), range(8)))
    assert [storage.get_all_studies() for storage in storages] == [[]] * 8


def test_who_makes_the_tables_is_waited_for_and_not_for_ever(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "SECONDS_TO_WAIT", 1)
    postgres.ask("create database anew")
    url = postgres.url.removesuffix("/study") + "/anew"
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(f"select pg_advisory_lock({storage_module.OPENING})")
        with pytest.raises(UserError, match="lock timeout"):
            connect(url)
        other.execute(f"select pg_advisory_unlock({storage_module.OPENING})")
        connect(url)
        other.execute(f"select pg_advisory_lock({storage_module.OPENING})")
        connect(url)  # the tables are there, so nobody waits


def test_a_worker_with_other_versions_or_other_weights_is_refused(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"format": 1, "model": {"sha256": {"model.safetensors": "aa"}}}
    open_study(postgres.url, "shared", facts)
    open_study(postgres.url, "shared", facts)
    with pytest.raises(StudyMismatch, match=r"model\.safetensors.*aa.*bb"):
        open_study(postgres.url, "shared", {**facts, "model": {"sha256": {"model.safetensors": "bb"}}})
    other = {**storage_module.versions_that_matter(), "torch": "1.0"}
    monkeypatch.setattr(storage_module, "versions_that_matter", lambda: other)
    with pytest.raises(StudyMismatch, match="torch"):
        open_study(postgres.url, "shared", facts)
