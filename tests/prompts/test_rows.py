"""Rows of prompt files, and the prompts in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from heretic.errors import UserError
from heretic.prompts.rows import prompt_in
from heretic.prompts.sets import from_text_or_file, load
from heretic.settings import PromptSource

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "sure"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "never shown"},
]


def prompts(name: str, column: str = "text") -> tuple[str, ...]:
    return load("harmful_eval", PromptSource(source=name, column=column)).prompts


def rows_as(name: str, values: list[Any]) -> None:
    rows = [{"text": value} for value in values]
    if name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_the_last_user_turn_of_a_conversation_is_the_prompt(name: str) -> None:
    rows_as(name, [TURNS, [{"role": "user", "content": "only"}]])
    assert prompts(name) == ("second", "only")


@pytest.mark.parametrize(
    "conversation",
    [
        [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "ask"}]}],
        {"role": ["user", "assistant"], "content": ["ask", "x"]},
    ],
)
def test_the_usual_forms_of_conversations_are_understood(conversation: Any) -> None:
    assert prompt_in(conversation, "row 1", "prompts.harmful_eval") == "ask"


@pytest.mark.parametrize(
    "value",
    [
        7, 1.5, True, b"bytes", {"a": 1}, ["text"], [], [["deep"]], [{"text": "no role"}], [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}], [{"role": "user", "content": 5}],
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(UserError) as refused:
        prompt_in(value, "row 3, column 'text'", "prompts.harmful_eval")
    assert refused.value.code == "not-a-prompt" and refused.value.where == "prompts.harmful_eval.column"
    assert "row 3" in refused.value.what


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_a_number_in_a_column_of_texts_is_refused_with_its_row(name: str) -> None:
    rows_as(name, ["a", None, "b"] if name.endswith("parquet") else ["a", None, 5])
    if name.endswith("parquet"):  # a column has one type there
        assert prompts(name) == ("a", "b")
        rows_as(name, [1, 2])
    with pytest.raises(UserError) as refused:
        prompts(name)
    assert refused.value.code == "not-a-prompt" and name in refused.value.what


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p.jsonl", b'{"text": "a"}\n{"text": "b"},\n', ":2"),
        ("p.jsonl", b'{"text": "a"}\n["b"]\n', ":2"),
        ("p.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ":1"),
        ("p.jsonl", b"[" * 100_000, ":1"),
        ("p.json", b'[{"text": "a"},\n {"text": }]', ":2"),
        ("p.json", b'"text"', "p.json"),
        ("p.json", b'{"text": ["a", "b"], "id": [1]}', "p.json"),
        ("p.csv", b"id,text\n1,a\n2,b, and c\n", ":3"),
        ("p.csv", b'id,text\n1,"a\n', ":2"),
        ("p.csv", b"id;text\n1;a; and b\n", ":2"),
        ("p.csv", b"text,text\na,b\n", ":1"),
        ("p.tsv", b'text\tid\nbake\t0\n"tis fine\t1\nmake soup\t2\nsay 5"\t3\n', ":3"),
        ("p.tsv", b'"text"\tid\n"Hi" he said\tx\n', ":2"),
        ("p.json", b'{"text": {"0": "a", "1": "b"}, "id": {"0": 1, "2": 2}}', "p.json"),
        ("p.json", b'{"text": {"0": "a"}, "id": [1]}', "p.json"),
        ("p.parquet", b"PAR1 cut off", "p.parquet"),
        ("p.parquet", b"", "p.parquet"),
    ],
)
def test_a_file_that_cannot_be_parsed_names_the_line(name: str, content: bytes, line: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        prompts(name)
    assert refused.value.code == "bad-data-file" and line in refused.value.what
    assert "network" not in str(refused.value.fix)


def test_lists_by_column_and_lines_in_a_json_file_are_read() -> None:
    Path("p.json").write_text('{"text": ["a", "b"]}')
    assert prompts("p.json") == ("a", "b")
    Path("p.json").write_text('{"text": {"0": "a", "7": "b"}, "id": {"7": 2, "0": null}}')
    assert prompts("p.json") == ("a", "b")
    with pytest.raises(UserError) as refused:
        prompts("p.json", "label")
    assert refused.value.code == "no-such-column"
    Path("p.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert prompts("p.json") == ("a", "b")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_line_separator_inside_a_prompt_stays_in_it(name: str) -> None:
    text = "one\u2028half\x85and\x0cmore"
    lines = {
        "p.txt": f"{text}\ntwo\n",
        "p.jsonl": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in (text, "two")),
        "p.csv": f"text\n{text}\ntwo\n",
    }
    Path(name).write_bytes(lines[name].encode())
    assert prompts(name) == (text, "two")
    assert from_text_or_file(name) == (text, "two")


@pytest.mark.parametrize(("name", "separator"), [("p.csv", ";"), ("p.csv", "\t"), ("p.csv", ","), ("p.tsv", "\t")])
def test_tables_of_any_usual_separator_are_read(name: str, separator: str) -> None:
    rows = [("id", "text"), ("1", "make soup"), ("2", f'"a{separator} b"')]
    Path(name).write_text("".join(f"{separator.join(row)}\n" for row in rows))
    assert prompts(name) == ("make soup", f"a{separator} b")


def test_a_column_without_separators_in_its_head_is_one_column() -> None:
    Path("p.csv").write_text("text\nmake soup; then bread\n")
    assert prompts("p.csv") == ("make soup; then bread",)


def test_quotes_of_a_head_hide_separators_and_those_of_a_tsv_may_be_plain() -> None:
    Path("p.csv").write_text('text,"kind (a; b; c)"\nmake soup,1\n')
    assert prompts("p.csv") == ("make soup",)
    Path("p.tsv").write_text('text\tid\n"Hi" he said\tx\n"tis fine\ty\n')
    assert prompts("p.tsv") == ('"Hi" he said', '"tis fine')
    Path("p.tsv").write_text('text\tid\n"say ""hi"" now"\t1\n"bad" x\t2\n')
    with pytest.raises(UserError):
        prompts("p.tsv")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text\n"line one\nline two"\nplain\n', ("line one\nline two", "plain")),
        ('text\n"Who are you?"\n"Hello" he said\n', ('"Who are you?"', '"Hello" he said')),
        ('text\tid\nbake\t1\nhe said "\t2\n', ("bake", 'he said "')),
        ('text\tid\n"two\nlines"\t1\n', ("two\nlines",)),
        ('text\tid\n"Name\tAge\nSort"\tb\n"say ""hi"""\tb\n', ("Name\tAge\nSort", 'say "hi"')),
        ('"text"\t"id"\n"Name\tAge\nSort"\tb\n', ("Name\tAge\nSort",)),
        ('text\tid\n"Name\tAge\tSex\nSort"\tb\n', ("Name\tAge\tSex\nSort",)),
    ],
)
def test_quotes_of_a_tsv_that_quote_nothing_are_text(content: str, expected: tuple[str, ...]) -> None:
    Path("p.tsv").write_text(content)
    assert prompts("p.tsv") == expected


def test_the_separator_makes_the_column_a_field() -> None:
    Path("p.csv").write_text("text,labels (a;b;c)\nmake soup,a\n")
    assert prompts("p.csv") == ("make soup",)
    Path("p.csv").write_text('"text";"a, b, c"\n"make soup";"x"\n')
    assert prompts("p.csv") == ("make soup",)


def test_without_a_column_setting_the_separator_makes_any_usual_column_a_field() -> None:
    Path("p.csv").write_text("prompt;kinds (a,b,c)\nmake soup;1\n")
    assert from_text_or_file("p.csv") == ("make soup",)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "prompt": ["bake"], "messages": ["no"]}), "q.parquet")
    assert from_text_or_file("q.parquet") == ("bake",)
