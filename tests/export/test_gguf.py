"""GGUF files written for models whose logits and token ids come back through transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from heretic.errors import UserError
from heretic.export.export import Export
from heretic.export.gguf_file import KINDS, rounding_of_blocks
from heretic.export.gguf_tokenizer import PROBES, vocabulary
from heretic.model.checkpoint import open_checkpoint
from heretic.progress import SILENT
from heretic.reproduce import reproduce
from heretic.run import run
from heretic.settings.layers import resolve
from heretic.stop import Stop
from tests.tiny import FAMILIES, TEMPLATE, TEXT, tiny_model

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
SPECIAL = ["<|endoftext|>", "<|begin|>", "<|end|>"]
SIZE = 320


def save_bpe(folder: Path, split: str | None) -> None:
    """A small byte-level BPE tokenizer that splits text as Qwen 2, Llama 3 or (None) GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if split is None
        else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 10, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f"{TEXT} 12 123 1234 don't we'll"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def save_model(folder: Path, family: str, split: str | None, monkeypatch: pytest.MonkeyPatch, **other: object) -> Path:
    name, arguments = FAMILIES[family]
    changed = {**arguments, "vocab_size": SIZE, "sliding_window": None, **other}
    monkeypatch.setitem(FAMILIES, family, (name, changed))
    tiny_model(family).save_pretrained(folder, max_shard_size="60KB")
    save_bpe(folder, split)
    return folder


def export(config: Path, model: Path, *assignments: str, form: str = "gguf") -> Export:
    options = {"model": str(model), "save_to": "out", "n_trials": 1, "export_format": form}
    strong = ("search.attention.max_weight=[1.0, 1.2]", "search.mlp.max_weight=[1.0, 1.2]")
    found = run(resolve(config, options, (*strong, *assignments)), watcher=SILENT, stop=Stop()).export
    assert found is not None
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 20, 40, 33, 9, 301]])).logits


@pytest.mark.parametrize(
    ("family", "split", "other", "pre"),
    [
        ("llama", LLAMA3, {"tie_word_embeddings": True}, "llama-bpe"),
        ("llama", None, {"head_dim": 8, "rope_theta": 5e5}, "gpt-2"),
        ("mistral", None, {}, "gpt-2"),
        ("qwen2", QWEN2, {"rms_norm_eps": 1e-5}, "qwen2"),
        ("qwen3", QWEN2, {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}, "qwen2"),
    ],
)
def test_logits_and_ids_come_back(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    split: str | None,
    other: dict[str, object],
    pre: str,
) -> None:
    base = save_model(tmp_path / "m", family, split, monkeypatch, **other)
    assert export(config, base, "gguf_type=f32").verification.divergence < 1e-6
    (file,) = Path("out").glob("*.gguf")
    assert {p.name for p in Path("out").iterdir()} == {"README.md", "manifest.json", "heretic", file.name}
    read = AutoModelForCausalLM.from_pretrained("out", gguf_file=file.name)
    found = reproduce_full(config, base)
    assert (logits(read) - logits(found)).abs().max() < 1e-4 < (logits(read) - logits(tiny_model(family))).abs().max()
    theirs, ours = AutoTokenizer.from_pretrained("out", gguf_file=file.name), AutoTokenizer.from_pretrained(base)
    for text in PROBES:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template
    assert [theirs.pad_token, theirs.bos_token, theirs.eos_token] == SPECIAL
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert len(fields["tokenizer.ggml.tokens"].contents()) == SIZE


def reproduce_full(config: Path, base: Path) -> torch.nn.Module:
    """The same trial as a full model."""
    Path("out").rename("kept")
    export(config, base, form="full")
    model = AutoModelForCausalLM.from_pretrained("out")
    shutil.rmtree("out")
    Path("kept").rename("out")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_types_round_as_much_as_they_say(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = save_model(tmp_path / "m", "qwen2", QWEN2, monkeypatch, hidden_size=64)
    (base / "LICENSE").write_text("terms")
    proof = export(config, base, f"gguf_type={kind}").verification
    assert proof.divergence < max(1e-6, KINDS[kind][2])
    (file,) = Path("out").glob("*.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.attn_q.weight"].tensor_type == KINDS[kind][0]
    assert stored["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    rows = stored["blk.0.ffn_down.weight"]  # 48 inputs: no whole number of blocks of 32
    assert rows.tensor_type == (gguf.GGMLQuantizationType.F16 if kind == "q8_0" else KINDS[kind][0])
    assert np.isfinite(gguf.quants.dequantize(rows.data, rows.tensor_type)).all()
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["written"]["format"] == "gguf" and manifest["written"]["type"] == kind
    assert Path("out/LICENSE").read_text() == "terms"
    card = Path("out/README.md").read_text()
    assert "library_name: gguf" in card and f"`{kind}`" in card
    elsewhere = shutil.copytree(base, tmp_path / "renamed")
    again = reproduce(Path("out"), None, base=str(elsewhere), watcher=SILENT, stop=Stop())
    assert again.verdict == "identical", "also from a base under another name"


@pytest.mark.parametrize("largest", [1.0, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 0.0])
def test_blocks_of_small_numbers_are_within_their_rounding(largest: float) -> None:
    torch.manual_seed(0)
    blocks = (torch.rand(4096, 32) * 2 - 1) * largest
    packed = gguf.quants.quantize(blocks.numpy(), gguf.GGMLQuantizationType.Q8_0)
    read = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).copy())
    apart, most = (read - blocks).abs(), rounding_of_blocks(blocks)
    assert (apart <= most * 1.0001 + 1e-30).all()
    if largest > 1e-2:
        assert (apart > most / 4).any(), "the bound says something"


@pytest.mark.parametrize(
    ("family", "other", "what"),
    [
        ("gemma3", {"sliding_window": 8}, "gemma3_text is not among"),
        ("qwen3", {"head_dim": 8}, "heads are 8 wide, not 128"),
        ("mistral", {"sliding_window": 8}, "attention has a window"),
        ("llama", {"attention_bias": True}, "attention has biases"),
        ("llama", {"mlp_bias": True}, "MLPs have biases"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "positions are scaled",
        ),
    ],
)
def test_what_cannot_be_proven_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, other: dict[str, object], what: str
) -> None:
    base = save_model(tmp_path / "m", family, QWEN2, monkeypatch, **other)
    with pytest.raises(UserError, match=what) as refused:
        export(config, base)
    assert "convert_hf_to_gguf.py" in str(refused.value) and not Path("out").exists()


def test_tokenizers_that_cannot_be_proven_are_refused(
    config: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not byte-level BPE"):
        export(config, llama)
    base = save_model(tmp_path / "m", "llama", r"\d+|\D", monkeypatch)
    with pytest.raises(UserError, match="splits text is not known"):
        export(config, base)
    data = json.loads((base / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    (base / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="in another way"):
        export(config, base)
    assert not Path("out").exists()


def test_templates_of_all_names_are_written(llama: Path, tmp_path: Path) -> None:
    save_bpe(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {"default": TEMPLATE, "rag": "RAG"}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    vocabulary(tokenizer, SIZE, open_checkpoint(str(llama))).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.chat_template.rag"].contents() == "RAG"
