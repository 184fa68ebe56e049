"""Measuring any model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heretic.commands.app import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PlainOption,
    SetOption,
    WaitOption,
    app,
    out,
    read_settings,
    watcher_for,
)
from heretic.stop import Stop


@app.command()
def evaluate(
    model: ModelArgument = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The original, to measure KL divergence from.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Refusals and KL of any model on the configured prompt sets."""
    resolved = read_settings(config, assignments, {"model": model}, quiet=as_json)
    from heretic.later import evaluate_model
    from heretic.screen.tables import show_lines

    stop = Stop()
    with stop.on_signals():
        watcher = watcher_for(as_json, plain)
        result = evaluate_model(resolved.settings, against, wait=wait, watcher=watcher, stop=stop)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    show_lines(out, result.rows())
