"""The gradient path: ablations optimized for increasing refusal weights, and the ablations around them."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import optuna
from pydantic import Json, TypeAdapter

from heretic.ablation.ablation import Ablation
from heretic.storage import attributes
from heretic.storage.attributes import GRADIENT_PATH, MAX_LAYERS


@dataclass(frozen=True)
class PathPoint:
    """The optimum at one weight of the refusal term; `vector` is as in an Ablation."""

    weight: float
    strengths: Mapping[str, tuple[float, ...]]  # by component, one per layer
    kl: float  # mean over the validation prompts
    probability: float  # mean probability of the reference refusals on the validation prompts
    vector: tuple[float, ...] | None = None

    @property
    def ablation(self) -> Ablation:
        """The ablation at this point."""
        return Ablation(self.strengths, vector=self.vector)


@dataclass(frozen=True)
class GradientPath:
    """The points by increasing weight; empty if the gradient search failed (see `failure_reason`)."""

    points: tuple[PathPoint, ...]
    failure_reason: str = ""
    second: bool = False  # whether they are of the second search, against evasions

    def at(self, position: float, gains: Mapping[str, Sequence[float]], shift: float) -> Ablation:
        """Interpolate the ablation at a position on the path (0: the first point).

        Args:
            gains: factors of the strengths by component, one per layer.
            shift: mixes each layer's direction with a neighbor's, in layers; ignored for vectors.
        """
        low = min(int(position), len(self.points) - 1)
        high = min(low + 1, len(self.points) - 1)
        share = position - low
        a, b = self.points[low], self.points[high]
        strengths = {
            component: tuple(
                g * s for g, s in zip(gains[component], _between(profile, b.strengths[component], share), strict=True)
            )
            for component, profile in a.strengths.items()
        }
        if a.vector is not None and b.vector is not None:
            return Ablation(strengths, vector=_between(a.vector, b.vector, share))
        return Ablation(strengths, shift=shift)

    @property
    def uses_layer_directions(self) -> bool:
        """Whether the directions are those of the layers, which `shift` can move."""
        return all(p.vector is None for p in self.points)

    @property
    def edited_layer_range(self) -> tuple[int, int]:
        """First and last layer that any point edits."""
        edited = [
            layer for p in self.points for profile in p.strengths.values() for layer, s in enumerate(profile) if s > 0
        ]
        return min(edited, default=0), max(edited, default=0)

    def save(self, study: optuna.Study) -> None:
        """Store the path in the study."""
        study.set_user_attr(GRADIENT_PATH, json.dumps(asdict(self)))

    @classmethod
    def load(cls, study: optuna.Study) -> GradientPath | None:
        """Load the study's path; None if it has none. Raises UserError if it is damaged."""
        gradient_path = attributes.read(study, GRADIENT_PATH, _adapter())
        if gradient_path is not None and not alike(gradient_path.points):
            raise attributes.damaged(study, f"'{GRADIENT_PATH}' is invalid (points differ in shape, or are not finite)")
        return gradient_path


@functools.cache
def _adapter() -> TypeAdapter[GradientPath]:
    return TypeAdapter(Json[GradientPath])


def alike(points: Sequence[PathPoint]) -> bool:
    """Return whether all points have the same components, layers and kind of direction, and finite numbers."""
    shapes = {
        (
            *sorted((component, len(profile)) for component, profile in p.strengths.items()),
            None if p.vector is None else len(p.vector),
        )
        for p in points
    }
    numbers = [part for p in points for part in (*p.strengths.values(), p.vector or ())]
    layers = {len(part) for p in points for part in p.strengths.values()}
    return (
        len(shapes) <= 1
        and len(layers) <= 1
        and max(layers, default=0) <= MAX_LAYERS
        and all(map(math.isfinite, itertools.chain(*numbers)))
    )


def _between(a: Sequence[float], b: Sequence[float], share: float) -> tuple[float, ...]:
    return tuple((1 - share) * x + share * y for x, y in zip(a, b, strict=True))
