"""What a report says of the model and of the machine, stored with the study for those who have neither at hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import optuna
from pydantic import Field, Json, TypeAdapter

from heretic.model.loading import LanguageModel
from heretic.runs.environment import collect
from heretic.storage import attributes
from heretic.storage.attributes import MAX_LAYERS, METADATA


@dataclass(frozen=True)
class RunMetadata:
    """The model's number of layers and components; a 1 for every request that the original declines; versions and devices of
    the last session."""

    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    components: tuple[str, ...]
    refused: Annotated[str, Field(pattern="^[01]*$")]
    environment: dict[str, str]

    @classmethod
    def from_model(cls, model: LanguageModel, refused: Sequence[bool]) -> RunMetadata:
        """Of a loaded model and this machine; `declined` for every request."""
        bits = "".join("1" if d else "0" for d in refused)
        return cls(model.structure.num_layers, tuple(model.structure.components), bits, _environment(model.dtype))

    def save(self, study: optuna.Study) -> None:
        """Store it with the study."""
        study.set_user_attr(METADATA, json.dumps(asdict(self)))

    @classmethod
    def load(cls, study: optuna.Study) -> RunMetadata | None:
        """The study's; None in one that was made before this was stored. Raises UserError for a damaged one."""
        return attributes.read(study, METADATA, _adapter())


@functools.cache
def _adapter() -> TypeAdapter[RunMetadata]:
    return TypeAdapter(Json[RunMetadata])


def _environment(dtype: str) -> dict[str, str]:
    seen: dict[str, Any] = collect(None, "")
    devices = {
        "number format": dtype,
        "cores": str(seen["cpu_cores"]),
        "RAM": seen["ram"],
        "GPU": ", ".join(seen["gpus"]),
    }
    return {**seen["versions"], **devices, **seen["environment"]}
