"""The command line: one thin function a command; the work is done elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from heretic import __version__
from heretic.errors import Interrupted, UserError
from heretic.screen.console import make_watcher, printable, spell
from heretic.settings_layers import DEFAULT_FILE, Resolved, resolve
from heretic.stop import Stop

# Heavy imports (torch, transformers, optuna) happen inside the commands, so that --help and errors come at once.

app = typer.Typer(
    name="heretic",
    help="Directional ablation of language models: find the refusal direction, project it out, search the strengths.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help=f"Settings file; {DEFAULT_FILE} here is found by itself.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Any setting, as key=value; may be given often.")
]
ModelArgument = Annotated[str | None, typer.Argument(help="Hub id, local folder, or .gguf file.", show_default=False)]
RunArgument = Annotated[
    str | None, typer.Argument(help="Name or folder of a run; the newest if left out.", show_default=False)
]
RunsOption = Annotated[
    str | None, typer.Option("--runs-dir", help="Folder that holds the runs; left out: as configured.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


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
    wait: Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")] = False,
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
def export(
    name: Annotated[str, typer.Argument(help="Name or folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the model to.")],
    trial: Annotated[
        int | None, typer.Option("--trial", help="Trial to export; left out: the one that the rule prefers.")
    ] = None,
    runs_dir: RunsOption = None,
    assignments: SetOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")] = False,
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
    wait: Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")] = False,
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
    wait: Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")] = False,
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


@app.command()
def evaluate(
    model: ModelArgument = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The original, to measure KL divergence from.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for devices that another process holds.")] = False,
) -> None:
    """Refusals and KL of any model on the configured prompt sets."""
    resolved = read_settings(config, assignments, {"model": model}, quiet=as_json)
    from heretic.later import evaluate_model
    from heretic.progress import SILENT
    from heretic.screen.tables import show_lines

    stop = Stop()
    with stop.on_signals():
        result = evaluate_model(
            resolved.settings, against, wait=wait, watcher=SILENT if as_json else make_watcher(out), stop=stop
        )
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    show_lines(out, result.rows())


@app.command()
def config(
    config_file: ConfigOption = None,
    assignments: SetOption = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="The documented defaults, as a file to start from.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of the settings.")] = False,
) -> None:
    """The resolved settings, each with where it came from."""
    from heretic.settings import Settings
    from heretic.settings_text import defaults_text, resolved_text

    if schema:
        print(json.dumps(Settings.model_json_schema(), indent=2))
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
    from heretic.doctor import examine
    from heretic.screen.tables import show_lines

    found = examine(resolved, problem)
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
    out.print(printable(found["settings"]), highlight=False, soft_wrap=True)


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


def read_settings(
    file: Path | None, assignments: list[str] | None, options: dict[str, Any], *, quiet: bool = False
) -> Resolved:
    """Settings from every source; says which file was read."""
    resolved = resolve(file, options, assignments or (), os.environ)
    if resolved.file is not None and not quiet:
        out.print(f"Settings from {printable(str(resolved.file))}")
    return resolved


def configured_runs(option: str | None) -> str:
    """The folder of runs: the option, or what the settings here say."""
    return option or resolve(environment=os.environ).settings.runs_dir


def _version(argv: list[str]) -> bool:
    return argv[:1] in (["--version"], ["-V"])


def shorthand(argv: list[str], commands: list[str]) -> list[str]:
    """`heretic MODEL` and `heretic --config FILE` mean `heretic run …`; so does `heretic` alone where a config.toml lies."""
    own = ("-h", "--help", "--install-completion", "--show-completion")
    if not argv:
        return ["run"] if Path(DEFAULT_FILE).is_file() else argv
    return argv if argv[0] in commands or argv[0] in own else ["run", *argv]


def guarded(job: Callable[[], Any]) -> int:
    """Run a command; what a user can cause becomes one to three lines and an exit status."""
    try:
        job()
    except UserError as error:
        err.print(f"[bold red]Error:[/bold red] {printable(str(error))}", soft_wrap=True)
        return error.exit_status
    except Interrupted:
        err.print("Stopped. Everything finished is kept; the same command goes on from here.")
        return Interrupted.exit_status
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0
    return 0


def main() -> None:
    """The command `heretic`."""
    argv = sys.argv[1:]
    if _version(argv):
        print(f"heretic {__version__}")
        sys.exit(0)
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    arguments = shorthand(argv, commands)
    sys.exit(guarded(lambda: app(args=arguments, prog_name="heretic")))
