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
from heretic.scoring.harmless_metrics import Conduct
from heretic.scoring.judges.verdict import EVASIVE, ORDER, REFUSAL, Verdict
from heretic.search.gradient_path import Point, alike
from heretic.search.path_optimizer import State

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
    conduct: Conduct | None = None

    @property
    def declined(self) -> tuple[bool, ...]:
        """Which requests the original declines."""
        return tuple(v == REFUSAL for v in self.verdicts)

    @property
    def evasive(self) -> int:
        """Number of requests that it neither declines nor answers."""
        return self.verdicts.count(EVASIVE)

    @property
    def refusals(self) -> int:
        """Number of requests that the original declines."""
        return sum(self.declined)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are stored; texts as bytes, so that one hash covers all."""
        import torch

        tensors = {
            "log_probs": self.log_probs,
            "declined": torch.tensor([ORDER.index(v) for v in self.verdicts], dtype=torch.uint8),
            "refusal_texts": _padded(self.refusal_texts),
            "response_prefix": _bytes(self.start.prefix),
            "template_variables": _bytes(json.dumps(dict(self.start.variables))),
            "answered": _padded(self.answered),
        }
        if self.conduct is not None:
            tensors["conduct"] = torch.tensor(list(self.conduct.as_dict().values()))
        return tensors

    @classmethod
    def of(cls, tensors: Tensors) -> Baseline | None:
        """From stored tensors; None in a file from before the answers were kept. Raises ValueError."""
        if not {"refusal_texts", "answered"} <= tensors.keys():
            return None
        variables = json.loads(_text(tensors, "template_variables"))
        _require(isinstance(variables, dict), "template_variables is not an object")
        log_probs = _named(tensors, "log_probs", 2)
        places = _named(tensors, "declined", 1, whole=True).tolist()
        texts, answered = (_unpadded(_named(tensors, name, 2, whole=True)) for name in ("refusal_texts", "answered"))
        _require(not bool(log_probs.isnan().any()), "log_probs has numbers that are not numbers")
        _require(all(0 <= place < len(ORDER) for place in places), "declined has an unknown verdict")
        _require(len(texts) == len(places), "refusal_texts has another number of requests than declined")
        _require(sum(map(len, answered)) == len(log_probs), "answered has another number of tokens than log_probs")
        conduct = _named(tensors, "conduct", 1, whole=True).tolist() if "conduct" in tensors else None
        _require(conduct is None or (len(conduct) == 3 and min(conduct) >= 0), "conduct is not three counts")
        return cls(
            log_probs=log_probs,
            verdicts=tuple(ORDER[place] for place in places),
            refusal_texts=texts,
            start=AnswerStart(_text(tensors, "response_prefix"), variables),
            answered=answered,
            conduct=Conduct(*conduct) if conduct else None,
        )


def directions_of(tensors: Tensors) -> Directions:
    """Directions in float32. Raises ValueError."""
    vectors = _finite(tensors, "directions", 2)
    if "further" not in tensors:
        return Directions(vectors.float())
    further = _finite(tensors, "further", 3)
    _require(further.shape[1] > 0 and further[:, 0].shape == vectors.shape, "further has another shape than directions")
    return Directions(vectors.float(), further.float())


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


class _Told(TypedDict):
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[misc]

    steps: Count
    first_layer: Count
    points: list[Point]
    heard: list[tuple[Count, list[Count]]]
    just_heard: bool
    further: NotRequired[Count]
    places: NotRequired[list[Count]]


@functools.cache
def _told() -> TypeAdapter[_Told]:
    return TypeAdapter(_Told)


def state_of(tensors: Tensors) -> State:
    """The state of a descent under way. Raises ValueError."""
    strengths = _finite(tensors, "strengths", 2)
    layers = strengths.shape[1]
    mixture = _finite(tensors, "mixture", 1) if "mixture" in tensors else None
    vector = _finite(tensors, "vector", 1) if "vector" in tensors else None
    _require(mixture is None or len(mixture) == layers, "mixture has another number of layers than strengths")
    told = _told().validate_json(_text(tensors, "told"))
    profiles = [profile for point in told["points"] for profile in point.strengths.values()]
    _require(alike(told["points"]) and all(len(p) == layers for p in profiles), "the points differ in shape")
    _require(told["first_layer"] <= layers, "first_layer is beyond the last layer")
    names = {"strengths", "mixture", "vector", "told"}
    moments = {name: tensor for name, tensor in tensors.items() if name not in names}
    for name, tensor in moments.items():
        of = tensors.get(name.partition(".")[0])
        fits = of is not None and tensor.shape in (of.shape, ()) and tensor.is_floating_point()
        _require(fits and bool(tensor.isfinite().all()), f"{name} is invalid")
    return State(
        strengths,
        mixture,
        vector,
        told["steps"],
        told["first_layer"],
        told["points"],
        told["heard"],
        told["just_heard"],
        told.get("further", 0),
        told.get("places", []),
        moments,
    )


def state_tensors(state: State) -> dict[str, Tensor]:
    """The state of a descent by name, as it is stored."""
    told = {"steps": state.steps, "first_layer": state.first_layer, "points": [asdict(p) for p in state.points]}
    told |= {"heard": state.heard, "just_heard": state.just_heard, "further": state.further, "places": state.places}
    return {**state.tensors, **state.moments, "told": _bytes(json.dumps(told))}


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
