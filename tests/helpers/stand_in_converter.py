"""Stands in for llama.cpp's programs: converts a tiny Llama or Qwen 2, or fails in the way that STAND_IN names.

As `llama-quantize` it writes Q5_0, which the real one falls back to for rows that are no whole blocks of a K-quant.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

TYPES = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
MODE = os.environ.get("STAND_IN", "")


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray], kind: Kind) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for name, values in tensors.items():
        small = values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]
        stored = Kind.F32 if small else kind
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(folder: Path, out: Path, kind: Kind) -> None:
    config = json.loads((folder / "config.json").read_text())
    layers, architecture = config["num_hidden_layers"], config["model_type"]
    known = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), layers
    )
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            called = known.get_name(name, (".weight", ".bias"))
            assert called is not None
            tensors[called] = tensor
    damage(tensors)
    write(out, architecture, tensors, kind)
    if MODE == "truncate":
        os.truncate(out, out.stat().st_size // 2)


def damage(tensors: dict[str, np.ndarray]) -> None:
    edited, other = "blk.1.attn_output.weight", "blk.1.ffn_up.weight"
    if MODE == "columns":  # not damage: the converter may reorder what a writer reads
        tensors[edited] = tensors[edited][:, ::-1].copy()
    elif MODE == "unknown":  # nor is a name that the gguf package does not know
        tensors["blk.1.novel.weight"] = tensors.pop(edited)
    elif MODE == "edited":
        tensors[edited][3, 5] += 0.5
    elif MODE == "other":
        tensors[other] *= 1.1
    elif MODE == "zeros":
        tensors[edited][:] = 0
    elif MODE == "nan":
        tensors["output_norm.weight"][0] = np.nan
    elif MODE == "overflow":
        tensors[other][0, 0] = 1e6
    elif MODE == "shape":
        tensors[edited] = tensors[edited][:-1]
    elif MODE == "missing":
        del tensors["blk.1.ffn_norm.weight"]
    elif MODE == "layer":
        for name in [n for n in tensors if n.startswith("blk.1.")]:
            del tensors[name]


def quantize(source: Path, out: Path) -> None:
    reader = gguf.GGUFReader(source)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    write(out, reader.fields["general.architecture"].contents(), tensors, Kind.Q5_0)


def main() -> None:
    if Path(sys.argv[0]).name == "llama-imatrix":
        given = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
        assert (
            gguf.GGUFReader(given["-m"]).tensors and len(Path(given["-f"]).read_text(encoding="utf-8").split()) > 4000
        )
        Path(given["-o"]).write_bytes(b"matrix")
        return None
    if Path(sys.argv[0]).name == "llama-quantize":
        if sys.argv[1] == "--imatrix":
            assert Path(sys.argv[2]).read_bytes() == b"matrix"
            print("with an importance matrix", flush=True)
            del sys.argv[1:3]
        if sys.argv[3] not in ("Q4_K_M", "Q5_K_M", "Q6_K"):
            sys.exit(1)
        return quantize(Path(sys.argv[1]), Path(sys.argv[2]))
    if sys.argv[1] == "--print-supported-models":
        return print("TEXT models:\n  - LlamaForCausalLM\n  - Qwen2ForCausalLM\nMMPROJ models:")
    folder, given = Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    print(f"INFO offline {os.environ['HF_HUB_OFFLINE']}", flush=True)
    out = Path(given["--outfile"])
    if MODE in ("fail", "hang"):
        out.write_bytes(b"GGUF")
        print("about to " + MODE, flush=True)
        time.sleep(600 if MODE == "hang" else 0)
        sys.exit("ValueError: the tokenizer is not known\n\x1b[31mlast words")
    if MODE == "nothing":
        return None
    if any(folder.rglob("*.py")) or "auto_map" in (folder / "config.json").read_text():
        sys.exit("the model's own code is here")
    assert "ablated" in json.loads(Path(given["--metadata"]).read_text())["general.name"]
    return convert(folder, out, TYPES[given["--outtype"]])


if __name__ == "__main__":
    main()
