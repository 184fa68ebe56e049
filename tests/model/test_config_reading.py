"""A model's config: believed where the tensors bear it out, refused in one message where it cannot be meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic.errors import UserError
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.model.meta_model import meta_model
from tests.tiny import save_tiny


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def refusal(folder: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as error:
        meta_model(open_checkpoint(str(folder), **options), "float32")
    assert str(error.value).count("\n") <= 2 and len(str(error.value)) < 1000 and error.value.fix
    return error.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("hidden_size", 10**12),
        ("hidden_size", -32),
        ("vocab_size", 10**30),
        ("head_dim", 10**9),
        ("intermediate_size", -1),
        ("num_key_value_heads", 10**9),
        ("num_labels", 10**12),
        ("max_position_embeddings", 0),
        ("hidden_size", 64),
        ("vocab_size", 97),
        ("intermediate_size", 49),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_refused(folder: Path, key: str, value: int) -> None:
    change(folder, **{key: value})
    found = refusal(folder)
    assert found.code == "config-size-mismatch" and "config.json" in str(found.where)


def test_sizes_of_configs_within_configs_are_checked(folder: Path) -> None:
    change(folder, text_config={"num_hidden_layers": 10**9})
    found = refusal(folder)
    assert found.code == "config-size-mismatch" and "text_config.num_hidden_layers" in str(found.where)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", ["full_attention"] * 3),
        ("hidden_size", "thirty-two"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", 3),
        ("architectures", {"a": 1}),
        ("torch_dtype", "torch.bfloat16"),
        ("num_key_value_heads", [2, 2]),
        ("id2label", 5),
        ("quantization_config", "4bit"),
    ],
)
def test_entries_that_transformers_refuses_are_named(folder: Path, key: str, value: Any) -> None:
    change(folder, **{key: value}, dtype=None)
    found = refusal(folder)
    assert found.code == "invalid-config" and "update transformers" not in str(found.fix)
    assert key in str(found) or key == "torch_dtype"


def test_update_is_advised_for_an_unknown_model_type_only(folder: Path) -> None:
    change(folder, model_type="of_tomorrow")
    found = refusal(folder)
    assert found.code == "unknown-model-type" and "update transformers" in str(found.fix)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel", "BertForMaskedLM"])
def test_other_kinds_of_models_are_refused(folder: Path, name: str) -> None:
    change(folder, architectures=[name])
    assert refusal(folder).code == "not-a-causal-model"


@pytest.mark.parametrize("names", [None, [], ["CalledOtherwise"], ["LlamaForCausalLM"]])
def test_mapping_of_transformers_decides_not_the_name(folder: Path, names: list[str] | None) -> None:
    change(folder, architectures=names)
    assert open_checkpoint(str(folder)).config.model_type == "llama"


@pytest.mark.parametrize(("auto", "accepted"), [("AutoModelForCausalLM", True), ("AutoModel", False)])
def test_auto_map_decides_for_code_of_its_own(folder: Path, auto: str, accepted: bool) -> None:
    code = f"odd_{auto.lower()}"  # transformers remembers what it has loaded
    (folder / f"{code}.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class OddConfig(LlamaConfig):\n    model_type = "odd_one"\n\n\n'
        "class OddModel(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    names = {"AutoConfig": f"{code}.OddConfig", auto: f"{code}.OddModel"}
    change(folder, model_type="odd_one", architectures=["OddModel"], auto_map=names)
    trusted = [str(folder)]
    if not accepted:
        assert refusal(folder, trust_remote_code=trusted).code == "not-a-causal-model"
        return
    checkpoint = open_checkpoint(str(folder), trust_remote_code=trusted)
    model = load(checkpoint, ["float32"], {"device_map": {"": "cpu"}}, trust_remote_code=trusted).model
    assert type(model).__name__ == "OddModel"


FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LEFT_OVER = [FOUR_BITS, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "mxfp4"},
             {"quant_method": "magic"}, {"load_in_8bit": True}, {}]  # fmt: skip


@pytest.mark.parametrize("entry", LEFT_OVER)
def test_quantization_without_packed_tensors_is_ignored(folder: Path, entry: Any) -> None:
    change(folder, quantization_config=entry)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.leftover_quantization and checkpoint.quantized_by is None and checkpoint.is_dequantized is None
    assert "quantization_config" not in json.loads(str(checkpoint.config_text()))
    model = load(checkpoint, ["bfloat16"], {"device_map": {"": "cpu"}}).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_packed_tensors_without_an_entry_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    assert refusal(folder).code == "no-quantization-config"


LEFT_BY_TOOLS: list[dict[str, Any]] = [
    {"_attn_implementation": "flash_attention_2"},
    {"attn_implementation": "flash_attention_3"},
    {"_attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation_autoset": True, "_flash_attn_2_enabled": True},
    {"experts_implementation": "of_another_machine"},
    {"torch_dtype": "float16", "dtype": "float8_e4m3fn"},
    {"use_cache": False},
    {"_name_or_path": "/home/somebody/secret", "name_or_path": "x"},
    {"unsloth_version": "2025.1.1", "unsloth_fixed": True},
    {"architectures": None},
    {"transformers_version": "99.0.0"},
    {"pad_token_id": None},
]


@pytest.mark.parametrize("left", LEFT_BY_TOOLS, ids=lambda left: next(iter(left)))
def test_what_tools_leave_behind_does_not_hinder(folder: Path, left: dict[str, Any]) -> None:
    change(folder, **left)
    checkpoint = open_checkpoint(str(folder))
    meta_model(checkpoint, "float32")
    model = load(checkpoint, ["float32"], {"device_map": {"": "cpu"}}).model
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_head_dimensions_of_experts_may_lie_the_other_way_round(tmp_path: Path) -> None:
    for family in ("mixtral", "gpt_oss", "deepseek_v3"):
        meta_model(open_checkpoint(str(save_tiny(tmp_path / family, family))), "float32")
