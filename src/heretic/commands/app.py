"""What the commands share: the application, the options that several have, and where output goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from heretic.screen.console import printable
from heretic.settings.layers import DEFAULT_FILE, Resolved, resolve

# Heavy imports (torch, transformers, optuna) happen inside the commands, so that --help and errors come at once.

app = typer.Typer(
    name="heretic",
    help="Directional ablation of language models: find the refusal direction, project it out, search the strengths.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help=f"Settings file; {DEFAULT_FILE} here is found by itself.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Any setting, as key=value; may be given often.")
]
ModelArgument = Annotated[str | None, typer.Argument(help="Hub id, local folder, or .gguf file.", show_default=False)]
RunArgument = Annotated[
    str | None, typer.Argument(help="Name or folder of a run; the newest if left out.", show_default=False)
]
RunsOption = Annotated[
    str | None, typer.Option("--runs-dir", help="Folder that holds the runs; left out: as configured.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def read_settings(
    file: Path | None, assignments: list[str] | None, options: dict[str, Any], *, quiet: bool = False
) -> Resolved:
    """Settings from every source; says which file was read."""
    resolved = resolve(file, options, assignments or (), os.environ)
    if resolved.file is not None and not quiet:
        out.print(f"Settings from {printable(str(resolved.file))}")
    return resolved


def configured_runs(option: str | None) -> str:
    """The folder of runs: the option, or what the settings here say."""
    return option or resolve(environment=os.environ).settings.runs_dir
