"""Store facts on model and machine with the study, for reports without either."""

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
    """Facts on the model and the machine of a study."""

    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    components: tuple[str, ...]
    refused: Annotated[str, Field(pattern="^[01]*$")]  # per request, 1 if the original refuses it
    environment: dict[str, str]  # versions and devices of the last session

    @classmethod
    def from_model(cls, model: LanguageModel, refused: Sequence[bool]) -> RunMetadata:
        """Collect the metadata of a loaded model and this machine; `refused` has an entry per request."""
        bits = "".join("1" if is_refusal else "0" for is_refusal in refused)
        return cls(model.structure.num_layers, tuple(model.structure.components), bits, _environment(model.dtype))

    def save(self, study: optuna.Study) -> None:
        """Store the metadata with the study."""
        study.set_user_attr(METADATA, json.dumps(asdict(self)))

    @classmethod
    def load(cls, study: optuna.Study) -> RunMetadata | None:
        """Load the study's metadata; None if it has none. Raises UserError for damaged metadata."""
        return attributes.read(study, METADATA, _adapter())


@functools.cache
def _adapter() -> TypeAdapter[RunMetadata]:
    return TypeAdapter(Json[RunMetadata])


def _environment(dtype: str) -> dict[str, str]:
    facts: dict[str, Any] = collect(None, "")
    devices = {
        "number format": dtype,
        "cores": str(facts["cpu_cores"]),
        "RAM": facts["ram"],
        "GPU": ", ".join(facts["gpus"]),
    }
    return {**facts["versions"], **devices, **facts["environment"]}
