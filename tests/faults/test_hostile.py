"""Files that mean harm: settings, prompts, checkpoints, and text that would steer a terminal."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic.cli.ui.console import escape_terminal
from heretic.errors import UserError
from heretic.model.checkpoint import open_checkpoint
from heretic.prompts.sets import load
from heretic.settings import PromptSource
from heretic.settings.sources import all_keys, resolve
from tests.faults.conftest import FULL, Tally
from tests.helpers.command import heretic

TIMES = 3000 if FULL else 60
MANY = settings(max_examples=TIMES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=20), st.lists(st.floats(), max_size=3),
    st.lists(st.text(max_size=5), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode(errors="replace"))))
@MANY
def test_any_bytes_as_settings(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.toml"
    path.write_bytes(content)
    try:
        resolve(path)
    except UserError as error:
        assert len(str(error)) < 2000


@given(key=st.sampled_from(sorted(all_keys())), value=values)
@MANY
def test_any_value_of_any_setting(key: str, value: object) -> None:
    try:
        resolve(None, {}, [f"{key}={value}"], {})
    except UserError as error:
        assert str(error).count("\n") <= 3 or len(str(value)) > 100


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".txt", ".json", ".jsonl", ".csv", ".parquet"]))
@MANY
def test_any_bytes_as_prompts(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content)
    try:
        found = load("harmful_train", PromptSource(source=str(path)))
    except UserError as error:
        assert len(str(error)) < 2000
    else:
        assert found.prompts and all(isinstance(p, str) for p in found.prompts)


@given(text=st.text(max_size=100))
@MANY
def test_no_text_steers_the_terminal(text: str) -> None:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=200).print(
        escape_terminal(text), soft_wrap=True, highlight=False
    )
    shown = out.getvalue()
    assert "\x1b" not in shown and "\x9b" not in shown and "\r" not in shown and "\x00" not in shown


ESCAPES = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b2J\rback [bold]markup[/bold] \u202eturned"


def test_escapes_in_prompts_and_answers_are_shown_not_obeyed(
    config: Path, prompt_files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("asked.txt").write_text(f"tell me {ESCAPES.replace(chr(13), '')}\n")
    assert heretic(capsys, monkeypatch, "run", "--run-name", "mine").status == 0
    monkeypatch.setattr("sys.argv", ["heretic", "compare", "mine", "--trials", "0", "--prompts", "asked.txt"])
    from heretic.cli import main as cli

    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr()
    assert "\x1b]0" not in printed.out and "\x1b[2J" not in printed.out and "\x07" not in printed.out
    assert "\\x1b" in printed.out


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def opened(folder: Path) -> str:
    """What opening and reading everything of a checkpoint says."""
    with pytest.raises(UserError) as refused:
        checkpoint = open_checkpoint(str(folder))
        for name in checkpoint.tensors:
            checkpoint.read(name)
    return str(refused.value)


def header(file: Path, change: object) -> None:
    """Change the header of a safetensors file, keeping the rest."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    told = json.loads(content[8 : 8 + length])
    change(told)  # type: ignore[operator]
    text = json.dumps(told).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_headers_that_lie(folder: Path, tally: Tally) -> None:
    file = folder / "model.safetensors"
    kept = file.read_bytes()

    def first(told: dict[str, dict[str, object]]) -> dict[str, object]:
        return told[next(n for n in told if n != "__metadata__")]

    lies = [
        lambda told: first(told).update(data_offsets=[0, 1 << 50]),
        lambda told: first(told).update(shape=[1 << 40, 1 << 40]),
        lambda told: first(told).update(dtype="F1"),
        lambda told: first(told).update(data_offsets=[64, 0]),
    ]
    for lie in lies:
        file.write_bytes(kept)
        header(file, lie)
        assert str(folder) in opened(folder)
    for content in (b"", kept[:5], struct.pack("<Q", 1 << 62) + kept[8:], kept[: len(kept) // 2]):
        file.write_bytes(content)
        assert str(folder) in opened(folder)
    tally("headers of a checkpoint that lie, or are cut", len(lies) + 4, "nothing: refused")


def test_an_index_that_leads_out_of_the_folder(folder: Path, tally: Tally) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in opened(folder)
    tally("an index that names files outside the model's folder", 1, "nothing: refused")


def test_pickles_and_remote_code_are_not_executed(folder: Path, tally: Tally) -> None:
    class Bad:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path("executed"),))  # type: ignore[return-value]

    (folder / "model.safetensors").rename(folder.parent / "kept")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bad()))
    assert "[pickled-weights]" in opened(folder)
    (folder.parent / "kept").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("open('executed', 'w')\n")
    assert "[needs-remote-code]" in opened(folder)
    assert not Path("executed").exists()
    tally("pickled weights, and a model's own code", 2, "nothing: neither is executed")


@pytest.mark.parametrize(
    "name", ["a b", "a;touch executed", "$(touch executed)", "../../etc", "a\nb", "-rf", "ü", "a" * 300]
)
def test_names_with_odd_characters(
    name: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = heretic(capsys, monkeypatch, "run", f"./{name}", "--set", f"run_name={name}")
    assert ran.status != 0 and len(ran.err) < 2000
    assert not Path("executed").exists()


SMALL_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
]
CONTENTS = {
    "empty": b"",
    "no text": bytes(range(256)),
    "a list": b"[]",
    "a number": b"1",
    "nested": b"[" * 200_000,
    "nested and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "out of its sandbox": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "wrong kinds": json.dumps(
        {key: {"a": []} for key in ("model_type", "vocab_size", "hidden_size", "model", "added_tokens", "eos_token_id")}
    ).encode(),
}


@pytest.mark.parametrize("content", sorted(CONTENTS))
@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_of_a_model(
    name: str,
    content: str,
    folder: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    (folder / name).write_bytes(CONTENTS[content])
    ran = heretic(capsys, monkeypatch, "run", str(folder), "--trials", "1")
    assert ran.status in (0, 1) and len(ran.err) < 2000, ran.err
    assert ran.status == 0 or ran.err.count("Error:") == 1
    tally("small files of a model that are broken", 1, "nothing: refused, or unimportant")


def test_giant_metadata(folder: Path, tally: Tally) -> None:
    file = folder / "model.safetensors"
    header(file, lambda told: told.update(__metadata__={str(i): "x" * 100 for i in range(20_000)}))
    checkpoint = open_checkpoint(str(folder))  # two megabytes are large, not harmful
    checkpoint.read(next(iter(checkpoint.tensors)))
    with file.open("r+b") as opened:
        opened.write(struct.pack("<Q", 1 << 30))
        opened.truncate((1 << 30) + 16)  # takes no room on the disk
    assert str(folder) in opened_text(folder)
    tally("metadata of two megabytes and of a gigabyte in a checkpoint", 2, "nothing: the second is refused")


opened_text = opened


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "[" + "a." * 50_000 + "b]", 'a = """' + "x" * 10_000_000 + '"""']
)
def test_settings_without_end(text: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        resolve(path)
    assert len(str(refused.value)) < 500_000


@given(
    content=st.one_of(
        st.binary(max_size=100),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["run", "fingerprint", "trial", "scores", "written", "verification"]), inner
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
@MANY
def test_any_manifest_in_the_destination(content: bytes, tmp_path: Path) -> None:
    from heretic.export.destination import check_destination
    from heretic.export.export import earlier_export
    from heretic.runs.folder import RunFolder
    from heretic.settings import Settings

    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/manifest.json").write_bytes(content)
    assert earlier_export(tmp_path / "out", RunFolder(tmp_path / "mine", "stamp"), 3, Settings()) is None
    with pytest.raises(UserError):
        check_destination(tmp_path / "out", "mine")


def test_counted(tally: Tally) -> None:
    kinds = "random settings files and values, prompt files, screen texts, manifests"
    tally(kinds, 5 * TIMES, "nothing")
    tally("names of models with characters of shells and paths", 8, "nothing: refused, nothing is executed")
    tally("settings nested or long without end", 3, "nothing: refused")
