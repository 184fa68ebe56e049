"""Everything a user can get wrong ends in one to three lines, the right exit status, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic.errors import BusyError, StudyMismatch
from heretic.hardware.locks import acquire_locks, device_locks
from heretic.runs.status import read_status
from heretic.settings.sources import read_toml
from tests.helpers.command import Ran, heretic
from tests.tiny import save_tiny

Command = Callable[..., Ran]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def call(*arguments: str, status: int) -> Ran:
        ran = heretic(capsys, monkeypatch, *arguments)
        assert ran.status == status, ran
        return ran

    return call


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_missing_config(command: Command) -> None:
    ran = command("--config", "nowhere.toml", status=1)
    assert ran.code == "missing-file" and "nowhere.toml" in ran.err


def test_toml_syntax_error(command: Command) -> None:
    Path("config.toml").write_text('model = "x"\n[search\n')
    ran = command("run", status=1)
    assert ran.code == "invalid-toml" and "config.toml:2" in ran.err


def test_unknown_key_and_wrong_type(command: Command, config: Path) -> None:
    ran = command("run", "--set", "batchsize=2", status=1)
    assert ran.code == "unknown-setting" and "'batch_size'" in ran.err
    config.write_text(config.read_text().replace("batch_size = 4", 'batch_size = "4"'))
    ran = command("run", status=1)
    assert ran.code == "invalid-setting" and "config.toml:4" in ran.err and "'batch_size'" in ran.err
    ran = command("run", "--trials", "0", status=1)
    assert ran.code == "invalid-setting" and "'n_trials'" in ran.err


def test_model_folder_without_config(command: Command, config: Path) -> None:
    Path("empty").mkdir()
    assert command("run", "./empty", status=1).code == "no-config"
    assert command("run", "./not-there", status=1).code == "no-model-folder"


def test_model_that_is_no_decoder(command: Command, config: Path, copy: Path) -> None:
    data = json.loads((copy / "config.json").read_text()) | {"architectures": ["LlamaForTokenClassification"]}
    (copy / "config.json").write_text(json.dumps(data))
    assert command("run", str(copy), status=1).code == "not-a-causal-model"


def test_empty_prompt_file_and_split_out_of_range(command: Command, config: Path) -> None:
    Path("empty.txt").write_text("\n")
    assert command("run", "--set", "prompts.harmful_eval.source=empty.txt", status=1).code == "no-prompts"
    ran = command("run", "--set", "prompts.harmful_eval.split=train[:99]", status=1)
    assert ran.code == "split-out-of-range" and "prompts.harmful_eval" in ran.err and "[:8]" in ran.err


def test_overlapping_prompts_are_counted(command: Command, config: Path, prompt_files: dict[str, Path]) -> None:
    ran = command(
        "run", "--trials", "1", "--set", f"prompts.harmful_eval.source={prompt_files['harmful_train']}", status=0
    )
    assert "16 of 16 prompts in prompts.harmful_eval are also in prompts.harmful_train" in ran.out


def test_prompt_longer_than_the_context(command: Command, config: Path) -> None:
    Path("long.txt").write_text("tell me about " * 200 + "\nmake soup\n")
    ran = command("run", "--set", "prompts.harmful_eval.source=long.txt", status=1)
    assert ran.code == "prompt-too-long" and "harmful_eval" in ran.err and "256" in ran.err
    assert "prompts.harmful_eval" in command("preflight", "--set", "prompts.harmful_eval.source=long.txt", status=1).out


def test_harmless_prompt_whose_answer_exceeds_the_context(command: Command, config: Path) -> None:
    Path("long.txt").write_text("tell me about " * 78 + "\nmake soup\n")
    asked = ("--set", "prompts.harmless_eval.source=long.txt", "--set", "max_response_length=40")
    told = command("preflight", *asked, status=1)
    assert "prompts.harmless_eval" in told.out and "With 40 for the answer" in told.out


def test_study_of_other_settings_under_the_same_name(command: Command, config: Path) -> None:
    command("run", "--run-name", "mine", "--trials", "1", status=0)
    ran = command("run", "--run-name", "mine", "--set", "seed=5", status=StudyMismatch.exit_status)
    assert ran.code == "study-mismatch" and "seed: was 0, now 5" in ran.err and "--fresh" in ran.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_runs_folder_that_cannot_be_written(command: Command, config: Path) -> None:
    Path("runs").mkdir(mode=0o500)
    assert command("run", status=1).code == "run-folder-unwritable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_runs_folder_that_cannot_be_read(command: Command) -> None:
    Path("runs").mkdir(mode=0o300)
    assert command("status", status=1).code == "unreadable-file"


def test_storage_that_cannot_be_opened(command: Command, config: Path) -> None:
    ran = command("run", "--storage", "sqlite:////proc/nowhere/study.db", status=1)
    assert ran.code == "run-folder-unwritable" and "preflight: storage" in ran.err
    Path("file").touch()
    assert command("run", "--set", "runs_dir=file/runs", status=1).code == "run-folder-unwritable"


def test_damaged_study_is_kept_and_named(command: Command, config: Path) -> None:
    command("run", "--run-name", "mine", "--trials", "1", status=0)
    Path("runs/mine/study.db").write_bytes(b"this is not a database at all, not even nearly")
    ran = command("run", "--run-name", "mine", status=1)
    assert ran.code == "storage-unavailable" and "--fresh" in ran.err
    command("run", "--run-name", "mine", "--trials", "1", "--fresh", status=0)


def test_disk_full_while_saving(command: Command, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("heretic.export.save.stream_edited", full)
        ran = command("run", "--save-to", "out", status=1)
    assert ran.code == "disk" and "No space left on device" in ran.err
    assert not Path("out").exists() and not list(Path().glob(".out*"))
    assert "written to" in command("run", "--save-to", "out", status=0).out, (
        "the study was complete, only the export is done again"
    )


def test_a_device_that_this_process_holds(command: Command, config: Path) -> None:
    with acquire_locks(device_locks([]), model="another/model"):
        ran = command("run", status=BusyError.exit_status)
    assert ran.code == "busy" and f"process {os.getpid()}" in ran.err
    assert "another/model" in ran.err and "session.close()" in ran.err


def test_gpu_that_is_not_there(command: Command, config: Path) -> None:
    ran = command("run", "--set", "device_map=cuda:3", status=1)
    assert ran.code == "device-not-there" and "cuda:3" in ran.err and "device_map" in ran.err


def test_logits_that_are_not_numbers(command: Command, config: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    ran = command("run", str(copy), status=1)
    assert ran.code == "logits-not-finite" and "float32" in ran.err


def test_tokenizer_without_chat_template(command: Command, config: Path, copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    assert command("run", str(copy), status=1).code == "no-chat-template"
    Path("t.jinja").write_text(template)
    command("run", str(copy), "--trials", "1", "--set", "chat_template=t.jinja", status=0)


def test_prompts_that_do_not_differ(command: Command, config: Path, prompt_files: dict[str, Path]) -> None:
    same = f"prompts.harmless_train.source={prompt_files['harmful_train']}"
    command("run", "--set", same, status=1)


def test_export_of_what_is_not_there(command: Command, config: Path) -> None:
    assert command("export", "nothing", "-o", "x", status=1).code == "run-not-found"
    command("run", "--run-name", "mine", "--trials", "2", status=0)
    assert command("export", "mine", "--trial", "7", "-o", "x", status=1).code == "trial-not-found"


def test_status_without_runs(command: Command) -> None:
    assert command("status", status=1).code == "run-not-found"


def test_a_password_in_the_storage_url_is_never_shown(command: Command, config: Path) -> None:
    ran = command("run", "--storage", "postgresql://me:hunter2@127.0.0.1:1/x", status=1)
    assert "hunter2" not in ran.err + ran.out
    assert "hunter2" not in "".join(p.read_text(errors="replace") for p in Path().rglob("*") if p.is_file())


def test_study_is_readable_after_everything(command: Command, config: Path) -> None:
    command("run", "--run-name", "mine", "--trials", "1", status=0)
    with sqlite3.connect("runs/mine/study.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_run_in_a_folder_with_a_strange_name_stays_there(command: Command, config: Path) -> None:
    command("run", "--run-name", "q4", "--trials", "1", status=0)
    command("run", "--run-name", "q%34", "--trials", "1", status=0)
    command("run", "--run-name", "{x}", "--trials", "1", status=0)
    for name in ("q4", "q%34", "{x}"):
        assert read_status(name, "runs", {}).summary.n_complete == 1 and Path("runs", name, "study.db").is_file()


def test_a_run_is_used_from_any_folder_and_after_a_move(
    command: Command, config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path("project").resolve()
    shutil.copytree(llama, project / "m")
    text = config.read_text().replace(f'model = "{llama}"', 'model = "m"\nsave_to = "out"')
    for line in text.splitlines():
        if line.startswith("source"):
            name = Path(line.split('"')[1]).name
            shutil.copy(line.split('"')[1], project / name)
            text = text.replace(line, f'source = "{name}"')
    (project / "config.toml").write_text(text)
    config.unlink()
    monkeypatch.chdir(project)
    command("run", "--run-name", "mine", "--trials", "1", status=0)
    kept = read_toml(project / "runs/mine/config.toml").values
    asked = ("--trials", "0", "--prompts", "make soup")
    # 1. From elsewhere, also after a move
    monkeypatch.chdir(project.parent)
    command("compare", str(project / "runs/mine"), *asked, status=0)
    moved = project.rename(project.with_name("moved"))
    command("run", "moved/runs/mine", "--trials", "2", status=0)
    assert read_status("moved/runs/mine", "runs", {}).summary.n_complete == 2 and not Path("out").exists()
    assert read_toml(moved / "runs/mine/config.toml").values == {**kept, "n_trials": 2}
    # 2. A copy has its own export
    shutil.copytree(moved, "copy")
    shutil.rmtree("copy/out")
    monkeypatch.chdir("copy")
    command("run", "mine", "--trials", "3", status=0)
    assert Path("out/manifest.json").is_file() and '"moved' not in Path("out/manifest.json").read_text()
    # 3. What is named from elsewhere means the same later
    Path("else").mkdir()
    monkeypatch.chdir("else")
    command("run", "../runs/mine", "--trials", "4", "--save-to", "own", status=0)
    monkeypatch.chdir("..")
    command("run", "mine", "--trials", "5", status=0)
    assert read_toml(Path("runs/mine/config.toml")).values["save_to"] == str(Path("else/own").resolve())
    # 4. Without the model, the new folder is named
    Path("m").rename("n")
    assert command("compare", "mine", *asked, status=1).code == "no-model-folder"
    command("compare", "mine", *asked, "--set", "model=n", status=0)


def test_a_finished_run_needs_its_prompt_files_no_more(
    command: Command, config: Path, prompt_files: dict[str, Path]
) -> None:
    text = config.read_text()
    for role, file in prompt_files.items():
        text = text.replace(str(file), str(shutil.copy(file, f"my_{role}.txt")))
    config.write_text(text)
    command("run", "--run-name", "mine", "--trials", "1", status=0)
    # 1. A changed and a missing file
    Path("my_harmful_eval.txt").write_text("bake bread\n")
    Path("my_harmless_train.txt").unlink()
    command("export", "mine", "-o", "out", status=0)
    command("compare", "mine", "--trials", "0", "--prompts", "make soup", status=0)
    command("run", "mine", "--trials", "2", status=0)
    # 2. A setting for this command reads them, and so does a run by its config file
    assert command("run", "--run-name", "mine", "--trials", "3", status=1).code == "missing-file"
    asked = ("compare", "mine", "--trials", "0", "--prompts", "make soup")
    assert command(*asked, "--set", "prompts.harmless_train.source=no.txt", status=1).code == "missing-file"
    # 3. Without the copy they are read again
    Path("runs/mine/prompts.json").write_text("{")
    assert command(*asked, status=1).code == "missing-file"


def test_an_adapter_of_fused_experts_is_refused_before_the_study(command: Command, config: Path) -> None:
    model = str(save_tiny(Path("mixture"), "mixtral"))
    asked = ("--set", f"model={model}", "--set", "export_format=lora", "--save-to", "out")
    ran = command("run", *asked, status=1)
    assert "LoRA" in ran.err and not Path("runs").exists()
    command("evaluate", model, "--set", "export_format=lora", status=0)  # which exports nothing


def test_limits_without_effect_are_named(command: Command, config: Path) -> None:
    ran = command("preflight", "--set", 'max_memory={cpu="100MiB"}', status=2)
    assert "max_memory" in ran.out


def test_a_destination_below_a_file_is_refused_at_once(command: Command, config: Path) -> None:
    command("run", "--run-name", "mine", "--trials", "1", status=0)
    ran = command("export", "mine", "-o", "config.toml/x", status=1)
    assert ran.code == "destination-not-writable" and "Loading" not in ran.out
    assert '.-2"' not in command("preflight", "--set", "save_to=.", status=1).out


def test_a_run_in_an_absolute_folder_is_used_from_any_folder(
    command: Command, config: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("m").symlink_to(llama)
    config.write_text(config.read_text().replace(f'model = "{llama}"', 'model = "m"'))
    runs = Path("far").resolve()
    command("run", "--run-name", "mine", "--trials", "1", "--set", f"runs_dir={runs}", status=0)
    Path("else").mkdir()
    monkeypatch.chdir("else")
    command("compare", str(runs / "mine"), "--trials", "0", "--prompts", "make soup", status=0)


def test_a_limit_that_leaves_no_room_is_a_failure_of_the_preflight(command: Command, config: Path) -> None:
    asked = ("--devices", "1x24GiB", "--set", "device_map=planned", "--set", 'max_memory={0="1KiB"}')
    ran = command("preflight", *asked, status=1)
    assert "weights" in ran.out and "max_memory = {}" in ran.out
    assert "no effect" not in ran.out and "The settings put the model on the CPU" not in ran.out
