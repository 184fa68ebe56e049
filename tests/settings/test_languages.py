"""The table of languages, and what the setting changes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from heretic.prompts.sets import bundled_names, load_all
from heretic.settings import PromptSettings, Settings
from heretic.settings.languages import ENGLISH, LANGUAGES, language
from heretic.settings.sources import resolve
from tests.helpers.errors import raises

CODES = [code for code in LANGUAGES if code != ENGLISH]
SIZES = {"harmful_train": 30, "harmless_train": 30, "harmful_eval": 15, "harmless_eval": 15}


@pytest.mark.parametrize("code", CODES)
def test_every_language_has_phrases_and_four_prompt_sets_without_overlap(code: str) -> None:
    table = language(code)
    assert {role: len(set(texts)) for role, texts in table.prompts.items()} == SIZES
    texts = [text for prompts in table.prompts.values() for text in prompts]
    assert len(set(texts)) == len(texts)
    for phrases in (table.refusal_markers, table.evasive_markers):
        assert (
            phrases
            and len(set(phrases)) == len(phrases)
            and all(p == p.lower() and len(p.strip()) > 1 for p in phrases)
        )


def test_prompt_sets_without_a_source_are_those_of_the_language() -> None:
    settings = resolve(
        None,
        {"language": "de", "prompts": {"harmless_eval": {"source": "mine.txt"}, "harmful_eval": {"split": "[:5]"}}},
    ).settings
    sources = {role: getattr(settings.prompts, role).source for role in PromptSettings.model_fields}
    assert sources == {
        "harmful_train": "bundled:de/harmful_train",
        "harmless_train": "bundled:de/harmless_train",
        "harmful_eval": "bundled:de/harmful_eval",
        "harmless_eval": "mine.txt",
    }
    sets = load_all(settings.prompts.model_copy(update={"harmless_eval": settings.prompts.harmless_train}))
    assert len(sets.harmful_train) == 30 and len(sets.harmful_eval) == 5
    assert sets.harmful_train.prompts == language("de").prompts["harmful_train"]
    assert Settings().prompts == PromptSettings(), "English keeps its data sets"


def test_an_unknown_language_is_an_error_and_its_sets_are_listed() -> None:
    with raises("invalid-setting"):
        resolve(None, {"language": "xx"})
    assert "zh/harmless_eval" in bundled_names()


@pytest.mark.parametrize("value", [["de"], {"code": "de"}, 3])
def test_a_language_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"model": "m", "language": value})
