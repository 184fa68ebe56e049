"""Prompt sets from every kind of source."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest

from heretic.errors import UserError
from heretic.prompts.sets import bundled_names, from_text_or_file, load, load_all
from heretic.settings import PromptSettings, PromptSource
from tests.helpers.errors import raises


def prompts(**source: str) -> tuple[str, ...]:
    return load("harmful_train", PromptSource(**source)).prompts


def test_every_kind_of_file_gives_the_same_prompts() -> None:
    rows = ["one", "zwei, drei", "vier\u2019s"]
    Path("p.txt").write_text("\n".join(rows) + "\n\n", encoding="utf-8-sig")
    Path("p.jsonl").write_text("\n".join(json.dumps({"text": r, "id": i}) for i, r in enumerate(rows)))
    Path("p.csv").write_text("id,text\n" + "\n".join(f'{i},"{r}"' for i, r in enumerate(rows)), encoding="utf-8")
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert prompts(source=name) == tuple(rows), name


def test_a_data_set_that_was_saved_to_disk_is_read() -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    table.save_to_disk("saved")
    datasets.DatasetDict({"train": table}).save_to_disk("parts")
    assert prompts(source="saved") == prompts(source="parts", split="train") == ("one", "two", "three")
    assert prompts(source="saved", split="train[1:2]") == ("two",)
    with pytest.raises(UserError) as error:
        prompts(source="saved", split="test")
    assert error.value.code == "dataset-unreadable"


def test_a_list_of_texts_in_json_is_read() -> None:
    for name in ("p.json", "p.jsonl"):
        Path(name).write_text(json.dumps(["one", "two"]))
        assert prompts(source=name) == prompts(source=name, column="goal") == ("one", "two")
    assert from_text_or_file("p.json") == ("one", "two")
    Path("p.json").write_text(json.dumps(["one", {"text": "two"}]))
    with raises("bad-data-file"):
        prompts(source="p.json")


def test_rows_after_the_slice_need_not_be_prompts() -> None:
    Path("p.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    assert prompts(source="p.jsonl", split="train[:2]") == ("one", "two")
    for split in ("train", "train[:3]"):
        with pytest.raises(UserError):
            prompts(source="p.jsonl", split=split)


def test_repetitions_and_prompts_of_both_kinds_are_warnings() -> None:
    Path("a.txt").write_text("one\ntwo\nthree\n")
    Path("b.txt").write_text("three\nfour\nfour\n")
    Path("c.txt").write_text("five\nsix\n")
    Path("d.txt").write_text("seven\n")
    sources = {"harmful_train": "a", "harmless_train": "b", "harmful_eval": "c", "harmless_eval": "d"}
    given = {role: PromptSource(source=f"{name}.txt") for role, name in sources.items()}
    warnings = load_all(PromptSettings(**given)).warnings
    assert len(warnings) == 2 and "harmless_train" in warnings[0] and "repetitions" in warnings[1]


def test_slices_prefix_and_suffix() -> None:
    Path("p.txt").write_text("a\nb\nc\nd\n")
    assert prompts(source="p.txt", split="train[1:3]", prefix="<", suffix=">") == ("<b>", "<c>")
    assert prompts(source="p.txt", split="[2:]") == ("c", "d")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"source": "missing.txt"}, "missing-file"),
        ({"source": "missing.csv"}, "missing-file"),
        ({"source": "p.txt", "split": "train[:5]"}, "split-out-of-range"),
        ({"source": "p.txt", "split": "train[3:3]"}, "split-out-of-range"),
        ({"source": "p.txt", "split": "train[10%]"}, "invalid-split"),
        ({"source": "empty.txt"}, "no-prompts"),
        ({"source": "latin.txt"}, "file-encoding"),
        ({"source": "p.jsonl", "column": "prompt"}, "no-such-column"),
        ({"source": "broken.jsonl"}, "bad-data-file"),
        ({"source": "bundled:nothing"}, "no-such-prompt-set"),
        ({"source": ""}, "no-prompts"),
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
    assert error.value.code == expected
    assert "prompts.harmful_train" in str(error.value.where)


def test_overlap_is_counted_and_said() -> None:
    Path("a.txt").write_text("x\ny\nz\n")
    Path("b.txt").write_text("y\nz\nw\n")
    Path("c.txt").write_text("u\nv\n")
    a, b, c = (PromptSource(source=f"{name}.txt") for name in "abc")
    sets = load_all(
        PromptSettings(
            harmful_train=a, harmful_eval=b, harmless_train=c, harmless_eval=PromptSource(source="a.txt", split="[:1]")
        )
    )
    assert len(sets.warnings) == 1 and sets.warnings[0].startswith("2 of 3 prompts in prompts.harmful_eval")


def test_the_hash_is_of_the_prompts_not_of_the_file() -> None:
    Path("a.txt").write_text("x\ny\n")
    Path("b.txt").write_text("x\n\ny")
    one, two = (load("harmful_eval", PromptSource(source=n)) for n in ("a.txt", "b.txt"))
    assert one.sha256 == two.sha256


def test_bundled_sets_are_there() -> None:
    assert bundled_names()[:4] == ["cooking_eval", "cooking_train", "other_eval", "other_train"]
    assert len(prompts(source="bundled:cooking_train")) >= 100


def code_of(source: str) -> str:
    """The error's code, the same for a prompt set and for a file of prompts named on the command line."""
    with pytest.raises(UserError) as error:
        prompts(source=source)
    with pytest.raises(UserError) as on_command_line:
        from_text_or_file(source)
    assert error.value.code == on_command_line.value.code
    return error.value.code


def test_a_file_whose_name_does_not_say_what_it_is_is_not_looked_for_on_the_hub() -> None:
    Path("notes.md").write_text("a prompt\n")
    assert code_of("notes.md") == "unknown-file-kind"
    assert from_text_or_file("notes.md is a file") == ("notes.md is a file",)
    with pytest.raises(UserError) as error:
        from_text_or_file(" ")
    assert error.value.code == "no-prompts"


def save(name: str, values: list[Any], column: str = "text") -> str:
    """A table with a column of these values and one of numbers, in the format that the name says."""
    rows = [{column: value, "id": n} for n, value in enumerate(values)]
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    elif name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Path(name).write_text(json.dumps(rows, indent=1))
    return name


FORMATS = ("p.jsonl", "p.json", "p.parquet")
CHATML = [
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "sure"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "two"}],
]  # fmt: skip
SHAREGPT = [
    [{"from": "human", "value": "one"}, {"from": "gpt", "value": "sure"}],
    [{"from": "system", "value": "be"}, {"from": "human", "value": "two"}],
]
PARTS = [
    [{"role": "user", "content": [{"type": "text", "text": "one"}]}],
    [{"role": "system", "content": [{"type": "text", "text": "be"}]},
     {"role": "user", "content": [{"type": "text", "text": "two"}]}],
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("conversations", [CHATML, SHAREGPT, PARTS])
def test_the_last_user_turn_of_a_conversation_is_the_prompt(name: str, conversations: list[Any]) -> None:
    found = load("harmful_train", PromptSource(source=save(name, conversations, "messages"), column="messages"))
    assert (found.prompts, found.n_truncated) == (("one", "two"), 1)
    assert from_text_or_file(name) == ("one", "two")


def test_conversations_with_earlier_turns_are_said() -> None:
    source = PromptSource(source=save("p.jsonl", CHATML, "messages"), column="messages")
    sets = load_all(
        PromptSettings(harmful_train=source, harmful_eval=source, harmless_train=source, harmless_eval=source)
    )
    assert sum("1 of 2 conversations" in warning for warning in sets.warnings) == 4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [
    3, 1.5, True, {"a": "b"}, ["a"], [["a"]], [], [{"role": "assistant", "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}], [{"role": "user", "content": 3}], str(CHATML[0]),
    json.dumps(SHAREGPT[0]),
])  # fmt: skip
def test_nothing_but_text_becomes_a_prompt(name: str, bad: Any) -> None:
    save(name, [None, bad])
    with pytest.raises(UserError) as error:
        prompts(source=name)
    assert error.value.code == "not-a-prompt"
    assert name in error.value.what and "2" in error.value.what


def test_bytes_and_labels_of_a_table_are_no_text() -> None:
    assert code_of(save("p.parquet", [b"bytes"])) == "not-a-prompt"
    Path("p.csv").write_text("text,other\n1,a\n2.5,b\n")
    assert code_of("p.csv") == "not-a-prompt"
    Path("p.csv").write_text("text\n1\ntwo\n")
    assert prompts(source="p.csv") == ("1", "two"), "a cell of CSV is text, just as it is written"


def test_a_data_set_of_the_hub_gives_text_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", None], "messages": CHATML, "label": [0, 1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: table)
    assert prompts(source="owner/name") == ("a",)
    assert prompts(source="owner/name", column="messages") == ("one", "two")
    with pytest.raises(UserError) as error:
        prompts(source="owner/name", column="label")
    assert error.value.code == "not-a-prompt"


def test_without_the_hub_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    from huggingface_hub import constants

    asked = []

    def load(*_: object, **__: object) -> object:
        asked.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:  # listens, closed before anybody asks
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with raises("dataset-unreadable"):
        prompts(source="owner/name")
    assert asked == [(True, True)], "the libraries would try for 10 s a data set"
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=ValueError("Unknown split")))
    with pytest.raises(UserError, match="Unknown split"):  # of a set in the cache: the hub is not the reason
        prompts(source="owner/name")
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("heretic.prompts.sets._hub_error", lambda *_: "")
    with raises("dataset-unreadable"):
        prompts(source="owner/name")
    assert asked[1:] == [(False, False)]


def test_texts_that_are_not_unicode_are_refused() -> None:
    Path("p.jsonl").write_text('{"text": "\\ud800"}\n')
    assert code_of("p.jsonl") == "not-a-prompt"
    with pytest.raises(UserError) as error:
        from_text_or_file("a\udcff")
    assert error.value.code == "not-a-prompt"


def test_a_prompt_may_hold_line_separators() -> None:
    rows = ["a\u2028b", "c\x85d", "e\x0cf", "g\x1ch"]
    Path("p.txt").write_bytes("\r\n".join(rows).encode())
    Path("p.jsonl").write_bytes("\n".join(json.dumps({"text": r}, ensure_ascii=False) for r in rows).encode())
    Path("p.csv").write_bytes(("text\n" + "\n".join(rows)).encode())
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert prompts(source=name) == tuple(rows), name


@pytest.mark.parametrize(
    ("name", "content", "code", "line"),
    [
        ("p.jsonl", b'{"text": "a"}\n{"text": "b"},\n{"text": "c"}\n', "bad-data-file", 2),
        ("p.jsonl", b'{"text": "a"}\n\n5\n', "bad-data-file", 3),
        ("p.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}\n', "bad-data-file", 2),
        ("p.jsonl", b'{"text": ' + b"[" * 100_000, "bad-data-file", 1),
        ("p.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "bad-data-file", 1),
        ("p.json", b'[{"text": "a"},\n {"text": }]', "bad-data-file", 2),
        ("p.json", b'{"data": {"text": "a"}}', "bad-data-file", None),
        ("p.json", b'["a", 5]', "bad-data-file", None),
        ("p.csv", b"text,id\na,1\nb, c,2\n", "bad-data-file", 3),
        ("p.csv", b'text,id\n"a\nb",1\nc\n', "bad-data-file", 4),
        ("p.csv", b'text\n"a\n', "bad-data-file", 2),
        ("p.csv", b"text,text\na,b\n", "bad-data-file", None),
        ("p.jsonl", '{"text": "a"}\n'.encode("utf-16"), "file-encoding", 1),
        ("p.csv", b"text\na\n\xff\n", "file-encoding", 3),
        ("p.parquet", b"PAR1" + b"\0" * 40, "bad-data-file", None),
        ("p.parquet", b"", "bad-data-file", None),
        ("p.json", b"", "no-prompts", None),
        ("p.jsonl", b"\n", "no-prompts", None),
        ("p.csv", b"text\n", "no-prompts", None),
        ("p.json", b"[]", "no-prompts", None),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, content: bytes, code: str, line: int | None) -> None:
    Path(name).write_bytes(content)
    assert code_of(name) == code
    with pytest.raises(UserError) as error:
        prompts(source=name)
    assert "network" not in str(error.value.fix) and len(str(error.value)) < 600
    assert (f"{name}:{line}" if line else name) in f"{error.value.what} {error.value.where}"


def test_rows_of_json_may_stand_in_either_form() -> None:
    Path("p.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("p.jsonl").write_text('[{"text": "a"}, {"text": "b"}]')
    Path("P.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"id": 1}\r\n{"text": "b"}')
    for name in ("p.json", "p.jsonl", "P.JSONL"):
        assert prompts(source=name) == ("a", "b"), name


def test_columns_of_the_same_name_in_parquet_are_refused() -> None:
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), "p.parquet")
    assert code_of("p.parquet") == "bad-data-file"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet", ""])
def test_only_regular_files_are_opened(suffix: str) -> None:
    for make in (os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")):
        make(f"p{suffix}")
        assert code_of(f"p{suffix}") == "not-a-regular-file"
        Path(f"p{suffix}").unlink()


def test_a_home_folder_that_is_not_known_is_refused() -> None:
    assert code_of("~unknown-user-of-heretic/p.txt") == "unknown-home"
    assert from_text_or_file("~unknown-user-of-heretic what is this") == ("~unknown-user-of-heretic what is this",)


def test_a_path_may_hold_spaces_brackets_and_links() -> None:
    Path("a [1] *ü").mkdir()
    save("a [1] *ü/p q.parquet", ["a"])
    Path("link.parquet").symlink_to("a [1] *ü/p q.parquet")
    assert prompts(source="a [1] *ü/p q.parquet") == prompts(source="link.parquet") == ("a",)


def test_a_full_disk_of_the_cache_of_data_sets_is_no_network_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    file = f"{datasets.config.HF_DATASETS_CACHE}/x.arrow"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", file)

    monkeypatch.setattr("datasets.load_dataset", full)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises("disk") as error:
        prompts(source="owner/name")
    assert error.value.where == file and "HF_DATASETS_CACHE" in str(error.value.fix)
