"""Commands `run`, `preflight`, `status` and `demo`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    out,
    read_settings,
    reject_password_on_command_line,
    reporter_for,
    require_own_settings,
    run_names,
)
from heretic.cli.ui.console import is_interactive, non_interactive_reason, on_terminal
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.progress import ProgressReporter
from heretic.settings.sources import Resolved, resolve

if TYPE_CHECKING:
    from heretic.pipeline.run_context import RunContext
    from heretic.pipeline.workers import WorkerCount


@app.command()
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id, local folder or .gguf file; or name or folder of a run to resume.",
            metavar="MODEL or RUN",
            show_default=False,
            autocompletion=run_names,
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    trials: Annotated[
        str | None,
        typer.Option("--trials", help="n_trials: largest number of trials; +50 adds 50 to those already completed."),
    ] = None,
    save_to: Annotated[str | None, typer.Option("--save-to", help="save_to: folder for the resulting model.")] = None,
    run_name: Annotated[str | None, typer.Option("--run-name", help="run_name: name of the run's folder.")] = None,
    storage: Annotated[str | None, typer.Option("--storage", help="storage: Optuna storage URL.")] = None,
    workers: Annotated[
        str | None,
        typer.Option("--workers", help="Worker processes: a number, or auto for one per GPU.", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run; an earlier run is archived.")] = False,
    wait: WaitOption = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if preflight fails.")] = False,
    no_menu: Annotated[bool, typer.Option("--no-menu", help="Show no menu after the run.")] = False,
    plain: PlainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the direction, run the study, export the best trial; resumes an unfinished run. On a terminal a menu follows."""
    total, extra_trials = _parse_trials(trials)
    options = {"model": model, "n_trials": total, "save_to": save_to, "run_name": run_name, "storage": storage}
    resolved = _resolve_run(model, config, assignments, options, quiet=as_json)
    _run_and_show(
        resolved,
        extra_trials,
        workers,
        fresh=fresh,
        force=force,
        wait=wait,
        no_menu=no_menu,
        plain=plain,
        as_json=as_json,
    )


def _run_and_show(
    resolved: Resolved,
    extra_trials: int,
    workers: str | None,
    *,
    fresh: bool,
    force: bool,
    wait: bool,
    no_menu: bool,
    plain: bool,
    as_json: bool,
) -> None:
    """Run the study, export its best trial and print the outcome; the options are those of the command."""
    from heretic.cli.ui.outcome import show_outcome
    from heretic.cli.ui.preflight_table import show
    from heretic.pipeline.run import run as run_job
    from heretic.pipeline.worker_process import exit_with_parent

    # 1. Choose reporter, number of workers and menu
    stop = StopSignal()
    reporter = reporter_for(as_json, plain, resolved.settings.model, stop)
    n_workers = _worker_count(workers, resolved, reporter)
    menu_wanted = not (no_menu or as_json) and on_terminal(out)
    show_menu = menu_wanted and is_interactive()
    # 2. Run the study, export, and show the menu
    with stop.on_signals(), exit_with_parent(stop):
        outcome = run_job(
            resolved,
            fresh=fresh,
            force=force,
            wait=wait,
            extra_trials=extra_trials,
            workers=n_workers,
            reporter=reporter,
            stop=stop,
            on_preflight=lambda report: show(report, err if as_json else out),
            on_finished=_show_menu if show_menu else None,
        )
    # 3. Print the outcome
    if as_json:
        print(json.dumps(outcome.as_dict(), indent=2))
        return
    show_outcome(out, outcome, with_pareto_front=not show_menu)
    if menu_wanted and not show_menu:
        out.print(f"No menu: {non_interactive_reason()}. heretic --help lists its actions as commands.", soft_wrap=True)


def _show_menu(run_context: RunContext) -> None:
    from heretic.cli.ui.menu import Menu

    Menu(out, run_context).run()


def _worker_count(option: str | None, resolved: Resolved, reporter: ProgressReporter) -> WorkerCount:
    """Return the number of --workers; warn if more workers will not help or if the storage's password is visible."""
    from heretic.pipeline.workers import WorkerCount, resolve_worker_count
    from heretic.storage.url import masked

    storage, origin = resolved.settings.storage, resolved.origins.get("storage", "")
    if masked(storage) != storage and (origin == "option" or origin.startswith("--set")):
        reporter.warning(
            "Every user of this machine can read the storage's password in the process list. Set HERETIC_STORAGE instead."
        )
    if option is None:
        return WorkerCount()
    count, warning = resolve_worker_count(option, resolved.settings)
    if warning:
        reporter.warning(warning)
    return count


def _parse_trials(text: str | None) -> tuple[int | None, int]:
    """Parse --trials as (total number of trials, number of extra trials)."""
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


def _resolve_run(
    model: str | None, config: Path | None, assignments: list[str] | None, options: dict[str, Any], *, quiet: bool
) -> Resolved:
    """Resolve the settings of a new or of an existing run. Raises SettingsError."""
    folder = None
    if model and not model.endswith(".gguf"):
        from heretic.runs.folder import find_existing_run, load_run_settings

        runs_dir = [a for a in assignments or [] if a.partition("=")[0].strip() == "runs_dir"]
        located = resolve(config, assignments=runs_dir, environment=os.environ)
        folder = find_existing_run(model, located.settings.runs_dir)
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
    devices: Annotated[str | None, typer.Option("--devices", help="Plan for other GPUs, such as 4x24GiB.")] = None,
) -> None:
    """Check whether a run can succeed on this machine. Exit status: 0 ready, 1 will fail, 2 risky."""
    resolved = read_settings(config, assignments, {"model": model}, quiet=as_json)
    from heretic.cli.ui.preflight_table import show
    from heretic.hardware.virtual_gpus import virtual_gpus
    from heretic.pipeline.prepare import run_preflight

    out.long_work = True  # its exit status counts without a reader too
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
        str | None, typer.Option("--storage", help="Storage URL of a run without a local folder; RUN is its name.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until the study is complete.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, max=86400, help="Seconds between refreshes of --watch.")
    ] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Show progress and Pareto front of a study, also while it runs, here or on another machine."""
    from heretic.cli.ui.status_view import show_status, watch_status
    from heretic.runs.status import Status, read_status

    def read() -> Status:
        return read_status(name or "", storage_dir, os.environ, storage or "")

    reject_password_on_command_line(storage or "")
    if every != every:  # NaN passes the range check
        raise UserError("Invalid number of seconds.", code="invalid-option", where="--every", fix="write it like 5")
    storage_dir = "" if storage else configured_runs(runs_dir)
    if watch and not as_json:
        watch_status(out, read, every)
    elif as_json:
        print(json.dumps(read().as_dict(), indent=2))
    else:
        show_status(out, read())


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Folder for the demo's models and run.")] = Path("demo"),
    trials: Annotated[int | None, typer.Option("--trials", help="Number of trials.")] = None,
    assignments: SetOption = None,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Run the complete workflow on a small bundled model that refuses to talk about cooking."""
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
            on_preflight=lambda report: show(report, out),
        )
    show_demo(out, outcome)
