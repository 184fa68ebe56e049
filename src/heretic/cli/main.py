"""Entry point: choose the command and turn errors into messages and exit statuses; the commands are in `commands/`."""

from __future__ import annotations

import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from heretic._version import __version__
from heretic.cli.commands import (  # noqa: F401  each adds its commands to the application
    ablate,
    config,
    evaluate,
    export_cmds,
    reports,
    runs,
    trials,
)
from heretic.cli.options import app, err, out, run_names
from heretic.cli.ui.console import escape_terminal, is_interactive, on_terminal
from heretic.errors import (
    DISK_ERRNOS,
    LIMIT_ERRNOS,
    Interrupted,
    UserError,
    disk_error,
    limit_error,
    memory_error,
    no_folder_error,
)
from heretic.hardware.openmp import prepare_threads
from heretic.settings.sources import DEFAULT_FILE

# Order of the commands in --help: the order of a run's workflow.
ORDER = (
    "run", "ablate", "preflight", "status", "demo", "chat", "compare", "benchmark", "export", "upload",
    "reproduce", "directions", "report", "serve", "geometry", "evaluate", "config", "doctor",
)  # fmt: skip
app.registered_commands.sort(key=lambda c: ORDER.index(c.name or c.callback.__name__ if c.callback else ""))
ERRORS_PAGE = Path(__file__).parents[3] / "docs" / "errors.md"  # of a checkout: terminals open it from an error's code


def _version(argv: list[str]) -> bool:
    return argv[:1] in (["--version"], ["-V"])


def shorthand(argv: list[str], commands: list[str]) -> list[str]:
    """Expand `heretic MODEL` and `heretic --config FILE` to `heretic run …`; `heretic` alone too if config.toml exists."""
    app_options = ("-h", "--help", "--install-completion", "--show-completion")
    if not argv:
        return ["run"] if Path(DEFAULT_FILE).is_file() else argv
    return argv if argv[0] in commands or argv[0] in app_options else ["run", *argv]


def mistyped(name: str, commands: list[str]) -> UserError | None:
    """Return an error for a misspelled command; None if `name` is a command, a path, a run or unlike any command."""
    near = difflib.get_close_matches(name, commands, n=1, cutoff=0.75)
    if not near or name.startswith("-") or name in commands or Path(name).exists() or name in run_names(name):
        return None
    return UserError(
        f"There is no command '{name}'.",
        code="unknown-command",
        fix=f"did you mean: heretic {near[0]}? To start a run: heretic run {name}",
    )


def exit_status(command: Callable[[], Any]) -> int:
    """Run a command and return its exit status; print errors that a user can fix in one to three lines."""
    try:
        command()
        if sys.stdout is not None:
            sys.stdout.flush()  # raises here, not at the interpreter's exit, if the disk is full
    except UserError as error:
        return _print_error(error)
    except BrokenPipeError:  # the reader of our output ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, MemoryError) as error:
        if (found := machine_error(error)) is None:
            raise
        return _print_error(found)
    except Interrupted:
        err.print("Stopped. All finished work is kept; run the same command to continue.")
        return Interrupted.exit_status
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else 0
    return 0


def machine_error(error: Exception) -> UserError | None:
    """Return the UserError for an error of disk, device, memory or another limit of the machine; None for a defect."""
    if isinstance(error, OSError):
        number = _number(error)
        if number in DISK_ERRNOS and (number != errno.ENOTCONN or error.filename):  # else of a lost connection
            return disk_error(error)
        if number == errno.ENOMEM:
            return memory_error(error)
        if isinstance(error, FileNotFoundError) and not _has_folder():
            return no_folder_error()
        if "No usable temporary directory" in str(error):
            return disk_error(error)
        written = hasattr(error, "characters_written")  # a pipe that does not wait
        if number in LIMIT_ERRNOS and not written:
            return limit_error(error)
        if number is not None:
            return None
    from heretic.model.batching import out_of_memory
    from heretic.model.device_errors import device_failure

    if out_of_memory(error):
        return memory_error(error)
    return limit_error(error) if "can't start new thread" in str(error) else device_failure(error)


def _number(error: OSError) -> int | None:
    """Return the system's number of an error, which those of Rust libraries hold in their text only."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if error.errno is None else None
    return int(found[1]) if found else error.errno


def _print_error(error: UserError) -> int:
    text, code = escape_terminal(str(error)), escape_terminal(f"[{error.code}]")
    if ERRORS_PAGE.exists():
        text = text.replace(code, f"[link={ERRORS_PAGE.as_uri()}]{code}[/link]", 1)
    with suppress(OSError):  # the terminal is gone
        err.print(f"[bold red]Error:[/bold red] {text}", soft_wrap=True)
    return error.exit_status


def _has_folder() -> bool:
    """Whether the current folder exists."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def main() -> None:
    """Run the command `heretic`."""
    prepare_threads()
    argv = sys.argv[1:]
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)  # what the terminal's encoding does not have must not raise
    if _version(argv):
        print(f"heretic {__version__}")
        sys.exit(0)
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    arguments = shorthand(argv, commands)

    def command() -> None:
        if not _has_folder():  # libraries of PyTorch end the process
            raise no_folder_error()
        if argv and (problem := mistyped(argv[0], commands)):
            raise problem
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
            raise UserError(
                "heretic was started by torchrun, but one process of it uses all GPUs.",
                code="started-by-torchrun",
                fix="run it without torchrun; for one model on each GPU: heretic run --workers auto",
            )
        if not arguments and on_terminal(out) and is_interactive():
            from heretic.cli.ui.first_run import write_first_config

            write_first_config(out, Path(DEFAULT_FILE))
            return
        app(args=arguments, prog_name="heretic")

    sys.exit(exit_status(command))
