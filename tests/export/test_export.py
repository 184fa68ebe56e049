"""Writing models: shards, dtypes, cards, and proof that catches a wrong edit."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic.errors import VerificationFailed
from heretic.export import destination, save
from heretic.export.export import plan_export
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import RunFolder
from heretic.scoring.scores import Divergence, Scores
from heretic.search.pareto import Result
from heretic.settings.sources import resolve
from tests.helpers.errors import raises
from tests.helpers.tiny_gguf import save_tiny_gguf
from tests.tiny import MIXED, save_tiny


def do(config: Path, model: Path, *assignments: str) -> Outcome:
    return run(
        resolve(config, {"model": str(model), "save_to": "out", "n_trials": 2}, assignments),
        reporter=NULL_REPORTER,
        stop=StopSignal(),
    )


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3", "mixtral"])
def test_shards_and_dtype_of_the_original_are_kept(config: Path, family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", family, dtype=torch.bfloat16, max_shard_size="20KB")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\nlanguage:\n- en\n- de\n---\n# Old card\n")
    (folder / "LICENSE").write_text("terms")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    outcome = do(config, folder)
    assert outcome.export is not None and outcome.export.verification.divergence < 1e-3
    before, after = open_checkpoint(str(folder)), open_checkpoint("out")
    assert [p.name for p in after.shards()] == [p.name for p in before.shards()]
    assert len(after.shards()) > 2
    assert {n: (t.shape, t.dtype) for n, t in after.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in before.tensors.items()
    }
    assert (Path("out") / "LICENSE").read_text() == "terms" and not (Path("out") / "pytorch_model.bin").exists()
    head = metadata_load("out/README.md") or {}
    assert head["license"] == "apache-2.0" and head["language"] == ["en", "de"]
    assert "x" not in head["tags"] and "Old card" not in Path("out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained("out").chat_template == AutoTokenizer.from_pretrained(folder).chat_template


def test_manifest_says_from_what_it_was_made(config: Path, llama: Path) -> None:
    outcome = do(config, llama)
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["run"] == outcome.folder.name
    assert manifest["model"]["sha256"]["model.safetensors"] != manifest["written"]["sha256"]["model.safetensors"]
    assert manifest["prompts"]["harmful_eval"]["count"] == 8
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["scores"]["original"]["refusals"] == outcome.original_refusals


@pytest.mark.parametrize("looked_at", [True, False], ids=["tensors", "answers"])
def test_a_wrong_edit_is_caught_and_nothing_is_left(
    config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, looked_at: bool
) -> None:
    monkeypatch.setattr(save.TensorEdit, "__call__", lambda self, tensor: tensor)
    if not looked_at:
        monkeypatch.setattr("heretic.export.export.check_edits", lambda *_: 0)
    with raises("verification-failed", VerificationFailed) as error:
        do(config, llama, "search.attention.max_weight=[1.4, 1.5]", "search.mlp.max_weight=[1.4, 1.5]")
    assert (error.value.where in open_checkpoint(str(llama)).tensors) == looked_at, "the first check names a tensor"
    assert not Path("out").exists() and not list(Path().glob(".out*"))


def test_gguf_in_and_an_ordinary_folder_out(config: Path, tmp_path: Path) -> None:
    outcome = do(config, save_tiny_gguf(tmp_path / "tiny.gguf"))
    assert outcome.export is not None and outcome.export.verification.divergence < 0.01
    assert open_checkpoint("out").config.architectures == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained("out").dtype == torch.bfloat16
    stored = json.loads(Path("out/config.json").read_text())
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] and stored["torch_dtype"] == "bfloat16"
    assert "TokenizersBackend" not in Path("out/tokenizer_config.json").read_text()


@pytest.mark.parametrize("family", [*MIXED, "gemma3"])
def test_an_opened_model_is_written_under_the_names_that_files_have(tmp_path: Path, family: str) -> None:
    """Of a mixture whose experts lie in one tensor in memory and in many in files, too."""

    def loaded(folder: Path) -> LanguageModel:
        return load(open_checkpoint(str(folder)), ["bfloat16"], {"device_map": {"": "cpu"}})

    model = loaded(save_tiny(tmp_path / "model", family))
    (tmp_path / "written").mkdir()
    save.write_dequantized(model.checkpoint, (), {}, model, tmp_path / "written", NULL_REPORTER, StopSignal())
    tokens = torch.tensor([[5, 20, 40, 33, 9]])
    before, after = (m.model(input_ids=tokens).logits for m in (model, loaded(tmp_path / "written")))
    assert torch.equal(before, after)


def test_the_same_export_is_not_made_again_and_another_one_is(config: Path, llama: Path) -> None:
    def made(*assignments: str) -> float:
        export = do(config, llama, *assignments).export
        assert export is not None
        return Path("out/manifest.json").stat().st_mtime_ns

    first = made()
    assert made() == first
    file, manifest = Path("out/manifest.json"), json.loads(Path("out/manifest.json").read_text())
    manifest["verification"]["largest_difference"] = 0.01  # as earlier versions wrote it
    file.write_text(json.dumps(manifest))
    older = file.stat().st_mtime_ns
    assert made() == older
    (weights,) = Path("out").glob("*.safetensors")
    weights.unlink()
    again = made()
    assert again != first and weights.is_file(), "without its weights it is none"
    named = made("behavior=empty openings")
    assert named != again and made("behavior=empty openings") == named
    small = made("export_format=lora", "lora_rank=2", "ablation.geometry=norm_preserving")
    assert made("export_format=lora", "lora_rank=3", "ablation.geometry=norm_preserving") != small


def test_leftovers_of_a_process_with_our_number_are_removed(tmp_path: Path) -> None:
    """In a container every process that is started has the same one."""
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert destination.staging_dir(tmp_path / "out") == left and not list(left.iterdir())


def test_a_destroyed_model_is_not_exported(tmp_path: Path) -> None:
    d = Divergence(math.inf, 0.1, 0.1, math.inf)
    result = Result(3, {}, Scores(d, 0, 10, {}))
    with raises("logits-not-finite") as error:
        plan_export(None, None, None, result, RunFolder(tmp_path), tmp_path / "out")  # type: ignore[arg-type]
    assert "3" in error.value.what


def test_a_language_model_alone_names_the_class_of_its_tokenizer(tmp_path: Path) -> None:
    class Qwen3_5Tokenizer:  # that transformers takes for this model_type, whatever the file says
        pass

    assert save._named_tokenizer(tmp_path, Qwen3_5Tokenizer()) == {}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "pad_token": "x"}')
    named = json.loads(save._named_tokenizer(tmp_path, Qwen3_5Tokenizer())["tokenizer_config.json"])
    assert named == {"tokenizer_class": "Qwen3_5Tokenizer", "pad_token": "x"}
