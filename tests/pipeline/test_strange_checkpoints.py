"""Checkpoints that hurt, each from its folder to a proven export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.tiny_quantized import save_fp8
from tests.tiny import COMMON, TEMPLATE, save_tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def do(config: Path, model: Path, *assignments: str) -> Outcome:
    options = {"model": str(model), "save_to": "out", "n_trials": 1}
    return run(resolve(config, options, assignments), reporter=NULL_REPORTER, stop=StopSignal())


def changed(file: Path, **changes: Any) -> None:
    """A JSON file with keys set, or taken out where they are None."""
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("files", [1, 3])
def test_pickle_files_become_safetensors(config: Path, folder: Path, files: int) -> None:
    before = open_checkpoint(str(folder))
    names = sorted(before.tensors)
    tensors = {name: before.read(name) for name in names}
    (folder / "model.safetensors").unlink()
    parts = [f"pytorch_model-{i}-of-3.bin" for i in range(files)] if files > 1 else ["pytorch_model.bin"]
    for i, part in enumerate(parts):
        torch.save({n: tensors[n] for n in names[i::files]}, folder / part)
    if files > 1:
        index = {"metadata": {}, "weight_map": {n: parts[names.index(n) % files] for n in names}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with raises("pickled-weights") as error:
        do(config, folder)
    assert "allow_pickle = true" in str(error.value.fix)
    export = do(config, folder, "allow_pickle=true").export
    assert export is not None and export.verification.divergence < 1e-3
    assert not [p for p in Path("out").iterdir() if ".bin" in p.name]
    after = open_checkpoint("out")
    assert sorted(after.tensors) == names and len(after.shards()) == files
    assert torch.equal(after.read("model.norm.weight"), tensors["model.norm.weight"])
    AutoModelForCausalLM.from_pretrained("out")


def test_code_of_a_model_of_its_own_goes_with_it(config: Path, folder: Path) -> None:
    (folder / "odd.py").write_text(CODE)
    names = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    changed(folder / "config.json", model_type="odd", architectures=["OddForCausalLM"], auto_map=names)
    with raises("needs-remote-code") as error:
        do(config, folder)
    assert f'trust_remote_code = ["{folder}"]' in str(error.value.fix)
    export = do(config, folder, f'trust_remote_code=["{folder}"]').export
    assert export is not None and export.verification.divergence < 1e-3
    assert Path("out/odd.py").read_text() == CODE
    with raises("needs-remote-code"):
        open_checkpoint("out")
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM"


def test_tied_embeddings_stay_tied(config: Path, tmp_path: Path) -> None:
    COMMON_TIED = {**COMMON, "tie_word_embeddings": True}
    folder = save_tiny(tmp_path / "tied")
    from transformers import LlamaConfig

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON_TIED))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    assert "lm_head.weight" not in open_checkpoint(str(folder)).tensors
    export = do(config, folder).export
    assert export is not None and export.verification.divergence < 1e-3
    written = AutoModelForCausalLM.from_pretrained("out")
    assert written.lm_head.weight is written.model.embed_tokens.weight
    assert "lm_head.weight" not in open_checkpoint("out").tensors


def test_without_generation_config_and_pad_token(config: Path, folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    changed(folder / "tokenizer_config.json", pad_token=None)
    changed(folder / "config.json", pad_token_id=None)
    export = do(config, folder).export
    assert export is not None and export.verification.divergence < 1e-3
    assert not Path("out/generation_config.json").exists(), "what the original lacks is not made up"


def test_without_chat_template(config: Path, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    changed(folder / "tokenizer_config.json", chat_template=None)
    with raises("no-chat-template") as error:
        do(config, folder)
    assert 'chat_template = "template.jinja"' in str(error.value.fix)
    Path("mine.jinja").write_text(TEMPLATE)
    export = do(config, folder, "chat_template=mine.jinja").export
    assert export is not None and export.verification.divergence < 1e-3


def test_one_shard_is_copied_byte_for_byte_but_for_the_edits(config: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    do(config, folder)
    source, written = (f / "model.safetensors" for f in (folder, Path("out")))
    assert source.stat().st_size == written.stat().st_size
    differing = set()
    with safe_open(source, "pt") as a, safe_open(written, "pt") as b:
        assert a.metadata() == b.metadata()
        for name in a.keys():  # noqa: SIM118
            if not torch.equal(a.get_tensor(name), b.get_tensor(name)):
                differing.add(name.split(".")[-2])
    assert differing <= {"o_proj", "down_proj"} and differing


def test_model_file_beside_another_models_index_is_measured_and_exported(config: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", seed=1, max_shard_size="30KB")
    shutil.copy(save_tiny(tmp_path / "newer") / "model.safetensors", folder)
    export = do(config, folder).export
    assert export is not None and export.verification.divergence < 1e-3
    assert [p.name for p in Path("out").iterdir() if "safetensors" in p.name] == ["model.safetensors"]


def test_quantization_config_without_packed_tensors_is_left_out_of_the_export(config: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    changed(folder / "config.json", quantization_config=entry)
    export = do(config, folder).export
    assert export is not None and export.verification.divergence < 1e-3
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained("out", dtype="auto").dtype == torch.bfloat16


def test_class_not_called_causal_is_exported(config: Path, folder: Path) -> None:
    (folder / "glm.py").write_text(
        CODE.replace("Odd", "Glm").replace("odd", "glm_like").replace("GlmForCausalLM", "GlmModel")
    )
    names = {"AutoConfig": "glm.GlmConfig", "AutoModelForCausalLM": "glm.GlmModel"}
    changed(folder / "config.json", model_type="glm_like", architectures=["GlmModel"], auto_map=names)
    export = do(config, folder, f'trust_remote_code=["{folder}"]').export
    assert export is not None and export.verification.divergence < 1e-3


LEFT_IN_GENERATION = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}  # transformers refuses to save this


def test_what_a_training_tool_left_behind_does_not_hinder(config: Path, folder: Path) -> None:
    left = {
        "_attn_implementation": "flash_attention_2", "use_cache": False, "_name_or_path": "/home/x", "unsloth_version": "1",
        "transformers_version": "99.0.0", "pad_token_id": None, "torch_dtype": "float16", "architectures": None,
    }  # fmt: skip
    changed(folder / "config.json", **left)
    changed(folder / "generation_config.json", **LEFT_IN_GENERATION)
    export = do(config, folder).export
    assert export is not None and export.verification.divergence < 1e-3
    assert json.loads(Path("out/generation_config.json").read_text())["temperature"] == 0.6


def test_generation_config_that_transformers_refuses_to_save_goes_with_an_opened_model(
    config: Path, tmp_path: Path
) -> None:
    folder = save_fp8(tmp_path / "m")
    content = {"eos_token_id": 2, **LEFT_IN_GENERATION}
    (folder / "generation_config.json").write_text(json.dumps(content))
    export = do(config, folder).export
    assert export is not None
    assert json.loads(Path("out/generation_config.json").read_text()) == content
