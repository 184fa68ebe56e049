"""The user's own table of devices, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from heretic.errors import UserError
from heretic.model.meta_model import meta_model
from heretic.pipeline.prepare import prepare_run, run_preflight
from heretic.planning.device_table import explicit
from heretic.planning.placement import shares
from heretic.progress import NullReporter
from heretic.settings.sources import resolve
from tests.helpers.shapes import checkpoint_of, cpu, gpus, small

DEVICES = [*gpus(2, 24), cpu(64)]
BLOCKS = 6


def model_of(**sizes: object) -> PreTrainedModel:
    return meta_model(checkpoint_of(small(**sizes)), "bfloat16")


def code_of(table: dict[str, int | str], **sizes: object) -> tuple[str, UserError]:
    with pytest.raises(UserError) as error:
        explicit(model_of(**sizes), table, DEVICES, BLOCKS)
    return error.value.code, error.value


def test_longest_name_decides() -> None:
    model = model_of(tie_word_embeddings=False)
    table = explicit(model, {"model": "cuda:1", "lm_head": "cpu", "model.layers.0": 0}, DEVICES, BLOCKS)
    assert table == {"model": 1, "lm_head": "cpu", "model.layers.0": 0}
    placed = shares(model, table, BLOCKS)
    assert placed[0].blocks == [0] and placed[1].blocks == [1, 2, 3, 4, 5]


def test_device_that_is_not_there_is_named() -> None:
    code, error = code_of({"": "cuda:9"})
    assert code == "device-not-there" and "cuda:9" in error.what and "cuda:1" in (error.fix or "")


def test_module_without_device_is_named() -> None:
    code, error = code_of({"model.layers": 0, "model.embed_tokens": 0, "lm_head": 0})
    assert code == "module-without-device" and "model.norm" in error.what


def test_misspelled_module_is_named_with_the_nearest() -> None:
    code, error = code_of({"": 0, "model.layer.3": 1})
    assert (
        code == "unknown-module" and error.where == "device_map.model.layer.3" and "model.layers.3" in (error.fix or "")
    )


def test_parted_tied_weights_name_both_modules_and_the_key() -> None:
    table: dict[str, int | str] = {"model": 0, "lm_head": 1}
    code, error = code_of(table, tie_word_embeddings=True)
    assert code == "tied-weights-parted" and error.where == "device_map.lm_head"
    assert "model.embed_tokens" in error.what and "lm_head" in error.what and '"lm_head" = 0' in (error.fix or "")
    assert explicit(model_of(tie_word_embeddings=False), table, DEVICES, BLOCKS) == table


def test_tied_head_in_ram_runs_on_the_embedding_s_gpu() -> None:
    table: dict[str, int | str] = {"model": 0, "lm_head": "cpu"}
    assert explicit(model_of(tie_word_embeddings=True), table, DEVICES, BLOCKS) == table


def test_block_spread_within_is_refused() -> None:
    code, error = code_of({"": 0, "model.layers.1.mlp": 1})
    assert code == "block-on-several-devices" and error.where == "device_map.model.layers.1.mlp"
    assert '"model.layers.1" = 0' in (error.fix or "")


def test_part_of_a_block_may_wait_in_ram() -> None:
    table: dict[str, int | str] = {"": 0, "model.layers.1.mlp": "cpu"}
    assert explicit(model_of(), table, DEVICES, BLOCKS) == table


def test_preflight_and_run_keep_the_code(config: Path) -> None:
    config.write_text(
        config.read_text().replace('device_map = "cpu"', 'device_map = {"" = "cpu", "model.layer.0" = "cpu"}')
    )
    settings = resolve(config).settings
    report = run_preflight(settings)
    assert [f.code for f in report.findings if f.level == "failure"] == ["unknown-module"]
    with pytest.raises(UserError) as error:
        prepare_run(settings, force=False, reporter=NullReporter())
    assert error.value.code == "unknown-module"
