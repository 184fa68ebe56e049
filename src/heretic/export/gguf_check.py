"""Compare a GGUF file with the model folder that it was converted from, within the precision of its types.

llama.cpp's converter renames, splits and reorders tensors. Every edited tensor must be in its block with its values (columns in any
order), every other matrix with one counterpart must have its size and norm. Names are the gguf package's; without one, all
tensors of the block are candidates.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from heretic.errors import UserError, VerificationFailed, first_line
from heretic.export.save import TensorEdit
from heretic.export.spot_check import rounding_of
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.progress import ProgressReporter

FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
# Largest relative error norm of a block: about twice half a step for each of 32 numbers beside a single large one, since
# llama-quantize minimizes another error. `ROUGHEST` is for its fallback types.
ERRORS = {Kind.Q8_0: 0.025, Kind.Q6_K: 0.1, Kind.Q5_K: 0.15, Kind.Q5_1: 0.2, Kind.Q5_0: 0.2, Kind.Q4_K: 0.3}
ROUGHEST = 0.3
SMALLEST = 1e-4  # absolute error of a block's norm: float16 scales have a resolution of 2^-24
LAYER = re.compile(r"^(.+?)\.(\d+)\.(.+)$")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


class GgufFile:
    """An open GGUF file, with the mapping of tensor names."""

    def __init__(self, path: Path, layers: int) -> None:
        """Open the file. Raises VerificationFailed if it is unreadable."""
        try:
            reader = gguf.GGUFReader(path)
            self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
            name = reader.fields["general.architecture"].contents()
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise failed(path.name, f"it cannot be read ({first_line(error)})") from None
        architecture = next((a for a, called in gguf.MODEL_ARCH_NAMES.items() if called == name), None)
        self.names = gguf.get_tensor_name_map(architecture, layers) if architecture is not None else None

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Read a tensor, or one expert's part of it, in float32."""
        data, kind = self.tensors[name].data, self.tensors[name].tensor_type
        data = data if expert is None else data[expert]
        packed = kind in FLOATS or gguf.GGML_QUANT_SIZES[kind][0] > 1
        return torch.from_numpy((gguf.quants.dequantize(data, kind) if packed else data).astype("float32"))

    def shape(self, name: str, expert: int | None = None) -> tuple[int, ...]:
        """Return the shape in torch's order."""
        whole = tuple(int(n) for n in reversed(self.tensors[name].shape))
        return whole if expert is None else whole[1:] if len(whole) == 3 and expert < whole[0] else ()

    def name_of(self, name: str) -> str:
        """Return the GGUF name of a tensor of the model folder; empty if the gguf package has none."""
        single = EXPERT.sub(".experts.", name)
        layer = LAYER.match(single)
        candidates = [
            single,
            single.replace("language_model.", ""),
            f"model.layers.{layer[2]}.{layer[3]}" if layer else "",
        ]
        names = (self.names and self.names.get_name(key, (".weight", ".bias")) for key in candidates)
        called = next((n for n in names if n), "")
        return f"{called}.weight" if f"{called}.weight" in self.tensors else called


def check_file(
    path: Path, staged: Checkpoint, edits: Mapping[str, TensorEdit], reporter: ProgressReporter, stop: StopSignal
) -> None:
    """Compare a GGUF file with the model folder that it was converted from.

    Raises VerificationFailed, UserError for numbers too large for float16, Interrupted.
    """
    config = staged.text_config
    layers = config.num_hidden_layers
    heads = [getattr(config, name, None) or 1 for name in ("num_attention_heads", "num_key_value_heads")]
    file = GgufFile(path, layers)
    outer = {match[1] for name in edits if (match := LAYER.match(name))}  # prefixes of the language model's layers
    present: dict[str, set[tuple[bool, str]]] = defaultdict(set)
    with reporter.stage("Checking the GGUF file", len(file.tensors) + len(staged.tensors)) as stage:
        norms = {}
        for name, tensor in file.tensors.items():
            stop.check()
            norms[name] = float(file.read(name).double().norm())
            if not norms[name] < float("inf"):
                raise _not_finite(name, tensor.tensor_type)
            stage.advance()
        for name, info in staged.tensors.items():
            stop.check()
            stage.advance()
            layer = LAYER.match(name)
            if layer and ((outer and layer[1] not in outer) or int(layer[2]) >= layers):
                continue  # vision, audio and multi-token-prediction layers are not converted
            called = file.name_of(name)
            if name in edits:
                _check_edited(file, name, called, staged.read(name), edits[name], heads)
            elif called in norms and len(info.shape) > 1 and not EXPERT.search(name):
                _check_norm(file, name, called, staged.read(name), norms[called])
            if called and layer and name not in edits:
                present[layer[3]].add((called in norms, called))
    # A tensor exists in every layer, or in none if the converter splits it.
    for names in present.values():
        if len({exists for exists, _ in names}) > 1:
            raise failed(min(called for exists, called in names if not exists), "it is missing")
    for needed in ("token_embd.", *(f"blk.{layer}." for layer in range(layers))):
        if not any(name.startswith(needed) for name in norms):
            raise failed(f"{needed}*", "it is missing")


def _check_edited(
    file: GgufFile, name: str, called: str, stored: Tensor, edit: TensorEdit, heads: Sequence[int]
) -> None:
    layer, single = LAYER.match(name), EXPERT.search(name)
    block = [n for n in file.tensors if layer and n.startswith(f"blk.{layer[2]}.")]
    places, expert = [called] if called in file.tensors else block, int(single[1]) if single else None
    expected = (stored.mT if edit.transposed else stored).float()
    fitting = [n for n in places if file.shape(n, expert) == tuple(expected.shape)]
    if not fitting:
        raise failed(name, f"there is no tensor of the shape {list(expected.shape)} for it")
    orders = [expected]
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        orders += [_interleaved(expected, count) for count in heads if not len(expected) % (2 * count)]
    if not any(same(file.read(n, expert), rows, file.tensors[n].tensor_type) for n in fitting for rows in orders):
        raise failed(name, f"{fitting[0]} has other values")


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return the rows in the order that llama.cpp's Llama wants of queries and keys: the halves of each head in turn."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def same(values: Tensor, expected: Tensor, kind: Kind) -> bool:
    """Return whether tensors are equal within a type's precision, up to the order of columns."""
    ordered = values.sort(dim=-1).values, expected.sort(dim=-1).values
    if kind in FLOATS:
        pairs = ((values, expected), ordered)
        return any(bool(((a - b).abs() <= 1.0001 * rounding_of(b, FLOATS[kind])).all()) for a, b in pairs)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return _within_precision(values.reshape(-1, block), expected.reshape(-1, block), kind) or _within_precision(
        *ordered, kind
    )


def _within_precision(values: Tensor, expected: Tensor, kind: Kind) -> bool:
    allowed = ERRORS.get(kind, ROUGHEST) * expected.norm(dim=-1) + SMALLEST
    return bool(((values - expected).norm(dim=-1) <= allowed).all())


def _check_norm(file: GgufFile, name: str, called: str, stored: Tensor, norm: float) -> None:
    elements, kind = torch.Size(file.shape(called)).numel(), file.tensors[called].tensor_type
    if elements != stored.numel():
        if called.startswith(("token_embd.", "output.")):
            return  # some models pad the vocabulary
        raise failed(name, f"{called} has {elements} elements, expected {stored.numel()}")
    expected, tolerance = float(stored.double().norm()), 2**-8 if kind in FLOATS else ERRORS.get(kind, ROUGHEST)
    if abs(norm - expected) > tolerance * expected + SMALLEST:
        raise failed(name, f"{called} has the norm {norm:.4g}, expected {expected:.4g}")


def _not_finite(name: str, kind: Kind) -> UserError:
    if kind != Kind.F16:
        return failed(name, "it has values that are not finite")
    return UserError(
        f"{name} has values too large for float16.",
        code="gguf-overflow",
        where='gguf_type = "f16"',
        fix='gguf_type = "bf16"',
    )


def failed(name: str, why: str) -> VerificationFailed:
    """Return the error for a wrong tensor."""
    return VerificationFailed(
        f"The GGUF file differs from the converted model: {why}.",
        code="gguf-verification-failed",
        where=name,
        fix='report it with run.log; export_format = "full" writes the verified model folder',
    )
