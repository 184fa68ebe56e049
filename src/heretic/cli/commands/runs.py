"""Making a run, checking it before, and watching it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from heretic.cli.options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PlainOption,
    RunArgument,
    RunsOption,
    SetOption,
    WaitOption,
    app,
    configured_runs,
    err,
    keep_off_the_command_line,
    out,
    read_settings,
    reporter_for,
    require_own_settings,
    run_names,
)
from heretic.cli.ui.console import is_interactive, non_interactive_reason, on_terminal
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.progress import ProgressReporter
from heretic.settings.sources import Resolved, resolve


@app.command()
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id, local folder or .gguf file; or the name or folder of a run, to go on with it.",
            metavar="MODEL or RUN",
            show_default=False,
            autocompletion=run_names,
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    trials: Annotated[
        str | None,
        typer.Option("--trials", help="n_trials: trials in the finished study; +50: so many more than there are."),
    ] = None,
    save_to: Annotated[str | None, typer.Option("--save-to", help="save_to: folder for the resulting model.")] = None,
    run_name: Annotated[str | None, typer.Option("--run-name", help="run_name: name of the run's folder.")] = None,
    storage: Annotated[str | None, typer.Option("--storage", help="storage: Optuna storage URL.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers", help="Processes that share the trials: a number, or auto for one a GPU.", show_default=False
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an earlier run is set aside, not deleted.")
    ] = False,
    wait: WaitOption = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if preflight says that it will fail.")] = False,
    no_menu: Annotated[bool, typer.Option("--no-menu", help="End without the menu, also on a terminal.")] = False,
    plain: PlainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the direction, run the study, export the best trial; resumes an unfinished run. On a terminal a menu follows."""
    total, add = _trials(trials)
    options = {"model": model, "n_trials": total, "save_to": save_to, "run_name": run_name, "storage": storage}
    resolved = _resolved(model, config, assignments, options, quiet=as_json or os.environ.get("RANK", "0") != "0")
    from heretic.cli.ui.preflight_table import show
    from heretic.pipeline.run import run as run_job
    from heretic.pipeline.run_context import RunContext
    from heretic.pipeline.tensor_parallel import follower_loop, rank, size
    from heretic.pipeline.worker_process import exit_with_parent

    if rank():
        follower_loop(resolved.settings)
        return
    stop = StopSignal()
    reporter = reporter_for(as_json, plain, resolved.settings.model, stop)
    number = _workers(workers, resolved, reporter)
    # Under torchrun the others wait for trials, and know nothing of what a menu does.
    may_ask = not (no_menu or as_json) and on_terminal(out) and size() == 1
    asks = may_ask and is_interactive()

    def menu(run_context: RunContext) -> None:
        from heretic.cli.ui.menu import Menu

        Menu(out, run_context).run()

    with stop.on_signals(), exit_with_parent(stop):
        outcome = run_job(
            resolved,
            fresh=fresh,
            force=force,
            wait=wait,
            extra_trials=add,
            workers=number,
            reporter=reporter,
            stop=stop,
            on_report=lambda report: show(report, err if as_json else out),
            on_finished=menu if asks else None,
        )
    if as_json:
        print(json.dumps(outcome.as_dict(), indent=2))
        return
    from heretic.cli.ui.outcome import show_outcome

    show_outcome(out, outcome, seen=asks)
    if may_ask and not asks:
        out.print(
            f"No menu, since {non_interactive_reason()}; heretic --help lists its actions as commands.", soft_wrap=True
        )


def _workers(wanted: str | None, resolved: Resolved, reporter: ProgressReporter) -> int:
    """--workers as a number, with a warning where it is hardly worth it."""
    from heretic.pipeline.workers import resolve_worker_count
    from heretic.storage.url import masked

    storage, origin = resolved.settings.storage, resolved.origins.get("storage", "")
    if masked(storage) != storage and (origin == "option" or origin.startswith("--set")):
        reporter.warning("The storage's password is seen by everybody who lists processes: HERETIC_STORAGE hides it.")
    if wanted is None:
        return 1
    number, warning = resolve_worker_count(wanted, resolved.settings)
    if warning:
        reporter.warning(warning)
    return number


def _trials(text: str | None) -> tuple[int | None, int]:
    """--trials as (trials in all, or more than there are)."""
    if text is None:
        return None, 0
    number = text.removeprefix("+")
    if not re.fullmatch("[0-9]{1,9}", number) or (text.startswith("+") and int(number) == 0):
        raise UserError(
            f"Invalid number of trials: {text[:40]!r}.",
            code="invalid-option",
            where="--trials",
            fix="write it like 200, or like +50 to add trials",
        )
    return (None, int(number)) if text.startswith("+") else (int(number), 0)


def _resolved(
    model: str | None, config: Path | None, assignments: list[str] | None, options: dict[str, Any], *, quiet: bool
) -> Resolved:
    """The settings of a new run or of one that is named. Raises SettingsError."""
    folder = None
    if model and not model.endswith(".gguf"):
        from heretic.runs.folder import find_existing_run, load_run_settings

        where = [a for a in assignments or [] if a.partition("=")[0].strip() == "runs_dir"]
        folder = find_existing_run(model, resolve(config, assignments=where, environment=os.environ).settings.runs_dir)
    if folder is None:
        return read_settings(config, assignments, options, quiet=quiet)
    if config is not None or options["run_name"]:
        raise require_own_settings(str(model), "settings and name", "--config" if config is not None else "--run-name")
    fixed = {"model": None, "runs_dir": str(folder.path.parent), "run_name": folder.name}
    return load_run_settings(folder, os.environ, options | fixed, assignments or [])


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
    from heretic.cli.ui.preflight_table import show
    from heretic.hardware.virtual_gpus import virtual_gpus
    from heretic.pipeline.prepare import run_preflight

    report = run_preflight(resolved.settings, virtual=virtual_gpus(devices) if devices is not None else ())
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        show(report, out)
    raise typer.Exit(report.exit_status)


@app.command()
def status(
    name: RunArgument = None,
    runs_dir: RunsOption = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Storage URL of a run whose folder is not here; NAME is its name.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again and again, until the study is complete.")
    ] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, max=86400, help="Seconds between two looks of --watch.")
    ] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Progress and front of a study, also while it runs, here or on another machine."""
    from heretic.cli.ui.status_view import show_status, watch_status
    from heretic.runs.status import Status, read_status

    def look() -> Status:
        return read_status(name or "", storage_dir, os.environ, storage or "")

    keep_off_the_command_line(storage or "")
    if every != every:  # what is no number is in no range
        raise UserError("Invalid number of seconds.", code="invalid-option", where="--every", fix="write it like 5")
    storage_dir = "" if storage else configured_runs(runs_dir)
    if watch and not as_json:
        watch_status(out, look, every)
    elif as_json:
        print(json.dumps(look().as_dict(), indent=2))
    else:
        show_status(out, look())


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the demo's models and run go.")] = Path("demo"),
    trials: Annotated[int | None, typer.Option("--trials", help="Trials of the demo's study.")] = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """The whole job on a small bundled model that declines to talk about cooking."""
    from heretic.cli.ui.outcome import show_demo
    from heretic.cli.ui.preflight_table import show
    from heretic.pipeline.demo.demo import run_demo

    stop = StopSignal()
    reporter = reporter_for(False, plain, "demo", stop)
    with stop.on_signals():
        outcome = run_demo(
            folder,
            trials=trials,
            assignments=assignments or (),
            wait=wait,
            reporter=reporter,
            stop=stop,
            on_report=lambda report: show(report, out),
        )
    show_demo(out, outcome)
