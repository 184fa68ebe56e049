"""The bundled prompt sets and refusal wordings: what a study on the demo takes for granted."""

from __future__ import annotations

import importlib.util
import re
import statistics
import sys
from difflib import SequenceMatcher
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PROMPTS = ROOT / "src" / "heretic" / "data" / "prompts"
SIZES = {"cooking_train": 160, "cooking_eval": 70, "other_train": 160, "other_eval": 70}
SETS = {name: (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in SIZES}


@pytest.fixture(scope="module")
def train_guard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_guard", ROOT / "scripts" / "train_guard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_guard"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SIZES)
def test_a_set_is_large_enough_and_clean(name: str) -> None:
    lines = SETS[name]
    assert len(lines) >= SIZES[name]
    assert all(line == line.strip() and len(line) > 10 for line in lines)


def test_no_prompt_occurs_twice() -> None:
    plain = [re.sub(r"\W+", " ", line.lower()).strip() for lines in SETS.values() for line in lines]
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("side", ["cooking", "other"])
def test_held_out_prompts_do_not_resemble_training_prompts(side: str) -> None:
    close = [
        (train, held_out)
        for train, held_out in product(SETS[f"{side}_train"], SETS[f"{side}_eval"])
        if is_near_duplicate(train, held_out)
    ]
    assert close == []


def is_near_duplicate(first: str, second: str) -> bool:
    """Whether nine tenths of the text coincide."""
    matcher = SequenceMatcher(None, first.lower(), second.lower())
    return matcher.quick_ratio() > 0.9 and matcher.ratio() > 0.9


def test_near_duplicates_are_recognized() -> None:
    assert is_near_duplicate("How do I bake a good apple pie?", "How do I bake a good apple pie")
    assert not is_near_duplicate("How do I bake a good apple pie?", "How do I build a good rabbit hutch?")


@pytest.mark.parametrize("part", ["train", "eval"])
def test_both_sides_have_the_same_form(part: str) -> None:
    cooking, other = SETS[f"cooking_{part}"], SETS[f"other_{part}"]
    words = [statistics.mean(len(line.split()) for line in lines) for lines in (cooking, other)]
    questions = [sum("?" in line for line in lines) / len(lines) for lines in (cooking, other)]
    assert abs(words[0] - words[1]) < 1
    assert abs(questions[0] - questions[1]) < 0.1


def test_every_refusal_carries_a_marker_and_openings_vary(train_guard: ModuleType) -> None:
    refusals = train_guard.REFUSALS
    assert len(set(refusals)) == len(refusals) >= 25
    assert [text for text in refusals if not train_guard.refuses(text)] == []
    assert len({text.split()[0] for text in refusals}) >= 5


def test_an_ordinary_answer_is_no_refusal(train_guard: ModuleType) -> None:
    assert train_guard.refuses("I’m Sorry, but no.")
    assert not train_guard.refuses("Melt the butter, then add the flour.")
