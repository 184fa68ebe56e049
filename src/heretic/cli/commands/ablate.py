"""Command `ablate`: one ablation without a study."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from heretic.cli.options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PlainOption,
    SetOption,
    WaitOption,
    app,
    out,
    read_settings,
    reporter_for,
)
from heretic.interrupt import StopSignal


@app.command()
def ablate(
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model.")],
    model: ModelArgument = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="One strength for all writers (1 removes the direction), without a search."),
    ] = None,
    layer: Annotated[
        float | None,
        typer.Option(
            "--layer", help="With --strength: the layer whose direction is removed everywhere; default: its own."
        ),
    ] = None,
    by_block: Annotated[
        bool,
        typer.Option(
            "--by-block",
            help="With --strength: read the model from disk, one block at a time, because it fits no memory; no scores.",
        ),
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
    plain: PlainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ablate a model without a study: directions, gradient search or a given strength, export, verification."""
    resolved = read_settings(config, assignments, {"model": model}, quiet=as_json)
    from heretic.cli.ui.outcome import show_export_summary
    from heretic.pipeline.ablate import ablate_once
    from heretic.pipeline.ablate_by_block import ablate_by_block

    stop = StopSignal()
    reporter = reporter_for(as_json, plain, resolved.settings.model, stop)
    before: int | None = None
    with stop.on_signals():
        if by_block:
            export = ablate_by_block(
                resolved, output, strength=strength, layer=layer, wait=wait, reporter=reporter, stop=stop
            )
        else:
            export, before = ablate_once(
                resolved, output, strength=strength, layer=layer, wait=wait, reporter=reporter, stop=stop
            )
    if as_json:
        print(json.dumps({"original_refusals": before, **export.as_dict()}, indent=2))
        return
    show_export_summary(out, export, before)
    if by_block:
        out.print("No score was measured. Where the model fits: heretic evaluate FOLDER", markup=False)
        return
    out.print(
        "This is one ablation. A study compares many and selects the one with the fewest refusals at a low KL: "
        f"heretic run {quote(resolved.settings.model)}",
        soft_wrap=True,
        markup=False,
    )
