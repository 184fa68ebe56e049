"""Random changes to a model's small files: a UserError or a model, never another exception, each within seconds."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic.errors import UserError
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.model.meta_model import meta_model
from tests.faults.conftest import FULL, Tally

TIMES = 600 if FULL else 40
SECONDS = 20  # for one example, on a slow machine; most take a tenth of one
MANY = settings(
    max_examples=TIMES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
JSON_FILES = [CONFIG, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 10**6, 10**9, -(10**9), 2**63, 10**40, 0.5, -0.0, 1e300, float("nan"), float("inf")]),
    st.integers(-100, 1000),
    st.sampled_from(["", "a", "llama", "gpt2", "t5", "mamba", "auto", "eager", "float32", "../x", "/dev/zero", "\x1b[2J"]),
    st.text(max_size=8),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = [
    "model_type", "architectures", "auto_map", "quantization_config", "text_config", "transformers_weights", "rope_scaling",
    "rope_parameters", "layer_types", "dtype", "torch_dtype", "id2label", "per_layer_config", "_attn_implementation",
    "is_encoder_decoder", "tie_word_embeddings", "sliding_window", "pad_token_id", "eos_token_id", "num_labels", "hidden_act",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that an example may change: `fresh` makes it whole again."""
    return Path(shutil.copytree(llama, tmp_path_factory.mktemp("hostile") / "model"))


def fresh(folder: Path, llama: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(llama, folder)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail what takes longer."""

    def late(*_: object) -> None:
        pytest.fail(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(folder: Path) -> None:
    """Open, place and load the model: it works, or a UserError of at most three short lines says why not."""
    with within(SECONDS):
        try:
            checkpoint = open_checkpoint(str(folder))
            meta_model(checkpoint, "float32")
            load(checkpoint, ["float32"], {"device_map": {"": "cpu"}})
        except UserError as error:
            assert str(error).count("\n") <= 2 and len(str(error)) < 2000
            assert error.code != "user-error" and "\x1b" not in str(error)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value, but for long lists and tables."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [place for key, value in list(inner)[:40] for place in places(value, (*path, key))]
    return [path, *found] if path else found


def put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@given(name=st.sampled_from(JSON_FILES), data=st.data())
@MANY
def test_any_value_in_a_json_file(name: str, data: st.DataObject, folder: Path, llama: Path) -> None:
    fresh(folder, llama)
    tree = json.loads((llama / name).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        changed = copy.deepcopy(tree)
        try:
            put(changed, data.draw(st.sampled_from(places(tree))), data.draw(values))
        except (LookupError, TypeError):  # an earlier change took the place away
            continue
        tree = changed
    (folder / name).write_text(json.dumps(tree))
    survives(folder)


@given(entries=st.dictionaries(st.sampled_from(ENTRIES), values, min_size=1, max_size=3))
@MANY
def test_any_entry_of_a_config(entries: dict[str, Any], folder: Path, llama: Path) -> None:
    fresh(folder, llama)
    (folder / CONFIG).write_text(json.dumps({**json.loads((llama / CONFIG).read_text()), **entries}))
    survives(folder)


@given(name=st.sampled_from([*JSON_FILES, INDEX, WEIGHTS, "chat_template.jinja"]), content=st.binary(max_size=200))
@MANY
def test_any_bytes_in_a_file(name: str, content: bytes, folder: Path, llama: Path) -> None:
    fresh(folder, llama)
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    survives(folder)


names = st.one_of(st.sampled_from([WEIGHTS, "part.safetensors", CONFIG, "../part.safetensors", ".", "sub"]), values)
tensors = st.sampled_from(["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "x"])


@given(
    index=st.one_of(
        values,
        st.fixed_dictionaries(
            {"metadata": st.just({}) | values, "weight_map": st.dictionaries(tensors, names) | values}
        ),
    )
)
@MANY
def test_any_index(index: Any, folder: Path, llama: Path) -> None:
    fresh(folder, llama)
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    (folder / "sub").mkdir()
    (folder / INDEX).write_text(json.dumps(index))
    survives(folder)


entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "I64", "F1", "U8"]) | values,
        "shape": st.lists(st.sampled_from([0, 1, 32, 48, 96, 2**40, -1]), max_size=3) | values,
        "data_offsets": st.lists(st.sampled_from([0, 4, 128, 2**50, -4]), min_size=2, max_size=2) | values,
    }
)


@given(
    entries=st.dictionaries(tensors, entry | values, min_size=1, max_size=3),
    length=st.sampled_from([0, 0, 0, 1, -1, 2**60]),
)
@MANY
def test_any_header_of_weights(entries: dict[str, Any], length: int, folder: Path, llama: Path) -> None:
    fresh(folder, llama)
    kept = (llama / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", kept[:8])
    header = json.dumps({**json.loads(kept[8 : 8 + size]), **entries}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", max(0, len(header) + length)) + header + kept[8 + size :])
    survives(folder)


@pytest.mark.parametrize("name", [*JSON_FILES, WEIGHTS, "chat_template.jinja", "README.md", "notes.txt"])
def test_named_pipes_do_not_hang(name: str, folder: Path, llama: Path) -> None:
    fresh(folder, llama)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    survives(folder)


def test_counted(tally: Tally) -> None:
    kinds = "random values, entries and bytes in config, tokenizer, index and headers of a model"
    tally(kinds, 5 * TIMES, "nothing: the model is loaded, or refused in at most three lines")
    tally("named pipes in place of a model's files", 8, "nothing: refused, nothing waits")
