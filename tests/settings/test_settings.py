"""Settings: one schema, every source, and nothing silently ignored."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from heretic.errors import SettingsError
from heretic.settings import Settings
from heretic.settings.sources import all_keys, line_numbers, read_toml, resolve, tomllib
from heretic.settings.toml import defaults_text, resolved_text, toml_value
from tests.helpers.errors import raises

ROOT = Path(__file__).parents[2]


def refused(*assignments: str, config: Path | None = None, environment: dict[str, str] | None = None) -> SettingsError:
    with pytest.raises(SettingsError) as error:
        resolve(config, assignments=assignments, environment=environment)
    return error.value


def test_the_shipped_default_file_is_what_the_schema_says() -> None:
    assert (ROOT / "config.default.toml").read_text() == defaults_text(), "rebuild it: heretic config --defaults"
    assert resolve(ROOT / "config.default.toml").settings == Settings()


def test_every_key_is_documented() -> None:
    """What it is, and when to change it and at what cost."""
    text = defaults_text()
    for key in all_keys():
        assert f"\n{key.rpartition('.')[2]} = " in text
    schema = Settings.model_json_schema()
    for table in [schema, *schema["$defs"].values()]:
        for name, entry in table["properties"].items():
            assert "$ref" in entry or (entry.get("description") and entry.get("when")), name


@pytest.mark.parametrize("name", ["config.32b.toml", "src/heretic/pipeline/demo/demo.toml"])
def test_the_shipped_files_load(name: str) -> None:
    resolve(ROOT / name)


def test_option_beats_environment_beats_file_beats_default() -> None:
    file = Path("c.toml")
    file.write_text("seed = 1\nbatch_size = 1\nn_trials = 1\n")
    environment = {"HERETIC_SEED": "2", "HERETIC_BATCH_SIZE": "2", "HERETIC_ABLATION__GEOMETRY": "plain", "HOME": "/"}
    resolved = resolve(file, {"model": "m", "save_to": None}, ["seed=3"], environment)
    settings = resolved.settings
    assert (settings.seed, settings.batch_size, settings.n_trials) == (3, 2, 1)
    assert settings.ablation.geometry == "plain"
    origins = [resolved.origin(k) for k in ("seed", "batch_size", "n_trials", "ablation.geometry", "model", "max_kl")]
    assert origins == [
        "--set seed",
        "HERETIC_BATCH_SIZE",
        "c.toml:3",
        "HERETIC_ABLATION__GEOMETRY",
        "option",
        "default",
    ]


def test_what_is_no_text_and_what_is_too_long_to_show() -> None:
    assert refused("model=\udcff").where == "--set model"
    assert len(str(refused("seed=" + "[" * 50_000))) < 400
    assert refused("prompts=3").where == "--set prompts"


def test_texts_that_would_steer_a_terminal_are_escaped() -> None:
    text = "a\x9bb\x7f\u202e★ü\x1b\x00\n"
    written = toml_value(text)
    assert all(c.isprintable() for c in written) and tomllib.loads(f"v = {written}")["v"] == text


def test_resolved_text_reads_back_as_the_same_settings() -> None:
    odd = [
        'system_prompt=quotes " and \\\\ and \\u00e9',
        'max_memory={0="20GiB"}',
        "search.mlp.max_weight=[0.0,2]",
        'dtypes=["float16"]',
    ]
    resolved = resolve(assignments=odd)
    Path("back.toml").write_text(resolved_text(resolved), encoding="utf-8")
    assert resolve(Path("back.toml")).settings == resolved.settings


def test_unknown_keys_are_refused_with_the_nearest_name() -> None:
    file = Path("c.toml")
    file.write_text('model = "m"\n\n[ablation]\ngeometrie = "plain"\n')
    error = refused(config=file)
    assert (error.code, error.where) == ("unknown-setting", "c.toml:4")
    assert "'ablation.geometrie'" in error.what and "'ablation.geometry'" in str(error.fix)
    assert "'n_trials'" in str(refused("n_trial=3").fix)
    assert refused(environment={"HERETIC_BATCHSIZE": "3"}).where == "HERETIC_BATCHSIZE"
    assert "'ablation.geometry'" in str(refused("geometry=plain").fix), "the right name in the wrong table"


def test_wrong_types_name_file_line_and_key() -> None:
    file = Path("c.toml")
    file.write_text('seed = 0\nbatch_size = "four"\n')
    error = refused(config=file)
    assert (error.code, error.where) == ("invalid-setting", "c.toml:2")
    assert "'batch_size'" in error.what and "'four'" in error.what and "integer" in str(error.fix)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("batch_size=2.5", "batch_size"),
        ("cache_weights=1", "true or false"),
        ("n_trials=0", "greater than or equal to 1"),
        ("ablation.geometry=round", "norm_preserving"),
        ("search.mlp.max_weight=[2,1]", "lower bound"),
        ("search.mlp.max_weight=[1]", "search.mlp.max_weight"),
        ("refusal_markers=[]", "refusal_markers"),
        ("directions.winsorize=2", "winsorize"),
        ("directions.count=3", "`mean_difference` gives one direction per layer"),
        ('dtypes=["fp8"]', "bfloat16"),
    ],
)
def test_wrong_values_are_refused(assignment: str, expected: str) -> None:
    error = refused(assignment)
    key = assignment.partition("=")[0]
    assert error.code == "invalid-setting" and error.where == f"--set {key}" and expected in str(error)


def test_toml_errors_name_the_line() -> None:
    file = Path("c.toml")
    file.write_text('model = "m"\nseed = = 2\n')
    error = refused(config=file)
    assert (error.code, error.where) == ("invalid-toml", "c.toml:2")


def test_missing_file() -> None:
    error = refused(config=Path("nowhere.toml"))
    assert (error.code, error.where) == ("missing-file", "nowhere.toml")


def test_numbers_that_are_texts_stay_texts() -> None:
    assert resolve(assignments=["model=123", "revision=true"]).settings.model == "123"


def test_line_numbers_survive_multi_line_strings_and_quoted_keys() -> None:
    text = 'a = """\nb = 1\n"""\n[t."x y"]\nc.d = 1 # e = 2\n"f" = 2\n'
    assert line_numbers(text) == {"a": 1, "t.x y": 4, "t.x y.c.d": 5, "t.x y.f": 6}


def test_another_part_of_the_default_prompt_set_needs_no_source() -> None:
    found = Settings.model_validate({"prompts": {"harmful_train": {"split": "train[:10]"}}}).prompts.harmful_train
    assert (found.source, found.split) == (Settings().prompts.harmful_train.source, "train[:10]")
    other = Settings.model_validate({"prompts": {"harmful_train": {"source": "mine.txt"}}}).prompts.harmful_train
    assert (other.source, other.split) == ("mine.txt", "train")


@pytest.mark.parametrize(
    "assignment", ["prompts.harmful_eval={split='train'}", "prompts.harmful_eval=foo", "prompts=3"]
)
def test_a_set_that_is_replaced_whole_is_no_traceback(tmp_path: Path, assignment: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[prompts.harmful_eval]\nsource = "theirs"\nsplit = "test[:100]"\n')
    environment = {"HERETIC_PROMPTS__HARMFUL_EVAL__SOURCE": "x.txt"}
    with contextlib.suppress(SettingsError):
        resolve(file, {}, [assignment], environment)


@pytest.mark.parametrize("assignments, options, split", [
    (["prompts.harmful_eval.source=mine.txt"], {}, "train"),
    ([], {"prompts": {"harmful_eval": {"source": "mine.txt"}}}, "train"),
    (["prompts.harmful_eval.source=mine.txt", "prompts.harmful_eval.split=test[:9]"], {}, "test[:9]"),
    (["prompts.harmful_eval.source=theirs"], {}, "test[:100]"),
    (["prompts.harmful_eval.column=other"], {}, "test[:100]"),
])  # fmt: skip
def test_a_split_belongs_to_the_source_that_it_was_written_for(
    tmp_path: Path, assignments: list[str], options: dict[str, Any], split: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[prompts.harmful_eval]\nsource = "theirs"\nsplit = "test[:100]"\n')
    resolved = resolve(file, options, assignments)
    assert resolved.settings.prompts.harmful_eval.split == split
    assert resolved.origin("prompts.harmful_eval.split").startswith(
        {"test[:100]": str(file), "test[:9]": "--set", "train": "default"}[split]
    )


def code_of(text: bytes | str, key: str = "") -> tuple[str, str | None]:
    """The error's code and place for a settings file, or for the value of `key` in a file, the environment and --set alike."""
    if key:
        assert isinstance(text, str)
        for assignments, environment in (([f"{key}={text}"], {}), ([], {f"HERETIC_{key.upper()}": text})):
            with pytest.raises(SettingsError):
                resolve(None, {}, assignments, environment)
        text = f"{key} = {text}\n"
    Path("c.toml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SettingsError) as error:
        resolve(Path("c.toml"))
    assert len(str(error.value)) < 1000
    return error.value.code, error.value.where


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_settings_are_read_with_a_byte_order_mark(end: bytes) -> None:
    Path("c.toml").write_bytes(b"\xef\xbb\xbf" + end.join([b"seed = 3", b'model = "\xc3\xa4"', b""]))
    settings = resolve(Path("c.toml")).settings
    assert (settings.seed, settings.model) == (3, "ä")


def test_settings_in_another_encoding_name_the_line() -> None:
    assert code_of("seed = 3\n".encode("utf-16")) == ("file-encoding", "c.toml:1")
    assert code_of(b'seed = 3\nmodel = "\xe4"\n') == ("file-encoding", "c.toml:2")


def test_line_separators_in_values_do_not_move_the_lines() -> None:
    assert code_of('model = "a\u2028b\x85"\nseed = "x"\n') == ("invalid-setting", "c.toml:2")


@pytest.mark.parametrize("value", [
    "1" + "0" * 4999, "0x" + "f" * 5000, "9223372036854775808", "nan", "inf", "1e999", "1979-05-27", "[" * 300 + "]" * 300,
    '"\\u0000"',
])  # fmt: skip
@pytest.mark.parametrize("key", ["seed", "max_kl", "refusal_markers"])
def test_values_that_no_setting_can_be_are_refused_from_every_source(key: str, value: str) -> None:
    assert code_of(value, key)[1] in ("c.toml:1", "c.toml")


@pytest.mark.parametrize("bounds", ["[nan, nan]", "[0, inf]"])
def test_bounds_are_finite(bounds: str) -> None:
    assert refused(f"search.mlp.max_weight={bounds}").where == "--set search.mlp.max_weight"


@pytest.mark.parametrize(
    "key", ["judge.llm.timeout", "workers.heartbeat", "workers.grace_period", "workers.retry_timeout"]
)
def test_durations_fit_the_clock(key: str) -> None:
    assert refused(f"{key}={2**62}").where == f"--set {key}"


@pytest.mark.parametrize("value", ['"a\\u0000b"', '["\\u0000"]', '{a = "\\u0000"}', '["a\udcff"]'])
def test_texts_inside_values_are_checked_too(value: str) -> None:
    refused(f"refusal_markers={value}")


@pytest.mark.parametrize(
    "text",
    [".".join(["a"] * 20_000) + " = 1", "[" + " . ".join(['"b,"'] * 20_000) + "]", "x = {" + "a." * 20_000 + "a = 1}"],
)
def test_keys_of_very_many_parts_are_refused_at_once(text: str) -> None:
    assert code_of(f"seed = 1\n{text}\n") == ("invalid-toml", "c.toml:2")
    refused(f"max_memory={{{text.strip('[]')} = 1}}")
    refused(f"{text}=1")


def test_a_settings_file_that_is_no_regular_file_is_refused() -> None:
    os.mkfifo("pipe.toml")
    Path("large.toml").write_text("#" * (1 << 21))
    for name, code in (("pipe.toml", "not-a-regular-file"), ("/dev/zero", "not-a-regular-file"), (".", "not-a-regular-file"),
                       ("large.toml", "file-too-large")):  # fmt: skip
        with pytest.raises(SettingsError) as error:
            resolve(Path(name))
        assert error.value.code == code


def test_a_home_folder_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown-user-of-heretic" in refused("runs_dir=~unknown-user-of-heretic/runs").what
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    assert code_of('"~/out"', "save_to") == ("invalid-setting", "c.toml:1")
    assert resolve(assignments=["save_to=./~/out"]).settings.save_to == "./~/out"


def test_entries_of_maps_can_be_set_from_every_source() -> None:
    Path("c.toml").write_text("[constraints]\nkl = 3\nown_answer_kl.p95 = 0.5\n[scorers.copying]\ntasks = 7\n", "utf-8")
    found = resolve(
        Path("c.toml"), assignments=["constraints.kl.p95=2", "scorers.copying.seed=1"],
        environment={"HERETIC_CONSTRAINTS__UNCHANGED": "0.5"},
    )  # fmt: skip
    assert found.settings.constraints == {"kl": 3, "own_answer_kl.p95": 0.5, "unchanged": 0.5, "kl.p95": 2}
    assert found.settings.scorers == {"copying": {"tasks": 7, "seed": 1}}
    Path("again.toml").write_text(resolved_text(found), "utf-8")
    assert resolve(Path("again.toml")).settings == found.settings
    assert read_toml(Path("c.toml")).values["scorers"] == {"copying": {"tasks": 7}}
    with raises("invalid-setting", SettingsError):
        resolve(Path("c.toml"), assignments=["constraints.kl=many"])
    with raises("invalid-setting", SettingsError):
        resolve(None, {"constraints": 3}, ["constraints.kl=3"])


def test_limits_of_earlier_versions_are_read() -> None:
    old = {"max_over_refusals": -1, "max_degenerate": 4}
    assert Settings.model_validate({"constraints": old}).constraints == {"degenerate": 4}


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "continue_final_message", "a b", ""])
def test_variables_of_the_template_cannot_have_the_names_of_the_renderers(name: str) -> None:
    assert Settings(model="m", template_variables={"enable_thinking": True}).template_variables == {
        "enable_thinking": True
    }
    with pytest.raises(ValueError):
        Settings(model="m", template_variables={name: True})


def test_an_empty_variable_is_not_set_unless_the_setting_is_a_text() -> None:
    environment = {
        "HERETIC_BATCH_SIZE": "",
        "HERETIC_SEED": "",
        "HERETIC_SYSTEM_PROMPT": "",
        "HERETIC_SEARCH__START": "",
    }
    found = resolve(None, {"seed": None}, environment=environment)
    assert found.settings.batch_size == Settings().batch_size and found.origin("seed") == "default"
    assert found.origin("system_prompt") == "HERETIC_SYSTEM_PROMPT"
    with raises("unknown-setting"):
        resolve(None, environment={"HERETIC_SEDE": ""})
