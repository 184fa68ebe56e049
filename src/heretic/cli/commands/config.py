"""The settings, and what a report of a fault should hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from heretic.cli.options import ConfigOption, JsonOption, SetOption, app, out, read_settings
from heretic.cli.ui.console import escape_terminal
from heretic.errors import UserError


@app.command()
def config(
    config_file: ConfigOption = None,
    assignments: SetOption = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="The documented defaults, as a file to start from.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of the settings.")] = False,
    manifest: Annotated[
        Path | None, typer.Option("--from-manifest", help="The settings of an exported model's study.")
    ] = None,
    theirs: Annotated[
        Path | None, typer.Option("--from-heretic", help="A config.toml of heretic-llm, said in these settings.")
    ] = None,
) -> None:
    """The resolved settings, each with where it came from."""
    from heretic.settings import Settings
    from heretic.settings.migrate import from_heretic
    from heretic.settings.toml import defaults_text, resolved_text

    if sum([defaults, schema, manifest is not None, theirs is not None]) > 1:
        raise UserError(
            "These options exclude each other.", code="conflicting-options", fix="give one of them at a time"
        )
    if schema:
        print(json.dumps(Settings.model_json_schema(), indent=2))
    elif manifest is not None:
        from heretic.export.manifest import settings_of

        print(resolved_text(settings_of(manifest)), end="")
    elif theirs is not None:
        print(from_heretic(theirs), end="")
    elif defaults:
        print(defaults_text(), end="")
    else:
        print(resolved_text(read_settings(config_file, assignments, {}, quiet=True)), end="")


@app.command()
def doctor(config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False) -> None:
    """What a report of a fault should hold: versions, devices and settings, without secrets."""
    resolved, problem = None, ""
    try:
        resolved = read_settings(config, assignments, {}, quiet=True)
    except UserError as error:
        problem = str(error)
    from heretic.cli.ui.tables import show_lines
    from heretic.runs.environment import collect

    found = collect(resolved, problem)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        *found["versions"].items(),
        ("cores", str(found["cpu_cores"])),
        ("RAM", found["ram"]),
        ("disk", found["disk"]),
    ]
    rows += [("GPU", gpu) for gpu in found["gpus"]] + list(found["environment"].items())
    show_lines(out, rows)
    out.print()
    out.print(escape_terminal(found["settings"]), highlight=False, soft_wrap=True)
