"""The application, options shared by several commands, and the consoles."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heretic.cli.ui.console import PipeConsole, escape_terminal
from heretic.cli.ui.reporters import make_reporter
from heretic.errors import EXIT_STATUSES, UserError
from heretic.interrupt import StopSignal
from heretic.settings.sources import DEFAULT_FILE, Resolved, resolve

if TYPE_CHECKING:
    from heretic.search.summary import StudyReporter

# The commands import torch, transformers and optuna inside their bodies, so that --help and errors appear at once.

app = typer.Typer(
    name="heretic",
    help="Directional ablation of language models: find the refusal direction, remove it from the weights, tune the ablation.",
    epilog="Exit status: " + "; ".join(f"{number} {meaning}" for number, meaning in EXIT_STATUSES.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run_names(incomplete: str) -> list[str]:
    """Complete names of runs in the configured folder, for the shell."""
    try:
        root = Path(resolve(environment=os.environ).settings.runs_dir)
    except UserError:
        return []
    return sorted(f.parent.name for f in root.glob("*/config.toml") if f.parent.name.startswith(incomplete))


ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help=f"Settings file; default: {DEFAULT_FILE} in the current folder.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting, as key=value; can be repeated.")]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Hub id, local folder, or .gguf file.", metavar="MODEL", show_default=False)
]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        help="Name or folder of a run; default: the newest.",
        metavar="RUN",
        show_default=False,
        autocompletion=run_names,
    ),
]
NamedRunArgument = Annotated[
    str, typer.Argument(help="Name or folder of a run.", metavar="RUN", autocompletion=run_names)
]
RunsOption = Annotated[
    str | None, typer.Option("--runs-dir", help="Folder of the runs; default: the setting runs_dir.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to standard error.")]
PublicOption = Annotated[bool, typer.Option("--public", help="Make the upload public; default: private.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Plain lines instead of progress bars and full screens.")]

out = PipeConsole(highlight=False)
err = PipeConsole(stderr=True, highlight=False)


def read_settings(
    file: Path | None, assignments: list[str] | None, options: dict[str, Any], *, quiet: bool = False
) -> Resolved:
    """Resolve the settings from all sources and print the file's name unless `quiet`."""
    resolved = resolve(file, options, assignments or (), os.environ)
    if resolved.origin("storage") in ("option", "--set storage"):
        reject_password_on_command_line(resolved.settings.storage)
    if resolved.file is not None and not quiet:
        out.print(f"Settings from {escape_terminal(str(resolved.file))}")
    return resolved


def require_own_settings(run: str, what: str, where: str) -> UserError:
    """Return the error for an option that conflicts with an existing run."""
    return UserError(
        f"{run} is a run and has its own {what}.",
        code="conflicting-options",
        where=where,
        fix="omit this option, or name the model instead of the run",
    )


def reject_password_on_command_line(storage: str) -> None:
    """Raise UserError for a storage URL with a password: every user of the machine can read command lines."""
    if not storage:
        return
    from heretic.storage.url import masked

    if masked(storage) != storage:
        raise UserError(
            "Every user of this machine can read the storage's password in the process list.",
            code="password-on-command-line",
            where="--storage",
            fix=f'set it in the environment (HERETIC_STORAGE) or in {DEFAULT_FILE} (storage = "…"), and change the password',
        )


def configured_runs(option: str | None) -> str:
    """Return the folder of runs: the option, or the setting runs_dir."""
    return option or resolve(environment=os.environ).settings.runs_dir


def reporter_for(
    as_json: bool = False, plain: bool = False, title: str = "", stop: StopSignal | None = None
) -> StudyReporter:
    """Return the reporter of long work; with JSON it writes to standard error.

    Call it after the imports of a command: their objects are exempted from garbage collection, which would search them for 0.4 s
    each time.
    """
    out.long_work = err.long_work = True
    gc.collect()
    gc.freeze()
    return make_reporter(err if as_json else out, plain=plain, title=title, stop=stop)
