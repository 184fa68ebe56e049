"""Convert the contents of a run's safetensors files to and from tensors.

Each reader raises ValueError for tensors that heretic cannot have written (missing name, wrong shape or type, not finite),
because a hash does not protect against a file with a recomputed hash.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from heretic.ablation.directions import Directions
from heretic.ablation.geometries.conditional import InputMap
from heretic.ablation.operator import Operator
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.model.response_prefix import AnswerStart
from heretic.scoring.direction_effects import DirectionEffects
from heretic.scoring.judges.verdict import EVASIVE, ORDER, REFUSAL, Verdict
from heretic.search.gradient_path import PathPoint, alike
from heretic.search.path_optimizer import OptimizerState

FARTHEST = 1e6  # largest number of an edit, so that float32 stays finite; measured ones are below ten

Tensors = Mapping[str, Tensor]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Baseline:
    """Measurements of the original model."""

    log_probs: Tensor  # [tokens, vocabulary], at the first tokens (`answered`) of its responses to the harmless prompts
    verdicts: tuple[Verdict, ...]  # on its responses to the harmful prompts
    refusal_texts: tuple[list[int], ...]  # first token ids of its refusals; empty for other responses
    start: AnswerStart  # common prefix of its responses
    answered: tuple[list[int], ...]
    harmless_answers: tuple[list[int], ...] = ()  # to the harmless prompts, whole; none in a file of an earlier version

    @property
    def refused(self) -> tuple[bool, ...]:
        """Whether the original refuses, per request."""
        return tuple(v == REFUSAL for v in self.verdicts)

    @property
    def evasive(self) -> int:
        """Number of requests that the original evades."""
        return self.verdicts.count(EVASIVE)

    @property
    def refusals(self) -> int:
        """Number of requests that the original refuses."""
        return sum(self.refused)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store by name; texts are bytes, so that one hash covers everything."""
        import torch

        tensors = {
            "log_probs": self.log_probs,
            "refused": torch.tensor([ORDER.index(v) for v in self.verdicts], dtype=torch.uint8),
            "refusal_texts": _padded(self.refusal_texts),
            "response_prefix": _bytes(self.start.prefix),
            "template_variables": _bytes(json.dumps(dict(self.start.variables))),
            "answered": _padded(self.answered),
        }
        if self.start.date:
            tensors["template_date"] = _bytes(self.start.date)
        if self.start.end_of_turn is not None:
            tensors["end_of_turn"] = torch.tensor([self.start.end_of_turn])
        if self.harmless_answers:
            tensors["harmless_answers"] = _padded(self.harmless_answers)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Baseline | None:
        """Return the baseline of stored tensors; None for a file of an earlier version. Raises ValueError."""
        if not {"refusal_texts", "answered"} <= tensors.keys():
            return None
        variables = json.loads(_text(tensors, "template_variables"))
        _require(isinstance(variables, dict), "template_variables is not an object")
        date = _text(tensors, "template_date") if "template_date" in tensors else ""
        _require(not date or datetime.date.fromisoformat(date) is not None, "template_date is not a date")
        end = _named(tensors, "end_of_turn", 1, integer=True).tolist() if "end_of_turn" in tensors else [None]
        _require(len(end) == 1, "end_of_turn must be one token")
        log_probs = _named(tensors, "log_probs", 2)
        verdict_ids = _named(tensors, "refused", 1, integer=True).tolist()
        texts, answered = (_unpadded(_named(tensors, name, 2, integer=True)) for name in ("refusal_texts", "answered"))
        _require(not bool(log_probs.isnan().any()), "log_probs contains NaN")
        _require(all(0 <= number < len(ORDER) for number in verdict_ids), "refused has an unknown verdict")
        _require(len(texts) == len(verdict_ids), "refusal_texts and refused differ in length")
        _require(sum(map(len, answered)) == len(log_probs), "answered and log_probs differ in length")
        known = "harmless_answers" in tensors
        answers = _unpadded(_named(tensors, "harmless_answers", 2, integer=True)) if known else ()
        _require(not known or len(answers) == len(answered), "harmless_answers and answered differ in length")
        return cls(
            log_probs=log_probs,
            verdicts=tuple(ORDER[number] for number in verdict_ids),
            refusal_texts=texts,
            start=AnswerStart(_text(tensors, "response_prefix"), variables, date, end[0]),
            answered=answered,
            harmless_answers=answers,
        )


def directions_from_tensors(tensors: Tensors) -> Directions:
    """Return stored directions in float32. Raises ValueError."""
    vectors = _finite(tensors, "directions", 2)
    if "extra" not in tensors:
        return Directions(vectors.float())
    extra = _finite(tensors, "extra", 3)
    _require(extra.shape[1] > 0 and extra[:, 0].shape == vectors.shape, "extra and directions differ in shape")
    return Directions(vectors.float(), extra.float())


def input_map_tensors(input_maps: Mapping[str, InputMap]) -> dict[str, Tensor]:
    """Return the tensors to store for the input maps of writers, by name."""
    return {f"{name}.{part}": getattr(own, part) for name, own in input_maps.items() for part in ("outputs", "inputs")}


def input_maps_from_tensors(tensors: Tensors) -> dict[str, InputMap]:
    """Return stored input maps by writer. Raises ValueError."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    found = {n: InputMap(*(_finite(tensors, f"{n}.{part}", 2) for part in ("outputs", "inputs"))) for n in names}
    _require(2 * len(found) == len(tensors), "it has tensors of no input map")
    _require(all(len(own.outputs) == len(own.inputs) for own in found.values()), "outputs and inputs differ in keys")
    return found


def operator_tensors(operators: Mapping[str, Operator]) -> dict[str, Tensor]:
    """Return the tensors to store for operators, by name."""
    return {f"{name}.{part}": tensor for name, own in operators.items() for part, tensor in own.parts.items()}


def operators_from_tensors(tensors: Tensors) -> dict[str, Operator]:
    """Return stored operators by writer. Raises ValueError."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        writer, _, part = name.rpartition(".")
        _require(part in ("u", "w", "n", "a"), f"{name} is no part of an operator")
        _require(bool((tensors[name].abs() <= FARTHEST).all()), f"{name} has numbers above {FARTHEST:g}")
        parts.setdefault(writer, {})[part] = _finite(tensors, name, tensors[name].ndim).float()
    for writer, own in parts.items():
        _require("u" in own and ("w" in own or "a" in own), f"{writer} lacks u, or w and a")
        shape = own["u"].shape
        _require(len(shape) in (1, 2), f"{writer}.u has the wrong shape")
        _require("w" not in own or own["w"].shape == shape, f"{writer}.w and u differ in shape")
        _require("n" not in own or own["n"].shape == shape[-1:], f"{writer}.n and u differ in shape")
        _require("a" not in own or own["a"].shape[:-1] == shape[:-1], f"{writer}.a and u differ in directions")
    return {writer: Operator(own["u"], own.get("w"), own.get("n"), own.get("a")) for writer, own in parts.items()}


def geometry_from_tensors(tensors: Tensors) -> ResidualGeometry:
    """Return a stored residual geometry, in which `separation` can be NaN. Raises ValueError."""
    layers, prompts = len(_finite(tensors, "silhouette", 1)), len(_named(tensors, "harmful", 1, integer=True))
    shapes = {
        "cosines": (layers, layers),
        "norms": (layers, 3),
        "points": (layers, prompts, 2),
        "explained": (layers, 2),
    }
    for name, shape in shapes.items():
        _require(_finite(tensors, name, len(shape)).shape == shape, f"{name} must have the shape {list(shape)}")
    separation = _named(tensors, "separation", 1)
    _require(len(separation) == layers > 0 and prompts > 0, "separation has the wrong number of layers")
    names = (*shapes, "silhouette", "separation", "harmful")
    return ResidualGeometry(**{name: tensors[name] for name in names})


def effects_from_tensors(tensors: Tensors) -> DirectionEffects:
    """Return stored effects of the layers' directions. Raises ValueError."""
    found = DirectionEffects(
        **{name: _finite(tensors, name, 1) for name in ("necessity", "sufficiency", "kl", "original")}
    )
    layers = len(found.kl)
    _require(layers == len(found.necessity) == len(found.sufficiency), "the effects differ in layers")
    _require(len(found.original) == 2, "original must be two probabilities")
    return found


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


def optimizer_state_from_tensors(tensors: Tensors) -> OptimizerState:
    """Return the stored state of a running gradient search. Raises ValueError."""
    strengths = _finite(tensors, "strengths", 2)
    layers = strengths.shape[1]
    vector = _finite(tensors, "vector", 1) if "vector" in tensors else None
    stored = _state_json().validate_json(_text(tensors, "state"))
    profiles = [profile for point in stored["points"] for profile in point.strengths.values()]
    _require(alike(stored["points"]) and all(len(p) == layers for p in profiles), "the points differ in shape")
    _require(stored["first_layer"] <= layers, "first_layer is beyond the last layer")
    others = ("strengths", "vector", "state", "mixture")  # the last one and its moments are of earlier versions
    moments = {n: t for n, t in tensors.items() if n not in others and not n.startswith("mixture.")}
    for name, tensor in moments.items():
        parameter = tensors.get(name.partition(".")[0])
        fits = parameter is not None and tensor.shape in (parameter.shape, ()) and tensor.is_floating_point()
        _require(fits and bool(tensor.isfinite().all()), f"{name} is invalid")
    return OptimizerState(
        strengths,
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


def optimizer_state_tensors(state: OptimizerState) -> dict[str, Tensor]:
    """Return the tensors to store for the state of a gradient search, by name."""
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


def _named(tensors: Tensors, name: str, dimensions: int, *, integer: bool = False) -> Tensor:
    """Return a tensor after checking its dimensions and its kind of numbers (integer or floating point)."""
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != dimensions or tensor.is_complex() or tensor.is_floating_point() == integer:
        raise ValueError(f"{name} is missing or has the wrong shape or type")
    return tensor


def _finite(tensors: Tensors, name: str, dimensions: int) -> Tensor:
    tensor = _named(tensors, name, dimensions)
    _require(tensor.numel() > 0 and bool(tensor.isfinite().all()), f"{name} is empty or not finite")
    return tensor


def _bytes(text: str) -> Tensor:
    import torch

    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _text(tensors: Tensors, name: str) -> str:
    return bytes(_named(tensors, name, 1, integer=True).tolist()).decode()


def _padded(texts: Sequence[list[int]]) -> Tensor:
    import torch

    longest = max(map(len, texts))
    return torch.tensor([text + [-1] * (longest - len(text)) for text in texts], dtype=torch.int64)


def _unpadded(tensor: Tensor) -> tuple[list[int], ...]:
    return tuple([t for t in row if t >= 0] for row in tensor.tolist())
