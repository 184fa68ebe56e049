"""The command line: which command is meant, and what an error becomes; the commands are in `commands/`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heretic import __version__
from heretic.commands import about, exported, models, reports, runs, trials  # noqa: F401  each adds its commands to the application
from heretic.commands.app import app, err
from heretic.errors import OF_THE_DISK, Interrupted, UserError, disk_error, memory_error
from heretic.screen.console import printable
from heretic.settings.layers import DEFAULT_FILE


def _version(argv: list[str]) -> bool:
    return argv[:1] in (["--version"], ["-V"])


def shorthand(argv: list[str], commands: list[str]) -> list[str]:
    """`heretic MODEL` and `heretic --config FILE` mean `heretic run …`; so does `heretic` alone where a config.toml lies."""
    own = ("-h", "--help", "--install-completion", "--show-completion")
    if not argv:
        return ["run"] if Path(DEFAULT_FILE).is_file() else argv
    return argv if argv[0] in commands or argv[0] in own else ["run", *argv]


def guarded(job: Callable[[], Any]) -> int:
    """Run a command; what a user can cause becomes one to three lines and an exit status."""
    try:
        job()
    except UserError as error:
        err.print(f"[bold red]Error:[/bold red] {printable(str(error))}", soft_wrap=True)
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in OF_THE_DISK:
            raise
        said = disk_error(error)
        err.print(f"[bold red]Error:[/bold red] {printable(str(said))}", soft_wrap=True)
        return said.exit_status
    except (RuntimeError, MemoryError) as error:
        from heretic.model.batching import out_of_memory

        if not out_of_memory(error):
            raise
        err.print(f"[bold red]Error:[/bold red] {printable(str(memory_error(error)))}", soft_wrap=True)
        return UserError.exit_status
    except Interrupted:
        err.print("Stopped. Everything finished is kept; the same command goes on from here.")
        return Interrupted.exit_status
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0
    return 0


def main() -> None:
    """The command `heretic`."""
    argv = sys.argv[1:]
    if _version(argv):
        print(f"heretic {__version__}")
        sys.exit(0)
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    arguments = shorthand(argv, commands)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and arguments[:1] != ["run"]:
        err.print("[bold red]Error:[/bold red] Under torchrun there is only heretic run.\nTo fix: leave torchrun out")
        sys.exit(1)
    sys.exit(guarded(lambda: app(args=arguments, prog_name="heretic")))
