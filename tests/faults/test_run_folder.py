"""One flipped bit in any file that a run's folder holds: found by its hash, then computed again or refused, never believed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.files import read_tensors, sha256
from heretic.progress import SILENT
from heretic.run import run
from heretic.run_folder import find_run, stored_settings
from heretic.search.attributes import settings_of
from heretic.search.walk import Walk
from heretic.settings.layers import resolve
from heretic.status import load_study
from heretic.stop import Stop
from tests.command import heretic
from tests.faults.conftest import Amount, Tally

WALKING = ('search.start="gradient"', "search.gradient.weights=[0.1]", "search.gradient.steps=2",
           "refusal_markers=['sorry', 'bread', 'a', 'e', 'o']")  # fmt: skip
FOLDER = Path("runs/mine")
Flip = Callable[[Path], None]


@pytest.fixture
def flip() -> Flip:
    """`flip(file)`: one bit of it, of chance."""
    chance = random.Random(11)

    def one(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)

    return one


def walked(config: Path) -> Walk:
    run(resolve(config, {"run_name": "mine", "n_trials": 1}, WALKING), watcher=SILENT, stop=Stop())
    walk = Walk.of(load_study(f"sqlite:///{FOLDER}/study.db", "heretic"))
    assert walk is not None and walk.points, walk
    return walk


def test_the_walk(config: Path, flip: Flip, amount: Amount, tally: Tally) -> None:
    wanted, file = walked(config), FOLDER / "walk.safetensors"
    told, kept = read_tensors(file)[1]["sha256"], file.read_bytes()
    times = amount(2, 20)
    for _ in range(times):
        (FOLDER / "study.db").unlink()  # as a process that was killed on its way would have left it
        file.write_bytes(kept)
        flip(file)
        assert walked(config) == wanted and read_tensors(file)[1]["sha256"] == told, "a damaged walk was believed"
        assert file.with_suffix(".damaged").is_file()
    tally("one bit flipped in walk.safetensors", times, "nothing: found by hash, walked again")


def test_directions_baseline_and_geometry(
    config: Path,
    flip: Flip,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    amount: Amount,
    tally: Tally,
) -> None:
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine", "--trials", "1").status == 0
    seen = heretic(capsys, monkeypatch, "geometry", "mine", "--json").out
    more = ("run", "mine", "--trials", "+1")
    again = {"directions": more, "baseline": more, "geometry": ("geometry", "mine", "--json")}
    times = amount(1, 20)
    for _ in range(times):
        for name, command in again.items():
            file = FOLDER / f"{name}.safetensors"
            wanted = sha256(file)
            flip(file)
            if name == "geometry":
                assert heretic(capsys, monkeypatch, "report", "mine").status == 0
                assert "heretic geometry mine" in (FOLDER / "report.html").read_text(), "what is left out is not said"
                assert heretic(capsys, monkeypatch, *command).out == seen
            else:
                said = heretic(capsys, monkeypatch, *command)
                assert said.status == 0 and f"{file.name} is damaged" in said.out, said
            assert sha256(file) == wanted, f"{name}: a damaged file was believed"
    for name in again:
        tally(f"one bit flipped in {name}.safetensors", times, "nothing: found by hash, measured again")


def test_the_settings(
    config: Path,
    flip: Flip,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    amount: Amount,
    tally: Tally,
) -> None:
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine", "--trials", "1").status == 0
    file = FOLDER / "config.toml"
    kept, folder = file.read_bytes(), find_run("mine", "runs")
    wanted = stored_settings(folder, {})
    assert settings_of(load_study(f"sqlite:///{FOLDER}/study.db", "heretic")) == wanted
    times, refused = amount(200, 5000), 0
    for _ in range(times):
        file.write_bytes(kept)
        flip(file)
        try:
            assert stored_settings(folder, {}) == wanted, "changed settings were believed"
        except UserError as error:
            refused += 1
            assert str(error).count("\n") <= 2 and "config.toml" in str(error)
    assert refused > times * 0.9
    file.write_bytes(kept.replace(b"n_trials = 1 ", b"n_trials = 3 "))
    for command in (["status"], ["run"], ["report"], ["export", "-o", "out"], ["directions", "-o", "d.safetensors"]):
        said = heretic(capsys, monkeypatch, *command, "mine")
        assert said.status == 1 and said.code == "hash-mismatch" and "config.toml" in said.err, command
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    told = json.loads(heretic_json(capsys, monkeypatch, "status", "mine", "--json"))
    assert told["n_trials"] == 3, "a change by hand cannot be made good"
    tally(
        f"one bit flipped in a run's config.toml ({refused} times refused, else in its seal's words)", times, "nothing"
    )


def heretic_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command prints."""
    return heretic(capsys, monkeypatch, *arguments).out
