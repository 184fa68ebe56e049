"""Settings as TOML with their documentation."""

from __future__ import annotations

from heretic.settings.sources import read_toml, resolve
from heretic.settings.toml import commented_text, explanation
from tests.helpers.errors import raises


def test_an_explanation_names_value_and_origin() -> None:
    text = explanation("search.gradient.steps", resolve(assignments=["search.gradient.steps=9"]))
    assert text.splitlines()[-1] == "search.gradient.steps = 9  # --set search.gradient.steps"
    assert "# Default: 6" in text and text.startswith("# ")


def test_a_table_is_explained_with_all_its_settings() -> None:
    text = explanation("workers", resolve())
    assert "[workers]" in text and "heartbeat = " in text and "grace_period = " in text


def test_an_entry_of_a_map_is_explained_by_the_whole_map() -> None:
    assert (
        explanation("constraints.kl", resolve(assignments=["constraints.kl=0.5"]))
        .splitlines()[-1]
        .startswith("constraints = ")
    )


def test_an_unknown_setting_is_an_error_that_names_the_nearest() -> None:
    with raises("unknown-setting") as error:
        explanation("search.gradient.step", resolve())
    assert "search.gradient.steps" in str(error.value.fix)


def test_commented_settings_read_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "config.toml"
    path.write_text(commented_text({"model": 'a "b"/c', "n_trials": 7}), encoding="utf-8")
    assert read_toml(path).values == {"model": 'a "b"/c', "n_trials": 7}
