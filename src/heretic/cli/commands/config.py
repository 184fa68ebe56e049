"""Commands `config` and `doctor`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from heretic.cli.options import (
    ConfigOption,
    JsonOption,
    RunArgument,
    RunsOption,
    SetOption,
    app,
    configured_runs,
    out,
    read_settings,
)
from heretic.cli.ui.console import escape_terminal
from heretic.errors import UserError


@app.command()
def config(
    config_file: ConfigOption = None,
    assignments: SetOption = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Print the documented defaults as a settings file.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the settings.")] = False,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="KEY", help="Print what one setting means, its value and its source."),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--from-manifest", help="Print the settings of an exported model's study.")
    ] = None,
    heretic_llm_config: Annotated[
        Path | None, typer.Option("--from-heretic", help="Convert a config.toml of heretic-llm.")
    ] = None,
) -> None:
    """Print the resolved settings, each with its source."""
    from heretic.settings import Settings
    from heretic.settings.migrate import from_heretic
    from heretic.settings.toml import defaults_text, explanation, resolved_text

    if sum([defaults, schema, *(option is not None for option in (explain, manifest, heretic_llm_config))]) > 1:
        raise UserError(
            "These options exclude each other.", code="conflicting-options", fix="use one of them at a time"
        )
    if schema:
        print(json.dumps(Settings.model_json_schema(), indent=2))
    elif manifest is not None:
        from heretic.export.manifest import settings_of

        print(resolved_text(settings_of(manifest)), end="")
    elif heretic_llm_config is not None:
        print(from_heretic(heretic_llm_config), end="")
    elif explain is not None:
        print(explanation(explain, read_settings(config_file, assignments, {}, quiet=True)), end="")
    elif defaults:
        print(defaults_text(), end="")
    else:
        print(resolved_text(read_settings(config_file, assignments, {}, quiet=True)), end="")


@app.command()
def doctor(
    run: RunArgument = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Write this file for a bug report, with status and log of the run too."),
    ] = None,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a bug report needs: versions, devices and settings, without secrets."""
    resolved, problem = None, ""
    try:
        resolved = read_settings(config, assignments, {}, quiet=True)
    except UserError as error:
        problem = str(error)
    from heretic.cli.ui.tables import show_lines
    from heretic.runs.environment import collect

    environment = collect(resolved, problem)
    if bundle is not None:
        from heretic.files import write_text
        from heretic.runs.bug_report import bug_report

        write_text(bundle, bug_report(environment, run or "", configured_runs(runs_dir), os.environ), private=True)
        out.print(f"Written: {escape_terminal(str(bundle))}. Read it before you send it.", soft_wrap=True)
        return
    if as_json:
        print(json.dumps(environment, indent=2))
        return
    rows = [
        *environment["versions"].items(),
        ("cores", str(environment["cpu_cores"])),
        ("RAM", environment["ram"]),
        ("disk", environment["disk"]),
    ]
    rows += [("GPU", gpu) for gpu in environment["gpus"]] + list(environment["environment"].items())
    show_lines(out, rows)
    out.print()
    out.print(escape_terminal(environment["settings"]), highlight=False, soft_wrap=True)
