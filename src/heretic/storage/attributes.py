"""User attributes of studies and trials: their names, and a validating reader for each.

A reader returns None if the attribute is not stored. It raises a UserError with the code `damaged-study` for a value that
heretic cannot have written: wrong type, missing field, number that is not finite.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any, TypeVar

import optuna
from optuna.trial import FrozenTrial
from pydantic import Field, Json, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from heretic.errors import StudyMismatch, UserError, plain_line
from heretic.scoring.objectives import DEFAULT_OBJECTIVES, NAME, Objective
from heretic.scoring.scores import Divergence, PrunedTrial, RefusalProxy, Scores, scores_adapter
from heretic.settings import Settings
from heretic.storage.url import masked

FORMAT = 5  # increased when a change of heretic makes old studies incomparable or unreadable

# Of the study.
FINGERPRINT = "heretic:fingerprint"  # everything that its results depend on
REFUSALS_BEFORE = "heretic:refusals_before"  # requests that the original refuses
SETTINGS = "heretic:settings"  # for readers without the run folder
EXPORTED = "heretic:exported "  # + kind; by whom and where to
OBJECTIVES = "heretic:objectives"  # missing in a study of KL and refusals
VALUES_BEFORE = "heretic:values_before"  # numbers of scorers on the original, by name
GRADIENT_PATH = "heretic:gradient_path"  # result of the gradient search
CONVERGENCE = "heretic:convergence"  # when and by which settings it converged
REQUESTED_TRIALS = "heretic:requested_trials"  # finished trials that the user asked for explicitly
METADATA = "heretic:metadata"  # model and machine, for the report
TRIALS_PER_BATCH = "heretic:trials_per_batch"  # trials measured in one batch
CLAIM = "heretic:claim "  # + name; the worker that computes it
RESULT = "heretic:result "  # + file name; its hash and artifact

# Of a trial.
SCORES = "heretic:scores"  # of a full measurement
PRUNED = "heretic:pruned"  # measurements until it was pruned
KL_PER_PROMPT = "heretic:kl_per_prompt"  # only of a trial on the Pareto front when it finished
WORKER = "heretic:worker"  # the worker that measures it
START = "heretic:initial"  # its index among the initial trials
REEVALUATES = "heretic:reevaluates"  # the pruned trial that it measures in full
RETRY = "heretic:retry_of"  # the trial that it repeats after its worker died
RETRIES = "heretic:retries"  # how often workers died with these parameters
ERROR = "heretic:error"  # why it failed

FIXED = "fixed_params"  # Optuna's system attribute: parameters of an enqueued trial

MAX_LAYERS = 100_000
MAX_REQUESTS = 10_000_000  # protects tables and figures from damaged numbers
SMALLEST_KL = -0.01  # negative by rounding only
SHOWN = 200  # characters of a problem in a message

T = TypeVar("T")
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_REQUESTS)]
Number = Annotated[int, Field(strict=True, ge=0, lt=2**63)]  # of a trial
Finite = Annotated[float, Field(allow_inf_nan=False)]
Parameters = dict[str, Finite | str]


class Signature(TypedDict):
    """The worker of a trial (see `rdb.worker`), and its memory usage by device."""

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    began: Finite
    machine: NotRequired[str]
    memory: NotRequired[dict[str, str]]


class Claim(TypedDict):
    """The worker that computes something for all, with a count of its heartbeats."""

    worker: Signature
    signs: int


class ComputedResult(TypedDict):
    """A file that one worker computed for all."""

    sha256: str
    artifact: str
    worker: str


_FACTS = TypeAdapter[dict[str, Any]](Json[dict[str, Any]])
_SETTINGS = TypeAdapter[Settings](Json[Settings])
_COUNT = TypeAdapter[int](Count)
_NUMBER = TypeAdapter[int](Number)
_TEXT = TypeAdapter[str](Annotated[str, Field(strict=True)])
_BATCH_SIZE = TypeAdapter[int](Annotated[int, Field(strict=True, ge=1, le=4096)])
_CLAIM = TypeAdapter[Claim](Json[Claim])
_COMPUTED_RESULT = TypeAdapter[ComputedResult](Json[ComputedResult])
_SIGNATURE = TypeAdapter[Signature](Signature)
_PER_PROMPT = TypeAdapter[list[float]](list[Finite])
_FIXED = TypeAdapter[dict[str, Any]](Parameters)
_OBJECTIVE_VALUES = TypeAdapter[list[float]](Annotated[list[Finite], Field(min_length=2)])
_OBJECTIVES = TypeAdapter[tuple[Objective, ...]](Json[Annotated[tuple[Objective, ...], Field(min_length=2)]])
_VALUES = TypeAdapter[dict[str, float]](Json[dict[str, float]])


def place(study: optuna.Study, trial: FrozenTrial | None = None) -> str:
    """Format the storage (password masked) and the trial, for `where` of an error."""
    storage: Any = study._storage
    url = getattr(getattr(storage, "_backend", storage), "url", "")
    named = masked(str(url)) if url else f"study '{study.study_name}'"
    return named if trial is None else f"{named} trial {trial.number}"


def damaged(study: optuna.Study, what: str, trial: FrozenTrial | None = None) -> UserError:
    """Create the error for a damaged study; `what` ends without a period."""
    return UserError(
        f"The study is damaged: {plain_line(what)[:SHOWN]}.",
        code="damaged-study",
        where=place(study, trial),
        fix="restore a copy of the study, or start over with --fresh (heretic keeps the old run)",
    )


def read(study: optuna.Study, name: str, adapter: TypeAdapter[T], trial: FrozenTrial | None = None) -> T | None:
    """Read an attribute of the study or of a trial; None if it is not stored. Raises UserError."""
    stored = (study if trial is None else trial).user_attrs.get(name)
    return None if stored is None else _valid(study, name, adapter, stored, trial)


def _valid(study: optuna.Study, name: str, adapter: TypeAdapter[T], stored: Any, trial: FrozenTrial | None) -> T:
    try:
        return adapter.validate_python(stored)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        part = "".join(f".{key}" for key in first["loc"])
        raise damaged(study, f"'{name}{part}' is invalid ({first['msg']})", trial) from None
    except RecursionError:
        raise damaged(study, f"'{name}' is nested too deeply", trial) from None


def fingerprint(study: optuna.Study) -> dict[str, Any] | None:
    """Read everything that the study's results depend on."""
    return read(study, FINGERPRINT, _FACTS)


def require_format(study: optuna.Study, wanted: object = FORMAT) -> None:
    """Raise StudyMismatch if the study's fingerprint has another format than `wanted`."""
    stored = (fingerprint(study) or {}).get("format", wanted)
    if stored != wanted:
        raise StudyMismatch(
            f"The study '{study.study_name}' was made by another version of heretic: it has format {stored}, this version "
            f"makes {wanted}.",
            where=place(study),
            fix="use that version, choose another run_name, or start over with --fresh (heretic keeps the old run)",
        )


def settings_of(study: optuna.Study) -> Settings | None:
    """Read the settings of the study's last session; None in studies of versions that did not store them."""
    return read(study, SETTINGS, _SETTINGS)


def refusals_before(study: optuna.Study) -> int | None:
    """Read how many requests the original refuses."""
    return read(study, REFUSALS_BEFORE, _COUNT)


def objectives(study: optuna.Study) -> tuple[Objective, ...]:
    """Read what the study optimizes."""
    found = read(study, OBJECTIVES, _OBJECTIVES) or DEFAULT_OBJECTIVES
    if not all(NAME.fullmatch(objective.name) for objective in found):
        raise damaged(study, f"'{OBJECTIVES}' has an invalid name")
    return found


def values_before(study: optuna.Study) -> dict[str, float]:
    """Read the numbers of the scorers on the original; empty if the search uses none."""
    return read(study, VALUES_BEFORE, _VALUES) or {}


def trials_per_batch(study: optuna.Study) -> int | None:
    """Read how many trials are measured in one batch."""
    return read(study, TRIALS_PER_BATCH, _BATCH_SIZE)


def requested_trials(study: optuna.Study) -> int | None:
    """Read how many finished trials the user asked for explicitly, as by `--trials +50`."""
    return read(study, REQUESTED_TRIALS, _NUMBER)


def exported(study: optuna.Study, kind: str) -> str | None:
    """Read by whom and where to `kind` (a trial and format) was exported."""
    return read(study, EXPORTED + kind, _TEXT)


def claim(study: optuna.Study, name: str) -> Claim | None:
    """Read which worker computes this name; None if none does."""
    return read(study, CLAIM + name, _CLAIM)


def computed_result(study: optuna.Study, name: str) -> ComputedResult | None:
    """Read the hash and artifact of a computed file."""
    return read(study, RESULT + name, _COMPUTED_RESULT)


@functools.cache
def _pruned_adapter() -> TypeAdapter[PrunedTrial]:
    return TypeAdapter(PrunedTrial)


def scores(study: optuna.Study, trial: FrozenTrial) -> Scores | None:
    """Read the scores of a fully measured trial."""
    stored = read(study, SCORES, scores_adapter(), trial)
    if stored is not None and (problem := _problem(stored)):
        raise damaged(study, f"'{SCORES}' is invalid ({problem})", trial)
    return stored


def pruned(study: optuna.Study, trial: FrozenTrial) -> PrunedTrial | None:
    """Read the measurements of a pruned trial."""
    stored = read(study, PRUNED, _pruned_adapter(), trial)
    if stored is not None and (problem := _problem(stored)):
        raise damaged(study, f"'{PRUNED}' is invalid ({problem})", trial)
    return stored


def _problem(stored: Scores | PrunedTrial) -> str:
    """Return why these numbers cannot be measurements; empty if they can."""
    counts: tuple[int, ...] = (stored.refusals, stored.evasive) if isinstance(stored, Scores) else (stored.at_least,)
    if not 0 < stored.total <= MAX_REQUESTS:
        return "total"
    if any(n < 0 for n in counts) or sum(counts) > stored.total:
        return f"counts {counts} of {stored.total}"
    if not _measurable(stored.divergence):
        return "divergence"
    sums = list(stored.seconds.values())  # other numbers may be NaN for a destroyed model
    if isinstance(stored, Scores):
        if stored.refused and (len(stored.refused) != stored.total or set(stored.refused) - set("012")):
            return "refused"
        sums += stored.excess.values()
        if any(map(math.isnan, stored.values.values())) or not all(map(NAME.fullmatch, stored.values)):
            return "values"
    if not all(map(math.isfinite, sums)):
        return "a number is not finite"
    return "refusal_proxy" if stored.refusal_proxy and not _possible(stored.refusal_proxy) else ""


def _measurable(divergence: Divergence) -> bool:
    """Return whether the numbers are possible; infinity is, for a destroyed model."""
    return all(n >= SMALLEST_KL for n in (divergence.mean, divergence.median, divergence.p95, divergence.max))


def _possible(proxy: RefusalProxy) -> bool:
    likely = not (proxy.probability < 0 or proxy.probability > 1.01)
    return likely and 0 <= proxy.matching <= proxy.refused <= MAX_REQUESTS


def objective_values(study: optuna.Study, trial: FrozenTrial) -> list[float]:
    """Read the objective values of a finished trial, all minimized: (KL, expected refusals), or those of `objectives`."""
    values = _valid(study, "values", _OBJECTIVE_VALUES, trial.values, trial)
    if len(values) != len(study.directions):
        raise damaged(study, f"it has {len(values)} values for {len(study.directions)} objectives", trial)
    return values


def kl_per_prompt(study: optuna.Study, trial: FrozenTrial) -> list[float] | None:
    """Read the KL of every prompt, for the figures."""
    return read(study, KL_PER_PROMPT, _PER_PROMPT, trial)


def reevaluates(study: optuna.Study, trial: FrozenTrial) -> int | None:
    """Read the number of the pruned trial that this one measures in full."""
    return read(study, REEVALUATES, _NUMBER, trial)


def start(study: optuna.Study, trial: FrozenTrial) -> int | None:
    """Read the trial's index among the initial trials."""
    return read(study, START, _NUMBER, trial)


def retry(study: optuna.Study, trial: FrozenTrial) -> int | None:
    """Read the number of the trial that this one repeats."""
    return read(study, RETRY, _NUMBER, trial)


def retries(study: optuna.Study, trial: FrozenTrial) -> int:
    """Read how often workers died with the trial's parameters."""
    return read(study, RETRIES, _COUNT, trial) or 0


def failed_on_its_own(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Return whether the trial itself failed, rather than its worker."""
    return read(study, ERROR, _TEXT, trial) is not None


def fixed_params(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """Read the parameters with which a trial was enqueued."""
    return _valid(study, FIXED, _FIXED, trial.system_attrs.get(FIXED, {}), trial)


def signature(trial: FrozenTrial) -> Signature | None:
    """Read which worker measures the trial; None if the signature is missing or invalid."""
    try:
        return _SIGNATURE.validate_python(trial.user_attrs.get(WORKER))
    except (ValidationError, RecursionError):
        return None
