"""Commands `report` and `geometry`."""

from __future__ import annotations

import json
import os
import webbrowser
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from heretic.cli.options import (
    ConfigOption,
    JsonOption,
    PlainOption,
    RunArgument,
    RunsOption,
    SetOption,
    WaitOption,
    app,
    configured_runs,
    out,
    read_settings,
    reporter_for,
    require_own_settings,
    run_names,
)
from heretic.cli.ui.console import escape_terminal
from heretic.interrupt import StopSignal

if TYPE_CHECKING:
    from heretic.runs.folder import RunFolder
    from heretic.settings import Settings


@app.command()
def report(
    name: RunArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: report.html in the run's folder.")
    ] = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="Include the texts of the evaluation prompts, also harmful ones.")
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    runs_dir: RunsOption = None,
) -> None:
    """Write the report of a finished or running run: one HTML file that works offline."""
    from heretic.files import ensure_parent
    from heretic.report.report import load_report_input
    from heretic.report.reporter import write_report
    from heretic.runs.folder import REPORT

    source = load_report_input(name or "", configured_runs(runs_dir), os.environ, with_texts=texts)
    file = ensure_parent(output) if output else source.folder.path / REPORT
    write_report(source, file)
    out.print(f"Written: {escape_terminal(str(file))}", soft_wrap=True)
    if show:
        _open_in_browser(file)


@app.command()
def serve(
    name: RunArgument = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 0,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    runs_dir: RunsOption = None,
) -> None:
    """Show a run as a live page in the browser, on this machine only; it can stop and continue the run, and chat."""
    from heretic.pipeline.browser_chat import BrowserChat
    from heretic.report.server import open_server
    from heretic.runs.folder import find_run

    folder = configured_runs(runs_dir)
    run = find_run(name or "", folder)
    server = open_server(run, folder, os.environ, BrowserChat(run), port)
    out.print(
        f"Open {server.url}\nThe address is a key: do not share it. Ctrl-C ends the page, not the run.", soft_wrap=True
    )
    with server, TemporaryDirectory() as private, suppress(KeyboardInterrupt):
        if show:
            # By a file that only the user can read: all users see the browser's command line, and the address is a key.
            redirect = Path(private) / "open.html"
            redirect.write_text(f'<meta http-equiv="refresh" content="0; url={server.url}">', encoding="utf-8")
            _open_in_browser(redirect)
        server.serve_forever(poll_interval=0.2)


@app.command()
def geometry(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Hub id, local folder or .gguf file; or the name or folder of a run.",
            metavar="MODEL or RUN",
            show_default=False,
            autocompletion=run_names,
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the plots to this HTML file, which works offline.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the file of --html in the browser.")] = False,
    effects: Annotated[
        bool,
        typer.Option("--effects", help="Also remove and add each layer's direction, and measure refusals and KL."),
    ] = False,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Compare the residuals of harmful and harmless prompts in every layer; needs no study."""
    from heretic.cli.ui.tables import show_geometry
    from heretic.files import ensure_parent, write_text
    from heretic.pipeline.geometry import residual_geometry
    from heretic.report.report import geometry_page

    settings, folder = _model_or_run(name, config, assignments, quiet=as_json)
    if html is not None:  # an unwritable file fails before the work
        html = ensure_parent(html)
    stop = StopSignal()
    with stop.on_signals():
        residuals, measured = residual_geometry(
            settings, folder, effects=effects, wait=wait, reporter=reporter_for(as_json, plain), stop=stop
        )
    if html is not None:
        write_text(html, geometry_page(residuals, settings.model, measured))
    if as_json:
        print(json.dumps({**residuals.as_dict(), "effects": measured.as_dict() if measured else None}, indent=2))
        return
    show_geometry(out, residuals, measured)
    if html is not None:
        out.print(f"Written: {escape_terminal(str(html))}", soft_wrap=True)
        if show:
            _open_in_browser(html)


def _model_or_run(
    name: str | None, config: Path | None, assignments: list[str] | None, *, quiet: bool
) -> tuple[Settings, RunFolder | None]:
    """Return the settings of an existing run, with its folder, or of a model. Raises UserError."""
    from heretic.runs.folder import find_existing_run, load_settings
    from heretic.settings.sources import resolve

    located = resolve(config, assignments=assignments or (), environment=os.environ)
    folder = find_existing_run(name or "", located.settings.runs_dir)
    if folder is None:
        return read_settings(config, assignments, {"model": name}, quiet=quiet).settings, None
    ignored = [a for a in assignments or [] if a.partition("=")[0].strip() != "runs_dir"]
    if ignored or config is not None:
        where = "--config" if config is not None else f"--set {ignored[0]}"
        raise require_own_settings(folder.name, "settings", where)
    fixed = {"runs_dir": str(folder.path.parent), "run_name": folder.name}
    return load_settings(folder, os.environ).model_copy(update=fixed), folder


def _open_in_browser(file: Path) -> None:
    if not webbrowser.open(file.resolve().as_uri()):
        out.print("No browser could be started. Open the file by hand.")
