"""One flipped bit in any file that a run's folder holds. A tensor file is found by its hash and computed again; the settings are
checked as any settings file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.files import read_tensors, sha256
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import find_run, load_settings
from heretic.runs.status import load_study
from heretic.search.gradient_path import GradientPath
from heretic.settings.sources import resolve
from heretic.storage.attributes import settings_of
from tests.faults.conftest import Amount, Tally
from tests.helpers.command import heretic

GRADIENT_SEARCH = ('search.start="gradient"', "search.gradient.weights=[0.1]", "search.gradient.steps=2",
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


def gradient_path_of(config: Path) -> GradientPath:
    run(
        resolve(config, {"run_name": "mine", "n_trials": 1}, GRADIENT_SEARCH), reporter=NULL_REPORTER, stop=StopSignal()
    )
    gradient_path = GradientPath.load(load_study(f"sqlite:///{FOLDER}/study.db", "heretic"))
    assert gradient_path is not None and gradient_path.points, gradient_path
    return gradient_path


def test_the_gradient_path(config: Path, flip: Flip, amount: Amount, tally: Tally) -> None:
    wanted, file = gradient_path_of(config), FOLDER / "gradient_path.safetensors"
    told, kept = read_tensors(file)[1]["sha256"], file.read_bytes()
    times = amount(2, 20)
    for _ in range(times):
        (FOLDER / "study.db").unlink()  # as a process that was killed on its way would have left it
        file.write_bytes(kept)
        flip(file)
        assert gradient_path_of(config) == wanted and read_tensors(file)[1]["sha256"] == told, "a damaged path was used"
        assert file.with_suffix(".damaged").is_file()
    tally("one bit flipped in gradient_path.safetensors", times, "nothing: found by hash, searched again")


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
    wanted = load_settings(folder, {})
    assert settings_of(load_study(f"sqlite:///{FOLDER}/study.db", "heretic")) == wanted
    times, refused, changed = amount(200, 5000), 0, 0
    for _ in range(times):
        file.write_bytes(kept)
        flip(file)
        try:
            changed += load_settings(folder, {}) != wanted
        except UserError as error:
            refused += 1
            assert str(error).count("\n") <= 2 and "config.toml" in str(error)
    same = times - refused - changed
    done = f"one bit flipped in a run's config.toml ({refused} times refused, {changed} read as another value, {same} as before)"
    tally(done, times, "nothing: results are compared with the study")
