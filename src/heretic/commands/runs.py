"""Making a run, checking it before, and watching it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from heretic.commands.app import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    RunArgument,
    RunsOption,
    SetOption,
    WaitOption,
    app,
    configured_runs,
    out,
    read_settings,
)
from heretic.screen.console import make_watcher, spell
from heretic.stop import Stop


@app.command()
def run(
    model: ModelArgument = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    trials: Annotated[int | None, typer.Option("--trials", help="n_trials: trials in the finished study.")] = None,
    save_to: Annotated[str | None, typer.Option("--save-to", help="save_to: folder for the resulting model.")] = None,
    run_name: Annotated[str | None, typer.Option("--run-name", help="run_name: name of the run's folder.")] = None,
    storage: Annotated[str | None, typer.Option("--storage", help="storage: Optuna storage URL.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an earlier run is set aside, not deleted.")
    ] = False,
    wait: WaitOption = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if preflight says that it will fail.")] = False,
) -> None:
    """Find the direction, run the study, export the best trial; resumes an unfinished run."""
    options = {"model": model, "n_trials": trials, "save_to": save_to, "run_name": run_name, "storage": storage}
    resolved = read_settings(config, assignments, options)
    from heretic.run import run as run_job
    from heretic.screen.preflight_table import show

    stop = Stop()
    with stop.on_signals():
        outcome = run_job(
            resolved,
            fresh=fresh,
            force=force,
            wait=wait,
            watcher=make_watcher(out),
            stop=stop,
            on_report=lambda report: show(report, out),
        )
    from heretic.screen.outcome import show_outcome

    show_outcome(out, outcome)


@app.command()
def preflight(
    model: ModelArgument = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    devices: Annotated[
        str | None, typer.Option("--devices", help="Plan for GPUs that are not here, such as 4x24GiB.")
    ] = None,
) -> None:
    """Can this run succeed here? Exit status: 0 ready, 1 will fail, 2 risky."""
    resolved = read_settings(config, assignments, {"model": model}, quiet=as_json)
    from heretic.machine.imagined import imagined_gpus
    from heretic.run import check
    from heretic.screen.preflight_table import show

    report = check(resolved.settings, imagined=imagined_gpus(devices) if devices else ())
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        show(report, out)
    raise typer.Exit(report.exit_status)


@app.command()
def status(
    name: RunArgument = None,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Progress and front of a study, also while it runs."""
    from heretic.screen.tables import show_front, show_lines
    from heretic.status import look_at

    seen = look_at(name or "", configured_runs(runs_dir), os.environ)
    if as_json:
        print(json.dumps(seen.as_dict(), indent=2))
        return
    counts = [f"{seen.done} of {seen.n_trials}"]
    counts += [f"{n} {what}" for n, what in ((seen.stopped, "left early"), (seen.failed, "failed")) if n]
    rows = [("run", str(seen.folder)), ("model", seen.model), ("trials", ", ".join(counts)), ("state", seen.state)]
    if seen.walk:
        rows.append(("walk", seen.walk))
    if seen.surrogate_error is not None:
        rows.append(("estimates", f"off by {seen.surrogate_error:.1f} refusals on average"))
    if seen.seconds_left is not None:
        rows.append(("time left", f"about {spell(seen.seconds_left)} ({spell(seen.seconds_per_trial or 0)} a trial)"))
    show_lines(out, rows)
    show_front(out, seen.found, seen.before)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the demo's models and run go.")] = Path("demo"),
    trials: Annotated[int | None, typer.Option("--trials", help="Trials of the demo's study.")] = None,
) -> None:
    """The whole job on a small bundled model that declines to talk about cooking."""
    from heretic.demo.demo import run_demo
    from heretic.screen.outcome import show_demo
    from heretic.screen.preflight_table import show

    stop = Stop()
    with stop.on_signals():
        outcome = run_demo(
            folder, trials=trials, watcher=make_watcher(out), stop=stop, on_report=lambda report: show(report, out)
        )
    show_demo(out, outcome)
