"""Store facts on model and machine with the study, for reports without either."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import optuna
from pydantic import Field, Json, TypeAdapter

from heretic.errors import UserError, plain_line
from heretic.model.loading import LanguageModel
from heretic.progress import ProgressReporter
from heretic.runs.environment import collect
from heretic.storage import attributes
from heretic.storage.attributes import MAX_LAYERS, METADATA
from heretic.storage.fingerprint_diff import RELEVANT, relevant_versions

ON_DEVICE = re.compile(r"\([a-z]+:\d+\)")  # after the names of usable GPUs
MOST_SHOWN = 40  # characters of a version


@dataclass(frozen=True)
class RunMetadata:
    """Facts on the model and the machine of a study."""

    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    components: tuple[str, ...]
    refused: Annotated[str, Field(pattern="^[01]*$")]  # per request, 1 if the original refuses it
    environment: dict[str, str]  # versions and devices of the last session
    earlier_versions: tuple[dict[str, str], ...] = ()  # of earlier sessions, each as the property `versions`

    @classmethod
    def from_model(cls, model: LanguageModel, refused: Sequence[bool]) -> RunMetadata:
        """Collect the metadata of a loaded model and this machine; `refused` has an entry per request."""
        bits = "".join("1" if is_refusal else "0" for is_refusal in refused)
        return cls(model.structure.num_layers, tuple(model.structure.components), bits, _environment(model.dtype))

    def save(self, study: optuna.Study) -> None:
        """Store the metadata with the study; the versions of its earlier sessions are kept."""
        before = _stored(study)
        earlier = (*before.earlier_versions, before.versions) if before else ()
        kept = tuple(one for one in earlier if one != self.versions)
        study.set_user_attr(METADATA, json.dumps(asdict(replace(self, earlier_versions=kept))))

    @property
    def versions(self) -> dict[str, str]:
        """The full versions of heretic, torch and transformers of the last session."""
        return {name: self.environment[name] for name in RELEVANT if name in self.environment}

    @property
    def gpu(self) -> str:
        """The GPUs that PyTorch could use in the last session; empty for none."""
        found = self.environment.get("GPU", "")
        return found if ON_DEVICE.search(found) else ""

    @property
    def facts(self) -> dict[str, str]:
        """Environment and earlier versions, for the report."""
        earlier = "; ".join(_text(one) for one in self.earlier_versions)
        return {**self.environment, **({"earlier sessions": earlier} if earlier else {})}

    @classmethod
    def load(cls, study: optuna.Study) -> RunMetadata | None:
        """Load the study's metadata; None if it has none. Raises UserError for damaged metadata."""
        return attributes.read(study, METADATA, _adapter())


def warn_of_other_versions(study: optuna.Study, reporter: ProgressReporter) -> None:
    """Warn if the last session of a study had other versions that can change measurements."""
    if (stored := _stored(study)) is None:
        return
    before, now = relevant_versions(stored.environment), relevant_versions()
    changed = {name: value for name, value in before.items() if value != now[name]}
    if changed:
        reporter.warning(
            f"The trials before were measured with {_text(changed)}, those of this session are with "
            f"{_text({name: now[name] for name in changed})}: scores may differ slightly. To avoid that, install the earlier "
            "versions, or start a new run (--fresh)."
        )


def _text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {plain_line(value)[:MOST_SHOWN]}" for name, value in versions.items())


def _stored(study: optuna.Study) -> RunMetadata | None:
    """Load the study's metadata; None also if they are damaged: a run writes them anew."""
    try:
        return RunMetadata.load(study)
    except UserError:
        return None


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
