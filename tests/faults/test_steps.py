"""Killed before every single step that it takes on the disk, one after the other: made, opened for writing, renamed, removed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from heretic import files
from heretic.cli import main as cli
from heretic.export import destination
from heretic.files import read_tensors, sha256
from tests.faults.conftest import Amount, Tally

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
RUN = ("run", "--run-name", "mine", "--save-to", "out", "--trials", "2")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "ctypes.dlsym"}


def watched(before: Callable[[], None], here: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook (PEP 578) that calls `before` each step that changes something under `here`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "ctypes.dlsym":
            if arguments[1] in ("renameat2", "renamex_np"):
                before()
        elif event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
            if any(os.path.abspath(path).startswith(here) for path in paths):
                before()

    return hook


def child(arguments: tuple[str, ...], kill_before: int = 0) -> tuple[int, int]:
    """Run the command in a child process that is killed before a step, if one is given; its status and its steps."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 70
        try:
            for stream in (1, 2):
                os.dup2(os.open("child.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.addaudithook(watched(step, os.getcwd()))
            sys.argv = ["heretic", *arguments]
            cli.main()
        except SystemExit as finished:
            status = int(finished.code or 0)
        finally:
            os.write(writer, str(steps).encode())
            os._exit(status)
    os.close(writer)
    _, waited = os.waitpid(process, 0)
    with open(reader, "rb") as told:
        steps = int(told.read() or 0)
    return os.waitstatus_to_exitcode(waited), steps


def whole(folder: Path) -> int:
    """The trial that an exported folder holds, if every weight in it is what its manifest says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["written"]["sha256"].items():
        assert sha256(folder / name) == digest
    assert (folder / "README.md").is_file() and (folder / "config.json").is_file()
    return int(manifest["trial"])


def outcome() -> dict[str, object]:
    """What a finished run has come to."""
    study = optuna.load_study(study_name="heretic", storage="sqlite:///runs/mine/study.db")
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    tensors = {n: read_tensors(Path(f"runs/mine/{n}.safetensors"))[1]["sha256"] for n in ("directions", "baseline")}
    return {
        "trials": sorted(tuple(t.values) for t in complete),
        **tensors,
        "weights": sha256(Path("out/model.safetensors")),
    }


def spread(steps: int, times: int) -> list[int]:
    """So many of the steps 1 to `steps`, the last ones among them."""
    return sorted({max(1, steps - i * max(1, steps // times)) for i in range(times)})


def test_a_run(config: Path, amount: Amount, tally: Tally) -> None:
    status, steps = child(RUN)
    assert status == 0, Path("child.txt").read_text()
    wanted = outcome()
    chosen = spread(steps, amount(2, 30))
    for step in chosen:
        Path("runs").rename(f"runs-{step}")
        Path("out").rename(f"out-{step}")
        assert child(RUN, step)[0] == -signal.SIGKILL
        if Path("out").exists():
            whole(Path("out"))
        status, _ = child(RUN)
        assert status == 0, f"step {step}: {Path('child.txt').read_text()}"
        assert outcome() == wanted
        assert not list(Path().glob(".out*")), "something is left beside the export"
    tally(f"kill -9 before each of {steps} steps on the disk in a run", len(chosen), "the trial under way")


@pytest.mark.parametrize("how", ["exchanged", "renamed"])
def test_an_export_in_the_place_of_another(
    config: Path, amount: Amount, tally: Tally, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "renamed":  # as on a system that cannot exchange names
        monkeypatch.setattr(destination, "atomic_swap", lambda one, other: False)
    elif not exchanges():
        pytest.skip("names cannot be exchanged here")
    assert child((*RUN[:-2], "--trials", "3"))[0] == 0
    first = whole(Path("out"))
    other = (first + 1) % 3
    again, back = (("export", "mine", "--output", "out", "--trial", str(trial)) for trial in (other, first))
    status, steps = child(again)
    assert status == 0, Path("child.txt").read_text()
    assert whole(Path("out")) == other
    chosen = spread(steps, amount(1, 30))
    for step in chosen:
        assert child(back)[0] == 0 and whole(Path("out")) == first
        assert child(again, step)[0] == -signal.SIGKILL
        if how == "exchanged":
            assert whole(Path("out")) in (first, other), "neither the old export nor the new one is there"
        elif not Path("out").exists():  # it lies beside until the next export begins
            destination.staging_dir(Path("out").resolve()).rmdir()
            assert whole(Path("out")) == first
        status, _ = child(again)
        assert status == 0 and whole(Path("out")) == other, Path("child.txt").read_text()
        assert not list(Path().glob(".out*"))
    tally(f"kill -9 before each of {steps} steps of an export over an earlier one ({how})", len(chosen), "nothing")


def exchanges() -> bool:
    """Whether this system does it."""
    Path("a").mkdir()
    Path("b").mkdir()
    return files.atomic_swap(Path("a"), Path("b"))
