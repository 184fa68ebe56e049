"""What is done with a model that has been exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from heretic.cli.options import (
    JsonOption,
    PlainOption,
    PublicOption,
    RunsOption,
    WaitOption,
    YesOption,
    app,
    configured_runs,
    err,
    out,
    reporter_for,
    run_names,
)
from heretic.errors import NotReproduced
from heretic.interrupt import StopSignal


@app.command()
def reproduce(
    manifest: Annotated[
        Path, typer.Argument(help="manifest.json of an exported model, or the model's folder.", metavar="MANIFEST")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the rebuilt model; left out: only compared.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model is now; left out: as the manifest says.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where the base model's files are not those of the manifest.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model run Python code that came with it.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a base model whose weights are in pickle files.")
    ] = False,
    device_map: Annotated[str, typer.Option("--device-map", help="As the setting device_map.")] = "planned",
    wait: WaitOption = False,
    as_json: JsonOption = False,
    plain: PlainOption = False,
) -> None:
    """Make an exported model again from its base and its manifest, without a study, and say whether it is the same."""
    from heretic.cli.ui.outcome import show_reproduction
    from heretic.pipeline.reproduce import reproduce as make_again

    stop = StopSignal()
    with stop.on_signals():
        found = make_again(
            manifest,
            output,
            base=base,
            device_map=device_map,
            trust=trust,
            allow_pickle=allow_pickle,
            force=force,
            wait=wait,
            reporter=reporter_for(as_json, plain),
            stop=stop,
        )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show_reproduction(out, found)
    if found.verdict == "different":
        raise NotReproduced(
            f"The rebuilt model is not the one of the manifest: {found.why}.",
            fix="take the versions and the base model that the manifest names" if found.changed else None,
        )


@app.command()
def upload(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of an exported model; or name or folder of a run, which has exported one.",
            metavar="FOLDER",
            autocompletion=run_names,
        ),
    ],
    repository: Annotated[str, typer.Argument(help="Where it goes on the hub.", metavar="USER/NAME")],
    public: PublicOption = False,
    yes: YesOption = False,
    trial: Annotated[
        int | None, typer.Option("--trial", help="Of a run that has exported several trials: the number of one.")
    ] = None,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
    plain: PlainOption = False,
) -> None:
    """Send an exported model to the Hugging Face hub: private unless --public, and never without a yes."""
    from heretic.cli.ui.outcome import confirm_upload, show_lines
    from heretic.export.upload import plan_upload
    from heretic.export.upload import upload as send
    from heretic.runs.folder import exported_folder

    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    folder = exported_folder(source, configured_runs(runs_dir), trial)
    with stop.on_signals():
        planned = plan_upload(folder, repository, public=public, reporter=reporter, stop=stop)
        confirm_upload(err if as_json else out, planned, yes=yes, stop=stop)
        address = send(planned, reporter, stop)
    if as_json:
        print(json.dumps({"folder": str(folder), "uploaded_to": address, "public": public}, indent=2))
        return
    show_lines(out, [("uploaded to", address)])
