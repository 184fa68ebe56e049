"""Working with the trials of a run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from heretic.commands.app import JsonOption, RunArgument, RunsOption, SetOption, WaitOption, app, configured_runs, out
from heretic.errors import UserError
from heretic.screen.console import make_watcher
from heretic.stop import Stop


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Name or folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the model to.")],
    trial: Annotated[
        int | None, typer.Option("--trial", help="Trial to export; left out: the one that the rule prefers.")
    ] = None,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
) -> None:
    """Write the model of a chosen trial, and prove that it is the one that was measured."""
    from heretic.later import export_run
    from heretic.screen.outcome import show_export

    stop = Stop()
    with stop.on_signals():
        outcome = export_run(
            name,
            configured_runs(runs_dir),
            trial,
            output,
            assignments or [],
            wait=wait,
            watcher=make_watcher(out),
            stop=stop,
        )
    show_export(out, outcome)


@app.command()
def chat(
    name: RunArgument = None,
    trial: Annotated[int | None, typer.Option("--trial", help="Number of the trial; left out: the chosen one.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer, in tokens.")] = 512,
    runs_dir: RunsOption = None,
    wait: WaitOption = False,
) -> None:
    """Talk to a trial's model and to the original, on the same loaded weights; nothing is written."""
    from heretic.later import talking
    from heretic.screen.chat import Chat, typed

    stop = Stop()
    watcher = make_watcher(out)
    held = talking(name or "", configured_runs(runs_dir), trial, tokens, wait=wait, watcher=watcher, stop=stop)
    with ExitStack() as stack:
        with stop.on_signals():
            result, answer = stack.enter_context(held)
        # From here on Ctrl-C is an exception again: it cuts an answer short.
        out.print(f"Trial {result.number}, {result.scores.refusals} of {result.scores.total} declined.")
        Chat(out, answer).run(typed(out))


@app.command()
def compare(
    name: Annotated[str, typer.Argument(help="Name or folder of a run.")],
    trials: Annotated[str, typer.Option("--trials", help="Numbers of trials, as 3,7.")],
    prompts: Annotated[str, typer.Option("--prompts", help="A file of prompts, or any source as in the settings.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer, in tokens.")] = 100,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
) -> None:
    """The greedy answers of the original and of trials to your prompts, one below the other."""
    from heretic.later import compare_trials
    from heretic.progress import SILENT
    from heretic.screen.tables import show_lines

    try:
        numbers = [int(number) for number in trials.split(",")]
    except ValueError:
        raise UserError(f"{trials!r} is no list of trials.", where="--trials", fix="write it like 3,7") from None
    stop = Stop()
    watcher = SILENT if as_json else make_watcher(out)
    with stop.on_signals():
        found = compare_trials(
            name, configured_runs(runs_dir), numbers, prompts, tokens, wait=wait, watcher=watcher, stop=stop
        )
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for row in found:
        show_lines(out, list(row.items()))
        out.print()
