"""A config.toml of heretic-llm becomes one of ours that loads and means the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.errors import SettingsError
from heretic.settings.migrate import PROMPT_KEYS, PROMPT_SETS, TABLE, from_heretic
from heretic.settings.sources import all_keys, resolve
from tests.helpers.errors import raises

THEIRS = """
model = "some/model"
n_trials = 50
n_startup_trials = 20
row_normalization = "pre"
orthogonalize_direction = false
kl_divergence_target = 0.03
max_batch_size = 64
max_memory = { "0" = "20GB" }
unknown_to_everyone = 3
[bad_prompts]
dataset = "own.txt"
split = "train[:10]"
residual_plot_color = "red"
"""


def test_what_is_named_is_taken_over_and_the_rest_is_said() -> None:
    Path("theirs.toml").write_text(THEIRS)
    text = from_heretic(Path("theirs.toml"))
    Path("ours.toml").write_text(text)
    settings = resolve(Path("ours.toml")).settings
    assert settings.model == "some/model" and settings.n_trials == 50
    assert settings.search.n_startup_trials == 20 and settings.search.kl_floor == 0.03
    assert settings.ablation.geometry == "row_normalized" and not settings.directions.project_harmless
    assert settings.prompts.harmful_train.source == "own.txt" and settings.max_memory == {"0": "20GB"}
    assert settings.system_prompt == "You are a helpful assistant."  # what it sends without being told
    for name in ("max_batch_size", "unknown_to_everyone", "bad_prompts.residual_plot_color"):
        assert f"# {name}: " in text


def test_a_value_that_is_no_good_is_said() -> None:
    Path("theirs.toml").write_text('row_normalization = "sideways"\n')
    with raises("invalid-setting", SettingsError) as refused:
        from_heretic(Path("theirs.toml"))
    assert "sideways" in refused.value.what


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bad_prompts = 3", "'bad_prompts'"), ("[[bad_prompts]]\nx = 1", "'bad_prompts'"),
        ("n_trials = 1979-05-27", "'n_trials'"), ("[model]\na = 1", "'model'"), ("row_normalization = []", "geometry"),
    ],
)  # fmt: skip
def test_kinds_of_values_that_nobody_would_write(text: str, wanted: str) -> None:
    Path("theirs.toml").write_text(text)
    with raises("invalid-setting", SettingsError) as refused:
        from_heretic(Path("theirs.toml"))
    assert wanted in refused.value.what


def test_beside_a_file_of_their_name_and_with_names_that_would_be_lines() -> None:
    Path("config.toml").write_text('model = "a/b"\nprint_responses = true\n"x\\nmodel = 3 \\u001b" = 1\n')
    text = from_heretic(Path("config.toml"))  # theirs has the name that ours has
    assert 'model = "a/b"' in text and "# print_responses" in text and "\x1b" not in text and "\nmodel = 3" not in text


def test_every_name_of_ours_exists() -> None:
    known = set(all_keys())
    assert {t.ours for t in TABLE.values() if t.ours} <= known
    assert {f"prompts.{role}.{key}" for role in PROMPT_SETS.values() for key in PROMPT_KEYS.values()} <= known
