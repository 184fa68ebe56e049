"""Prompt sets from every kind of source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.prompts import bundled_names, from_text_or_file, load, load_all
from heretic.settings import Prompts, PromptSource


def prompts(**source: str) -> tuple[str, ...]:
    return load("harmful_train", PromptSource(**source)).prompts


def test_every_kind_of_file_gives_the_same_prompts() -> None:
    rows = ["one", "zwei, drei", "vier\u2019s"]
    Path("p.txt").write_text("\n".join(rows) + "\n\n", encoding="utf-8-sig")
    Path("p.jsonl").write_text("\n".join(json.dumps({"text": r, "id": i}) for i, r in enumerate(rows)))
    Path("p.csv").write_text("id,text\n" + "\n".join(f'{i},"{r}"' for i, r in enumerate(rows)), encoding="utf-8")
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert prompts(source=name) == tuple(rows), name


def test_slices_prefix_and_suffix() -> None:
    Path("p.txt").write_text("a\nb\nc\nd\n")
    assert prompts(source="p.txt", split="train[1:3]", prefix="<", suffix=">") == ("<b>", "<c>")
    assert prompts(source="p.txt", split="[2:]") == ("c", "d")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"source": "missing.txt"}, "does not exist"),
        ({"source": "missing.csv"}, "does not exist"),
        ({"source": "p.txt", "split": "train[:5]"}, "there are 4"),
        ({"source": "p.txt", "split": "train[3:3]"}, "train[3:3]"),
        ({"source": "p.txt", "split": "train[10%]"}, "is no split"),
        ({"source": "empty.txt"}, "is empty"),
        ({"source": "latin.txt"}, "not UTF-8"),
        ({"source": "p.jsonl", "column": "prompt"}, "no column 'prompt'"),
        ({"source": "broken.jsonl"}, "bad-data-file"),
        ({"source": "bundled:nothing"}, "cooking_train"),
        ({"source": ""}, "no source"),
    ],
)
def test_bad_sources_say_what_is_wrong(source: dict[str, str], expected: str) -> None:
    Path("p.txt").write_text("a\nb\nc\nd\n")
    Path("p.jsonl").write_text('{"text": "a"}\n')
    Path("broken.jsonl").write_text('{"text": \n')
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("äöü".encode("latin-1"))
    with pytest.raises(UserError) as error:
        prompts(**source)
    assert expected in str(error.value)
    assert "prompts.harmful_train" in str(error.value)


def test_overlap_is_counted_and_said() -> None:
    Path("a.txt").write_text("x\ny\nz\n")
    Path("b.txt").write_text("y\nz\nw\n")
    a, b = PromptSource(source="a.txt"), PromptSource(source="b.txt")
    sets = load_all(
        Prompts(
            harmful_train=a, harmful_eval=b, harmless_train=b, harmless_eval=PromptSource(source="a.txt", split="[:1]")
        )
    )
    assert len(sets.warnings) == 1 and sets.warnings[0].startswith("2 of 3 prompts in prompts.harmful_eval")


def test_the_hash_is_of_the_prompts_not_of_the_file() -> None:
    Path("a.txt").write_text("x\ny\n")
    Path("b.txt").write_text("x\n\ny")
    one, two = (load("harmful_eval", PromptSource(source=n)) for n in ("a.txt", "b.txt"))
    assert one.sha256 == two.sha256


def test_bundled_sets_are_there() -> None:
    assert bundled_names() == ["cooking_eval", "cooking_train", "other_eval", "other_train"]
    assert len(prompts(source="bundled:cooking_train")) >= 100


def test_a_file_whose_name_does_not_say_what_it_is_is_not_looked_for_on_the_hub() -> None:
    Path("notes.md").write_text("a prompt\n")
    with pytest.raises(UserError, match="cannot be told from its name"):
        load("harmful_eval", PromptSource(source="notes.md"))
    with pytest.raises(UserError, match="cannot be told from its name"):
        from_text_or_file("notes.md")
    assert from_text_or_file("notes.md is a file") == ("notes.md is a file",)
    with pytest.raises(UserError, match="is empty"):
        from_text_or_file(" ")
