"""What a run reads before it plans memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from heretic.interrupt import StopSignal
from heretic.pipeline.prepare import check_storage, read_inputs
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.settings import PromptSettings, Settings
from heretic.settings.sources import resolve
from heretic.storage.attributes import METADATA
from heretic.storage.url import storage_url
from tests.helpers.errors import raises
from tests.tiny import save_prompts, save_tiny


def test_all_that_cannot_be_read_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings.model_validate(
        {
            "model": str(tmp_path / "missing"),
            "prompts": {"harmful_train": {"source": str(tmp_path / "missing.txt")}},
            "storage": f"sqlite:///{tmp_path}/file/study.db",
            "objectives": ["kl", "no_such_scorer"],
        }
    )
    inputs = read_inputs(settings)
    failures = {f.subject: f.code for f in inputs.findings if f.level == "failure"}
    assert set(failures) == {"model", "prompts", "storage", "scorers"} and all(failures.values())
    assert inputs.checkpoint is None and inputs.prompts is None


def test_the_workload_has_the_real_numbers_of_prompts_and_tokens(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    prompts = {role: {"source": str(path)} for role, path in save_prompts(tmp_path / "prompts").items()}
    settings = Settings.model_validate({"model": str(tmp_path / "model"), "prompts": prompts})
    inputs = read_inputs(settings)
    assert inputs.prompts is not None and inputs.checkpoint is not None
    assert inputs.work.requests == len(inputs.prompts.harmful_eval)
    assert not [f for f in inputs.findings if f.level == "failure"]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"language": "en"}, 'language = "fr"'),
        ({"language": "de"}, 'language = "fr"'),
        ({"language": "fr"}, None),
        ({"refusal_markers": ["désolé"]}, None),
    ],
)
def test_prompts_in_another_language_than_the_setting_are_noticed(changes: dict[str, Any], hint: str | None) -> None:
    prompts = {role: {"source": f"bundled:fr/{role}"} for role in PromptSettings.model_fields}
    inputs = read_inputs(Settings.model_validate({"prompts": prompts, **changes}))
    assert next((f.fix for f in inputs.findings if f.subject == "language"), None) == hint


def test_a_run_that_used_a_gpu_does_not_go_on_without_one_unnoticed(config: Path) -> None:
    def ran(**changes: Any) -> Outcome:
        options = {"run_name": "mine", "device_map": "planned", **changes}
        return run(resolve(config, options), reporter=NULL_REPORTER, stop=StopSignal())

    study = optuna.load_study(study_name="heretic", storage=storage_url("", ran(n_trials=1).folder.path))
    stored = json.loads(study.user_attrs[METADATA])
    stored["environment"]["GPU"] = "NVIDIA H100 (cuda:0), 70 GiB free"
    study.set_user_attr(METADATA, json.dumps(stored))
    with raises("gpu-lost"):
        ran(n_trials=2)
    assert len(ran(n_trials=2, device_map="cpu").results) == 2
    assert len(ran(n_trials=3).results) == 3, "the session before was on the CPU"


@pytest.mark.parametrize("storage", ["sqlite", "postgresql", "/runs/study.db"])
def test_a_storage_that_is_no_url_is_found_before_the_run(storage: str) -> None:
    with raises("unsupported-storage"):
        check_storage(Settings(storage=storage))
