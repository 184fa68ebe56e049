"""Secrets in storage URLs: never in a file that heretic writes, in what it prints, or in the list of processes."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heretic.storage.url import masked
from tests.faults.conftest import Tally
from tests.faults.test_hostile import MANY, TIMES
from tests.helpers.command import heretic, start

SECRET = "hunter2secret"
password = st.text(st.characters(blacklist_characters="&#", blacklist_categories=("Cs",)), min_size=4, max_size=20)


@given(secret=password, name=st.sampled_from(["password", "sslpassword", "token", "api_key", "PASSWD"]))
@MANY
def test_any_password_is_masked(secret: str, name: str) -> None:
    marked = f"<{secret}>"
    for url in (
        f"postgresql://me:{marked}@host/db",
        f"postgresql+psycopg://me:{marked}@host:1/db?sslmode=require",
        f"postgresql://:{marked}@host/db",
        f"postgresql://host/db?user=me&{name}={marked}",
        f"postgresql://host/db?{name}={marked}&sslmode=require",
    ):
        assert marked not in masked(url) and "host" in masked(url)


def test_counted(tally: Tally) -> None:
    tally("random passwords in storage URLs of 5 forms", 5 * TIMES, "nothing: all masked")


def test_a_secret_is_nowhere(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """A real storage, whose URL holds a secret that SQLite does not look at."""
    url = f"sqlite:///file:{Path('study.db').resolve()}?uri=true&token={SECRET}"
    monkeypatch.setenv("HERETIC_STORAGE", url)
    process = start("run", "--run-name", "mine", "--save-to", "out")
    looked = 0
    while process.poll() is None:
        for other in psutil.process_iter(["cmdline"]):
            assert SECRET not in " ".join(other.info["cmdline"] or []), "seen in the list of processes"
        looked += 1
        time.sleep(0.4)
    output, _ = process.communicate()
    assert process.returncode == 0 and "trials" in output, output
    status = heretic(capsys, monkeypatch, "status", "mine")
    assert status.status == 0, status.err
    assert SECRET not in output + status.out + status.err
    written = [p for folder in (Path(), Path("../runtime")) for p in folder.rglob("*") if p.is_file()]
    assert {"run.log", "config.toml", "manifest.json", "README.md", "study.db"} <= {p.name for p in written}
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
    tally(
        f"a run with a secret in its storage URL: {len(written)} files searched, {looked} looks at all processes",
        1,
        "nothing",
    )


@pytest.mark.parametrize("given", [["--storage", f"postgresql://me:{SECRET}@127.0.0.1:1/x"],
                                   ["--set", f"storage=postgresql://h/x?password={SECRET}"]])  # fmt: skip
def test_a_secret_on_the_command_line_is_refused(
    given: list[str], config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = heretic(capsys, monkeypatch, "run", *given)
    assert ran.status == 1 and ran.code == "password-on-command-line" and SECRET not in ran.err + ran.out
    assert not Path("runs").exists()
