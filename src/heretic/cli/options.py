"""What the commands share: the application, the options that several have, and where output goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from heretic.cli.ui.console import escape_terminal
from heretic.cli.ui.reporters import make_reporter
from heretic.errors import EXIT_STATUSES, UserError
from heretic.interrupt import StopSignal
from heretic.settings.sources import DEFAULT_FILE, Resolved, resolve

if TYPE_CHECKING:
    from heretic.search.summary import StudyReporter

# Heavy imports (torch, transformers, optuna) happen inside the commands, so that --help and errors come at once.

app = typer.Typer(
    name="heretic",
    help="Directional ablation of language models: find the refusal direction, project it out, search the strengths.",
    epilog="Exit status: " + "; ".join(f"{number} {meaning}" for number, meaning in EXIT_STATUSES.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run_names(incomplete: str) -> list[str]:
    """For the shell's completion: runs that begin so, of the folder that is configured here."""
    try:
        root = Path(resolve(environment=os.environ).settings.runs_dir)
    except UserError:
        return []
    return sorted(f.parent.name for f in root.glob("*/config.toml") if f.parent.name.startswith(incomplete))


ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help=f"Settings file; {DEFAULT_FILE} here is found by itself.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Any setting, as key=value; may be given often.")
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Hub id, local folder, or .gguf file.", metavar="MODEL", show_default=False)
]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        help="Name or folder of a run; the newest if left out.",
        metavar="RUN",
        show_default=False,
        autocompletion=run_names,
    ),
]
NamedRunArgument = Annotated[
    str, typer.Argument(help="Name or folder of a run.", metavar="RUN", autocompletion=run_names)
]
RunsOption = Annotated[
    str | None, typer.Option("--runs-dir", help="Folder that holds the runs; left out: as configured.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to standard error.")]
PublicOption = Annotated[bool, typer.Option("--public", help="Let everyone see what is uploaded; else it is private.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Upload without being asked.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Plain lines instead of bars and screens.")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def read_settings(
    file: Path | None, assignments: list[str] | None, options: dict[str, Any], *, quiet: bool = False
) -> Resolved:
    """Settings from every source; says which file was read."""
    resolved = resolve(file, options, assignments or (), os.environ)
    if resolved.origin("storage") in ("option", "--set storage"):
        keep_off_the_command_line(resolved.settings.storage)
    if resolved.file is not None and not quiet:
        out.print(f"Settings from {escape_terminal(str(resolved.file))}")
    return resolved


def require_own_settings(run: str, what: str, where: str) -> UserError:
    """For who names a run together with what the run has already."""
    return UserError(
        f"{run} is a run and has its own {what}.",
        code="conflicting-options",
        where=where,
        fix="leave this out, or name the model instead of the run",
    )


def keep_off_the_command_line(storage: str) -> None:
    """Raise UserError for a storage URL with a secret: everybody on the machine can read the command lines of all processes."""
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
    """The folder of runs: the option, or what the settings here say."""
    return option or resolve(environment=os.environ).settings.runs_dir


def reporter_for(
    as_json: bool = False, plain: bool = False, title: str = "", stop: StopSignal | None = None
) -> StudyReporter:
    """Who shows the work; standard output is kept for what was asked for as JSON."""
    return make_reporter(err if as_json else out, plain=plain, title=title, stop=stop)
