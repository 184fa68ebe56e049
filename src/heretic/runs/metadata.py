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
from heretic.runs.environment import examine
from heretic.storage import attributes
from heretic.storage.attributes import ABOUT, MOST_LAYERS


@dataclass(frozen=True)
class About:
    """The model's number of layers and components; a 1 for every request that the original declines; versions and devices of
    the last session."""

    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    components: tuple[str, ...]
    declined: Annotated[str, Field(pattern="^[01]*$")]
    environment: dict[str, str]

    @classmethod
    def measured(cls, model: LanguageModel, declined: Sequence[bool]) -> About:
        """Of a loaded model and this machine; `declined` for every request."""
        bits = "".join("1" if d else "0" for d in declined)
        return cls(model.anatomy.num_layers, tuple(model.anatomy.components), bits, _environment(model.dtype))

    def keep(self, study: optuna.Study) -> None:
        """Store it with the study."""
        study.set_user_attr(ABOUT, json.dumps(asdict(self)))

    @classmethod
    def of(cls, study: optuna.Study) -> About | None:
        """The study's; None in one that was made before this was stored. Raises UserError for a damaged one."""
        return attributes.read(study, ABOUT, _adapter())


@functools.cache
def _adapter() -> TypeAdapter[About]:
    return TypeAdapter(Json[About])


def _environment(dtype: str) -> dict[str, str]:
    seen: dict[str, Any] = examine(None, "")
    devices = {
        "number format": dtype,
        "cores": str(seen["cpu_cores"]),
        "RAM": seen["ram"],
        "GPU": ", ".join(seen["gpus"]),
    }
    return {**seen["versions"], **devices, **seen["environment"]}
