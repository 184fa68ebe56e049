"""Working with the trials of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from heretic.cli.options import (
    JsonOption,
    NamedRunArgument,
    PlainOption,
    PublicOption,
    RunArgument,
    RunsOption,
    SetOption,
    WaitOption,
    YesOption,
    app,
    configured_runs,
    err,
    out,
    reporter_for,
)
from heretic.errors import UserError
from heretic.interrupt import StopSignal

TrialOption = Annotated[int | None, typer.Option("--trial", help="Number of the trial; left out: the chosen one.")]


@app.command()
def export(
    name: NamedRunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the model to.")],
    trial: TrialOption = None,
    upload: Annotated[
        str | None, typer.Option("--upload", help="Send it to the Hugging Face hub afterwards: user/name.")
    ] = None,
    public: PublicOption = False,
    yes: YesOption = False,
    form: Annotated[
        str | None,
        typer.Option("--format", help="full; lora, an adapter; gguf, for llama.cpp; left out: as the settings say."),
    ] = None,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
    as_json: JsonOption = False,
    plain: PlainOption = False,
) -> None:
    """Write the model of a chosen trial, or an adapter for it, and prove that it is the one that was measured."""
    from heretic.cli.ui.outcome import check_answerable, confirm_upload, show_export
    from heretic.cli.ui.tables import show_lines
    from heretic.pipeline.actions import export_from_run, open_run

    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    if upload is not None:  # what would stop it is said before the hours that an export can take
        from heretic.export.upload import check_upload, plan_upload
        from heretic.export.upload import upload as send

        check_upload(upload)
        check_answerable(err if as_json else out, yes=yes)
    with stop.on_signals():
        held = open_run(
            name,
            configured_runs(runs_dir),
            assignments or [],
            destination=output,
            form=form,
            wait=wait,
            reporter=reporter,
            stop=stop,
        )
        with held as run_context:
            outcome = export_from_run(run_context, trial, output)
        if not as_json:
            show_export(out, outcome)
        found = outcome.as_dict()
        if upload is not None:
            planned = plan_upload(outcome.export.destination, upload, public=public, reporter=reporter, stop=stop)
            confirm_upload(err if as_json else out, planned, yes=yes, stop=stop)
            found["uploaded_to"] = send(planned, reporter, stop)
    if as_json:
        print(json.dumps(found, indent=2))
    elif upload is not None:
        show_lines(out, [("uploaded to", found["uploaded_to"])])


@app.command()
def directions(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The new file; gguf: one for each of a layer's directions, FILE-1.gguf."),
    ],
    name: RunArgument = None,
    form: Annotated[
        str, typer.Option("--format", help="safetensors; gguf for llama.cpp and repeng; left out: by the file's name.")
    ] = "",
    runs_dir: RunsOption = None,
) -> None:
    """Write the directions that a run has found to a file for other programs."""
    from heretic.cli.ui.tables import show_lines
    from heretic.export.control_vector import export_directions
    from heretic.runs.folder import find_run, load_settings

    folder = find_run(name or "", configured_runs(runs_dir))
    written = export_directions(folder, load_settings(folder, os.environ), output, form)
    show_lines(out, [("written to", str(path)) for path in written])
    if len(written) > 1:
        out.print(
            f"A layer has {len(written)} directions and a control vector holds one, so each file holds one of every layer."
        )


@app.command()
def chat(
    name: RunArgument = None,
    trial: TrialOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer, in tokens.")] = 512,
    runs_dir: RunsOption = None,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Talk to a trial's model and to the original, on the same loaded weights."""
    from heretic.cli.ui.chat import Chat, check_typed, typed
    from heretic.pipeline.actions import open_run, start_chat

    check_typed()
    stop = StopSignal()
    reporter = reporter_for(False, plain)
    with stop.on_signals():
        held = open_run(name or "", configured_runs(runs_dir), (), wait=wait, reporter=reporter, stop=stop)
        with held as run_context:
            result, answer = start_chat(run_context, trial, tokens)
            out.print(f"Trial {result.number}, {result.scores.refusals} of {result.scores.total} declined.")
            with stop.idle():
                Chat(out, answer, folder=run_context.folder.path, check=stop.check).run(typed(out))


@app.command()
def compare(
    name: NamedRunArgument,
    trials: Annotated[str, typer.Option("--trials", help="Numbers of trials, as 3,7.")],
    prompts: Annotated[str, typer.Option("--prompts", help="A prompt, a file of prompts, or a bundled set.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer, in tokens.")] = 100,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """The greedy answers of the original and of trials to your prompts, one below the other."""
    from heretic.cli.ui.tables import show_lines
    from heretic.pipeline.actions import compare as compare_trials
    from heretic.pipeline.actions import open_run
    from heretic.prompts import from_text_or_file

    try:
        numbers = [int(number) for number in trials.split(",")]
    except ValueError:
        raise UserError(
            f"Invalid list of trials: {trials!r}.", code="invalid-option", where="--trials", fix="write it like 3,7"
        ) from None
    asked = from_text_or_file(prompts)
    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    with (
        stop.on_signals(),
        open_run(name, configured_runs(runs_dir), (), wait=wait, reporter=reporter, stop=stop) as run_context,
    ):
        found = compare_trials(run_context, numbers, asked, tokens)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for row in found:
        show_lines(out, list(row.items()))
        out.print()


@app.command()
def benchmark(
    name: NamedRunArgument,
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks of lm-eval, as arc_easy,hellaswag.")],
    trial: TrialOption = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with task files (YAML) of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many questions of a task.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask through the model's chat template.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=0, help="Questions a pass; 0: chosen.")] = 0,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """lm-eval's tasks on the original and on a trial, on the same loaded weights (needs the extra lm_eval)."""
    from heretic.cli.ui.tables import show_benchmark
    from heretic.pipeline.actions import open_run
    from heretic.pipeline.benchmark import Tasks, benchmark_trial

    wanted = Tasks([t.strip() for t in tasks.split(",") if t.strip()], include_path, limit, chat_template, batch_size)
    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    with (
        stop.on_signals(),
        open_run(name, configured_runs(runs_dir), (), wait=wait, reporter=reporter, stop=stop) as run_context,
    ):
        found = benchmark_trial(run_context, trial, wanted)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    show_benchmark(out, found)
