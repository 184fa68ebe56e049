"""Command `evaluate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from heretic.cli.options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PlainOption,
    SetOption,
    WaitOption,
    app,
    out,
    read_settings,
    reporter_for,
)
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.settings.sources import Resolved, read_toml

if TYPE_CHECKING:
    from heretic.pipeline.actions import Evaluation
    from heretic.scoring.judges.agreement import Agreement


@app.command()
def evaluate(
    model: ModelArgument = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Original model; adds the KL divergence from it.")
    ] = None,
    measures: Annotated[
        str | None, typer.Option("--measures", help="Scorers to measure besides, such as `arithmetic,copying`.")
    ] = None,
    judge_agreement: Annotated[
        bool,
        typer.Option("--judge-agreement", help="Measure the configured judge on hand-labeled answers; needs no model."),
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    wait: WaitOption = False,
    plain: PlainOption = False,
) -> None:
    """Measure refusals and KL of any model on the configured prompt sets, or the accuracy of the refusal judge."""
    named = [name.strip() for name in measures.split(",")] if measures else None
    resolved = read_settings(config, assignments, {"model": model, "measures": named}, quiet=as_json)
    if judge_agreement and (model or against or measures):
        raise UserError(
            "--judge-agreement measures the judge, not a model.",
            code="conflicting-options",
            where="--judge-agreement",
            fix="omit the model",
        )
    from heretic.cli.ui.tables import show_comparisons, show_lines
    from heretic.pipeline.actions import evaluate_judge, evaluate_model

    stop = StopSignal()
    result: Agreement | Evaluation
    with stop.on_signals():
        reporter = reporter_for(as_json, plain)
        if judge_agreement:
            result = evaluate_judge(resolved.settings, reporter, stop)
        else:
            revisions = _revisions(resolved, model, against)
            result = evaluate_model(
                resolved.settings, against, revisions=revisions, wait=wait, reporter=reporter, stop=stop
            )
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    show_lines(out, result.rows())
    if comparisons := getattr(result, "comparisons", ()):
        show_comparisons(out, comparisons)


def _revisions(resolved: Resolved, model: str | None, against: str | None) -> tuple[str, str]:
    """Return the revisions of the model and of the original.

    A revision in a settings file belongs to the model that the file names; any other to the original, if there is one.
    """
    revision = resolved.settings.revision
    if resolved.file is None or not resolved.origin("revision").startswith(str(resolved.file)):
        return ("", revision) if against else (revision, "")
    named = read_toml(resolved.file).values.get("model", "")
    return revision if model in (None, named) else "", revision if against == named else ""
