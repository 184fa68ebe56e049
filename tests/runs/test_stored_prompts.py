from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from heretic.progress import NULL_REPORTER
from heretic.prompts.sets import load_all
from heretic.runs.stored_prompts import FILE, prompts_of_run, store_prompts
from heretic.settings import PromptSettings, PromptSource, Settings
from heretic.settings.sources import Resolved
from tests.helpers.command import heretic

ROLES = tuple(PromptSettings.model_fields)


def resolved(folder: str = "", **shortened: str) -> Resolved:
    prompts = PromptSettings(**{role: PromptSource(source=f"{folder}{role}.txt", suffix="!") for role in ROLES})
    return Resolved(Settings(prompts=prompts), None, {}, shortened)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path("x")):
        folder.mkdir(exist_ok=True)
        for role in ROLES:
            (folder / f"{role}.txt").write_text(f"a {role}\nanother ü{folder}\n")
    return tmp_path


def test_stored_prompts_replace_their_sources(here: Path) -> None:
    loaded = load_all(resolved().settings.prompts)
    store_prompts(here, resolved().settings.prompts, loaded)
    assert (here / FILE).stat().st_mode & 0o077 == 0
    for role in ROLES:
        Path(f"{role}.txt").unlink()
    assert prompts_of_run(here, resolved(), NULL_REPORTER).all == loaded.all
    absolute = resolved(f"{here}/", **{f"{here}/{role}.txt": f"{role}.txt" for role in ROLES})
    assert prompts_of_run(here, absolute, NULL_REPORTER).all == loaded.all


def test_other_settings_load_other_prompts(here: Path) -> None:
    store_prompts(here, resolved().settings.prompts, load_all(resolved().settings.prompts))
    for folder in ("x/", f"{here}/x/"):
        assert prompts_of_run(here, resolved(folder), NULL_REPORTER).harmful_eval.prompts[1] == "another üx!"


def test_a_damaged_copy_is_not_used(here: Path) -> None:
    (here / FILE).write_text('{"settings": {}, "sets": {}}')
    assert prompts_of_run(here, resolved(), NULL_REPORTER) == load_all(resolved().settings.prompts)


def test_a_run_that_is_named_goes_on_without_its_prompt_files(
    config: Path,
    prompt_files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = str(next(iter(prompt_files.values())).parent)
    folder = shutil.copytree(shared, "own")
    config.write_text(config.read_text().replace(shared, folder))
    ran = partial(heretic, capsys, monkeypatch, "run", "--no-menu")
    assert ran("--run-name", "mine", "--trials", "1").status == 0
    shutil.rmtree(folder)
    assert ran("mine", "--trials", "2").status == 0
    assert ran("mine", "--trials", "2", "--fresh").code == "missing-file", "a new run reads the files"
