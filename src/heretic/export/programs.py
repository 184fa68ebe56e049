"""What formats share that convert a verified model folder with a program: how it runs, and the rest of their `Format`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heretic.ablation.operator import Operator
from heretic.errors import UserError, plain_line
from heretic.export import full
from heretic.export.request import Format, WriteRequest, WriteResult
from heretic.export.save import TensorEdit
from heretic.files import write_text
from heretic.hardware.processes import ending
from heretic.interrupt import StopSignal
from heretic.model.checkpoint import Checkpoint
from heretic.model.loading import LanguageModel
from heretic.progress import ProgressReporter
from heretic.settings import Settings

log = logging.getLogger(__name__)

SHOWN = 3  # last lines of output of a failed program
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run_program(
    command: list[str], made: Path | None, stop: StopSignal, failure: Callable[[list[str], str], UserError]
) -> list[str]:
    """Run a program, log its output, and return the output's lines.

    Args:
        command: the command line.
        made: the file or folder that the program creates; None if it only prints.
        stop: ends the program.
        failure: makes the error from the command line and the program's last words.

    Raises:
        UserError: by `failure`, if the program fails or does not create `made`.
        Interrupted: on a stop.
    """
    log.info("running %s", " ".join(command))
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                command,
                env=os.environ | OFFLINE,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # heretic forwards Ctrl-C
            )
        except OSError as error:
            raise failure(command, error.strerror or "it cannot be started") from None
        try:
            while process.poll() is None:
                stop.check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            _kill(process)
            out.seek(0)
            text = out.read().decode(errors="replace").replace("\r", "\n")
            lines = [plain_line(line) for line in text.splitlines() if line.strip()]
            for line in lines if made is not None or process.returncode else ():
                log.info("%s", line)
    if process.returncode or (made is not None and not made.exists()):
        message = " | ".join(line.strip()[:160] for line in lines[-SHOWN:])
        if not message or process.returncode < 0 or process.returncode > 128:
            message = f"it {ending(process.returncode)}: {message or 'no output'}"
        raise failure(command, message)
    return lines


def converted_format(
    description: str,
    require: Callable[[Settings, Checkpoint], None],
    convert: Callable[[WriteRequest, Path, WriteResult, ProgressReporter, StopSignal], WriteResult],
    converted_size: Callable[[Checkpoint, Settings], float],
    options: Callable[[Settings], dict[str, Any]],
) -> Format:
    """Return a format that writes and verifies as `full`, then converts.

    `require` is called before anything is planned; `converted_size` are the bytes of what is converted, beside the folder.
    """

    def prepare(
        model: LanguageModel, operators: Mapping[str, Operator], settings: Settings, reporter: ProgressReporter
    ) -> dict[str, TensorEdit]:
        require(settings, model.checkpoint)
        return full.prepare(model, operators, settings, reporter)

    return Format(
        description,
        prepare,
        full.write,
        full.open_written,
        size=lambda checkpoint, settings: full.size(checkpoint, settings) + converted_size(checkpoint, settings),
        options=options,
        read_back=full.read_back,
        require=require,
        convert=convert,
    )


def delete_others(folder: Path, kept: Path) -> None:
    """Delete everything in the folder but one file or folder."""
    for path in folder.iterdir():
        if path == kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a running program and its children."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def remove_code(folder: Path) -> None:
    """Delete the model's own Python code from the folder: a converter would run it, and the user has not trusted it."""
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.rglob("*config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.pop("auto_map", None) is not None:
            write_text(path, json.dumps(data))
