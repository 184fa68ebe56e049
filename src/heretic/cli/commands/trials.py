"""Commands `export`, `directions`, `chat`, `compare` and `benchmark`, for the trials of a run."""

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

TrialOption = Annotated[int | None, typer.Option("--trial", help="Number of the trial; default: the selected trial.")]


@app.command()
def export(
    name: NamedRunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the model to.")],
    trial: TrialOption = None,
    upload: Annotated[
        str | None, typer.Option("--upload", help="Upload it to this Hugging Face repository: user/name.")
    ] = None,
    public: PublicOption = False,
    yes: YesOption = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="full, lora (an adapter), gguf (for llama.cpp) or mlx; default: the setting export_format."
        ),
    ] = None,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
    as_json: JsonOption = False,
    plain: PlainOption = False,
) -> None:
    """Write a trial's model or adapter, and verify that it equals the measured model."""
    from heretic.cli.ui.outcome import check_answerable, confirm_upload, show_export
    from heretic.cli.ui.tables import show_lines
    from heretic.pipeline.actions import export_from_run, open_run

    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    if upload is not None:  # an impossible upload fails before the export, which can take hours
        from heretic.export.upload import check_upload, plan_upload
        from heretic.export.upload import upload as send_files

        check_upload(upload)
        check_answerable(err if as_json else out, yes=yes)
    with stop.on_signals():
        opened_run = open_run(
            name,
            configured_runs(runs_dir),
            assignments or [],
            destination=output,
            form=form,
            wait=wait,
            reporter=reporter,
            stop=stop,
        )
        with opened_run as run_context:
            outcome = export_from_run(run_context, trial, output)
        if not as_json:
            show_export(out, outcome)
        summary = outcome.as_dict()
        if upload is not None:
            planned = plan_upload(outcome.export.destination, upload, public=public, reporter=reporter, stop=stop)
            confirm_upload(err if as_json else out, planned, yes=yes, stop=stop)
            summary["uploaded_to"] = send_files(planned, reporter, stop)
    if as_json:
        print(json.dumps(summary, indent=2))
    elif upload is not None:
        show_lines(out, [("uploaded to", summary["uploaded_to"])])


@app.command()
def directions(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to write; gguf with several directions per layer: FILE-1.gguf, …"),
    ],
    name: RunArgument = None,
    form: Annotated[
        str,
        typer.Option("--format", help="safetensors, or gguf for llama.cpp and repeng; default: from the file's name."),
    ] = "",
    runs_dir: RunsOption = None,
) -> None:
    """Write the directions of a run to a file for other programs."""
    from heretic.cli.ui.tables import show_lines
    from heretic.export.control_vector import export_directions
    from heretic.runs.folder import find_run, load_settings

    folder = find_run(name or "", configured_runs(runs_dir))
    written = export_directions(folder, load_settings(folder, os.environ), output, form)
    show_lines(out, [("written to", str(path)) for path in written])
    if len(written) > 1:
        out.print(
            f"This run has {len(written)} directions per layer and a control vector holds one, so there is one file for each."
        )


@app.command()
def chat(
    name: RunArgument = None,
    trial: TrialOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Maximum length of an answer, in tokens.")] = 512,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Chat with a trial's model and with the original, on the same loaded weights."""
    from heretic.cli.ui.chat import Chat, input_lines, require_input
    from heretic.pipeline.actions import open_run, start_chat

    require_input()
    stop = StopSignal()
    reporter = reporter_for(False, plain)
    out.long_work = False  # a chat without a reader ends
    with stop.on_signals():
        opened_run = open_run(
            name or "", configured_runs(runs_dir), assignments or [], wait=wait, reporter=reporter, stop=stop
        )
        with opened_run as run_context:
            result, answer = start_chat(run_context, trial, tokens)
            out.print(f"Trial {result.number}, {result.scores.refusals} of {result.scores.total} refused.")
            with stop.raise_immediately():
                Chat(out, answer, folder=run_context.folder.path, check=stop.check).run(input_lines(out))


@app.command()
def compare(
    name: NamedRunArgument,
    trials: Annotated[str, typer.Option("--trials", help="Numbers of trials, such as 3,7.")],
    prompts: Annotated[str, typer.Option("--prompts", help="A prompt, a file of prompts, or a bundled prompt set.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Maximum length of an answer, in tokens.")] = 100,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Print the greedy answers of the original and of trials to prompts."""
    from heretic.cli.ui.tables import show_lines
    from heretic.pipeline.actions import compare as compare_trials
    from heretic.pipeline.actions import open_run
    from heretic.prompts.sets import from_text_or_file

    try:
        numbers = [int(number) for number in trials.split(",")]
    except ValueError:
        raise UserError(
            f"Invalid list of trials: {trials!r}.", code="invalid-option", where="--trials", fix="write it like 3,7"
        ) from None
    texts = from_text_or_file(prompts)
    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    with (
        stop.on_signals(),
        open_run(
            name, configured_runs(runs_dir), assignments or [], wait=wait, reporter=reporter, stop=stop
        ) as run_context,
    ):
        answers = compare_trials(run_context, numbers, texts, tokens)
    if as_json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
        return
    for row in answers:
        show_lines(out, list(row.items()))
        out.print()


@app.command()
def benchmark(
    name: NamedRunArgument,
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks of lm-eval, such as arc_easy,hellaswag.")],
    trial: TrialOption = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with your own task files (YAML).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Maximum number of questions per task.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Use the model's chat template.")] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=0, help="Questions per forward pass; 0: automatic.")
    ] = 0,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Run lm-eval tasks on the original and on a trial, on the same loaded weights (needs the package lm_eval)."""
    from heretic.cli.ui.tables import show_benchmark
    from heretic.pipeline.actions import open_run
    from heretic.pipeline.benchmark import Tasks, benchmark_trial

    selection = Tasks(
        [t.strip() for t in tasks.split(",") if t.strip()], include_path, limit, chat_template, batch_size
    )
    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    with (
        stop.on_signals(),
        open_run(
            name, configured_runs(runs_dir), assignments or [], wait=wait, reporter=reporter, stop=stop
        ) as run_context,
    ):
        result = benchmark_trial(run_context, trial, selection)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    show_benchmark(out, result)
