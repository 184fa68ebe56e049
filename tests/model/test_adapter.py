"""LoRA adapters: which model they belong to, which files are refused, and that peft applies all their tensors."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from heretic.interrupt import StopSignal
from heretic.model.adapter import base_of, with_adapter
from heretic.pipeline import actions
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.tiny import tiny_model

WEIGHTS = "adapter_model.safetensors"


def save_adapter(folder: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    options = {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": False, **options}
    get_peft_model(model or tiny_model("llama"), LoraConfig(**options)).save_pretrained(str(folder))
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([[5, 20, 40, 33, 9]])).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["mlp.down_proj.weight"]}],
)
def test_what_peft_saves_is_attached_as_peft_does(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path, task_type="CAUSAL_LM", **options)
    expected = logits(PeftModel.from_pretrained(tiny_model("llama"), folder))
    assert torch.equal(logits(with_adapter(tiny_model("llama"), folder)), expected)
    assert not torch.equal(logits(tiny_model("llama")), expected)


def test_experts_that_peft_joins_are_attached(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer, expert in ((layer, expert) for layer in range(4) for expert in range(4)):
        for name, width, out in (("w1", 32, 48), ("w2", 48, 32), ("w3", 32, 48)):
            module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            tensors |= {
                f"{module}.lora_A.weight": torch.randn(2, width),
                f"{module}.lora_B.weight": torch.randn(out, 2),
            }
    save_adapter(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    change_config(tmp_path, target_modules=["w1", "w2", "w3"])
    assert not torch.equal(logits(with_adapter(tiny_model("mixtral"), tmp_path)), logits(tiny_model("mixtral")))


def test_tensors_that_the_model_or_the_file_lacks_are_refused(tmp_path: Path) -> None:
    tensors = load_file(save_adapter(tmp_path) / WEIGHTS)
    more = {name.replace("layers.3", "layers.9"): tensor.clone() for name, tensor in tensors.items()}
    for stored in (tensors | more, {name: tensors[name] for name in list(tensors)[1:]}):
        save_file(stored, tmp_path / WEIGHTS)
        with raises("adapter-not-loadable"):
            with_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "x"}, {"r": 0}, {"lora_alpha": None}, {"target_modules": 5}, {"task_type": "NOPE"}, {"rank_pattern": 3},
        {"megatron_config": 3}, {"layer_replication": [[0, 9]]}, {"layers_to_transform": "a"}, {"target_modules": ["no"]},
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    change_config(save_adapter(tmp_path), **changes)
    with raises("adapter-not-loadable"):
        with_adapter(tiny_model("llama"), tmp_path)


def test_damaged_files_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    weights = save_adapter(tmp_path) / WEIGHTS
    whole = weights.read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", whole[:-8]):
        weights.write_bytes(content)
        with raises("adapter-not-loadable"):
            base_of(tmp_path, "owner/name")
    weights.write_bytes(whole)
    assert base_of(tmp_path, "owner/name") == ("owner/name", "")
    change_config(tmp_path, task_type="NOPE")
    with raises("adapter-not-loadable"):
        base_of(tmp_path, "owner/name")


@pytest.mark.parametrize(
    ("named", "candidate", "expected"),
    [
        ("models/llama", "/data/models/llama", "/data/models/llama"),
        ("owner/name", "/srv/name/", "/srv/name/"),
        ("owner/name", "/srv/other", "owner/name"),
        ("owner/name", None, "owner/name"),
        ("/home/a/base/", "/data/base", "/data/base"),
        ("C:\\models\\base", "/data/base", "/data/base"),
        ("here/llama", "/data/llama", "here/llama"),
        ("/x/base", "/y/other", None),
        ("gpt2", None, None),
    ],
)
def test_the_model_is_the_folder_then_the_candidate_of_that_name_then_the_hubs(
    tmp_path: Path, named: str, candidate: str | None, expected: str | None
) -> None:
    Path("here/llama").mkdir(parents=True)
    change_config(save_adapter(tmp_path / "a"), base_model_name_or_path=named)
    with nullcontext() if expected else raises("adapter-only"):
        assert base_of(tmp_path / "a", candidate) == (expected, "")


@pytest.mark.parametrize(
    ("against", "revisions", "loaded"),
    [
        (None, ("", ""), ["owner/name@recorded"]),
        (None, ("mine", ""), ["owner/name@mine"]),
        ("owner/name", ("", "mine"), ["owner/name@mine", "owner/name@mine"]),
        ("owner/name", ("", ""), ["owner/name@recorded", "owner/name@recorded"]),
        ("owner/other", ("", "mine"), ["owner/other@mine", "owner/name@recorded"]),
    ],
)
def test_the_users_revision_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: str | None, revisions: tuple[str, str], loaded: list[str]
) -> None:
    change_config(save_adapter(tmp_path / "a"), base_model_name_or_path="owner/name", revision="recorded")
    seen: list[str] = []

    def load(settings: Any, *_: Any) -> Any:
        seen.append(f"{settings.model}@{settings.revision}")
        if len(seen) == len(loaded):
            raise InterruptedError
        return type("Context", (), {"language_model": type("Model", (), {"model": None}), "answer_start": None})

    monkeypatch.setattr(actions, "_load_for_evaluation", load)
    monkeypatch.setattr(actions, "_reference", lambda _: None)
    monkeypatch.setattr(actions, "unloaded_after", lambda _: nullcontext())
    settings = resolve(None, {"model": str(tmp_path / "a")}).settings
    with pytest.raises(InterruptedError):
        actions.evaluate_model(
            settings, against, revisions=revisions, wait=False, reporter=NULL_REPORTER, stop=StopSignal()
        )
    assert seen == loaded
