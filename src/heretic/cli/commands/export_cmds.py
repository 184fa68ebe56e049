"""Commands `reproduce` and `upload`, for exported models."""

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
        str,
        typer.Argument(
            help="manifest.json of an exported model, the model's folder, or user/name or the address of a model on the hub.",
            metavar="MANIFEST",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the rebuilt model; default: compare only.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; default: the manifest's.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Rebuild even if the base model's files differ from the manifest's.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model run its own Python code.")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read base weights from pickle files.")] = False,
    device_map: Annotated[str, typer.Option("--device-map", help="As the setting device_map.")] = "planned",
    wait: WaitOption = False,
    as_json: JsonOption = False,
    plain: PlainOption = False,
) -> None:
    """Rebuild an exported model from its base and its manifest, without a study, and compare the two."""
    from heretic.cli.ui.outcome import show_reproduction
    from heretic.export.manifest import locate_manifest
    from heretic.pipeline.reproduce import reproduce as rebuild

    stop = StopSignal()
    with stop.on_signals():
        reproduction = rebuild(
            locate_manifest(manifest),
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
        print(json.dumps(reproduction.as_dict(), indent=2))
    else:
        show_reproduction(out, reproduction)
    if reproduction.verdict == "different":
        raise NotReproduced(
            f"The rebuilt model differs from the manifest's: {reproduction.why}.",
            fix="use the versions and the base model in the manifest" if reproduction.changed else None,
        )


@app.command()
def upload(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of an exported model; or name or folder of a run with an exported model.",
            metavar="FOLDER",
            autocompletion=run_names,
        ),
    ],
    repository: Annotated[str, typer.Argument(help="Repository on the hub.", metavar="USER/NAME")],
    public: PublicOption = False,
    yes: YesOption = False,
    trial: Annotated[
        int | None, typer.Option("--trial", help="Number of the trial, if the run has exported several.")
    ] = None,
    runs_dir: RunsOption = None,
    as_json: JsonOption = False,
    plain: PlainOption = False,
) -> None:
    """Upload an exported model to the Hugging Face hub, after confirmation; private unless --public."""
    from heretic.cli.ui.outcome import confirm_upload, show_lines
    from heretic.export.upload import plan_upload
    from heretic.export.upload import upload as send_files
    from heretic.runs.folder import exported_folder

    stop = StopSignal()
    reporter = reporter_for(as_json, plain)
    folder = exported_folder(source, configured_runs(runs_dir), trial)
    with stop.on_signals():
        planned = plan_upload(folder, repository, public=public, reporter=reporter, stop=stop)
        confirm_upload(err if as_json else out, planned, yes=yes, stop=stop)
        address = send_files(planned, reporter, stop)
    if as_json:
        print(json.dumps({"folder": str(folder), "uploaded_to": address, "public": public}, indent=2))
        return
    show_lines(out, [("uploaded to", address)])
