"""One ablation without a study."""

from __future__ import annotations

from pathlib import Path

from heretic.ablation.ablation import Ablation
from heretic.errors import UserError
from heretic.export.export import Export
from heretic.interrupt import StopSignal
from heretic.pipeline.api import AblationSession, check_layer, open_ablation_session, out_of_range
from heretic.pipeline.gradient_search import run_gradient_search
from heretic.search.gradient_path import PathPoint
from heretic.search.summary import StudyReporter
from heretic.settings.sources import Resolved

MOST_STRENGTH = 10.0  # 1 removes the direction, 2 mirrors it
FEW_REFUSALS = 0.05  # refusal probability on validation prompts below which a gentler point is preferred


def ablate_once(
    resolved: Resolved,
    destination: Path,
    *,
    strength: float | None = None,
    layer: float | None = None,
    wait: bool = False,
    reporter: StudyReporter,
    stop: StopSignal,
) -> tuple[Export, int]:
    """Write one verified ablation, and return it with the original's number of refusals.

    The files of the run (directions, baseline, gradient path) stay in its folder: `heretic run` continues from them.

    Args:
        resolved: The settings with their origins.
        destination: New folder for the model.
        strength: Of all writers, as in Arditi et al. 2024 (arXiv 2406.11717) with 1; None: by the gradient search.
        layer: Layer whose direction is removed everywhere; None: each layer's own. Only with `strength`.
        wait: Wait for devices that another process holds.
        reporter: Receives progress and warnings.
        stop: Requests a stop.

    Raises:
        UserError: The model, the settings or the machine do not allow it.
        Interrupted: A stop.
    """
    if layer is not None and strength is None:
        raise needs_strength("--layer")
    if strength is not None:
        check_strength(strength)
    with open_ablation_session(resolved, wait=wait, reporter=reporter, stop=stop) as session:
        session.check_destination(destination)
        if strength is None:
            ablation = searched(session)
        else:
            check_layer(layer, session.num_layers)
            ablation = Ablation.uniform(session.components, strength, session.num_layers, layer)
        before = session.session.baseline.refusals
        return session.export(ablation, destination), before


def needs_strength(option: str) -> UserError:
    """Return the error of an option without --strength."""
    return UserError(f"{option} needs --strength.", code="conflicting-options", where=option, fix="add --strength 1")


def check_strength(strength: float) -> None:
    """Raise UserError for a strength that is out of range."""
    if not 0 < strength <= MOST_STRENGTH:
        raise out_of_range("--strength", f"above 0, at most {MOST_STRENGTH:g}")


def searched(session: AblationSession) -> Ablation:
    """Return the ablation of one point of the gradient path. Raises UserError if there is none."""
    run_context = session.run_context
    path = run_gradient_search(run_context.study, session.session, run_context.folder, run_context.compute_once)
    if path is None or not path.points:
        raise UserError(
            "The gradient search gives no ablation for this model.",
            code="no-gradient-path",
            where="search.start",
            fix="--strength 1, or a study: heretic run",
        )
    # Gentle points of the second search still evade.
    return (path.points[-1] if path.second else gentlest(path.points)).ablation


def gentlest(points: tuple[PathPoint, ...]) -> PathPoint:
    """Return the first point that refuses hardly anything on the validation prompts, else the one that refuses least."""
    few = [point for point in points if point.probability <= FEW_REFUSALS]
    return few[0] if few else min(points, key=lambda point: point.probability)
