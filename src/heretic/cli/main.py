"""The command line: which command is meant, and what an error becomes; the commands are in `commands/`."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heretic._version import __version__
from heretic.cli.commands import (  # noqa: F401  each adds its commands to the application
    config,
    evaluate,
    export_cmds,
    reports,
    runs,
    trials,
)
from heretic.cli.options import app, err, run_names
from heretic.cli.ui.console import escape_terminal
from heretic.errors import DISK_ERRNOS, Interrupted, UserError, disk_error, memory_error
from heretic.hardware.openmp import wait_passively
from heretic.settings.sources import DEFAULT_FILE

# As --help lists the commands: what comes first in the life of a run comes first.
ORDER = (
    "run", "preflight", "status", "demo", "chat", "compare", "benchmark", "export", "upload", "reproduce", "directions", "report",
    "geometry", "evaluate", "config", "doctor",
)  # fmt: skip
app.registered_commands.sort(key=lambda c: ORDER.index(c.name or c.callback.__name__ if c.callback else ""))


def _version(argv: list[str]) -> bool:
    return argv[:1] in (["--version"], ["-V"])


def shorthand(argv: list[str], commands: list[str]) -> list[str]:
    """`heretic MODEL` and `heretic --config FILE` mean `heretic run …`; so does `heretic` alone where a config.toml lies."""
    own = ("-h", "--help", "--install-completion", "--show-completion")
    if not argv:
        return ["run"] if Path(DEFAULT_FILE).is_file() else argv
    return argv if argv[0] in commands or argv[0] in own else ["run", *argv]


def mistyped(name: str, commands: list[str]) -> UserError | None:
    """What to say of a word that is no command, but nearly one, and nothing on this disk; None for anything else."""
    near = difflib.get_close_matches(name, commands, n=1, cutoff=0.75)
    if not near or name.startswith("-") or name in commands or Path(name).exists() or name in run_names(name):
        return None
    return UserError(
        f"There is no command '{name}'.",
        code="unknown-command",
        fix=f"did you mean: heretic {near[0]}? To start a run: heretic run {name}",
    )


def guarded(job: Callable[[], Any]) -> int:
    """Run a command; what a user can cause becomes one to three lines and an exit status."""
    try:
        job()
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is to be noticed here, not when the interpreter ends
    except UserError as error:
        err.print(f"[bold red]Error:[/bold red] {escape_terminal(str(error))}", soft_wrap=True)
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in DISK_ERRNOS:
            raise
        said = disk_error(error)
        err.print(f"[bold red]Error:[/bold red] {escape_terminal(str(said))}", soft_wrap=True)
        return said.exit_status
    except (RuntimeError, MemoryError) as error:
        from heretic.model.batching import out_of_memory

        if not out_of_memory(error):
            raise
        err.print(f"[bold red]Error:[/bold red] {escape_terminal(str(memory_error(error)))}", soft_wrap=True)
        return UserError.exit_status
    except Interrupted:
        err.print("Stopped. Everything finished is kept; the same command goes on from here.")
        return Interrupted.exit_status
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0
    return 0


def main() -> None:
    """The command `heretic`."""
    wait_passively()
    argv = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal does not know ends nothing
    if _version(argv):
        print(f"heretic {__version__}")
        sys.exit(0)
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    arguments = shorthand(argv, commands)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and arguments[:1] != ["run"]:
        err.print("[bold red]Error:[/bold red] Under torchrun there is only heretic run.\nTo fix: leave torchrun out")
        sys.exit(1)

    def job() -> None:
        if argv and (problem := mistyped(argv[0], commands)):
            raise problem
        app(args=arguments, prog_name="heretic")

    sys.exit(guarded(job))
