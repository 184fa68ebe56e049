"""The format `mlx`: the verified folder of `full`, converted by `mlx_lm convert` and compared tensor by tensor."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from heretic.errors import UserError, VerificationFailed
from heretic.export import full
from heretic.export.programs import converted_format, delete_others, remove_code, run_program
from heretic.export.request import WriteRequest, WriteResult
from heretic.export.save import TensorEdit, hashed
from heretic.export.spot_check import rounding_of
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.progress import ProgressReporter
from heretic.settings import Settings

GROUP = 64  # numbers with a scale and a bias of their own
AS_STORED = 16  # the setting's value for no quantization
# Largest relative error norm of a row, by bits: a normal distribution gives about 0.09 and 0.006.
ERRORS = {4: 0.2, 8: 0.02}
SMALLEST = 1e-4  # absolute error of a row's norm


def require(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise UserError if mlx_lm is not installed, or the model is a mixture of experts, whose tensors it merges."""
    converter()
    stacked = (name for name, t in checkpoint.tensors.items() if len(t.shape) == 3 and "conv" not in name)
    if held := next((name for name in checkpoint.tensors if ".experts" in name), next(stacked, None)):
        raise UserError(
            f"{held} belongs to experts, which mlx_lm merges, so heretic could not compare them.",
            code="export-format-not-supported",
            where='export_format = "mlx"',
            fix='export_format = "full", and convert it by hand: mlx_lm.convert --hf-path FOLDER',
        )


def converter() -> list[str]:
    """Return the command line of mlx_lm's converter: of heretic's own environment, or on PATH. Raises UserError."""
    if importlib.util.find_spec("mlx_lm") is not None:
        return [sys.executable, "-m", "mlx_lm", "convert"]
    if program := shutil.which("mlx_lm.convert"):
        return [program]
    raise UserError(
        "mlx_lm, which writes MLX models, is not installed.",
        code="mlx-missing",
        where="heretic's environment and PATH",
        fix="pip install mlx-lm (on Linux: 'mlx-lm[cpu]')",
    )


def convert(
    order: WriteRequest, folder: Path, written: WriteResult, reporter: ProgressReporter, stop: StopSignal
) -> WriteResult:
    """Convert the verified model folder, compare the two by tensor, and put the converted one in its place.

    Raises UserError, VerificationFailed, Interrupted.
    """
    bits, made = order.settings.mlx_bits, folder / "mlx"
    staged = full.open_written(order, folder)
    remove_code(folder)
    words = [] if bits == AS_STORED else ["--quantize", "--q-bits", str(bits), "--q-group-size", str(GROUP)]
    with reporter.stage("Converting to MLX", None):
        command = [*converter(), "--hf-path", str(folder), "--mlx-path", str(made), *words]
        run_program(command, made / "config.json", stop, _conversion_error)
    check_folder(made, staged, order.prepared, reporter, stop)
    delete_others(folder, made)
    (made / "README.md").unlink(missing_ok=True)  # heretic's card takes its place
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    with reporter.stage("Hashing", None):
        hashes = {"source": written.hashes["source"], "written": hashed(sorted(folder.iterdir()), stop)}
    stored = "as in the model folder" if bits == AS_STORED else f"in {bits} bits, with a scale for {GROUP} of them"
    about = (
        f"A folder for [mlx-lm](https://github.com/ml-explore/mlx-lm); matrices are stored {stored}. heretic compared them "
        "with those of the model folder that it was converted from, but did not run it."
    )
    relation = "finetune" if bits == AS_STORED else "quantized"
    return WriteResult(hashes, library="mlx", relation=relation, about=about, facts=options(order.settings))


def options(settings: Settings) -> dict[str, Any]:
    """Return the bits of a number."""
    return {"bits": settings.mlx_bits}


def converted_size(checkpoint: Checkpoint, settings: Settings) -> float:
    """Return the bytes of the converted folder."""
    return full.size(checkpoint, settings) * settings.mlx_bits / AS_STORED


def check_folder(
    made: Path, staged: Checkpoint, edits: Mapping[str, TensorEdit], reporter: ProgressReporter, stop: StopSignal
) -> None:
    """Compare every matrix with its counterpart of the same name; an edited one must have one. Raises VerificationFailed."""
    files = {}
    for file in sorted(made.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    with reporter.stage("Checking the MLX model", len(staged.tensors)) as stage:
        for name, info in staged.tensors.items():
            stop.check()
            stage.advance()
            if name in edits and name not in files:
                raise _failed(name, "it has no counterpart of this name")
            if name in files and len(info.shape) == 2:
                _compare(name, _read(files, name), staged.read(name))


def _compare(name: str, found: tuple[Tensor, int], expected: Tensor) -> None:
    values, bits = found
    if values.shape != expected.shape:
        raise _failed(name, f"it has the shape {list(values.shape)}, expected {list(expected.shape)}")
    error = (values.float() - expected.float()).abs()
    if bits == AS_STORED:
        wrong = not bool((error <= 1.0001 * rounding_of(expected.float(), values.dtype)).all())
    else:
        wrong = not bool((error.norm(dim=-1) <= ERRORS[bits] * expected.float().norm(dim=-1) + SMALLEST).all())
    if wrong:
        raise _failed(name, "it has other values")


def _read(files: Mapping[str, Path], name: str) -> tuple[Tensor, int]:
    """Read a matrix [rows, columns], unpacked, and its bits.

    MLX packs 32 / bits numbers into a U32, the first one in the lowest bits, and stores a scale and a bias for each group of a row:
    value = scale * number + bias (mlx.core.quantize, mode affine).
    """

    def read(full_name: str) -> Tensor:
        with safe_open(files[full_name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(full_name)
            return tensor

    packed, stem = read(name), name.removesuffix(".weight")
    if packed.dtype != torch.uint32:
        return packed, AS_STORED
    scales, biases = read(f"{stem}.scales").float(), read(f"{stem}.biases").float()
    bits = 32 * packed.shape[1] // (scales.shape[1] * GROUP)
    words = packed.view(torch.int32)
    numbers = torch.stack([(words >> bits * i) & (2**bits - 1) for i in range(32 // bits)], dim=-1).flatten(-2)
    return numbers * scales.repeat_interleave(GROUP, dim=1) + biases.repeat_interleave(GROUP, dim=1), bits


def _conversion_error(command: list[str], message: str) -> UserError:
    return UserError(
        f"The conversion to MLX failed: {message}.",
        code="mlx-conversion-failed",
        where=" ".join(command[:4]),
        fix='see run.log; update mlx-lm, or export_format = "full"',
    )


def _failed(name: str, what: str) -> VerificationFailed:
    return VerificationFailed(
        f"The MLX model differs from the converted one at {name}: {what}.",
        code="mlx-verification-failed",
        fix='report it with run.log; export_format = "full" writes the verified model folder',
    )


FORMAT = converted_format("a folder for mlx-lm", require, convert, converted_size, options)
