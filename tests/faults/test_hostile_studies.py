"""Databases that mean harm: any value in any stored attribute, parameter, value or state, for every command that reads a study."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.pipeline.trials import Trials
from heretic.progress import NULL_REPORTER
from heretic.report.report import load_report_input, report
from heretic.runs.status import read_status
from heretic.scoring.scores import Divergence, Scores, TrialOutcome
from heretic.search.gradient_path import GradientPath
from heretic.search.integrity import check_study
from heretic.search.pareto import results, select_trial
from heretic.search.space import SearchSpace
from heretic.search.study import n_complete, run_study
from heretic.settings import Settings
from heretic.settings.sources import resolve
from heretic.storage.attributes import FINGERPRINT, WORKER, refusals_before
from heretic.storage.heartbeat import requeue_stale_trials
from heretic.storage.rdb import fail_abandoned, open_study, translate_storage_errors
from tests.faults.conftest import FULL, Tally
from tests.helpers.command import heretic
from tests.tiny import save_prompts, save_tiny

TIMES = 200 if FULL else 40
pytestmark = pytest.mark.timeout(1800)  # in full, on a busy machine
LONGEST = 30.0  # seconds, of a busy machine, for all commands together
MANY = settings(max_examples=TIMES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COLUMNS = {  # what is stored as JSON, and what as numbers
    "study_user_attributes": "value_json",
    "trial_user_attributes": "value_json",
    "trial_system_attributes": "value_json",
    "trial_params": "distribution_json",
}
NUMBERS = [("trial_params", "param_value"), ("trial_values", "value"), ("trial_values", "value_type"),
           ("trials", "state"), ("trials", "datetime_start"), ("trials", "datetime_complete"), ("study_directions", "direction"),
           ("trials", "number"), ("trial_values", "objective")]  # fmt: skip

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1e308, "inf", "nan", "[" * 2000, "x" * 100_000, 2**31, 10**9]),
)  # fmt: skip
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["mean", "host", "pid", "a"]), inner),
    max_leaves=6,
)


@dataclass(frozen=True)
class Made:
    """A finished run, and its database as it should be."""

    folder: Path
    database: bytes
    facts: dict[str, Any]
    settings: Settings
    space: SearchSpace

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder / 'study.db'}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Six trials by kernels, some of them left early."""
    root = tmp_path_factory.mktemp("hostile")
    sources = save_prompts(root)
    given = {
        "model": str(save_tiny(root / "tiny")), "run_name": "mine", "runs_dir": str(root / "runs"), "n_trials": 6,
        "max_response_length": 4, "batch_size": 8, "device_map": "cpu", "max_kl": 5.0,
        "refusal_markers": ["sorry", "cannot", "bread"], "search": {"start": "kernels", "n_startup_trials": 2},
        "prompts": {role: {"source": str(path)} for role, path in sources.items()},
    }  # fmt: skip
    folder = run(resolve(None, given, environment={}), reporter=NULL_REPORTER, stop=StopSignal()).folder.path
    study = optuna.load_study(study_name="heretic", storage=f"sqlite:///{folder / 'study.db'}")
    facts = json.loads(study.user_attrs[FINGERPRINT])
    own = resolve(None, given, environment={}).settings
    return Made(
        folder, (folder / "study.db").read_bytes(), facts, own, SearchSpace(own.search, 4, ("attention", "mlp"))
    )


@dataclass(frozen=True)
class Constant(Trials):
    """Measures nothing: what is drawn is what counts."""

    def measure(
        self, trials: Sequence[optuna.Trial], beaten: Callable[[float, float], bool]
    ) -> list[TrialOutcome | UserError]:
        """The same for all."""
        for trial in trials:
            self.sample(trial)
        return [Scores(Divergence(0.1, 0.1, 0.1, 0.1), 1, 8, {}) for _ in trials]

    def trials_per_batch(self, before: int | None) -> int:
        """One, or as before."""
        return before or 1


def opened(made: Made) -> optuna.Study:
    study = open_study(made.url, "heretic", made.facts)
    with translate_storage_errors(made.url):
        check_study(study)
    return study


def resume(made: Made) -> None:
    """`heretic run`, and with workers beside it."""
    study = opened(made)
    fail_abandoned(study)
    requeue_stale_trials(study, made.settings.workers)
    wanted = made.settings.model_copy(update={"n_trials": n_complete(study) + 2})
    trials = Constant(None, made.space)  # type: ignore[arg-type]
    run_study(study, wanted, trials, reporter=NULL_REPORTER, stop=StopSignal())


def work_with_trials(made: Made) -> None:
    """`export`, `compare`, `chat`, `benchmark` and the Python API, up to where the model is loaded."""
    study = opened(made)
    refusals_before(study)
    found = results(study)
    select_trial(found, made.settings.select, made.settings.max_kl, made.settings.max_refusals)
    GradientPath.load(study)
    for result in found:
        made.space.from_params(result.params)


READERS: dict[str, Callable[[Made], object]] = {
    "status": lambda made: read_status("mine", str(made.folder.parent), {}).as_dict(),
    "status by storage": lambda made: read_status("heretic", "", {}, storage=made.url).as_dict(),
    "report": lambda made: report(load_report_input("mine", str(made.folder.parent), {}, with_texts=False)),
    "trials": work_with_trials,
    "resume": resume,
}


def damage(made: Made, statement: str, *values: object) -> None:
    """Write the database anew with one change."""
    (made.folder / "study.db").write_bytes(made.database)
    with closing(sqlite3.connect(made.folder / "study.db")) as stored:
        stored.execute(statement, values)
        stored.commit()


def nothing_but_user_errors(made: Made, names: Sequence[str] = tuple(READERS)) -> dict[str, str]:
    """The code of the error of every command that ends in one."""
    codes, began = {}, time.monotonic()
    for name in names:
        try:
            READERS[name](made)
        except UserError as error:
            assert error.code != UserError.code and error.where and len(str(error)) < 3000
            codes[name] = error.code
    assert time.monotonic() - began < LONGEST
    return codes


def some_readers(data: st.DataObject) -> Sequence[str]:
    """One, or all where time does not matter."""
    return tuple(READERS) if FULL else (data.draw(st.sampled_from(sorted(READERS))),)


def changed(value: Any, data: st.DataObject) -> Any:
    """JSON in which one part is something else, or gone."""
    if isinstance(value, str) and value[:1] in ("{", "["):  # text that holds JSON
        return json.dumps(changed(json.loads(value), data))
    if not isinstance(value, (dict, list)) or not value or data.draw(st.integers(0, 3)) == 0:
        return data.draw(anything)
    place = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    kept = value.copy()
    if data.draw(st.integers(0, 3)) == 0:
        del kept[place]
    else:
        kept[place] = changed(value[place], data)
    return kept


@given(data=st.data())
@MANY
def test_any_value_in_any_stored_json_is_refused_or_harmless(made: Made, data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(sorted(COLUMNS)))
    column = COLUMNS[table]
    with closing(sqlite3.connect(":memory:")) as stored:
        stored.deserialize(made.database)
        rows = stored.execute(f"select rowid, {column} from {table}").fetchall()
    if rows:
        row, text = data.draw(st.sampled_from(rows))
        new = json.dumps(changed(json.loads(text), data))
        damage(made, f"update {table} set {column} = ? where rowid = ?", new, row)
        nothing_but_user_errors(made, some_readers(data))


@given(
    where=st.sampled_from(NUMBERS),
    row=st.integers(1, 30),
    value=st.one_of(
        st.floats(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=5),
        st.sampled_from(["WAITING", "RUNNING", "PRUNED", "FAIL"]),
    ),
    data=st.data(),
)  # fmt: skip
@MANY
def test_any_value_in_any_column_is_refused_or_harmless(
    made: Made, where: tuple[str, str], row: int, value: object, data: st.DataObject
) -> None:
    try:
        damage(made, f"update {where[0]} set {where[1]} = ? where rowid = ?", value, row)
    except sqlite3.IntegrityError:  # SQLite itself refuses it
        return
    nothing_but_user_errors(made, some_readers(data))


SCORES = (
    "update trial_user_attributes set value_json = json_remove(value_json, '$.divergence') "
    "where key = 'heretic:scores' and trial_id = 1"
)
DAMAGED_FINGERPRINT = "update study_user_attributes set value_json = '\"[1]\"' where key = 'heretic:fingerprint'"
COUNT = "update study_user_attributes set value_json = '\"zzz\"' where key = 'heretic:refusals_before'"
PARAMETER = "update trial_params set param_name = 'of another program' where param_name = 'mlp.max_weight'"
DIRECTION = "update study_directions set direction = 'MAXIMIZE'"


@pytest.mark.parametrize("statement", [DAMAGED_FINGERPRINT, COUNT, DIRECTION])
def test_damage_to_the_study_itself_is_refused_by_every_command(made: Made, statement: str) -> None:
    damage(made, statement)
    codes = nothing_but_user_errors(made)
    assert set(codes) == set(READERS) and set(codes.values()) == {"damaged-study"}


def test_a_damaged_trial_is_left_out_of_status_and_report_and_refused_elsewhere(made: Made) -> None:
    damage(made, SCORES)
    assert nothing_but_user_errors(made) == {"trials": "damaged-study", "resume": "damaged-study"}
    seen = read_status("mine", str(made.folder.parent), {})
    whole = 6 - seen.summary.n_pruned - 1
    assert [r.number for r in seen.summary.results].count(0) == 0 and len(seen.summary.results) == whole
    assert sum("trial 0" in warning for warning in seen.warnings) == 1
    assert "trial 0" in report(load_report_input("mine", str(made.folder.parent), {}, with_texts=False))
    with pytest.raises(UserError) as refused:
        opened(made)
    assert refused.value.where == f"{made.url} trial 0"


def test_parameters_of_another_program_are_refused_where_a_trial_is_used(made: Made) -> None:
    damage(made, PARAMETER)
    assert nothing_but_user_errors(made).get("trials") == "damaged-study"


def test_a_worker_that_is_garbage_counts_as_gone(made: Made) -> None:
    (made.folder / "study.db").write_bytes(made.database)
    study = opened(made)
    for garbage in (
        3,
        "x",
        [],
        {"host": 1},
        {"host": "a", "pid": 2**70, "began": 0},
        {"host": "a", "pid": 1, "began": "b"},
    ):
        study.ask().set_user_attr(WORKER, garbage)
    assert read_status("mine", str(made.folder.parent), {}).state == "complete"
    check_study(study)
    assert len(fail_abandoned(study)) == 6


def test_the_commands_name_the_damaged_trial(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(made, SCORES)
    folder = str(made.folder)
    commands = (
        ["run", folder, "--trials", "8"], ["export", folder, "-o", "out"], ["chat", folder],
        ["compare", folder, "--trials", "1", "--prompts", "tell me"], ["benchmark", folder, "--tasks", "arc_easy"],
    )  # fmt: skip
    for command in commands:
        ran = heretic(capsys, monkeypatch, *command)
        assert ran.status == 1 and "[damaged-study]" in ran.err and "study.db trial 0" in ran.err, command
    assert heretic(capsys, monkeypatch, "status", folder).status == 0
    assert heretic(capsys, monkeypatch, "report", folder).status == 0
    assert heretic(capsys, monkeypatch, "directions", folder, "-o", "d.safetensors").status == 0


def test_counted(tally: Tally) -> None:
    tally("any value in any stored attribute, parameter, value or state of a study, for each kind of command", 2 * TIMES,
          "nothing: refused, or unimportant")  # fmt: skip
