"""What makes another run: settings of scorers count only if the search uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heretic.model.checkpoint import open_checkpoint
from heretic.prompts.sets import load_all
from heretic.runs.fingerprint import facts
from heretic.settings import Settings


@pytest.fixture
def facts_of(llama: Path, prompt_files: dict[str, Path]) -> Any:
    checkpoint = open_checkpoint(str(llama))
    sources = {role: {"source": str(path)} for role, path in prompt_files.items()}

    def made(**settings: Any) -> dict[str, Any]:
        chosen = Settings.model_validate({"model": str(llama), "prompts": sources, **settings})
        return facts(chosen, checkpoint, load_all(chosen.prompts), ["float32"], "")

    return made


def test_runs_older_than_the_scorers_can_be_continued(facts_of: Any) -> None:
    plain = facts_of()
    assert plain["constraints"] == {"max_over_refusals": -1, "max_degenerate": -1}
    assert not {"objectives", "scorers", "scorer_files", "measures"} & set(plain)
    assert facts_of(constraints={"over_refusals": 3})["constraints"]["max_over_refusals"] == 3


def test_measures_and_their_options_do_not_make_another_run(facts_of: Any) -> None:
    assert facts_of(measures=["copying"], scorers={"copying": {"tasks": 5}}) == facts_of()


def test_objectives_limits_options_and_files_make_another_run(facts_of: Any, tmp_path: Path) -> None:
    file, prompts = tmp_path / "mine.py", tmp_path / "prompts.txt"
    file.write_text("x = 1", encoding="utf-8")
    prompts.write_text("one\n", encoding="utf-8")
    every: dict[str, Any] = {
        "objectives": ["kl", "borderline_refusals"], "scorers": {"borderline_refusals": {"source": str(prompts)}},
        "scorer_files": [str(file)],
    }  # fmt: skip
    found = [facts_of(), facts_of(**every), facts_of(**every, constraints={"unchanged": 0.5})]
    prompts.write_text("two\n", encoding="utf-8")
    found.append(facts_of(**every))
    file.write_text("x = 2", encoding="utf-8")
    found.append(facts_of(**every))
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_a_language_and_its_phrases_make_another_run(facts_of: Any) -> None:
    assert not {"language", "language_markers"} & set(facts_of()), "a run older than the setting can be continued"
    german = facts_of(language="de")
    assert german["language"] == "de" and "tut mir leid" in german["language_markers"]
