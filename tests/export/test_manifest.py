"""What a manifest and a card say, and the study that a manifest's settings make again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from heretic._version import __version__
from heretic.export.card import share
from heretic.export.manifest import read_exported_files, read_manifest, settings_of
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.command import heretic
from tests.helpers.errors import raises

CARD = """---
license: other
license_name: tiny-terms
license_link: https://example.org/terms
tags:
- chat
---
"""


def test_the_same_study_from_a_manifest(
    config: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    (base / "README.md").write_text(CARD)
    first = run(
        resolve(config, {"model": str(base), "save_to": "out", "n_trials": 3}, ["seed=5"]),
        reporter=NULL_REPORTER,
        stop=StopSignal(),
    )
    card = Path("out/README.md").read_text()
    head = metadata_load("out/README.md") or {}
    assert (head["license"], head["license_name"], head["license_link"]) == (
        "other", "tiny-terms", "https://example.org/terms",
    )  # fmt: skip
    assert "[tiny-terms](https://example.org/terms)" in card and "chat" not in head["tags"]
    assert first.original_refusals is not None and first.export is not None
    assert (
        f"| requests refused | {share(first.original_refusals, 8)} | {share(first.export.verification.scores.refusals, 8)} |"
        in card
    )
    assert "heretic reproduce manifest.json -o FOLDER" in card and str(tmp_path) not in card
    config.unlink()
    monkeypatch.setattr("sys.argv", ["heretic", "config", "--from-manifest", "out/manifest.json"])
    with pytest.raises(SystemExit):
        from heretic.cli import main as cli

        cli.main()
    Path("again.toml").write_text(capsys.readouterr().out)
    options = {"n_trials": 3, "run_name": "again", "batch_size": 4, "device_map": "cpu", "early_stopping": False}
    second = run(resolve(Path("again.toml"), options), reporter=NULL_REPORTER, stop=StopSignal())
    assert [(r.params, r.point) for r in second.results] == [(r.params, r.point) for r in first.results]


def test_settings_of_a_manifest_from_anywhere(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(resolve(config, {"save_to": "out", "n_trials": 1}), reporter=NULL_REPORTER, stop=StopSignal())
    file = Path("out/manifest.json")
    manifest = json.loads(file.read_text())
    manifest["settings"]["trust_remote_code"] = [manifest["model"]["name"]]
    file.write_text(json.dumps(manifest))
    assert settings_of(file).settings.trust_remote_code == []
    manifest["settings"]["of_later"] = 1
    file.write_text(json.dumps(manifest))
    with raises("unknown-setting") as error:
        settings_of(file)
    assert "of_later" in error.value.what and error.value.where == str(file)
    said = heretic(capsys, monkeypatch, "config", "--from-manifest", "out/manifest.json")
    assert said.status == 1 and "[unknown-setting]" in said.err and "of_later" in said.err


LATER: dict[str, dict[str, Any]] = {
    "geometry": {"settings": {"ablation": {"geometry": "of_later"}}},
    "dtype": {"dtype": "float8"},
    "type of a GGUF file": {"written": {"type": "q1_0"}},
}


@pytest.mark.parametrize("version", ["99.1.0", __version__])
def test_a_manifest_of_another_version_names_it(config: Path, version: str) -> None:
    run(resolve(config, {"save_to": "out", "n_trials": 1}), reporter=NULL_REPORTER, stop=StopSignal())
    file = Path("out/manifest.json")
    manifest = json.loads(file.read_text()) | {"versions": {"heretic": version}}
    for later in LATER.values():
        file.write_text(json.dumps(_updated(manifest, later)))
        with raises("invalid-manifest" if version == __version__ else "manifest-version") as error:
            read_manifest(file)
        assert (version in str(error.value.fix)) == (version != __version__)
        assert read_exported_files(file).files == manifest["files"]
    file.write_text(json.dumps(_updated(manifest, {"settings": {"of_later": 1, "ablation": {"of_later": 1}}})))
    assert read_manifest(file)[0].settings.ablation.geometry == manifest["settings"]["ablation"]["geometry"]
    with raises("unknown-setting") as error:
        settings_of(file)
    assert (version in str(error.value.fix)) == (version != __version__)


def test_a_version_that_is_none_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    for version in ("9 [x](https://evil.example)", "9" * 1000, "9\n", ["9"], None):
        file.write_text(json.dumps({"made_with": "heretic", "versions": {"heretic": version}}))
        with raises("invalid-manifest"):
            read_manifest(file)


def _updated(data: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables with other values in them."""
    return data | {k: _updated(data[k], v) if isinstance(v, dict) else v for k, v in update.items()}


def test_shares_in_words() -> None:
    assert share(7, 50) == "7 of 50 (14 %; 7 % to 26 %)"
    assert share(0, 0) == "0 of 0"
