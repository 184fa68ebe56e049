"""The examples in the repository are settings, and the prompts that they name are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.prompts.sets import load_all
from heretic.settings.sources import resolve

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("config.*.toml")))
def test_an_example_is_read(name: str) -> None:
    resolve(ROOT / name)


def test_the_prompts_of_the_verbosity_example_are_bundled_and_apart() -> None:
    sets = load_all(resolve(ROOT / "config.verbosity.toml").settings.prompts)
    assert not sets.warnings and len(sets.harmful_train) == len(sets.harmless_train) == 32
    assert all(p.endswith("Answer in one short sentence.") for p in sets.harmless_eval.prompts)


def test_the_prompts_of_the_hedging_example_are_there_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sets = load_all(resolve(ROOT / "examples/behaviors/hedging.toml").settings.prompts)
    assert not sets.warnings and (len(sets.harmful_train), len(sets.harmful_eval)) == (48, 24)
    asked_of_all = {prompt.split("?")[0] for prompt in sets.harmless_train.prompts}
    assert not asked_of_all & {
        prompt.split("?")[0] for prompt in (*sets.harmful_eval.prompts, *sets.harmless_eval.prompts)
    }
