"""Disks that fill up, folders that cannot be written, and files that are not what was written."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from heretic.errors import UserError
from heretic.files import read_tensors, sha256
from heretic.search.integrity import check_study
from heretic.search.pareto import results
from heretic.storage.attributes import FINGERPRINT
from heretic.storage.rdb import open_study, translate_storage_errors
from tests.faults.conftest import Amount, Tally
from tests.helpers.command import heretic, start

RUN = ("run", "--run-name", "mine", "--save-to", "disk/out", "--set", "runs_dir=disk/runs")


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, which starts roomy."""
    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("needs a Linux that mounts")
    folder = Path("disk").resolve()
    folder.mkdir()
    mount(folder, "size=64m")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """Leave so many bytes free."""
    ballast = folder / "ballast"
    room = shutil.disk_usage(folder).free - left
    with contextlib.suppress(OSError):  # full already
        ballast.write_bytes(b"\0" * max(0, room))
    return ballast


def test_the_disk_fills_up_in_every_stage(
    disk: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    amount: Amount,
    tally: Tally,
) -> None:
    assert heretic(capsys, monkeypatch, *RUN).status == 0
    (report,) = (disk / "runs").glob("*/report.html")  # the only file without which a run goes on
    used = 64 * 2**20 - shutil.disk_usage(disk).free - report.stat().st_size
    wanted = sha256(disk / "out/model.safetensors")
    times = amount(3, 30)
    for i in range(times):
        shutil.rmtree(disk / "runs")
        shutil.rmtree(disk / "out")
        ballast = fill(disk, used * i // times // 4096 * 4096)
        ran = heretic(capsys, monkeypatch, *RUN, "--force")
        assert ran.status != 0, f"with {i}/{times} of the room it needs"
        assert ran.err.count("Error:") == 1 and len(ran.err) < 900, ran.err
        assert not (disk / "out").exists(), "a half-written model is visible"
        ballast.unlink()
        again = heretic(capsys, monkeypatch, *RUN)
        assert again.status == 0, again.err
        assert sha256(disk / "out/model.safetensors") == wanted
    tally("disk full at a growing share of a run's writes, then freed", times, "the trial under way")


def test_a_folder_that_cannot_be_written(
    disk: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    remount(disk, "ro")
    ran = heretic(capsys, monkeypatch, *RUN)
    assert ran.status != 0 and ran.code in ("run-folder-unwritable", "preflight-failed")
    remount(disk, "rw")
    output, _ = (process := start(*RUN)).communicate(timeout=120)
    assert process.returncode == 0, output
    remount(disk, "ro")  # what is there can still be looked at
    for looking in (
        ["status"],
        ["report", "-o", "r.html"],
        ["directions", "-o", "d.gguf"],
        ["geometry", "disk/runs/mine"],
    ):
        where = [] if looking[0] == "geometry" else ["mine", "--runs-dir", "disk/runs"]
        ran = heretic(capsys, monkeypatch, *looking, *where)
        assert ran.status == 0, ran.err
    ran = heretic(capsys, monkeypatch, "report", "mine", "--runs-dir", "disk/runs")
    assert ran.status == 1 and ran.code == "file-unwritable" and "report.html" in ran.err
    ran = heretic(capsys, monkeypatch, "export", "mine", "--runs-dir", "disk/runs", "-o", "elsewhere")
    assert ran.status == 1 and ran.code == "run-folder-unwritable" and "runs_dir" not in ran.err
    tally("folder read-only", 2, "nothing")


def test_bits_that_flip_are_found(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: Amount, tally: Tally
) -> None:
    arguments = ("run", "--run-name", "mine")
    assert heretic(capsys, monkeypatch, *arguments).status == 0
    folder = Path("runs/mine")
    names = ("directions.safetensors", "baseline.safetensors")
    kept = {name: (folder / name).read_bytes() for name in names}
    wanted = {name: read_tensors(folder / name)[1]["sha256"] for name in names}
    chance = random.Random(3)
    times = amount(4, 60)
    for i in range(times):
        name = names[i % len(names)]
        content = bytearray(kept[name])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(content)
        ran = heretic(capsys, monkeypatch, *arguments, "--trials", str(5 + i))
        assert ran.status == 0, ran.err
        assert read_tensors(folder / name)[1]["sha256"] == wanted[name], f"{name}: a damaged file was believed"
    tally("one bit flipped in the directions or the baseline", times, "nothing: found by hash, computed again")


def test_a_damaged_study_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: Amount, tally: Tally
) -> None:
    arguments = ("run", "--run-name", "mine", "--trials", "5")
    assert heretic(capsys, monkeypatch, *arguments[:-2]).status == 0
    database = Path("runs/mine/study.db")
    kept = database.read_bytes()
    times = amount(4, 40)
    for i in range(times):
        database.write_bytes(kept[: len(kept) * i // times])
        ran = heretic(capsys, monkeypatch, *arguments)
        if ran.status == 0:  # nothing was left of it: a new study
            assert i == 0
        else:
            assert "study" in ran.err and len(ran.err) < 900, ran.err
        shown = heretic(capsys, monkeypatch, "status", "mine")
        assert shown.status in (0, 1) and len(shown.err) < 900
    database.write_bytes(kept)
    assert heretic(capsys, monkeypatch, *arguments).status == 0
    tally("study.db truncated", times, "nothing: refused, file unchanged")


def test_bits_that_flip_in_the_study_are_never_believed(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: Amount, tally: Tally
) -> None:
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine").status == 0
    database = Path("runs/mine/study.db")
    kept, wanted, url = database.read_bytes(), measured(database), f"sqlite:///{database.resolve()}"
    chance, refused, times = random.Random(5), 0, amount(20, 500)
    used = [i for i in range(len(kept)) if kept[i]]  # most of a new database is zeros that mean nothing
    for _ in range(times):
        content = bytearray(kept)
        content[chance.choice(used)] ^= 1 << chance.randrange(8)
        database.write_bytes(content)
        ran = heretic(capsys, monkeypatch, "status", "mine")
        assert ran.status in (0, 1) and len(ran.err) < 900, ran.err
        try:
            study = open_study(url, "heretic", wanted[1])
            with translate_storage_errors(url):
                check_study(study)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 2000
        else:
            found = {r.number: (r.params, r.scores.as_dict()) for r in results(study)}
            assert all(wanted[0][number] == one for number, one in found.items() if number in wanted[0])
        database.with_name("study.db-journal").unlink(missing_ok=True)
    tally(f"one bit flipped in study.db ({refused} times refused, else unimportant)", times, "nothing believed")


def measured(database: Path) -> tuple[dict[int, object], dict[str, object]]:
    """What is stored of each trial, and what the study rests on."""
    study = optuna.load_study(study_name="heretic", storage=f"sqlite:///{database}")
    found = {r.number: (r.params, r.scores.as_dict()) for r in results(study)}
    return dict(found), json.loads(study.user_attrs[FINGERPRINT])


def test_a_database_locked_by_another_process_is_waited_for(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: Amount, tally: Tally
) -> None:
    seconds = amount(4, 50)
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine").status == 0
    ready = threading.Event()

    def hold() -> None:
        with sqlite3.connect("runs/mine/study.db", isolation_level=None) as other:
            other.execute("begin exclusive")
            ready.set()
            time.sleep(seconds)
            other.execute("rollback")

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()
    process = start("run", "--run-name", "mine", "--trials", "6")
    output, _ = process.communicate(timeout=seconds + 90)
    holder.join()
    assert process.returncode == 0, output
    study = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    assert sum(t.state.name == "COMPLETE" for t in study.trials) == 6
    tally(f"study.db locked by another process for {seconds} s", 1, "nothing")


def test_a_study_of_an_older_optuna_is_said(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """A file that Optuna 2.10.1 made (`create_study` and three trials), and one that says it is from an older version."""
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine").status == 0
    database = Path("runs/mine/study.db")
    kept = database.read_bytes()
    with sqlite3.connect(database) as stored:
        stored.execute("update alembic_version set version_num = 'v0.9.0.a'")
        stored.execute("update version_info set schema_version = 11")
    stored.close()
    ran = heretic(capsys, monkeypatch, "run", "--run-name", "mine", "--trials", "5")
    assert (ran.status, ran.code) == (1, "study-version"), ran.err
    database.unlink()
    with sqlite3.connect(database) as stored:
        stored.executescript((Path(__file__).parent / "optuna_2_10_1.sql").read_text())
    stored.close()
    old = database.read_bytes()
    for command in (("run", "--run-name", "mine", "--trials", "5"), ("status", "mine")):
        ran = heretic(capsys, monkeypatch, *command)
        assert (ran.status, ran.code) == (1, "study-version") and len(ran.err) < 900, ran.err
        assert database.read_bytes() == old, "the file was changed"
    database.write_bytes(kept)
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine", "--trials", "5").status == 0
    tally("study.db from other versions of Optuna (one made by 2.10.1)", 2, "nothing: refused, file unchanged")
