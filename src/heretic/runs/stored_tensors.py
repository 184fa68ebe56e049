"""The contents of a run's safetensors files, to and from tensors.

Each reader raises ValueError for tensors that heretic cannot have written: a missing name, another shape or type, numbers that are
not finite. A hash cannot tell, since it may have been computed again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from heretic.ablation.directions import Directions
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.model.response_prefix import AnswerStart
from heretic.scoring.harmless_metrics import HarmlessMetrics
from heretic.scoring.judges.verdict import EVASIVE, ORDER, REFUSAL, Verdict
from heretic.search.gradient_path import PathPoint, alike
from heretic.search.path_optimizer import OptimizerState

Tensors = Mapping[str, Tensor]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Baseline:
    """The original model: its log-probabilities [tokens, vocabulary] at the first `answered` tokens of its answers to the
    harmless prompts, the verdicts on its answers to the harmful ones, the first tokens with which it declined (none where it
    did not), how all its answers begin, and its conduct on the harmless prompts (None in a file of an
    earlier version)."""

    log_probs: Tensor
    verdicts: tuple[Verdict, ...]
    refusal_texts: tuple[list[int], ...]
    start: AnswerStart
    answered: tuple[list[int], ...]
    harmless_metrics: HarmlessMetrics | None = None

    @property
    def refused(self) -> tuple[bool, ...]:
        """Which requests the original declines."""
        return tuple(v == REFUSAL for v in self.verdicts)

    @property
    def evasive(self) -> int:
        """Number of requests that it neither declines nor answers."""
        return self.verdicts.count(EVASIVE)

    @property
    def refusals(self) -> int:
        """Number of requests that the original declines."""
        return sum(self.refused)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are stored; texts as bytes, so that one hash covers all."""
        import torch

        tensors = {
            "log_probs": self.log_probs,
            "refused": torch.tensor([ORDER.index(v) for v in self.verdicts], dtype=torch.uint8),
            "refusal_texts": _padded(self.refusal_texts),
            "response_prefix": _bytes(self.start.prefix),
            "template_variables": _bytes(json.dumps(dict(self.start.variables))),
            "answered": _padded(self.answered),
        }
        if self.harmless_metrics is not None:
            tensors["harmless_metrics"] = torch.tensor(list(self.harmless_metrics.as_dict().values()))
        return tensors

    @classmethod
    def of(cls, tensors: Tensors) -> Baseline | None:
        """From stored tensors; None in a file from before the answers were kept. Raises ValueError."""
        if not {"refusal_texts", "answered"} <= tensors.keys():
            return None
        variables = json.loads(_text(tensors, "template_variables"))
        _require(isinstance(variables, dict), "template_variables is not an object")
        log_probs = _named(tensors, "log_probs", 2)
        places = _named(tensors, "refused", 1, whole=True).tolist()
        texts, answered = (_unpadded(_named(tensors, name, 2, whole=True)) for name in ("refusal_texts", "answered"))
        _require(not bool(log_probs.isnan().any()), "log_probs has numbers that are not numbers")
        _require(all(0 <= place < len(ORDER) for place in places), "declined has an unknown verdict")
        _require(len(texts) == len(places), "refusal_texts has another number of requests than declined")
        _require(sum(map(len, answered)) == len(log_probs), "answered has another number of tokens than log_probs")
        harmless_metrics = (
            _named(tensors, "harmless_metrics", 1, whole=True).tolist() if "harmless_metrics" in tensors else None
        )
        _require(
            harmless_metrics is None or (len(harmless_metrics) == 3 and min(harmless_metrics) >= 0),
            "conduct is not three counts",
        )
        return cls(
            log_probs=log_probs,
            verdicts=tuple(ORDER[place] for place in places),
            refusal_texts=texts,
            start=AnswerStart(_text(tensors, "response_prefix"), variables),
            answered=answered,
            harmless_metrics=HarmlessMetrics(*harmless_metrics) if harmless_metrics else None,
        )


def directions_of(tensors: Tensors) -> Directions:
    """Directions in float32. Raises ValueError."""
    vectors = _finite(tensors, "directions", 2)
    if "extra" not in tensors:
        return Directions(vectors.float())
    extra = _finite(tensors, "extra", 3)
    _require(extra.shape[1] > 0 and extra[:, 0].shape == vectors.shape, "extra has another shape than directions")
    return Directions(vectors.float(), extra.float())


def geometry_of(tensors: Tensors) -> ResidualGeometry:
    """How the residuals lie. Raises ValueError; a separation may be no number."""
    layers, prompts = len(_finite(tensors, "silhouette", 1)), len(_named(tensors, "harmful", 1, whole=True))
    shapes = {
        "cosines": (layers, layers),
        "norms": (layers, 3),
        "points": (layers, prompts, 2),
        "explained": (layers, 2),
    }
    for name, shape in shapes.items():
        _require(_finite(tensors, name, len(shape)).shape == shape, f"{name} has another shape than {list(shape)}")
    separation = _named(tensors, "separation", 1)
    _require(len(separation) == layers > 0 and prompts > 0, "separation has another number of layers")
    names = (*shapes, "silhouette", "separation", "harmful")
    return ResidualGeometry(**{name: tensors[name] for name in names})


class _OptimizerStateJson(TypedDict):
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[misc]

    steps: Count
    first_layer: Count
    points: list[PathPoint]
    extra_refusals: list[tuple[Count, list[Count]]]
    has_new_refusals: bool
    extra_weights: NotRequired[Count]
    prompt_indices: NotRequired[list[Count]]


@functools.cache
def _state_json() -> TypeAdapter[_OptimizerStateJson]:
    return TypeAdapter(_OptimizerStateJson)


def state_of(tensors: Tensors) -> OptimizerState:
    """The state of a descent under way. Raises ValueError."""
    strengths = _finite(tensors, "strengths", 2)
    layers = strengths.shape[1]
    mixture = _finite(tensors, "mixture", 1) if "mixture" in tensors else None
    vector = _finite(tensors, "vector", 1) if "vector" in tensors else None
    _require(mixture is None or len(mixture) == layers, "mixture has another number of layers than strengths")
    stored = _state_json().validate_json(_text(tensors, "state"))
    profiles = [profile for point in stored["points"] for profile in point.strengths.values()]
    _require(alike(stored["points"]) and all(len(p) == layers for p in profiles), "the points differ in shape")
    _require(stored["first_layer"] <= layers, "first_layer is beyond the last layer")
    names = {"strengths", "mixture", "vector", "state"}
    moments = {name: tensor for name, tensor in tensors.items() if name not in names}
    for name, tensor in moments.items():
        of = tensors.get(name.partition(".")[0])
        fits = of is not None and tensor.shape in (of.shape, ()) and tensor.is_floating_point()
        _require(fits and bool(tensor.isfinite().all()), f"{name} is invalid")
    return OptimizerState(
        strengths,
        mixture,
        vector,
        stored["steps"],
        stored["first_layer"],
        stored["points"],
        stored["extra_refusals"],
        stored["has_new_refusals"],
        stored.get("extra_weights", 0),
        stored.get("prompt_indices", []),
        moments,
    )


def state_tensors(state: OptimizerState) -> dict[str, Tensor]:
    """The state of a descent by name, as it is stored."""
    stored = {"steps": state.steps, "first_layer": state.first_layer, "points": [asdict(p) for p in state.points]}
    stored |= {
        "extra_refusals": state.extra_refusals,
        "has_new_refusals": state.has_new_refusals,
        "extra_weights": state.extra_weights,
        "prompt_indices": state.prompt_indices,
    }
    return {**state.tensors, **state.moments, "state": _bytes(json.dumps(stored))}


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _named(tensors: Tensors, name: str, dimensions: int, *, whole: bool = False) -> Tensor:
    """A tensor with so many dimensions, of whole numbers or of floating point."""
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != dimensions or tensor.is_complex() or tensor.is_floating_point() == whole:
        raise ValueError(f"{name} is missing, or has another shape or type")
    return tensor


def _finite(tensors: Tensors, name: str, dimensions: int) -> Tensor:
    tensor = _named(tensors, name, dimensions)
    _require(tensor.numel() > 0 and bool(tensor.isfinite().all()), f"{name} is empty or not finite")
    return tensor


def _bytes(text: str) -> Tensor:
    import torch

    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _text(tensors: Tensors, name: str) -> str:
    return bytes(_named(tensors, name, 1, whole=True).tolist()).decode()


def _padded(texts: Sequence[list[int]]) -> Tensor:
    import torch

    longest = max(map(len, texts))
    return torch.tensor([text + [-1] * (longest - len(text)) for text in texts], dtype=torch.int64)


def _unpadded(tensor: Tensor) -> tuple[list[int], ...]:
    return tuple([t for t in row if t >= 0] for row in tensor.tolist())
