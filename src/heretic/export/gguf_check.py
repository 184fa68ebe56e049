"""A GGUF file against the model folder that it was converted from, tensor by tensor, within the precision of its types.

llama.cpp's converter renames, splits and reorders tensors. So every edited tensor must be found in its block with its numbers (its
columns perhaps in another order), and every other matrix that has one counterpart with its size and norm. Names are the gguf
package's; where it does not know one, all tensors of the block are looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
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
# Norm of the error over that of a block: about twice half a step of the type for each of 32 numbers beside a single large one, as
# llama-quantize chooses steps by another measure. `ROUGHEST` is for types that it falls back to.
ERRORS = {Kind.Q8_0: 0.025, Kind.Q6_K: 0.1, Kind.Q5_K: 0.15, Kind.Q5_1: 0.2, Kind.Q5_0: 0.2, Kind.Q4_K: 0.3}
ROUGHEST = 0.3
SMALLEST = 1e-4  # of a block's norm: scales are float16, whose smallest numbers are 2^-24 apart
LAYER = re.compile(r"^(.+?)\.(\d+)\.(.+)$")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


class GgufFile:
    """A GGUF file that is read, and the names that its tensors have in a model folder."""

    def __init__(self, path: Path, layers: int) -> None:
        """Raises VerificationFailed where it cannot be read."""
        try:
            reader = gguf.GGUFReader(path)
            self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
            name = reader.fields["general.architecture"].contents()
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise failed(path.name, f"it cannot be read ({first_line(error)})") from None
        architecture = next((a for a, called in gguf.MODEL_ARCH_NAMES.items() if called == name), None)
        self.names = gguf.get_tensor_name_map(architecture, layers) if architecture is not None else None

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor, or one expert's part of a stack, in float32."""
        data, kind = self.tensors[name].data, self.tensors[name].tensor_type
        data = data if expert is None else data[expert]
        packed = kind in FLOATS or gguf.GGML_QUANT_SIZES[kind][0] > 1
        return torch.from_numpy((gguf.quants.dequantize(data, kind) if packed else data).astype("float32"))

    def shape(self, name: str, expert: int | None = None) -> tuple[int, ...]:
        """As torch counts."""
        whole = tuple(int(n) for n in reversed(self.tensors[name].shape))
        return whole if expert is None else whole[1:] if len(whole) == 3 and expert < whole[0] else ()

    def name_of(self, name: str) -> str:
        """What a tensor of the model folder is called here; empty where the gguf package does not know it."""
        single = EXPERT.sub(".experts.", name)
        layer = LAYER.match(single)
        tried = [single, single.replace("language_model.", ""), f"model.layers.{layer[2]}.{layer[3]}" if layer else ""]
        found = (self.names and self.names.get_name(key, (".weight", ".bias")) for key in tried)
        called = next((n for n in found if n), "")
        return f"{called}.weight" if f"{called}.weight" in self.tensors else called


def check_file(
    path: Path, staged: Checkpoint, edits: Mapping[str, TensorEdit], reporter: ProgressReporter, stop: StopSignal
) -> None:
    """Compare a GGUF file with the model folder that it was converted from.

    Raises VerificationFailed, UserError for numbers too large for float16, Interrupted.
    """
    layers = staged.text_config.num_hidden_layers
    file = GgufFile(path, layers)
    outer = {found[1] for name in edits if (found := LAYER.match(name))}  # what the language model's layers are called
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
                continue  # what sees or hears is not converted, nor are layers that predict further tokens
            called = file.name_of(name)
            if name in edits:
                _check_edited(file, name, called, staged.read(name), edits[name])
            elif called in norms and len(info.shape) > 1 and not EXPERT.search(name):
                _check_norm(file, name, called, staged.read(name), norms[called])
            if called and layer and name not in edits:
                present[layer[3]].add((called in norms, called))
    # Of every layer, or of none where the converter splits it.
    for names in present.values():
        if len({there for there, _ in names}) > 1:
            raise failed(min(called for there, called in names if not there), "it is missing")
    for needed in ("token_embd.", *(f"blk.{layer}." for layer in range(layers))):
        if not any(name.startswith(needed) for name in norms):
            raise failed(f"{needed}*", "it is missing")


def _check_edited(file: GgufFile, name: str, called: str, stored: Tensor, edit: TensorEdit) -> None:
    layer, single = LAYER.match(name), EXPERT.search(name)
    block = [n for n in file.tensors if layer and n.startswith(f"blk.{layer[2]}.")]
    places, expert = [called] if called in file.tensors else block, int(single[1]) if single else None
    expected = (stored.mT if edit.transposed else stored).float()
    fitting = [n for n in places if file.shape(n, expert) == tuple(expected.shape)]
    if not fitting:
        raise failed(name, f"no tensor of the shape {list(expected.shape)} is in its place")
    if not any(same(file.read(n, expert), expected, file.tensors[n].tensor_type) for n in fitting):
        raise failed(name, f"{fitting[0]} does not have its numbers")


def same(found: Tensor, expected: Tensor, kind: Kind) -> bool:
    """Whether numbers are the same within a type's precision, the columns perhaps in another order."""
    ordered = found.sort(dim=-1).values, expected.sort(dim=-1).values
    if kind in FLOATS:
        pairs = ((found, expected), ordered)
        return any(bool(((a - b).abs() <= 1.0001 * rounding_of(b, FLOATS[kind])).all()) for a, b in pairs)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return _near(found.reshape(-1, block), expected.reshape(-1, block), kind) or _near(*ordered, kind)


def _near(found: Tensor, expected: Tensor, kind: Kind) -> bool:
    allowed = ERRORS.get(kind, ROUGHEST) * expected.norm(dim=-1) + SMALLEST
    return bool(((found - expected).norm(dim=-1) <= allowed).all())


def _check_norm(file: GgufFile, name: str, called: str, stored: Tensor, norm: float) -> None:
    numbers, kind = torch.Size(file.shape(called)).numel(), file.tensors[called].tensor_type
    if numbers != stored.numel():
        if called.startswith(("token_embd.", "output.")):
            return  # some models have rows that no token uses
        raise failed(name, f"{called} has {numbers} numbers where {stored.numel()} belong")
    wanted, share = float(stored.double().norm()), 2**-8 if kind in FLOATS else ERRORS.get(kind, ROUGHEST)
    if abs(norm - wanted) > share * wanted + SMALLEST:
        raise failed(name, f"{called} has the norm {norm:.4g} where {wanted:.4g} belongs")


def _not_finite(name: str, kind: Kind) -> UserError:
    if kind != Kind.F16:
        return failed(name, "it has numbers that are not finite")
    return UserError(
        f"{name} has numbers too large for float16.",
        code="gguf-overflow",
        where='gguf_type = "f16"',
        fix='gguf_type = "bf16"',
    )


def failed(name: str, why: str) -> VerificationFailed:
    """What is wrong with the file, as an error."""
    return VerificationFailed(
        f"The GGUF file is not the model that was converted: {why}.",
        code="gguf-verification-failed",
        where=name,
        fix='report it with run.log; export_format = "full" writes the model folder, which was proven',
    )
